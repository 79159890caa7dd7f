"""Makes a trace of large models fit a small engine, prefix structure and all.

Lengths change by whole tokens per block: full blocks become full blocks of the new size, and a prompt's partial last
block and its output shrink in proportion. So keys keep their meaning, and equal prefixes stay equal.
"""

import dataclasses

from serving.request import TraceRequest
from serving.workload.errors import TraceError
from serving.workload.requests import Trace

# Servers reuse KV in whole pages of a power of two: blocks that end where a page ends lose nothing of their reuse.
_PAGE = 16


def shrink(trace: Trace, divisor: int, output_divisor: int | None = None) -> Trace:
    """Divides tokens and the block size, so that prompts share the same fraction of each other as before.

    Outputs are divided by `output_divisor`, if one is given, for answers that are long beside their prompts.

    Raises:
        TraceError: the block size is no multiple of `divisor`, or a divisor is below 1.
    """
    if divisor < 1 or trace.block_size % divisor:
        raise TraceError(f"Blocks of {trace.block_size} tokens cannot be divided by {divisor}; use a divisor of that.")
    output_divisor = divisor if output_divisor is None else output_divisor
    if output_divisor < 1:
        raise TraceError(f"Outputs cannot be divided by {output_divisor}; use 1 or more.")
    if divisor == output_divisor == 1:
        return trace
    old, new = trace.block_size, trace.block_size // divisor
    requests = tuple(
        dataclasses.replace(
            request,
            input_tokens=_prompt_tokens(request, old, new),
            output_tokens=_output_tokens(request, 1, output_divisor),
        )
        for request in trace.requests
    )
    note = f"tokens were divided by {divisor}"
    if output_divisor != divisor:
        note += f", those of outputs by {output_divisor}"
    return dataclasses.replace(trace, requests=requests, block_size=new, notes=(*trace.notes, note))


def rescale(trace: Trace, block_size: int, max_tokens: int) -> Trace:
    """Gives `trace` blocks of `block_size` tokens, and each request at most `max_tokens` tokens of prompt and output.

    A prompt that is still too long loses its end, which leaves the prefixes that it shares as they are; `notes` counts
    such prompts.

    Raises:
        TraceError: an empty block, or an output beside which not even one token of a prompt fits.
    """
    if block_size < 1:
        raise TraceError(f"Blocks of {block_size} tokens: a block needs at least one. Choose a larger scale.")
    cut = 0
    requests = []
    for request in trace.requests:
        prompt, output = _lengths(request, trace.block_size, block_size)
        if output >= max_tokens:
            raise TraceError(
                f"Request {request.id} generates {output} tokens at this scale, and the model takes {max_tokens} of "
                "prompt and output. Choose a smaller scale."
            )
        cut += prompt + output > max_tokens
        prompt = min(prompt, max_tokens - output)
        keys = request.keys[: -(-prompt // block_size)]
        requests.append(dataclasses.replace(request, input_tokens=prompt, output_tokens=output, keys=keys))
    notes = [*trace.notes]
    if block_size != trace.block_size:
        notes.append(f"lengths times {block_size / trace.block_size:.3g}: blocks of {block_size} tokens")
    if cut:
        notes.append(f"{cut} prompts cut to {max_tokens} tokens less their output")
    return Trace(trace.name, tuple(requests), block_size, tuple(notes))


def fitting_block_size(trace: Trace, max_tokens: int, share: float = 0.95) -> int:
    """Returns the largest block size, at most the trace's, at which `share` of the requests fit `max_tokens` tokens."""

    def fits(size: int) -> bool:
        lengths = [_lengths(request, trace.block_size, size) for request in trace.requests]
        fitting = sum(prompt + output <= max_tokens for prompt, output in lengths)
        return fitting >= share * len(lengths) and all(output < max_tokens for _, output in lengths)

    size = trace.block_size
    while size > 1 and not fits(size):
        size -= 1
    return size - size % _PAGE if size > _PAGE else size


def fitting(trace: Trace, max_tokens: int) -> Trace:
    """Leaves out requests of more than `max_tokens` tokens, prompt and output.

    Raises:
        TraceError: nothing is left.
    """
    requests = tuple(r for r in trace.requests if r.input_tokens + r.output_tokens <= max_tokens)
    if len(requests) == len(trace.requests):
        return trace
    if not requests:
        raise TraceError(f"All requests of {trace.name} are longer than {max_tokens} tokens; shrink the trace.")
    note = f"{len(trace.requests) - len(requests)} requests of more than {max_tokens} tokens were left out"
    return dataclasses.replace(trace, requests=requests, notes=(*trace.notes, note))


def part(trace: Trace, start: int, count: int) -> Trace:
    """Takes `count` requests from number `start` on; arrivals count from the first of them.

    Raises:
        TraceError: there are not so many.
    """
    requests = trace.requests[start : start + count]
    if count < 1 or len(requests) < count:
        raise TraceError(
            f"{trace.name} has {len(trace.requests)} requests, not {count} from number {start} on; ask for fewer."
        )
    origin = requests[0].arrival_s
    moved = tuple(dataclasses.replace(request, arrival_s=request.arrival_s - origin) for request in requests)
    return dataclasses.replace(trace, requests=moved)


def _lengths(request: TraceRequest, old: int, new: int) -> tuple[int, int]:
    """Tokens of prompt and output when blocks of `old` tokens become blocks of `new`."""
    return _prompt_tokens(request, old, new), _output_tokens(request, new, old)


def _prompt_tokens(request: TraceRequest, old: int, new: int) -> int:
    full, rest = divmod(request.input_tokens, old)
    return full * new + -(-rest * new // old)


def _output_tokens(request: TraceRequest, times: int, divisor: int) -> int:
    """At least one token: prefill always yields it."""
    return max(1, round(request.output_tokens * times / divisor))
