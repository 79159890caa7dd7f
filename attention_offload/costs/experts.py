"""Experts on devices of their own: the slices of a mixture-of-experts model between router and combine."""

import dataclasses
import functools

from attention_offload.costs.deployments import CoupledDeployment, DecodeStep, OffloadedDeployment, room_beside_weights
from attention_offload.costs.knobs import Knobs
from attention_offload.costs.operators import p_norm, wire_bandwidth
from attention_offload.costs.shapes import ModelShape
from attention_offload.devices import Device
from attention_offload.errors import OffloadError

# Batches in flight beside a coupled base: one is in the experts while the other is in the rest (ping-pong).
_PING_PONG = 2


@dataclasses.dataclass(frozen=True)
class ExpertPoolDeployment:
    """`expert_count` devices hold the experts, whole ones each; `base` does everything else.

    With a coupled base this is the cut of MegaScale-Infer (arXiv:2504.02263): attention and projections here, experts
    there. With an offloaded one attention is cut out too, and there are three pools. Batches in flight take turns in
    the pools, so the longest stay in one of them, or the whole way of one batch, is the time of a round. Tokens are
    taken to spread evenly over the experts.
    """

    base: CoupledDeployment | OffloadedDeployment
    experts: Device
    expert_count: int

    def __post_init__(self) -> None:
        if self.expert_count < 1:
            raise OffloadError(f"`expert_count` must be at least 1, got {self.expert_count}.")
        if isinstance(self.base, OffloadedDeployment) and self.base.replicas > 1:
            raise OffloadError("Experts beside an offloaded base take one replica of the rest; use `in_flight` 1 or 2.")

    @property
    def price_per_hour(self) -> float:
        return self.base.price_per_hour + self.expert_count * self.experts.price_per_hour

    @property
    def label(self) -> str:
        return f"{self.base.label}, experts on {self.expert_count}x{self.experts.name}"

    @property
    def kv_network_bandwidth(self) -> float:
        return self.base.kv_network_bandwidth

    def kv_bytes(self, shape: ModelShape, knobs: Knobs) -> float:
        room_beside_weights(self.experts, self.expert_count, _only_experts(shape), knobs.coupled_memory_share)
        return self.base.kv_bytes(_without_experts(shape), knobs)

    def decode_step(self, shape: ModelShape, batch: float, context: float, knobs: Knobs) -> DecodeStep:
        ways = {self.staggered_step(shape, batch, context, knobs, n) for n in (1, _PING_PONG)}
        return min(ways, key=lambda step: step.tbt_s)

    def staggered_step(self, shape: ModelShape, batch: float, context: float, knobs: Knobs, n: int) -> DecodeStep:
        """Returns a step with `n` batches in flight: a round through the pools; no pool serves two at once."""
        rest, part = _without_experts(shape), batch / n
        expert_s = expert_time(shape, self.experts, self.expert_count, part, knobs)
        wire_s, network_s = self._network_time(shape, part, knobs)
        if isinstance(self.base, OffloadedDeployment):
            base = self.base.staggered_step(rest, part, context, knobs, 1)
            stays = (base.dense_s, base.attention_s)
        else:
            base = self.base.decode_step(rest, part, context, knobs)
            stays = (base.dense_s + base.attention_s,)
        dense_s, network_s = base.dense_s + expert_s, base.network_s + network_s
        round_s = dense_s + base.attention_s + network_s - base.overlap_s
        if n > 1:
            round_s = max(round_s, *(n * stay for stay in (*stays, expert_s, wire_s)))
        overhead_s = knobs.offload_overhead_s + knobs.offload_sequence_overhead_s * batch
        return DecodeStep(
            batch=batch,
            dense_s=dense_s,
            attention_s=base.attention_s,
            network_s=network_s,
            overlap_s=base.overlap_s,
            overhead_s=overhead_s,
            tbt_s=round_s + overhead_s,
        )

    def _network_time(self, shape: ModelShape, batch: float, knobs: Knobs) -> tuple[float, float]:
        """Returns seconds in which one direction of the NICs is busy, and seconds of dispatch and combine together.

        A token goes to each device that holds one of its experts, once.
        """
        near = self.base.dense if isinstance(self.base, OffloadedDeployment) else self.base.device
        count = self.base.dense_count if isinstance(self.base, OffloadedDeployment) else self.base.count
        copies = min(shape.experts_per_token, self.expert_count)
        moved = shape.num_layers * batch * copies * shape.activation_bytes * shape.hidden_size
        wire_s = moved / wire_bandwidth(near, count, self.experts, self.expert_count, knobs)
        return wire_s, 2 * wire_s + shape.num_layers * knobs.network.round_trip_s


def expert_time(shape: ModelShape, device: Device, count: int, batch: float, knobs: Knobs) -> float:
    """Returns seconds of all expert layers of a step over `batch` tokens, whole experts spread over `count` devices."""
    experts = _only_experts(shape)
    routed = batch * shape.experts_per_token
    traffic = experts.weights_read(batch) + 2 * shape.activation_bytes * routed * shape.hidden_size
    memory_s = traffic / count / (device.memory_bandwidth * knobs.gemm_bandwidth_share(1))
    flops = count * device.peak_flops(shape.compute_format) * knobs.gemm_flops_efficiency
    compute_s = 2 * shape.expert_parameters * routed / flops
    return p_norm(memory_s, compute_s, knobs.roofline_knee) + shape.num_layers * knobs.layer_overhead_s


@functools.lru_cache
def _only_experts(shape: ModelShape) -> ModelShape:
    if not shape.num_experts:
        raise OffloadError(f"{shape.name} has no experts to put on devices of their own.")
    return dataclasses.replace(
        shape,
        parameters=shape.num_experts * shape.expert_parameters,
        active_parameters=shape.experts_per_token * shape.expert_parameters,
    )


@functools.lru_cache
def _without_experts(shape: ModelShape) -> ModelShape:
    experts = _only_experts(shape)
    return dataclasses.replace(
        shape,
        parameters=shape.parameters - experts.parameters,
        active_parameters=shape.active_parameters - experts.active_parameters,
        num_experts=0,
        experts_per_token=0,
        expert_parameters=0.0,
    )
