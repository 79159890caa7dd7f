"""Fits a workload to a smaller model: every length shrinks by one factor, and equal prefixes stay equal.

The factor is a whole number of tokens per block. A prompt's full blocks become full blocks of the new size, and its
partial last block and its output shrink in proportion, so block ids keep their meaning.
"""

import dataclasses

from serving.replay.errors import ReplayError
from serving.request import TraceRequest
from serving.workload.requests import Trace

# Servers reuse KV in whole pages of a power of two: blocks that end where a page ends lose nothing of their reuse.
_PAGE = 16


def rescale(trace: Trace, block_size: int, max_tokens: int) -> Trace:
    """`trace` with blocks of `block_size` tokens, each request within `max_tokens` tokens of prompt and output.

    A prompt that is still too long loses its end, which leaves the prefixes that it shares as they are; `notes` counts
    such prompts. Raises ReplayError where not even one token of a prompt fits beside an output.
    """
    if block_size < 1:
        raise ReplayError(f"Blocks of {block_size} tokens: a block needs at least one. Choose a larger scale.")
    cut = 0
    requests = []
    for request in trace.requests:
        prompt, output = _lengths(request, trace.block_size, block_size)
        if output >= max_tokens:
            raise ReplayError(
                f"Request {request.id} generates {output} tokens at this scale, and the model takes {max_tokens} of "
                "prompt and output. Choose a smaller scale."
            )
        cut += prompt + output > max_tokens
        prompt = min(prompt, max_tokens - output)
        blocks = request.keys[: -(-prompt // block_size)]
        requests.append(dataclasses.replace(request, input_tokens=prompt, output_tokens=output, keys=blocks))
    notes = [*trace.notes]
    if block_size != trace.block_size:
        notes.append(f"lengths times {block_size / trace.block_size:.3g}: blocks of {block_size} tokens")
    if cut:
        notes.append(f"{cut} prompts cut to {max_tokens} tokens less their output")
    return Trace(trace.name, tuple(requests), block_size, tuple(notes))


def fitting_block_size(trace: Trace, max_tokens: int, share: float = 0.95) -> int:
    """The largest block size, at most the trace's, at which `share` of the requests fit into `max_tokens` tokens."""

    def fits(size: int) -> bool:
        lengths = [_lengths(request, trace.block_size, size) for request in trace.requests]
        fitting = sum(prompt + output <= max_tokens for prompt, output in lengths)
        return fitting >= share * len(lengths) and all(output < max_tokens for _, output in lengths)

    size = trace.block_size
    while size > 1 and not fits(size):
        size -= 1
    return size - size % _PAGE if size > _PAGE else size


def _lengths(request: TraceRequest, old: int, new: int) -> tuple[int, int]:
    """Tokens of prompt and output when blocks of `old` tokens become blocks of `new`."""
    full, rest = divmod(request.input_tokens, old)
    return full * new + -(-rest * new // old), max(1, round(request.output_tokens * new / old))
