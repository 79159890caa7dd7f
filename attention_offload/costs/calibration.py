"""Knobs of the cost model from result files of our own benches."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attention_offload.costs.knobs import A_PRIORI, Knobs
from attention_offload.costs.shapes import FORMAT_BYTES, ModelShape
from attention_offload.devices import Device
from attention_offload.errors import OffloadError

# Up to so many rows a matrix product reads weights rather than computes.
_FEW_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Measured:
    """One knob, its value, and what it was read from."""

    knob: str
    value: Any
    source: str


def from_linear(path: str | os.PathLike[str], device: Device, scale: float = 1.0) -> list[Measured]:
    """Reads memory and FLOP efficiency of GEMMs from a `result.json` of `bench_linear` (`rows`, `dtype`, `gb_s`).

    The fastest row counts: of at most 8 rows for memory, of any for FLOP/s. `scale` is what one unit of the bench is of
    the device: the bench counts core-seconds, so on a CPU it is the number of cores.
    """
    speeds = [(row, float(row["gb_s"]) * 1e9 * scale) for row in _rows(path, ("rows", "dtype", "gb_s"))]
    few = [speed for row, speed in speeds if row["rows"] <= _FEW_ROWS]
    if not few:
        raise OffloadError(
            f"{path} has no measurement with {_FEW_ROWS} rows or fewer; run the bench with --rows=1,8,512."
        )
    flops = max(
        2 * row["rows"] * speed / FORMAT_BYTES[row["dtype"]] / device.peak_flops(row["dtype"]) for row, speed in speeds
    )
    efficiency = {1: max(few) / device.memory_bandwidth}
    return [
        Measured("gemm_memory_efficiency", efficiency, f"{path}: fastest of up to {_FEW_ROWS} rows"),
        Measured("gemm_flops_efficiency", flops, f"{path}: fastest of all rows"),
    ]


def from_attention(path: str | os.PathLike[str], device: Device, scale: float = 1.0) -> list[Measured]:
    """Memory efficiency of decode attention, from the `result.json` of `bench_paged_attention`: rows with `gb_s`.

    The fastest row counts. `scale` is how much more than what the bench ran on the device is; the bench counts wall
    seconds, so it is 1 where it had the whole device.
    """
    fastest = max(float(row["gb_s"]) for row in _rows(path, ("gb_s",))) * 1e9 * scale
    return [Measured("attention_memory_efficiency", fastest / device.memory_bandwidth, f"{path}: fastest row")]


def from_engine(
    path: str | os.PathLike[str], device: Device, count: int, shape: ModelShape, knobs: Knobs = A_PRIORI
) -> list[Measured]:
    """Returns the knobs that a whole engine shows, from the `calibration.json` of `calibrate` on `count` devices.

    Seconds per token of prefill give the FLOP efficiency, seconds per token of KV the attention's memory efficiency.
    The fixed time of a decode iteration is the weights at the GEMM memory efficiency of `knobs`, and host time; where
    it is less than the weights take, it shows a better efficiency instead. Per-layer times of kernels are in these
    figures, so those knobs become 0.
    """
    costs = _json(path).get("costs")
    needed = ("prefill_token", "decode_base", "decode_sequence", "decode_token")
    if not isinstance(costs, Mapping) or not all(isinstance(costs.get(name), int | float) for name in needed):
        raise OffloadError(f"{path} is no calibration of an engine: it needs `costs` with {', '.join(needed)}.")
    if not (costs["prefill_token"] > 0 and costs["decode_base"] > 0):
        raise OffloadError(f"{path}: `prefill_token` and `decode_base` must be above 0; calibrate with more repeats.")
    flops, bandwidth = count * device.peak_flops(shape.compute_format), count * device.memory_bandwidth
    computing = 2 * shape.active_parameters / flops / costs["prefill_token"]
    read_s = shape.weights_read(1) / bandwidth
    reading = max(knobs.gemm_bandwidth_share(count), read_s / costs["decode_base"])
    sequence_s = max(0.0, costs["decode_sequence"] - 2 * shape.active_parameters / (flops * computing))
    measured = {
        "gemm_flops_efficiency": computing,
        "gemm_memory_efficiency": {1: reading},
        "coupled_overhead_s": max(0.0, costs["decode_base"] - read_s / reading),
        "coupled_sequence_overhead_s": sequence_s,
        "layer_overhead_s": 0.0,
        "layer_token_overhead_s": 0.0,
        "attention_layer_overhead_s": 0.0,
    }
    if costs["decode_token"] > 0:
        measured["attention_memory_efficiency"] = shape.kv_bytes_per_token / bandwidth / costs["decode_token"]
    return [Measured(knob, value, f"{path}: costs") for knob, value in measured.items()]


def write_knobs(path: str | os.PathLike[str], measured: Sequence[Measured]) -> Knobs:
    """Writes what `load_knobs("measured", path)` reads, and returns that; of a knob measured twice the last counts.

    Raises `OffloadError` where a share of the peak is above 1: then the device or the scale is not the bench's.
    """
    knobs = A_PRIORI.changed(name="measured", **{one.knob: one.value for one in measured})
    written = {
        "knobs": {one.knob: one.value for one in measured},
        "sources": {one.knob: one.source for one in measured},
    }
    pathlib.Path(path).write_text(json.dumps(written, indent=1) + "\n")
    return knobs


def _json(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    try:
        content = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise OffloadError(f"Cannot read the measurement {path}: {error}.") from error
    if not isinstance(content, Mapping):
        raise OffloadError(f"{path} holds no measurement; name the JSON file that a bench or `calibrate` wrote.")
    return content


def _rows(path: str | os.PathLike[str], fields: Sequence[str]) -> Sequence[Mapping[str, Any]]:
    def complete() -> Iterator[Mapping[str, Any]]:
        for row in _json(path).get("rows", ()):
            if all(field in row for field in fields):
                yield row

    rows = list(complete())
    if not rows:
        raise OffloadError(f"{path} has no rows with {', '.join(fields)}; name the `result.json` of the bench.")
    return rows
