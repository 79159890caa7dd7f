"""`Space`: everything that a search may rent and how it may split the model over it."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from attention_offload.costs.deployments import PARTITIONS, CoupledDeployment, DecodeDeployment, OffloadedDeployment
from attention_offload.costs.experts import ExpertPoolDeployment
from attention_offload.costs.partial import PartiallyOffloadedDeployment
from attention_offload.costs.shapes import ModelShape
from attention_offload.devices import Device
from attention_offload.errors import OffloadError
from attention_offload.planner.rates import PrefillDeployment

# Kinds that can run a model's GEMMs; memory pools of other kinds serve attention only.
_DENSE_KINDS = ("gpu", "tpu")


@dataclasses.dataclass(frozen=True)
class DecodeOption:
    """A way to decode: a deployment, the model as stored on it, and the prefill instances that help each instance."""

    deployment: DecodeDeployment
    shape: ModelShape
    helped_by: PrefillDeployment | None = None
    helpers: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """Device kinds and counts to choose from.

    `shapes` are one model in the number formats to consider. Tensor-parallel degrees (also of coupled and prefill
    instances) come from `dense_counts`, pools of attention devices from `attention_counts`, pools of devices for the
    experts of a mixture from `expert_counts` (empty keeps experts with the rest). `helpers` are how many prefill
    instances may help one decode instance; empty for none. `attention_devices` are those offered for attention, where
    they are not all of `devices`.
    """

    shapes: Sequence[ModelShape]
    devices: Sequence[Device]
    dense_counts: Sequence[int] = (1, 2, 4, 8)
    attention_counts: Sequence[int] = (1, 2, 4, 8)
    expert_counts: Sequence[int] = (1, 2, 4, 8)
    in_flight: Sequence[int] = (2, 3)
    partitions: Sequence[str] = ("head", "sequence")
    helpers: Sequence[int] = (1,)
    attention_devices: Sequence[Device] | None = None

    def __post_init__(self) -> None:
        if not self.devices or not self.shapes:
            raise OffloadError("A search needs at least one device and one model.")
        for device in (*self.devices, *(self.attention_devices or ())):
            if not device.priced:
                raise OffloadError(f"Device `{device.name}` has no price; add one in a device file, or leave it out.")
        for partition in self.partitions:
            if partition not in PARTITIONS:
                raise OffloadError(f"No partition `{partition}`; known: {', '.join(PARTITIONS)}.")

    @property
    def dense_devices(self) -> list[Device]:
        return [device for device in self.devices if device.kind in _DENSE_KINDS]

    def prefill(self) -> Iterator[PrefillDeployment]:
        for device, count in itertools.product(self.dense_devices, self.dense_counts):
            yield PrefillDeployment(device, count)

    def coupled(self) -> Iterator[DecodeOption]:
        for shape, device, count in itertools.product(self.shapes, self.dense_devices, self.dense_counts):
            yield DecodeOption(CoupledDeployment(device, count), shape)

    def experts(self) -> Iterator[DecodeOption]:
        """Yields coupled deployments with the experts on a pool of their own."""
        for option, pool in itertools.product(self.coupled(), self._expert_pools()):
            if pool is not None and option.shape.num_experts and isinstance(option.deployment, CoupledDeployment):
                yield DecodeOption(ExpertPoolDeployment(option.deployment, *pool), option.shape)

    def _expert_pools(self) -> list[tuple[Device, int] | None]:
        """None for experts that stay with the rest."""
        if not any(shape.num_experts for shape in self.shapes):
            return [None]
        return [None, *itertools.product(self.dense_devices, self.expert_counts)]

    def offloaded(self, spread: float) -> Iterator[DecodeOption]:
        """Yields every split of dense and attention; `spread` is the workload's, for attention divided by request."""
        for axes in itertools.product(*self.offloaded_axes()):
            if option := self.offloaded_option(axes, spread):
                yield option

    def offloaded_axes(self) -> tuple[Sequence, ...]:
        """Returns the axes: shape, dense device and count, attention device and count, n, partition, experts."""
        dense, counts, attention = self.dense_devices, self.dense_counts, self.attention_counts
        rest = (self.in_flight, self.partitions, self._expert_pools())
        pools = self.devices if self.attention_devices is None else self.attention_devices
        return (self.shapes, dense, counts, pools, attention, *rest)

    def offloaded_option(self, axes: tuple, spread: float) -> DecodeOption | None:
        """Returns the split at one point of the axes; None for values that do not go together."""
        shape, dense, dense_count, attention, attention_count, n, partition, experts = axes
        if experts and (n > 2 or not shape.num_experts):
            return None
        deployment = OffloadedDeployment(
            dense=dense,
            dense_count=dense_count,
            attention=attention,
            attention_count=attention_count,
            in_flight=n,
            partition=partition,
            context_spread=spread,
        )
        return DecodeOption(ExpertPoolDeployment(deployment, *experts) if experts else deployment, shape)

    def partial(self, slowdown: float) -> Iterator[DecodeOption]:
        """Yields coupled deployments that prefill instances help; helping slows those down by `slowdown`."""
        for option, prefill, helpers in itertools.product(self.coupled(), self.prefill(), self.helpers):
            coupled = option.deployment
            if not isinstance(coupled, CoupledDeployment):
                continue
            helped = PartiallyOffloadedDeployment(
                device=coupled.device,
                count=coupled.count,
                helper=prefill.device,
                helper_count=helpers * prefill.count,
                helper_tp=prefill.count,
            )
            slowed = dataclasses.replace(prefill, slowdown=slowdown)
            yield DecodeOption(helped, option.shape, helped_by=slowed, helpers=helpers)
