"""Token ids for the prompts of a trace, which says only which blocks they share."""

from collections.abc import Iterator

import numpy as np

from serving.request import TraceRequest
from serving.workload.errors import TraceError


def prompt_tokens(
    request: TraceRequest, block_size: int, *, seed: int = 0, low: int = 3, high: int = 259
) -> tuple[int, ...]:
    """`input_tokens` random ids from [low, high): requests share exactly the prefixes that their `keys` share.

    Blocks that the trace does not name are the request's own. The same arguments give the same ids on every machine.

    Raises:
        TraceError: an empty range of ids.
    """
    if not 0 <= low < high:
        raise TraceError(f"Token ids from {low} to {high}: use 0 <= low < high.")
    parts, left = [], request.input_tokens
    for key in _keys(request):
        part = np.random.default_rng((seed, *key)).integers(low, high, min(left, block_size))
        parts.extend(part.tolist())
        left -= len(part)
        if not left:
            break
    return tuple(parts)


def _keys(request: TraceRequest) -> Iterator[tuple[int, int, int]]:
    for block in request.keys:
        yield 0, block, 0
    index = 0
    while True:
        yield 1, int(request.id), index
        index += 1
