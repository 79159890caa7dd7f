"""The arrays of one step: a plan padded to its bucket.

A step computes `decode_rows` rows of one token each, then up to `prefill_tokens` tokens of `prefill_rows` prompt
chunks, as one flat batch of tokens. Padding rows have length 0 and padding tokens have slot -1: they read and write
nothing.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import Array

from kvcache.layout import KVLayout
from serving.engine.buckets import Bucket, rows_of
from serving.engine.scheduler import StepPlan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepInputs:
    """Arrays of one step: T tokens in R rows; P pages per row.

    Attributes:
        tokens: int32 [T].
        positions: int32 [T].
        slots: int32 [T], `page * page_size + offset` within one layer; -1 for padding.
        page_table: int32 [R, P].
        lengths: int32 [R], KV tokens of a row including this step's; 0 for padding.
        prefill_starts: int32 [prefill_rows + 1], borders of the prompt chunks within the prefill tokens.
        last: int32 [R], index into T of each row's last token: its logits choose the next one.
    """

    tokens: Array
    positions: Array
    slots: Array
    page_table: Array
    lengths: Array
    prefill_starts: Array
    last: Array


def step_inputs(plan: StepPlan, bucket: Bucket, layout: KVLayout, max_pages: int) -> StepInputs:
    """Pads `plan` to `bucket`."""
    tokens = np.zeros(bucket.tokens, np.int32)
    positions = np.zeros(bucket.tokens, np.int32)
    slots = np.full(bucket.tokens, -1, np.int32)
    page_table = np.zeros((bucket.rows, max_pages), np.int32)
    lengths = np.zeros(bucket.rows, np.int32)
    prefill_starts = np.zeros(bucket.prefill_rows + 1, np.int32)
    last = np.zeros(bucket.rows, np.int32)
    start = 0
    for row, sequence, count in rows_of(plan, bucket):
        if row == bucket.decode_rows:
            start = bucket.decode_rows
        end, computed = start + count, sequence.computed
        where = np.arange(computed, computed + count, dtype=np.int32)
        tokens[start:end] = sequence.tokens[computed : computed + count]
        positions[start:end] = where
        slots[start:end] = (
            sequence.page_table.row[where // layout.page_size] * layout.page_size + where % layout.page_size
        )
        page_table[row] = sequence.page_table.row
        lengths[row] = computed + count
        last[row] = end - 1
        if row >= bucket.decode_rows:
            prefill_starts[row - bucket.decode_rows + 1 :] = end - bucket.decode_rows
        start = end
    # NumPy until jit takes them: one transfer with the call is cheaper than seven before it.
    arrays: dict[str, Any] = {
        "tokens": tokens,
        "positions": positions,
        "slots": slots,
        "page_table": page_table,
        "lengths": lengths,
        "prefill_starts": prefill_starts,
        "last": last,
    }
    return StepInputs(**arrays)
