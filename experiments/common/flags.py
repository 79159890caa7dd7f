"""Flags that every script has, under one name and one meaning."""

import os
import pathlib

from absl import flags, logging

OUT = flags.DEFINE_string("out", None, "Folder for result.json, plots and timelines; made if it does not exist.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of everything random.", lower_bound=0)

# absl turns INFO on where no flag says otherwise, and JAX and Orbax then narrate every step.
flags.FLAGS.verbosity = logging.WARNING


def out_folder(default: str) -> pathlib.Path:
    """The folder named by `--out`, or `out/<default>`; made, and checked to be writable before a long run starts."""
    folder = pathlib.Path(OUT.value or os.path.join("out", default))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SystemExit(f"`--out={folder}` cannot be written: {error}. Name a folder that can.") from error
    return folder
