"""KV pages on their way from HBM to VMEM: double-buffered, a block of pages ahead of the arithmetic."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.kernels import target
from model.kernels.paged_attention.merge import merge
from model.kernels.paged_attention.problem import Pools, Problem


class Span(NamedTuple):
    """Pages `[first, end)` of a row's table; int32 scalars. May be empty."""

    row: Any
    first: Any
    end: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageStream:
    """The pages of one span after the other, in blocks of `block_pages`; the next one is in flight during the work.

    Whole pages move, each in one contiguous copy per pool, and only those inside the span. `heads` says which KV heads
    of a page this core reads. The refs: `table` int32 `[rows * max_pages]` in SMEM; `pools` `[pages, kv_heads,
    page_size, head_dim]` in HBM: k and v, and where there are scales those as `lanes_of` gives them; `buffers`
    `[2, block_pages, ...]` in VMEM, one for each pool, of this core's heads; `arrived`, a semaphore for each half of
    the buffers; `turn` int32 `[1]` in SMEM, which half comes next.
    """

    problem: Problem
    block_pages: int
    heads: int
    first_head: Any
    table: Any
    pools: tuple[Any, ...]
    buffers: tuple[Any, ...]
    arrived: Any
    turn: Any

    @property
    def block_tokens(self) -> int:
        """Keys in a block."""
        return self.block_pages * page_tokens(self.problem)

    def walk(
        self, here: Span, following: Span, is_first: jax.Array, is_last: jax.Array, visit: Callable, state: Any
    ) -> Any:
        """Folds `visit(slot, first_key, state) -> state` over the blocks of `here`; an empty span has one empty block.

        Grid steps that follow each other pass what comes after `here` as `following`, so that its first block is
        on its way already; the first step has nobody who did that, and the last one nothing to ask for.
        """

        @pl.when(is_first)
        def _():
            self.turn[0] = 0
            self._each_copy("start", 0, here, 0)

        turn = self.turn[0]
        blocks = jnp.maximum((here.end - here.first + self.block_pages - 1) // self.block_pages, 1)

        def step(block, state):
            slot = (turn + block) % 2

            @pl.when(block + 1 < blocks)
            def _():
                self._each_copy("start", 1 - slot, here, block + 1)

            @pl.when((block + 1 == blocks) & jnp.logical_not(is_last))
            def _():
                self._each_copy("start", 1 - slot, following, 0)

            self._each_copy("wait", slot, here, block)
            return visit(slot, (here.first + block * self.block_pages) * page_tokens(self.problem), state)

        state = lax.fori_loop(0, blocks, step, state)
        self.turn[0] = (turn + blocks) % 2
        return state

    def _each_copy(self, method: str, slot, span: Span, block) -> None:
        """Starts the copies of a block into half `slot` of the buffers, or waits for them."""
        first = span.first + block * self.block_pages
        heads = pl.ds(self.first_head, self.heads)
        scale_rows = slice(None)
        if self.problem.quantized and self._scales_are_split:
            scale_rows = pl.ds(self.first_head * self.problem.page_size // LANES, self.buffers[2].shape[2])
        parts = (heads, heads, scale_rows, scale_rows)[: len(self.pools)]

        def one_page(index, _):
            page = self.table[span.row * self.problem.max_pages + first + index]
            for pool, part, buffer in zip(self.pools, parts, self.buffers, strict=True):
                copy = pltpu.make_async_copy(pool.at[page, part], buffer.at[slot, index], self.arrived.at[slot])
                getattr(copy, method)()
            return _

        lax.fori_loop(0, jnp.minimum(span.end - first, self.block_pages), one_page, 0)

    def keys(self, slot, head, dtype) -> jax.Array:
        """Keys of one head in a block, `[block_tokens, head_dim]`."""
        return self._tokens(self.buffers[0], slot, head).astype(dtype)

    def values(self, slot, head, valid, dtype) -> jax.Array:
        """Values of one head in a block; zeros from token `valid` of the block on, where anything may have been."""
        v = self._tokens(self.buffers[1], slot, head)
        if jnp.issubdtype(v.dtype, jnp.integer):
            return v.astype(dtype)
        if self.problem.quantized:
            token = lax.broadcasted_iota(jnp.int32, v.shape, 0)
            v = jnp.where(token < valid, v, 0.0)
        return v.astype(dtype)

    def clear_rest(self, slot, valid) -> None:
        """Zeroes what is in VMEM from token `valid` of the block on: the values, as 0 times what is there might be NaN.

        Once, in the last block of a span, and cheaper there than a select in every block; one-byte floats cannot be
        stored on every chip, so `values` has that select for them.
        """
        if self.problem.quantized:
            return
        size = page_tokens(self.problem)
        # The key of a token is multiplied by the queries of the other in its row too, where those are 0.
        cleared = self.buffers[:2] if self.problem.row_tokens > 1 else self.buffers[1:2]

        @pl.when(valid < self.block_tokens)
        def _():
            def one_page(page, _):
                for buffer in cleared:
                    x = buffer[slot, page].astype(jnp.float32)
                    token = page * size + token_of(self.problem, x.shape)
                    buffer[slot, page] = jnp.where(token < valid, x, 0.0).astype(buffer.dtype)
                return _

            lax.fori_loop(jnp.maximum(valid, 0) // size, self.block_pages, one_page, 0)

    def append(self, slot, index, offset, k_row: Any, v_row: Any) -> None:
        """Puts a token's keys and values, refs `[heads, head_dim]`, into a block: at `offset` of its page `index`."""
        start, rows = self._tile_of(offset)
        for row, buffer in ((k_row, self.buffers[0]), (v_row, self.buffers[1])):
            for head in range(self.heads):
                here = (slot, index, head, pl.ds(start, rows))
                tile = buffer[*here].astype(jnp.float32)
                new = row[pl.ds(head, 1), :].astype(jnp.float32)
                token = start * self.problem.row_tokens + token_of(self.problem, tile.shape)
                buffer[*here] = jnp.where(token == offset, new, tile).astype(buffer.dtype)

    def write_back(self, slot, index, page, offset, written: Any) -> list[Any]:
        """Copies to HBM what `append` changed, whole tiles as no less can be; `written` is their semaphore."""
        start, rows = self._tile_of(offset)
        heads = pl.ds(self.first_head, self.heads)
        return [
            pltpu.make_async_copy(
                buffer.at[slot, index, :, pl.ds(start, rows)], pool.at[page, heads, pl.ds(start, rows)], written
            )
            for pool, buffer in zip(self.pools, self.buffers, strict=True)
        ]

    def _tile_of(self, offset) -> tuple[Any, int]:
        """First row of the tile that holds slot `offset` of a page, and how many rows a tile has."""
        rows = tile_rows(self.problem)
        return pl.multiple_of(offset // (rows * self.problem.row_tokens) * rows, rows), rows

    def scales(self, which: int, slot, head) -> jax.Array | None:
        """Scales of one head's keys (0) or values (1) in a block, `[1, block_tokens]`; None where there are none."""
        if not self.problem.quantized:
            return None
        buffer, size = self.buffers[2 + which], self.problem.page_size
        place = (head if self._scales_are_split else self.first_head + head) * size
        row, lane, per_row = place // LANES, place % LANES, max(1, LANES // size)
        chunks = []
        for page in range(0, self.block_pages, per_row):
            here = range(page, min(page + per_row, self.block_pages))
            if per_row == 1:
                chunks += [buffer[slot, page, pl.ds(row + i, 1)] for i in range(size // LANES)]
                continue
            chunk = jnp.zeros((1, LANES), jnp.float32)
            start = lax.broadcasted_iota(jnp.int32, chunk.shape, 1) // size
            for i, each in enumerate(here):
                moved = pltpu.roll(buffer[slot, each, pl.ds(row, 1)], (i * size - lane) % LANES, 1)
                chunk = jnp.where(start == i, moved, chunk)
            chunks.append(chunk[:, : len(here) * size])
        return jnp.concatenate(chunks, axis=1)

    @property
    def _scales_are_split(self) -> bool:
        """Whether the buffers hold the scales of this core's heads alone."""
        return self.buffers[2].shape[2] * LANES == self.heads * self.problem.page_size

    def _tokens(self, buffer, slot, head) -> jax.Array:
        """One head's tokens in a block; one-byte values as float32, whose rows do not pack."""
        tokens = buffer[slot, :, head]
        if self.problem.quantized:
            tokens = tokens.astype(jnp.float32)
        return tokens.reshape(self.block_pages * self.problem.page_size, self.problem.head_dim)


def scratch_shapes(problem: Problem, block_pages: int, heads: int) -> list[Any]:
    """The scratch of a `PageStream`: its buffers, `arrived` and `turn`."""
    page = (2, block_pages, heads, problem.page_size)
    buffers = [pltpu.VMEM((*page, problem.head_dim), problem.kv_dtype)] * 2
    if problem.quantized:
        split = heads * problem.page_size % LANES == 0
        rows = pl.cdiv((heads if split else problem.kv_heads) * problem.page_size, LANES)
        buffers += [pltpu.VMEM((2, block_pages, rows, LANES), jnp.float32)] * 2
    return [*buffers, pltpu.SemaphoreType.DMA((2,)), pltpu.SMEM((1,), jnp.int32)]


def packed(problem: Problem) -> Problem:
    """A problem whose pools keep two tokens in a row, as the kernels see it: rows of 128, each with twice the queries.

    `page_size` counts rows. Of the queries of a KV head the first half sees the tokens of the first lanes only, and the
    second those of the others; `spread` makes them, and `joined` merges what they found.
    """
    rows, lanes = problem.page_size // problem.row_tokens, problem.head_dim * problem.row_tokens
    return dataclasses.replace(problem, page_size=rows, head_dim=lanes, q_heads=problem.q_heads * problem.row_tokens)


def spread(problem: Problem, q: jax.Array) -> jax.Array:
    """Queries `[tokens, q_heads, head_dim]` of a packed problem's original as `[tokens, 2 q_heads, 2 head_dim]`."""
    q = q.reshape(q.shape[0], problem.kv_heads, problem.group, problem.head_dim)
    first, second = (jnp.pad(q, ((0, 0), (0, 0), (0, 0), pad)) for pad in ((0, q.shape[3]), (q.shape[3], 0)))
    return jnp.stack([first, second], 2).reshape(q.shape[0], 2 * problem.q_heads, 2 * problem.head_dim)


def joined(problem: Problem, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(out `[tokens, q_heads, head_dim]`, lse `[tokens, q_heads]`) of what spread queries found."""
    shape, size = (out.shape[0], problem.kv_heads, 2, problem.group), problem.head_dim
    out = out.reshape(*shape, 2 * size)
    outs = jnp.stack([out[:, :, 0, :, :size], out[:, :, 1, :, size:]])
    out, lse = merge(outs, jnp.moveaxis(lse.reshape(shape), 2, 0))
    return out.reshape(-1, problem.q_heads, size), lse.reshape(-1, problem.q_heads)


def page_tokens(problem: Problem) -> int:
    """Tokens of a page."""
    return problem.page_size * problem.row_tokens


def token_of(problem: Problem, shape: tuple[int, ...]) -> jax.Array:
    """The token in each element of keys or values `[..., rows, lanes]`, counted from the first row's first."""
    row = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2)
    if problem.row_tokens == 1:
        return row
    lane = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    return row * problem.row_tokens + lane // (shape[-1] // problem.row_tokens)


def key_of(problem: Problem, shape: tuple[int, ...], queries: int) -> jax.Array:
    """The token of each score `[heads * queries, keys]`; spread queries see one token of a row."""
    key = lax.broadcasted_iota(jnp.int32, shape, 1)
    if problem.row_tokens == 1:
        return key
    head = lax.broadcasted_iota(jnp.int32, shape, 0) // queries % problem.group
    return key * problem.row_tokens + head // (problem.group // problem.row_tokens)


def lanes_of(scale: jax.Array) -> jax.Array:
    """Scales `[pages, kv_heads, page_size]` as rows of whole tiles, `[pages, n, 128]`: no lane of a tile is padding.

    A reshape and no copy where they came as `scales_shape` says; else XLA copies them, padded, in every call.
    """
    flat = scale.reshape(scale.shape[0], -1)
    rows = pl.cdiv(flat.shape[1], LANES)
    return jnp.pad(flat, ((0, 0), (0, rows * LANES - flat.shape[1]))).reshape(-1, rows, LANES)


def pools_in_use(pools: Pools) -> tuple[jax.Array, ...]:
    """The arrays that a kernel takes: k, v, and their scales where there are any.

    They stay in HBM: XLA would bring small ones to VMEM whole, for a kernel that reads some of their pages.
    """
    scales = (
        () if pools.k_scale is None or pools.v_scale is None else (lanes_of(pools.k_scale), lanes_of(pools.v_scale))
    )
    arrays = (pools.k, pools.v, *scales)
    if target.platform() == "cpu":
        return arrays
    return tuple(pltpu.with_memory_space_constraint(array, pltpu.HBM) for array in arrays)


def tile_rows(problem: Problem) -> int:
    """Rows in a tile of the pools, 32 bytes of each lane: the least that can be copied."""
    return 32 // problem.kv_dtype.itemsize


def kv_token_bytes(problem: Problem) -> int:
    """Bytes in HBM of one token's keys and values, all heads, with their scales."""
    values = problem.head_dim // problem.row_tokens * problem.kv_dtype.itemsize
    return 2 * problem.kv_heads * (values + (4 if problem.quantized else 0))


def most_keys(problem: Problem, queries: int) -> int:
    """Keys that a block of `queries` of one row reads at most."""
    keys = problem.max_pages * page_tokens(problem)
    if problem.sliding_window is None:
        return keys
    return min(keys, problem.sliding_window + queries - 1 + page_tokens(problem))


def compute_dtype(problem: Problem) -> Any:
    """What the matrix unit multiplies: bfloat16 if the queries are and nothing is lost by it, else float32."""
    narrow = problem.kv_dtype.itemsize <= 2 and problem.q_dtype == jnp.bfloat16
    return jnp.bfloat16 if narrow else jnp.float32


def dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    """`a` `[M, X]` times `b`, contracted over its axis `contract`; float32, exact products."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((1,), (contract,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def cores(problem: Problem) -> int:
    """Cores that share one device (two in a v4 or v5p chip); each takes half of the KV heads, where they divide."""
    count = pltpu.get_tpu_info().num_cores if target.platform() == "tpu" else 1
    return count if problem.kv_heads % count == 0 else 1


def interpret() -> Any:
    """For `pallas_call`: on CPU the kernels run interpreted, with VMEM full of NaN and no read out of bounds."""
    return pltpu.InterpretParams() if target.platform() == "cpu" else False


# Below any score, yet finite: differences of two of them are 0, not NaN.
LOWEST = -1e30
LANES = 128
VMEM_LIMIT = 48 << 20
