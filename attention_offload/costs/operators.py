"""Times of the two halves of a decode step and of what crosses between them (Lamina §2, §3)."""

import math

from attention_offload.costs.knobs import Knobs
from attention_offload.costs.shapes import ModelShape
from attention_offload.devices import Device
from attention_offload.errors import OffloadError


def p_norm(first: float, second: float, p: float) -> float:
    """(first^p + second^p)^(1/p); the larger of the two for an infinite p."""
    larger, smaller = max(first, second), min(first, second)
    if larger == 0 or math.isinf(p):
        return larger
    return larger * (1 + (smaller / larger) ** p) ** (1 / p)


def dense_time(shape: ModelShape, device: Device, tp: int, batch: float, knobs: Knobs) -> float:
    """MTIME(B): seconds of all non-attention operators of a step, tensor-parallel over `tp` devices."""
    _check(batch=batch, tp=tp)
    e, d, layers = shape.activation_bytes, shape.hidden_size, shape.num_layers
    traffic = shape.weights_read(batch) / tp + 2 * e * batch * d
    memory_s = traffic / (device.memory_bandwidth * knobs.gemm_bandwidth_share(tp))
    flops = tp * device.peak_flops(shape.compute_format) * knobs.gemm_flops_efficiency
    compute_s = 2 * shape.active_parameters * batch / flops
    kernels_s = layers * (knobs.layer_overhead_s + knobs.layer_token_overhead_s * batch / math.sqrt(tp))
    return (
        p_norm(memory_s, compute_s, knobs.roofline_knee) + kernels_s + all_reduce_time(shape, device, tp, batch, knobs)
    )


def all_reduce_time(shape: ModelShape, device: Device, tp: int, batch: float, knobs: Knobs) -> float:
    """Two ring all-reduces of [batch, hidden] per layer; an expert layer's dispatch and combine move as much."""
    if tp == 1:
        return 0.0
    moved = 2 * (tp - 1) / tp * shape.activation_bytes * batch * shape.hidden_size
    once = knobs.all_reduce_latency_s + moved / (device.link_bandwidth * knobs.link_efficiency)
    return 2 * shape.num_layers * once


def attention_time(
    shape: ModelShape, device: Device, count: int, batch: float, context: float, knobs: Knobs, load: float = 1.0
) -> float:
    """ATIME(B, l): seconds of decode attention over `count` devices; `load` is the busiest over the mean."""
    _check(batch=batch, count=count, context=context)
    pairs = batch * shape.attended(context) * load / count
    memory_s = pairs * shape.kv_bytes_per_token / (device.memory_bandwidth * knobs.attention_memory_efficiency)
    compute_s = pairs * shape.attention_flops / (device.peak_flops() * knobs.attention_flops_efficiency)
    return max(memory_s, compute_s) + shape.num_layers * knobs.attention_layer_overhead_s


def wire_bandwidth(dense: Device, dense_count: int, attention: Device, attention_count: int, knobs: Knobs) -> float:
    """Bytes per second between the sides: the NICs of the weaker side, at what the network stack reaches."""
    line = min(dense_count * dense.network_bandwidth, attention_count * attention.network_bandwidth)
    return line * knobs.network.efficiency


def minimum_bandwidth(
    shape: ModelShape,
    dense: tuple[Device, int],
    attention: tuple[Device, int],
    batch: float,
    context: float,
    knobs: Knobs,
    slowdown: float = 0.2,
) -> float:
    """Bytes per second that keep the network below `slowdown` (alpha) of a step's computation (§3.1).

    It is the traffic of the whole instance; divide by the number of dense devices for the need of one NIC.
    """
    if not slowdown > 0:
        raise OffloadError(f"`slowdown` must be positive, got {slowdown}.")
    compute_s = dense_time(shape, *dense, batch, knobs) + attention_time(shape, *attention, batch, context, knobs)
    return shape.crossing_bytes * batch * shape.num_layers / (slowdown * compute_s)


def prefill_time(shape: ModelShape, device: Device, tp: int, tokens: float, cached: float, knobs: Knobs) -> float:
    """Seconds to prefill one prompt of `tokens`, the first `cached` of which are reused."""
    _check(tp=tp, tokens=tokens)
    new = max(tokens - cached, 1.0)
    flops = 2 * shape.active_parameters * new
    flops += shape.prefill_attention_flops * new * shape.attended((tokens + cached) / 2)
    compute_s = flops / (tp * device.peak_flops(shape.compute_format) * knobs.gemm_flops_efficiency)
    memory_s = shape.weights_read(new) / tp / (device.memory_bandwidth * knobs.gemm_bandwidth_share(tp))
    return p_norm(memory_s, compute_s, knobs.roofline_knee) + all_reduce_time(shape, device, tp, new, knobs)


def _check(**quantities: float) -> None:
    for name, value in quantities.items():
        if not value > 0:
            raise OffloadError(f"`{name}` must be positive, got {value}.")
