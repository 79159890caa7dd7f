"""Shapes of a step: a few *buckets* that steps are padded to; after warm-up none is compiled. Knows no JAX."""

import dataclasses
from collections.abc import Sequence as Items

from serving.engine.scheduler import StepPlan
from serving.engine.sequence import Sequence
from serving.engine.types import EngineConfig

_SMALLEST_PREFILL = 32


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """Static shape of a step: R = decode_rows + prefill_rows rows, T = decode_rows + prefill_tokens tokens."""

    decode_rows: int
    prefill_rows: int
    prefill_tokens: int

    @property
    def rows(self) -> int:
        """Rows of the step, decode first."""
        return self.decode_rows + self.prefill_rows

    @property
    def tokens(self) -> int:
        """Tokens of the step, decode first."""
        return self.decode_rows + self.prefill_tokens


def _powers(start: int, end: int) -> list[int]:
    sizes = []
    while start < end:
        sizes.append(start)
        start *= 2
    return [*sizes, end]


def buckets(config: EngineConfig) -> list[Bucket]:
    """Returns every shape that a step of this engine can have, smallest first."""
    if config.deterministic:
        return [Bucket(config.max_batch, 0, 0), Bucket(0, config.max_prefill_rows, config.token_budget)]
    prefill_sizes = _powers(min(_SMALLEST_PREFILL, config.token_budget), config.token_budget)
    decode_only = [Bucket(rows, 0, 0) for rows in _powers(1, config.max_batch)]
    prefill_only = [Bucket(0, config.max_prefill_rows, tokens) for tokens in prefill_sizes]
    mixed = [Bucket(config.max_batch, config.max_prefill_rows, tokens) for tokens in prefill_sizes]
    return decode_only + prefill_only + mixed


def bucket_of(plan: StepPlan, shapes: Items[Bucket]) -> Bucket:
    """Returns the smallest of `shapes` that holds `plan`."""
    decodes, prefills = len(plan.decodes), len(plan.prefills)
    tokens = sum(count for _, count in plan.prefills)
    return min(
        (
            shape
            for shape in shapes
            if shape.decode_rows >= decodes
            and shape.prefill_rows >= prefills
            and shape.prefill_tokens >= tokens
            and (decodes or not shape.decode_rows)
        ),
        key=lambda shape: shape.tokens,
    )


def rows_of(plan: StepPlan, bucket: Bucket) -> list[tuple[int, Sequence, int]]:
    """Returns (row, sequence, tokens) of everything that `plan` computes."""
    decodes = [(row, sequence, 1) for row, sequence in enumerate(plan.decodes)]
    return decodes + [
        (bucket.decode_rows + index, sequence, count) for index, (sequence, count) in enumerate(plan.prefills)
    ]
