"""Fig 2-4: dense and attention time against the batch, what fills the devices, and the bandwidth that this needs."""

from collections.abc import Mapping
from typing import Any

from attention_offload.costs.knobs import Knobs
from attention_offload.costs.operators import attention_time, dense_time, minimum_bandwidth
from attention_offload.costs.shapes import ModelShape
from attention_offload.devices import Device
from attention_offload.paper.setups import COMPUTE, MEMORY, paper_shape
from papers.comparison import PaperTable, at_least, at_most, compare

_BATCHES = (1, 2, 4, 8, 16, 20, 32, 64, 100, 128, 200, 256, 300)


def flops_utilisation(shape: ModelShape, device: Device, tp: int, batch: float, knobs: Knobs) -> float:
    """MFU of the non-attention operators."""
    flops = 2 * shape.active_parameters * batch
    return flops / (tp * device.peak_flops() * dense_time(shape, device, tp, batch, knobs))


def bandwidth_utilisation(shape: ModelShape, device: Device, batch: float, context: float, knobs: Knobs) -> float:
    """MBU of decode attention."""
    moved = shape.kv_bytes_per_token * context * batch
    return moved / (device.memory_bandwidth * attention_time(shape, device, 1, batch, context, knobs))


def figure_2(knobs: Knobs) -> PaperTable:
    """Non-attention operators of LLaMA3-70B on H100s."""
    shape = paper_shape("llama3-70b")
    rows = [
        at_most(
            f"MFU at B = {batch}, {tp} devices",
            0.20,
            flops_utilisation(shape, COMPUTE, tp, batch, knobs),
            f"§2.2.1; reading weights at the full bandwidth would give {batch / COMPUTE.ridge():.0%}",
        )
        for tp in (2, 4, 8)
        for batch in (64, 99)
    ]
    curves = [
        _point("figure_2", f"TP{tp}", "batch", batch, "MTIME (ms)", 1e3 * dense_time(shape, COMPUTE, tp, batch, knobs))
        for tp in (2, 4, 8)
        for batch in _BATCHES
    ]
    return PaperTable("Fig 2: dense operators, LLaMA3-70B", tuple(rows), tuple(curves))


def figure_3(knobs: Knobs) -> PaperTable:
    """Attention of LLaMA3-70B on one device: bandwidth-bound wherever it runs."""
    shape = paper_shape("llama3-70b")
    context = 8192
    filled = COMPUTE.memory_bytes / (shape.kv_bytes_per_token * context)
    rows = [compare("requests of 8192 tokens that fill an H100", 30, filled, 0.02, note="§2.2.2, 'about 30'")]
    rows += [
        at_least(
            f"MBU at B = 20 on {device.name}", 0.70, bandwidth_utilisation(shape, device, 20, context, knobs), "§2.2.2"
        )
        for device in (COMPUTE, MEMORY)
    ]
    curves = [
        _point(
            "figure_3",
            f"{device.name}, l={length}",
            "batch",
            batch,
            "ATIME (ms)",
            1e3 * attention_time(shape, device, 1, batch, length, knobs),
        )
        for device in (COMPUTE, MEMORY)
        for length in (4096, 8192)
        for batch in _BATCHES
    ]
    return PaperTable("Fig 3: attention, LLaMA3-70B", tuple(rows), tuple(curves))


def figure_4(knobs: Knobs) -> PaperTable:
    """Bandwidth that keeps the network below a fifth of a step, one device on either side and at DOP(2, 4) per NIC."""
    shape = paper_shape("llama3-70b")

    def need(context: float, batch: float, a: int = 1, b: int = 1) -> float:
        return minimum_bandwidth(shape, (COMPUTE, a), (MEMORY, b), batch, context, knobs) / a / 1e9

    rows = [
        at_most(f"GB/s at B = 300, l = {length}, DOP(1,1)", 30, need(length, 300), "§3.1") for length in (4096, 8192)
    ]
    rows += [
        at_most("GB/s at B = 300, l = 4096, DOP(2,4), per NIC", 30, need(4096, 300, 2, 4), "§3.1"),
        at_most("GB/s at B = 300, l = 1024, DOP(1,1)", 30, need(1024, 300), "shorter contexts than the paper shows"),
    ]
    curves = [
        _point("figure_4", f"l={length}", "batch", batch, "GB/s", need(length, batch))
        for length in (1024, 2048, 4096, 8192, 16384)
        for batch in _BATCHES
    ]
    return PaperTable("Fig 4: minimum network bandwidth, LLaMA3-70B", tuple(rows), tuple(curves))


def _point(figure: str, series: str, x_name: str, x: float, y_name: str, y: float) -> Mapping[str, Any]:
    return {"figure": figure, "series": series, "x_name": x_name, "x": x, "y_name": y_name, "y": y}
