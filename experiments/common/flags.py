"""Flags that every script has, under one name and one meaning."""

import os
import pathlib

from absl import flags, logging

OUT = flags.DEFINE_string("out", None, "Folder for result.json, plots and timelines; made if it does not exist.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of everything random.", lower_bound=0)

# absl turns INFO on where no flag says otherwise, and JAX and Orbax then narrate every step.
flags.FLAGS.verbosity = logging.WARNING


class _IntegersParser(flags.ArgumentParser[list[int]]):
    syntactic_help = "whole numbers with commas between them"

    def __init__(self, lower_bound: int) -> None:
        super().__init__()
        self._lower_bound = lower_bound

    def parse(self, argument: str | list[int]) -> list[int]:
        try:
            values = [int(text) for text in (argument.split(",") if isinstance(argument, str) else argument)]
        except ValueError as error:
            raise ValueError(f"give {self.syntactic_help}, such as 1,8: {error}") from None
        if not values or min(values) < self._lower_bound:
            raise ValueError(f"give one number or more, none below {self._lower_bound}")
        return values


def define_integers(name: str, default: list[int], text: str, lower_bound: int = 1) -> flags.FlagHolder[list[int]]:
    """A flag that takes several integers, such as --batches=1,8,32; a bad one is told by its name and value."""
    return flags.DEFINE(_IntegersParser(lower_bound), name, default, text)


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
