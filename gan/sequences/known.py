"""The largest SIRs known: our own searches' at every length, published ones where there are any.

`known_sir.json` says where each comes from. Beyond exhaustion its values are of this project's own searches: no table
of the SIR of length-N mismatched filters was found in the literature, which has it at N = 59 alone.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Literal

Status = Literal["optimal", "best_known", "best_known_and_skew_optimal", "single_run", "house_best"]


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


@dataclasses.dataclass(frozen=True)
class PublishedSir:
    """An SIR that somebody else has published, and where."""

    length: int
    sir: float
    source: str


PUBLISHED = {
    59: PublishedSir(59, 4 * 10.984034, "arXiv:2012.05645 (HpGAN), abstract: four times Legendre's"),
}
"""By length; AlphaSeq's 33.453 at N = 59 (arXiv:1810.01218) is smaller."""


def record_over(length: int, sir: float) -> PublishedSir | None:
    """The published SIR that is smaller than this one at its length; None where none is published, or none smaller."""
    published = PUBLISHED.get(length)
    return published if published and sir > published.sir + 5e-4 else None
