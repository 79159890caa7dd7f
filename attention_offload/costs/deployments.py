"""How one decode instance is deployed, and what a step costs there: coupled (one kind of device), or offloaded."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Protocol

from attention_offload.costs.knobs import Knobs
from attention_offload.costs.operators import attention_time, dense_time, wire_bandwidth
from attention_offload.costs.shapes import ModelShape
from attention_offload.devices import Device
from attention_offload.errors import CapacityError, OffloadError

PARTITIONS = ("head", "request", "sequence")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeStep:
    """One decode step of a batch: seconds of each part, as if run alone, and of the whole (TBT).

    With n batches in flight, `dense_s`, `attention_s` and `network_s` are those of one, `batch / n` sequences.
    `overlap_s` is what hides behind other work; `overhead_s` is the host's.
    """

    batch: float
    dense_s: float
    attention_s: float
    network_s: float
    overlap_s: float
    overhead_s: float
    tbt_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.tbt_s


class DecodeDeployment(Protocol):
    """The devices of one decode instance, and how the model is split over them; prices in dollars per hour."""

    @property
    def price_per_hour(self) -> float: ...

    @property
    def label(self) -> str: ...

    @property
    def kv_network_bandwidth(self) -> float:
        """Line rate of the NICs of the devices that hold KV, in bytes per second."""
        ...

    def kv_bytes(self, shape: ModelShape, knobs: Knobs) -> float:
        """Returns the bytes for KV beside the weights. Raises `CapacityError` where the weights do not fit."""
        ...

    def decode_step(self, shape: ModelShape, batch: float, context: float, knobs: Knobs) -> DecodeStep:
        """Returns a step of `batch` sequences of `context` tokens. Raises `OffloadError` for an impossible split."""
        ...


def max_batch(deployment: DecodeDeployment, shape: ModelShape, context: float, knobs: Knobs) -> int:
    """Returns how many sequences of `context` tokens fit (B_v, B_L of the paper). Raises `CapacityError` if none."""
    request = shape.kv_bytes_per_token * shape.attended(context)
    room = deployment.kv_bytes(shape, knobs)
    if room < request:
        raise CapacityError(
            f"{deployment.label} has {room / 1e9:.1f} GB for KV, but one request of {context:.0f} tokens of "
            f"{shape.name} needs {request / 1e9:.1f} GB. Use more or larger attention devices, or quantise the KV."
        )
    return int(room // request)


def room_beside_weights(device: Device, count: int, shape: ModelShape, share: float) -> float:
    """Returns the bytes that one copy of the weights leaves on `count` devices. Raises `CapacityError` if none."""
    usable = share * count * device.memory_bytes
    if usable <= shape.weight_bytes:
        raise CapacityError(
            f"The weights of {shape.name} are {shape.weight_bytes / 1e9:.1f} GB, but {count}x{device.name} offer "
            f"{usable / 1e9:.1f} GB. Use more or larger devices, or quantise the weights."
        )
    return usable - shape.weight_bytes


@dataclasses.dataclass(frozen=True)
class CoupledDeployment:
    """Everything on `count` devices of one kind, tensor-parallel: the homogeneous baseline."""

    device: Device
    count: int

    @property
    def price_per_hour(self) -> float:
        return self.count * self.device.price_per_hour

    @property
    def label(self) -> str:
        return f"{self.count}x{self.device.name}"

    @property
    def kv_network_bandwidth(self) -> float:
        return self.count * self.device.network_bandwidth

    def kv_bytes(self, shape: ModelShape, knobs: Knobs) -> float:
        room = room_beside_weights(self.device, self.count, shape, knobs.coupled_memory_share)
        return room / _copies(shape, self.count)

    def decode_step(self, shape: ModelShape, batch: float, context: float, knobs: Knobs) -> DecodeStep:
        dense_s = dense_time(shape, self.device, self.count, batch, knobs)
        load = _copies(shape, self.count)
        attention_s = attention_time(shape, self.device, self.count, batch, context, knobs, load)
        overhead_s = knobs.coupled_overhead_s + knobs.coupled_sequence_overhead_s * batch
        return DecodeStep(
            batch=batch,
            dense_s=dense_s,
            attention_s=attention_s,
            network_s=0.0,
            overlap_s=0.0,
            overhead_s=overhead_s,
            tbt_s=dense_s + attention_s + overhead_s,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffloadedDeployment:
    """DOP(a, b): `dense_count` devices for the model, `attention_count` for attention and KV (§4).

    `in_flight` is the n of rotational staggered pipelining: 1 runs one batch after the other, n >= 2 can keep n batches
    in flight on n - 1 replicas of the dense side, and does where that is the faster way: each batch reads the weights
    anew, so small ones are not worth splitting. `partition` divides attention by KV "head" (the paper's), by "request"
    (unbalanced by the spread of contexts, `context_spread` = standard deviation over mean), or by "sequence" (heads as
    far as they go, then tokens, whose partial softmaxes the dense side merges).
    """

    dense: Device
    dense_count: int
    attention: Device
    attention_count: int
    in_flight: int = 2
    partition: str = "head"
    context_spread: float = 0.0

    def __post_init__(self) -> None:
        if self.partition not in PARTITIONS:
            raise OffloadError(f"No partition `{self.partition}`; known: {', '.join(PARTITIONS)}.")
        for field in ("dense_count", "attention_count", "in_flight"):
            if getattr(self, field) < 1:
                raise OffloadError(f"`{field}` must be at least 1, got {getattr(self, field)}.")

    @property
    def replicas(self) -> int:
        """Copies of the dense side: n - 1 of them keep n batches in flight."""
        return max(self.in_flight - 1, 1)

    @property
    def price_per_hour(self) -> float:
        dense = self.replicas * self.dense_count * self.dense.price_per_hour
        return dense + self.attention_count * self.attention.price_per_hour

    @property
    def label(self) -> str:
        copies = f"{self.replicas}*" if self.replicas > 1 else ""
        return f"{copies}{self.dense_count}x{self.dense.name}+{self.attention_count}x{self.attention.name}"

    @property
    def kv_network_bandwidth(self) -> float:
        return self.attention_count * self.attention.network_bandwidth

    def kv_bytes(self, shape: ModelShape, knobs: Knobs) -> float:
        room_beside_weights(self.dense, self.dense_count, shape, knobs.coupled_memory_share)
        return self.attention_count * self.attention.memory_bytes * knobs.attention_memory_share

    def decode_step(self, shape: ModelShape, batch: float, context: float, knobs: Knobs) -> DecodeStep:
        ways = {self.staggered_step(shape, batch, context, knobs, n) for n in (1, self.in_flight)}
        return min(ways, key=lambda step: step.tbt_s)

    def staggered_step(self, shape: ModelShape, batch: float, context: float, knobs: Knobs, n: int) -> DecodeStep:
        """Returns a step with `n` batches in flight: a round of the pipeline (§4.3); no side serves two at once."""
        part = batch / n
        splits = self._sequence_splits(shape)
        load = self._imbalance(part)
        dense_s = dense_time(shape, self.dense, self.dense_count, part, knobs)
        attention_s = attention_time(shape, self.attention, self.attention_count, part, context, knobs, load)
        wire_s, network_s = self._network_time(shape, part, splits, knobs, migrates=n > 2)
        overlap_s = self._overlap_time(shape, part, attention_s, knobs) if knobs.overlap else 0.0
        round_s = dense_s + attention_s + network_s - overlap_s
        if n > 1:
            round_s = max(n * attention_s, n * dense_s / (n - 1), n * wire_s, round_s)
        overhead_s = knobs.offload_overhead_s + knobs.offload_sequence_overhead_s * batch
        return DecodeStep(
            batch=batch,
            dense_s=dense_s,
            attention_s=attention_s,
            network_s=network_s,
            overlap_s=overlap_s,
            overhead_s=overhead_s,
            tbt_s=round_s + overhead_s,
        )

    def _sequence_splits(self, shape: ModelShape) -> int:
        """Returns over how many devices one head's tokens are spread; 1 unless the partition is by sequence."""
        if self.partition == "request":
            return 1
        if self.partition == "head" and shape.kv_heads % self.attention_count:
            raise OffloadError(
                f"{self.attention_count} attention devices cannot share the {shape.kv_heads} KV heads of {shape.name} "
                "evenly. Use a divisor, or the partition `sequence` or `request`."
            )
        return self.attention_count // math.gcd(self.attention_count, shape.kv_heads)

    def _imbalance(self, batch: float) -> float:
        """Returns the load of the busiest device over the mean, when whole requests go to devices in turn."""
        b = self.attention_count
        if self.partition != "request" or b == 1:
            return 1.0
        # Largest of b normal sums of batch/b contexts (Blom's approximation); a device cannot hold more than all.
        largest = statistics.NormalDist().inv_cdf((b - 0.375) / (b + 0.25))
        return min(1 + self.context_spread * largest / math.sqrt(max(batch / b, 1.0)), float(b)) * max(b / batch, 1.0)

    def _network_time(
        self, shape: ModelShape, batch: float, splits: int, knobs: Knobs, *, migrates: bool
    ) -> tuple[float, float]:
        """Returns seconds in which the NICs' busier direction is busy, and seconds of the round trip.

        Queries go to every device that holds a part of the head's tokens, and as many partial outputs come back.
        """
        out, back = splits * shape.query_bytes + shape.kv_crossing_bytes, splits * shape.output_bytes
        wire = wire_bandwidth(self.dense, self.dense_count, self.attention, self.attention_count, knobs)
        per_layer = knobs.network.round_trip_s + batch * (out + back) / wire
        if migrates:
            # Each batch's residual moves to the next replica after every layer.
            residual = batch * shape.activation_bytes * shape.hidden_size
            nic = self.dense_count * self.dense.network_bandwidth * knobs.network.efficiency
            per_layer += knobs.network.round_trip_s / 2 + residual / nic
        return shape.num_layers * batch * max(out, back) / wire, shape.num_layers * per_layer

    def _overlap_time(self, shape: ModelShape, batch: float, attention_s: float, knobs: Knobs) -> float:
        """Returns seconds of K and V projection and transfer that attention over the cached tokens hides (§4.2.2)."""
        tp = self.dense_count
        weights = shape.kv_projection_parameters * shape.weight_bytes / shape.parameters
        projection_s = weights / (tp * self.dense.memory_bandwidth * knobs.gemm_bandwidth_share(tp))
        wire = wire_bandwidth(self.dense, tp, self.attention, self.attention_count, knobs)
        hidden = projection_s + shape.kv_crossing_bytes * batch / wire
        return shape.num_layers * min(hidden, attention_s / shape.num_layers)


def balanced_count(
    deployment: OffloadedDeployment,
    shape: ModelShape,
    batch: float,
    context: float,
    knobs: Knobs,
    counts: Sequence[int],
) -> int:
    """Returns the count of attention devices that hold the batch and bring t_a closest to t_m / (n - 1) (§4.3).

    Raises `CapacityError` where none does.
    """

    def apart(count: int) -> float:
        sized = dataclasses.replace(deployment, attention_count=count)
        step = sized.staggered_step(shape, batch, context, knobs, deployment.in_flight)
        return abs(step.attention_s - step.dense_s / sized.replicas)

    needed = batch * shape.kv_bytes_per_token * shape.attended(context)
    room = deployment.attention.memory_bytes * knobs.attention_memory_share
    holding = [count for count in counts if count * room >= needed]
    if not holding:
        raise CapacityError(
            f"{batch:.0f} sequences of {context:.0f} tokens of {shape.name} need {needed / 1e9:.1f} GB for KV; "
            f"{max(counts)}x{deployment.attention.name} offer {max(counts) * room / 1e9:.1f} GB."
        )
    return min(holding, key=apart)


def _copies(shape: ModelShape, tp: int) -> float:
    """Returns copies of the KV: above 1 where `tp` exceeds the KV heads. Latent attention shards by request instead."""
    return 1.0 if shape.compressed_kv else max(1.0, tp / shape.kv_heads)
