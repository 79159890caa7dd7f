"""The held-out documents and the score that a checkpoint carries beside its weights.

The standard library differs between Python versions; a recorded score can be reproduced only on the text that it was
measured on.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from model.training.corpus import Document
from model.training.evaluate import Evaluation

_DOCUMENTS = "held_out.json"
_EVALUATIONS = "evaluation.json"


def save_held_out(
    folder: str | os.PathLike[str],
    documents: Sequence[Document],
    evaluations: Sequence[Evaluation],
    made_by: Mapping[str, Any],
) -> None:
    """Writes the documents, what was measured on them at one or more context lengths, and what made the model."""
    folder = pathlib.Path(folder)
    texts = {document.name: document.entries for document in documents}
    records = {"made_by": dict(made_by), "evaluations": [dataclasses.asdict(evaluation) for evaluation in evaluations]}
    (folder / _DOCUMENTS).write_text(json.dumps(texts, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / _EVALUATIONS).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def load_held_out(folder: str | os.PathLike[str]) -> tuple[list[Document], list[Evaluation]] | None:
    """What `save_held_out` wrote, or None where the folder is of another origin."""
    folder = pathlib.Path(folder)
    if not (folder / _DOCUMENTS).exists():
        return None
    texts = json.loads((folder / _DOCUMENTS).read_text(encoding="utf-8"))
    records = json.loads((folder / _EVALUATIONS).read_text(encoding="utf-8"))
    documents = [Document(name, tuple(entries)) for name, entries in texts.items()]
    return documents, [Evaluation(**record) for record in records["evaluations"]]
