"""Files that ship with the project."""

import pathlib

from model.training.held_out import load_held_out

_FOLDER = pathlib.Path(__file__).parent.parent / "assets"

DEMO_MODEL = _FOLDER / "demo_model"
"""A small language model as an HF folder, with its held-out text and its score; made by `train_lm`."""

DEMO_TRACE = _FOLDER / "demo_trace.jsonl"
"""A workload in Mooncake's format; made by `make_trace`."""


def demo_text() -> str:
    """The held-out text of the model that ships: what it has never seen."""
    stored = load_held_out(DEMO_MODEL)
    if stored is None:
        raise FileNotFoundError(f"{DEMO_MODEL} has lost its held-out text; check the project out again.")
    return "\n\n".join(entry for document in stored[0] for entry in document.entries)
