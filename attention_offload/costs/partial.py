"""Partial offload: a part of decode attention runs on prefill devices."""

import dataclasses
import functools

from attention_offload.costs.deployments import DecodeStep, room_beside_weights
from attention_offload.costs.knobs import Knobs
from attention_offload.costs.operators import attention_time, dense_time, wire_bandwidth
from attention_offload.costs.shapes import ModelShape
from attention_offload.devices import Device


@functools.lru_cache
def _with_bandwidth(device: Device, memory_bandwidth: float) -> Device:
    return dataclasses.replace(device, memory_bandwidth=memory_bandwidth)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartiallyOffloadedDeployment:
    """`count` decode devices, helped by `helper_count` prefill devices, `helper_tp` of them to a copy of the weights.

    Helpers prefill, and lend the memory and bandwidth that prefill leaves idle (Adrenaline, arXiv:2503.20552), so they
    cost nothing here. A share of the sequences has its KV and its attention on the helpers: the share at which decode
    devices and helpers finish together, as far as memory allows.
    """

    device: Device
    count: int
    helper: Device
    helper_count: int
    helper_tp: int

    @property
    def price_per_hour(self) -> float:
        return self.count * self.device.price_per_hour

    @property
    def label(self) -> str:
        return f"{self.count}x{self.device.name}~{self.helper_count}x{self.helper.name}"

    @property
    def kv_network_bandwidth(self) -> float:
        return self.count * self.device.network_bandwidth + self.helper_count * self.helper.network_bandwidth

    def kv_bytes(self, shape: ModelShape, knobs: Knobs) -> float:
        return self._own_bytes(shape, knobs) + self._helper_bytes(shape, knobs)

    def decode_step(self, shape: ModelShape, batch: float, context: float, knobs: Knobs) -> DecodeStep:
        share = self._helped_share(shape, batch, context, knobs)
        own_s = self._own_attention(shape, batch * (1 - share), context, knobs)
        helper_s, network_s = self._helper_attention(shape, batch * share, context, knobs)
        attention_s = max(own_s, helper_s)
        # The helpers' round trip hides behind the attention of the sequences that stay.
        overlap_s = attention_s + network_s - max(own_s, helper_s + network_s)
        dense_s = dense_time(shape, self.device, self.count, batch, knobs)
        overhead_s = knobs.coupled_overhead_s + knobs.coupled_sequence_overhead_s * batch
        tbt_s = dense_s + attention_s + network_s - overlap_s + overhead_s
        return DecodeStep(
            batch=batch,
            dense_s=dense_s,
            attention_s=attention_s,
            network_s=network_s,
            overlap_s=overlap_s,
            overhead_s=overhead_s,
            tbt_s=tbt_s,
        )

    def _own_bytes(self, shape: ModelShape, knobs: Knobs) -> float:
        return room_beside_weights(self.device, self.count, shape, knobs.coupled_memory_share)

    def _helper_bytes(self, shape: ModelShape, knobs: Knobs) -> float:
        one = room_beside_weights(self.helper, self.helper_tp, shape, knobs.coupled_memory_share)
        return one * self.helper_count / self.helper_tp * knobs.helper_memory_share

    def _own_attention(self, shape: ModelShape, batch: float, context: float, knobs: Knobs) -> float:
        return attention_time(shape, self.device, self.count, batch, context, knobs) if batch > 0 else 0.0

    def _helper_attention(self, shape: ModelShape, batch: float, context: float, knobs: Knobs) -> tuple[float, float]:
        """Returns seconds of attention on the helpers, and seconds of the network round trips."""
        if batch <= 0:
            return 0.0, 0.0
        wire = wire_bandwidth(self.device, self.count, self.helper, self.helper_count, knobs)
        network_s = shape.num_layers * (knobs.network.round_trip_s + batch * shape.crossing_bytes / wire)
        lent = _with_bandwidth(self.helper, self.helper.memory_bandwidth * knobs.helper_bandwidth_share)
        return attention_time(shape, lent, self.helper_count, batch, context, knobs), network_s

    def _helped_share(self, shape: ModelShape, batch: float, context: float, knobs: Knobs) -> float:
        """Returns the share of sequences on the helpers at which both ends finish together; both are linear in it."""
        need = batch * shape.kv_bytes_per_token * shape.attended(context)
        least = max(0.0, 1 - self._own_bytes(shape, knobs) / need)
        most = min(1.0, self._helper_bytes(shape, knobs) / need)
        own_s = self._own_attention(shape, batch, context, knobs)
        helpers_s = sum(self._helper_attention(shape, batch, context, knobs))
        launch_s = shape.num_layers * knobs.attention_layer_overhead_s
        fixed_s = launch_s + shape.num_layers * knobs.network.round_trip_s
        # own_s less a share of what is not launching = fixed_s plus that share of the rest of helpers_s.
        share = (own_s - fixed_s) / (own_s - launch_s + helpers_s - fixed_s)
        # A share too small to pay for its round trips is better kept at home.
        return least if share < least + 1e-3 else min(share, max(least, most))
