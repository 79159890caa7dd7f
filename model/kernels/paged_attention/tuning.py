"""Tile sizes that were measured to be faster than the heuristics', by kind of device, in JSON files of this package.

`tuned/README.md` describes a file. What is not in one takes the heuristics.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from model.kernels.paged_attention.problem import Problem, TileSizes

FOLDER = pathlib.Path(__file__).parent / "tuned"
# A candidate must be so much faster than the heuristic to be kept: less is noise.
_WORTH = 0.97


@dataclasses.dataclass(frozen=True)
class Entry:
    """The fastest tile sizes of one kind of case, and seconds per call with them and with the heuristics."""

    case: Mapping[str, Any]
    tile_sizes: TileSizes
    time_s: float
    heuristic_time_s: float


def case_of(backend: str, problem: Problem) -> dict[str, Any]:
    """What of a problem decides its tile sizes; lengths that grow while a server runs, up to the next power of two."""
    return {
        "backend": backend,
        "q_dtype": problem.q_dtype.name,
        "kv_dtype": problem.kv_dtype.name,
        "q_heads": problem.q_heads,
        "kv_heads": problem.kv_heads,
        "head_dim": problem.head_dim,
        "page_size": problem.page_size,
        "sliding_window": problem.sliding_window,
        "rows": _next_power(problem.rows),
        "keys": _next_power(problem.max_pages * problem.page_size),
        "max_query_len": _next_power(problem.max_query_len),
    }


def candidates(backend: str, problem: Problem) -> list[TileSizes]:
    """Tile sizes to try, the heuristics' own first.

    Raises:
      NotImplementedError: a backend that has no tile sizes to choose.
    """
    keys = [size for size in (128, 256, 512, 1024, 2048) if size <= problem.max_pages * problem.page_size]
    if backend == "mosaic_gpu" and problem.max_query_len == 1:
        return [TileSizes(), *(TileSizes(splits=splits) for splits in (1, 2, 4, 8, 16, 32))]
    if backend == "pallas_tpu" and problem.max_query_len == 1:
        return [TileSizes(), *(TileSizes(decode_keys=size) for size in keys)]
    if backend == "pallas_tpu":
        queries = [size for size in (32, 64, 128, 256) if size < 2 * problem.max_query_len]
        return [TileSizes(), *(TileSizes(prefill_keys=k, prefill_queries=q) for k in keys[:-1] for q in queries)]
    raise NotImplementedError(f"{backend!r} has no tile sizes to choose for this case.")


def tune(backend: str, problem: Problem, measure: Callable[[TileSizes], float]) -> Entry:
    """The fastest of the candidates; `measure` gives seconds. One that the device has no memory for is passed over."""
    heuristic, *others = candidates(backend, problem)
    heuristic_s = measure(heuristic)
    best, best_s = heuristic, heuristic_s
    for tile_sizes in others:
        try:
            seconds = measure(tile_sizes)
        except jax.errors.JaxRuntimeError as error:
            if not lacks_memory(error):
                raise
            continue
        if seconds < min(best_s, heuristic_s * _WORTH):
            best, best_s = tile_sizes, seconds
    return Entry(case_of(backend, problem), best, best_s, heuristic_s)


def lacks_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether the device had no room for a computation, in its main memory or in a kernel's own."""
    return "RESOURCE_EXHAUSTED" in str(error)


def tile_sizes_for(backend: str, problem: Problem, device_kind: str) -> TileSizes:
    """The tile sizes that were measured for a case on a kind of device; the heuristics' where none were."""
    case = case_of(backend, problem)
    return next((entry.tile_sizes for entry in read(device_kind) if entry.case == case), TileSizes())


def path_of(device_kind: str) -> pathlib.Path:
    """The file of a kind of device."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "_", device_kind.lower()) + ".json")


def read(device_kind: str) -> tuple[Entry, ...]:
    """What was measured on a kind of device; nothing where there is no file.

    Raises:
      ValueError: a file that is not as `tuned/README.md` says.
    """
    return _read(path_of(device_kind))


@functools.cache
def _read(path: pathlib.Path) -> tuple[Entry, ...]:
    if not path.exists():
        return ()
    try:
        entries = json.loads(path.read_text())["entries"]
        return tuple(Entry(**(entry | {"tile_sizes": TileSizes(**entry["tile_sizes"])})) for entry in entries)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no tuned tile sizes: {error}. Tune again, or remove it.") from error


def write(device_kind: str, entries: Iterable[Entry], made_by: Mapping[str, Any]) -> pathlib.Path:
    """Puts entries into the file of a kind of device, in place of those of the same cases; returns its path."""
    new = list(entries)
    kept = [old for old in read(device_kind) if all(old.case != entry.case for entry in new)]
    records = []
    for entry in (*kept, *new):
        chosen = {name: size for name, size in dataclasses.asdict(entry.tile_sizes).items() if size is not None}
        records.append(dataclasses.asdict(entry) | {"tile_sizes": chosen})
    path = path_of(device_kind)
    path.parent.mkdir(exist_ok=True)
    content = {"device_kind": device_kind, "made_by": dict(made_by), "entries": records}
    path.write_text(json.dumps(content, indent=1) + "\n")
    _read.cache_clear()
    return path


def _next_power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
