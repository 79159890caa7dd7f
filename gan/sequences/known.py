"""Best known values, to tell a new record from a rediscovery. `known_sir.json` says where each comes from."""

import dataclasses
import functools
import json
import pathlib
from typing import Literal

Status = Literal["optimal", "best_known", "best_known_and_skew_optimal", "single_run"]


@dataclasses.dataclass(frozen=True)
class KnownSir:
    """The largest SIR known at one length, to three decimals, and how far it is known to be the largest."""

    length: int
    sir: float
    status: Status


@functools.cache
def known_sir() -> dict[int, KnownSir]:
    """By length."""
    table = json.loads(pathlib.Path(__file__).with_name("known_sir.json").read_text())
    return {row["length"]: KnownSir(**row) for row in table["values"]}


def is_record(length: int, sir: float) -> bool:
    """Whether an SIR exceeds the table at its length by more than its rounding; False where the table has no value."""
    known = known_sir().get(length)
    return known is not None and sir > known.sir + 5e-4
