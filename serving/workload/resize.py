"""Makes a trace of large models fit a small engine, prefix structure and all."""

import dataclasses

from serving.workload.errors import TraceError
from serving.workload.requests import Trace


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
    requests = tuple(
        dataclasses.replace(
            request,
            input_tokens=-(-request.input_tokens // divisor),
            output_tokens=max(1, round(request.output_tokens / output_divisor)),
        )
        for request in trace.requests
    )
    note = f"tokens were divided by {divisor}"
    if output_divisor != divisor:
        note += f", those of outputs by {output_divisor}"
    return dataclasses.replace(
        trace, requests=requests, block_size=trace.block_size // divisor, notes=(*trace.notes, note)
    )


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
    """`count` requests from number `start` on; arrivals count from the first of them.

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
