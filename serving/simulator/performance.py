"""What an instance costs in time: fitted to the paper, computed from a device table, or calibrated from an engine.

All three are coefficients of one form (`TimeModel`), so a decode batch can be advanced in closed form whichever it is.
"""

import dataclasses
import pathlib

from attention_offload.devices import Device, load_devices
from model.config import ModelConfig
from model.presets import preset
from serving.conductor import TimeModel
from serving.conductor.pipeline import PipelineTimeModel
from serving.simulator.decode_node import DecodeTimes
from serving.simulator.decode_table import DecodeTable
from serving.simulator.errors import SimulatorError
from serving.simulator.steps import EngineModel

_GIB = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Performance:
    """One instance.

    Attributes:
        costs: seconds of prefill, decode iterations and transfers. `transfer_token` is one token's KV over the NIC.
        load_token: seconds per token of KV from host memory to the device.
        ssd_token: seconds per token of KV from SSD to the device.
        kv_capacity_tokens: device memory for KV, in tokens.
        layers: of the model; the last layer's KV cannot be sent before prefill ends.
        boundary_token: seconds per token of activations over the NIC, between the nodes of a pipeline.
        schedule_s: fixed latency before a request reaches its queue.
        price_per_hour: dollars for one instance.
        source: where the figures come from.
        decode_table: seconds of decode iterations where no line describes them; `costs` is then what the Conductor
            believes of them.
        engine: of a calibrated engine, its sizes and the cost of its steps: coupled nodes then run its scheduler.
    """

    costs: TimeModel
    load_token: float
    ssd_token: float
    kv_capacity_tokens: int
    layers: int
    schedule_s: float = 0.0
    price_per_hour: float = 0.0
    source: str = ""
    decode_table: DecodeTable | None = None
    engine: EngineModel | None = None
    boundary_token: float = 0.0

    def group(self, nodes: int, chunk: int) -> PipelineTimeModel:
        """Costs of so many nodes that compute prompts together, in chunks of so many tokens."""
        return PipelineTimeModel(
            **dataclasses.asdict(self.costs), stages=nodes, chunk=chunk, boundary_token=self.boundary_token
        )

    @property
    def decode_times(self) -> DecodeTimes:
        return self.decode_table or self.costs


def mooncake_a800(bandwidth: float = 87e9) -> Performance:
    """LLaMA3-70B in bfloat16 on 8 x A800, tensor parallel, from the published measurements (FAST'25).

    Prefill is a least-squares fit to Figure 14 (at most 4 % off at its ten points); the decode iteration time is
    calibrated so that 8 + 8 instances match Figures 1 and 15b; loading is Figure 14's, the NIC (`bandwidth`, bytes per
    second) Figure 12's 4 x 200 Gbit/s. SSD: one NVMe drive of 6 GB/s, which the paper does not measure.
    """
    kv_bytes = 2 * 80 * 1024 * 2
    costs = TimeModel(
        prefill_base=0.0677,
        prefill_token=1.098e-4,
        prefill_pair=7.42e-10,
        prefill_reused=2.57e-6,
        decode_base=22.5e-3,
        decode_sequence=4.0e-3,
        decode_token=3.45e-8,
        transfer_token=kv_bytes / bandwidth,
    )
    return Performance(
        costs=costs,
        load_token=kv_bytes / 102e9,
        ssd_token=kv_bytes / 6e9,
        kv_capacity_tokens=1_300_000,
        layers=80,
        price_per_hour=8 * 1.39,
        source="Mooncake, FAST'25",
        boundary_token=8192 * 2 / bandwidth,
    )


def roofline(
    config: ModelConfig,
    device: Device,
    count: int,
    *,
    dtype: str = "bfloat16",
    efficiency: float = 0.5,
    memory_efficiency: float = 0.8,
    step_overhead_s: float = 2e-3,
    load_bandwidth: float = 50e9,
    ssd_bandwidth: float = 6e9,
) -> Performance:
    """Times of `config`, tensor parallel over `count` devices, from peaks.

    Prefill is bound by compute (2 FLOP per active weight and token, 4 d per attended pair and layer, halved by
    causality), decode by memory: weights once per iteration, each sequence its KV. A sequence's own arithmetic adds to
    that, which overstates small batches by less than the knee of a real roofline.

    Args:
        efficiency: share of the peak FLOP/s that prefill reaches.
        memory_efficiency: share of the peak memory bandwidth that decode reaches.
        step_overhead_s: launches and synchronisation of one step.
        load_bandwidth, ssd_bandwidth: host memory and SSD to device, bytes per second for the instance.

    Raises:
        SimulatorError: the weights do not fit.
    """
    if count < 1:
        raise SimulatorError(f"An instance of {count} devices cannot be; use at least 1.")
    kv_bytes = config.kv_bytes_per_token(dtype)
    value_bytes = kv_bytes / (2 * config.num_layers * config.num_kv_heads * config.head_dim)
    weight_bytes = config.parameter_count * value_bytes
    room = 0.9 * count * device.memory_bytes - weight_bytes
    if room < kv_bytes * 1024:
        raise SimulatorError(
            f"{config.model_type} of {weight_bytes / _GIB:.1f} GiB does not fit in {count} x {device.name} "
            f"({count * device.memory_bytes / _GIB:.1f} GiB); use more devices or a smaller dtype."
        )
    flops = count * device.peak_flops(dtype) * efficiency
    memory = count * device.memory_bandwidth * memory_efficiency
    token_flops = 2 * config.active_parameter_count
    pair_flops = 2 * config.num_layers * config.num_heads * config.head_dim
    costs = TimeModel(
        prefill_base=step_overhead_s + weight_bytes / memory,
        prefill_token=token_flops / flops,
        prefill_pair=pair_flops / flops,
        prefill_reused=kv_bytes / memory,
        decode_base=step_overhead_s + weight_bytes / memory,
        decode_sequence=token_flops / flops,
        decode_token=kv_bytes / memory,
        transfer_token=kv_bytes / (count * device.network_bandwidth),
    )
    return Performance(
        costs=costs,
        load_token=kv_bytes / load_bandwidth,
        ssd_token=kv_bytes / ssd_bandwidth,
        kv_capacity_tokens=int(room / kv_bytes),
        layers=config.num_layers,
        price_per_hour=count * device.price_per_hour if device.priced else 0.0,
        source=f"roofline of {count} x {device.name}",
        boundary_token=config.hidden_size * value_bytes / (count * device.network_bandwidth),
    )


def named_performance(model: str, device: str) -> Performance:
    """The fit to the paper for "llama3-70b" on "a800x8"; otherwise the roofline.

    `model` is a preset's name or a path to a Hugging Face `config.json`; `device` a name of the device table and a
    count, "h100x8". Raises `SimulatorError` where the device is not so written, and what reading the two raises.
    """
    if (model, device) == ("llama3-70b", "a800x8"):
        return mooncake_a800()
    name, _, count = device.rpartition("x")
    if not name or not count.isdigit():
        raise SimulatorError(f"`{device}` is not a device and a count; write it as in h100x8.")
    config = ModelConfig.from_hf(model) if pathlib.Path(model).exists() else preset(model)
    return roofline(config, load_devices()[name], int(count))
