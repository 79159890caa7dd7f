"""Reads public traces by content, Mooncake's JSON Lines or Azure's CSV, and writes Mooncake's.

Blocks of another size than Mooncake's 512 tokens add a `block_size` to each line, which other readers skip.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import random

from serving.request import TraceRequest
from serving.workload.errors import TraceError
from serving.workload.requests import Trace
from serving.workload.trace_lines import mooncake_record, read_requests


def read_trace(
    path: str | os.PathLike[str],
    *,
    start: int = 0,
    limit: int | None = None,
    speed: float = 1.0,
    jitter_s: float = 0.0,
    seed: int = 0,
) -> Trace:
    """Reads a trace file.

    Args:
        path: Mooncake JSON Lines (`timestamp` in ms, `input_length`, `output_length`, `hash_ids`, and `block_size`
            where that is not 512) or a CSV with a header (Azure: `arrived_at` in s, `num_prefill_tokens`,
            `num_decode_tokens`).
        start: skips so many requests; arrivals count from the first that is left.
        limit: takes at most so many.
        speed: divides arrival times; 2 offers twice the load.
        jitter_s: spreads arrivals uniformly over so many seconds, for traces whose stamps are coarse ticks.
        seed: of the jitter.

    Raises:
        TraceError: names the line of a malformed request, or says that nothing is left.
    """
    if speed <= 0:
        raise TraceError(f"`speed` is {speed}; it divides arrival times, so it must be above 0.")
    if start < 0 or (limit is not None and limit < 1):
        raise TraceError(f"`start` is {start} and `limit` is {limit}; use 0 or more, and 1 or more (or none).")
    path = pathlib.Path(path)
    if not path.is_file():
        raise TraceError(f"{path} is not a file; name a Mooncake JSONL or an Azure CSV trace.")
    with path.open(encoding="utf-8", newline="") as file:
        requests, block_size = read_requests(path, file)
    requests, notes = _clean(requests)
    requests = requests[start : None if limit is None else start + limit]
    if not requests:
        raise TraceError(f"{path} has no requests from number {start} on; choose another file or a smaller `start`.")
    requests = _retime(requests, speed, jitter_s, seed)
    return Trace(path.stem, tuple(requests), block_size, tuple(notes))


def write_mooncake(path: str | os.PathLike[str], trace: Trace) -> None:
    """Writes JSON Lines that `read_trace` reads back but for names and notes; times in whole milliseconds."""
    with pathlib.Path(path).open("w", encoding="utf-8") as file:
        for request in trace.requests:
            file.write(json.dumps(mooncake_record(request, trace.block_size)) + "\n")


def _clean(requests: list[TraceRequest]) -> tuple[list[TraceRequest], list[str]]:
    """Drops empty prompts, gives every request at least one output token and sorts by arrival; says what it did."""
    notes = []
    if empty := sum(not request.input_tokens for request in requests):
        notes.append(f"{empty} requests without input tokens were left out")
        requests = [request for request in requests if request.input_tokens]
    if silent := sum(not request.output_tokens for request in requests):
        notes.append(f"{silent} requests without output tokens generate one: prefill always yields it")
        requests = [r if r.output_tokens else dataclasses.replace(r, output_tokens=1) for r in requests]
    if late := sum(b.arrival_s < a.arrival_s for a, b in itertools.pairwise(requests)):
        notes.append(f"{late} requests arrived before the one above them; the trace was sorted")
        requests = sorted(requests, key=lambda request: request.arrival_s)
    return requests, notes


def _retime(requests: list[TraceRequest], speed: float, jitter_s: float, seed: int) -> list[TraceRequest]:
    origin = requests[0].arrival_s
    if origin == 0 and speed == 1 and not jitter_s:
        return requests
    rng = random.Random(seed)
    moved = [
        dataclasses.replace(r, arrival_s=(r.arrival_s - origin + (rng.uniform(0, jitter_s) if jitter_s else 0)) / speed)
        for r in requests
    ]
    return sorted(moved, key=lambda request: request.arrival_s)
