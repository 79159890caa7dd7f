"""Reads public traces by content: Mooncake's JSON Lines, with the field names other tools use, and Azure's CSV."""

import csv
import dataclasses
import itertools
import json
import os
import pathlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from serving.request import TraceRequest
from serving.workload.errors import TraceError
from serving.workload.requests import Trace

MOONCAKE_BLOCK_SIZE = 512
_MILLISECOND = 1e-3

_STAMP_MS = ("timestamp", "timestamp_ms", "arrival_time_ms")
_STAMP_S = ("arrived_at", "arrival_s", "TIMESTAMP_S")
_INPUT = ("input_length", "input_tokens", "num_prefill_tokens", "ContextTokens", "prompt_tokens", "isl")
_OUTPUT = ("output_length", "output_tokens", "num_decode_tokens", "GeneratedTokens", "completion_tokens", "osl")
_BLOCKS = ("hash_ids", "block_ids", "block_hashes")
_TENANT = ("tenant", "user_id")


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
        path: Mooncake JSON Lines (`timestamp` in ms, `input_length`, `output_length`, `hash_ids`) or a CSV with a
            header (Azure: `arrived_at` in s, `num_prefill_tokens`, `num_decode_tokens`).
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
        requests = list(_requests(path, file))
    requests, notes = _clean(requests)
    requests = requests[start : None if limit is None else start + limit]
    if not requests:
        raise TraceError(f"{path} has no requests from number {start} on; choose another file or a smaller `start`.")
    requests = _retime(requests, speed, jitter_s, seed)
    return Trace(path.stem, tuple(requests), MOONCAKE_BLOCK_SIZE, tuple(notes))


def _requests(path: pathlib.Path, lines: Iterable[str]) -> Iterator[TraceRequest]:
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    first = next(numbered, None)
    if first is None:
        raise TraceError(f"{path} is empty; a trace needs at least one request.")
    numbered = itertools.chain([first], numbered)
    records = _json_records if first[1].lstrip().startswith("{") else _csv_records
    for index, (number, record) in enumerate(records(path, numbered)):
        try:
            yield _request(index, record)
        except (KeyError, TypeError, ValueError) as error:
            reason = error.args[0] if error.args else error
            raise TraceError(f"{path}, line {number}: {reason}. Mend or remove the line.") from error


def _json_records(path: pathlib.Path, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in lines:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise TraceError(f"{path}, line {number}: not JSON ({error}). Mend or remove the line.") from error
        if not isinstance(record, dict):
            raise TraceError(f"{path}, line {number}: {line.strip()[:40]} is not an object. Mend or remove the line.")
        yield number, record


def _csv_records(path: pathlib.Path, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    lines = iter(lines)
    header = next(csv.reader([next(lines)[1]]))
    if not set(header) & {*_INPUT}:
        raise TraceError(f"{path}, line 1: neither a JSON object nor a CSV header with one of {', '.join(_INPUT)}.")
    for number, line in lines:
        fields = next(csv.reader([line]))
        if len(fields) != len(header):
            raise TraceError(
                f"{path}, line {number}: {len(fields)} fields, the header has {len(header)}. Mend or remove the line."
            )
        yield number, dict(zip(header, fields, strict=True))


def _field(record: Mapping[str, Any], names: tuple[str, ...], read: Callable[[Any], Any], default: Any = None) -> Any:
    for name in names:
        if name in record:
            try:
                return read(record[name])
            except (TypeError, ValueError):
                raise ValueError(f"`{name}` is {record[name]!r}") from None
    if default is None:
        raise KeyError(f"no `{names[0]}`")
    return default


def _count(value: Any) -> int:
    number = int(value)
    if number < 0 or number != float(value) or isinstance(value, bool):
        raise ValueError
    return number


def _seconds(value: Any) -> float:
    number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError
    return number


def _ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise ValueError
    return tuple(value)


def _request(index: int, record: Mapping[str, Any]) -> TraceRequest:
    in_ms = any(name in record for name in _STAMP_MS)
    stamp = _field(record, _STAMP_MS if in_ms else _STAMP_S, _seconds)
    return TraceRequest(
        id=str(index),
        arrival_s=stamp * _MILLISECOND if in_ms else stamp,
        input_tokens=_field(record, _INPUT, _count),
        output_tokens=_field(record, _OUTPUT, _count),
        keys=_field(record, _BLOCKS, _ids, ()),
        tenant=_field(record, _TENANT, str, ""),
        priority=_field(record, ("priority",), int, 0),
    )


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
