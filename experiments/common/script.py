"""What every script does around its `main`: `--seed`, `--help`, stray arguments, errors that the user can mend."""

import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

SEED = flags.DEFINE_integer("seed", 0, "Seed of everything that is drawn at random.", lower_bound=0)

# absl turns INFO on where no flag says otherwise, and JAX and Orbax then narrate every step.
flags.FLAGS.verbosity = logging.WARNING

_REQUIRED = re.compile(r"flag --(\w+)=None: Flag --\w+ must have a value other than None\.")


def name() -> str:
    """The name of the script that runs, such as "serve"."""
    return pathlib.Path(sys.argv[0]).stem


def flag_values() -> dict[str, Any]:
    """Every flag of the script that runs, by name, with its value."""
    return {flag.name: flag.value for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])}


def run(main: Callable[..., None], *errors: type[Exception], operands: bool = False) -> None:
    """Parses the flags, calls `main()` and ends the process.

    `--help` lists every flag that a module under `experiments` defines, once the script has imported it. Bad flags,
    `app.UsageError` and `errors` end the process with one sentence on stderr and exit status 1.

    Args:
        main: called without arguments, or with what is no flag where the script takes `operands`.
        *errors: what `main` raises where its input is bad; the message says which value, and what to give instead.
        operands: whether the script takes arguments that are no flags.
    """
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith("experiments."):
            for flag in defined:
                flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)

    def checked(argv: Sequence[str]) -> None:
        if argv[1:] and not operands:
            _refuse(f"Unexpected arguments {' '.join(argv[1:])}: flags begin with --, as in --flag=value.")
        try:
            main(*argv[1:])
        except (app.UsageError, *errors) as error:
            _refuse(str(error))

    app.run(checked, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _refuse(_REQUIRED.sub(r"--\1 is required.", str(error)))
    except SystemExit:
        # absl's --help ends the process with status 1.
        raise SystemExit(0) from None


def _refuse(sentence: str) -> NoReturn:
    raise SystemExit(f"{sentence} (`python -m experiments.{name()} --help` lists the flags.)")
