"""The lines of trace files: Mooncake's JSON Lines, with the field names other tools use, and Azure's CSV."""

import csv
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from serving.request import TraceRequest
from serving.workload.errors import TraceError

MOONCAKE_BLOCK_SIZE = 512
_MILLISECOND = 1e-3

_STAMP_MS = ("timestamp", "timestamp_ms", "arrival_time_ms")
_STAMP_S = ("arrived_at", "arrival_s", "TIMESTAMP_S")
_INPUT = ("input_length", "input_tokens", "num_prefill_tokens", "ContextTokens", "prompt_tokens", "isl")
_OUTPUT = ("output_length", "output_tokens", "num_decode_tokens", "GeneratedTokens", "completion_tokens", "osl")
_BLOCKS = ("hash_ids", "block_ids", "block_hashes")
_TENANT = ("tenant", "user_id")
_BLOCK_SIZE = "block_size"


def read_requests(path: pathlib.Path, lines: Iterable[str]) -> tuple[list[TraceRequest], int]:
    """Returns the requests of `lines`, and how many tokens a block of theirs has, which all lines must agree on.

    Raises:
        TraceError: names the line that is malformed.
    """
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    first = next(numbered, None)
    if first is None:
        raise TraceError(f"{path} is empty; a trace needs at least one request.")
    numbered = itertools.chain([first], numbered)
    records = _json_records if first[1].lstrip().startswith("{") else _csv_records
    requests: list[TraceRequest] = []
    block_size = 0
    for index, (number, record) in enumerate(records(path, numbered)):
        try:
            requests.append(_request(index, record))
            size = _field(record, (_BLOCK_SIZE,), _positive, MOONCAKE_BLOCK_SIZE)
            block_size = block_size or size
            if size != block_size:
                raise ValueError(f"`{_BLOCK_SIZE}` is {size}, and {block_size} in the lines before")
        except (KeyError, TypeError, ValueError) as error:
            reason = error.args[0] if error.args else error
            raise TraceError(f"{path}, line {number}: {reason}. Mend or remove the line.") from error
    return requests, block_size


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


def _positive(value: Any) -> int:
    if not (number := _count(value)):
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


def mooncake_record(request: TraceRequest, block_size: int) -> dict[str, Any]:
    """Returns what a line of Mooncake's JSON says of a request; defaults are left out."""
    record: dict[str, Any] = {
        "timestamp": round(request.arrival_s / _MILLISECOND),
        "input_length": request.input_tokens,
        "output_length": request.output_tokens,
        "hash_ids": list(request.keys),
    }
    if block_size != MOONCAKE_BLOCK_SIZE:
        record[_BLOCK_SIZE] = block_size
    if request.tenant:
        record["tenant"] = request.tenant
    if request.priority:
        record["priority"] = request.priority
    return record
