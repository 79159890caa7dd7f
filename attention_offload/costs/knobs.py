"""Every assumption of the cost model, by name, and the presets that the experiments compare."""

import dataclasses
import json
import math
import os
import pathlib
import tomllib
from collections.abc import Mapping
from typing import Any

from attention_offload.errors import OffloadError


@dataclasses.dataclass(frozen=True)
class NetworkStack:
    """A network stack: seconds of a small message's round trip, and the share of the line rate that it reaches."""

    name: str
    round_trip_s: float
    efficiency: float


# Lamina §5, Fig 13, measured there on 400 Gb/s RoCE (50 GB/s): 33.0 us and 45.7 GB/s against 66.6 us and 35.5 GB/s.
FHBN = NetworkStack("fhbn", 33.0e-6, 45.7 / 50)
NCCL = NetworkStack("nccl", 66.6e-6, 35.5 / 50)
LINE_RATE = NetworkStack("line_rate", 0.0, 1.0)
NETWORKS = {stack.name: stack for stack in (FHBN, NCCL, LINE_RATE)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knobs:
    """Assumptions of the cost model; times in seconds, efficiencies as shares of the datasheet's peak.

    Dense side: `gemm_memory_efficiency` by tensor-parallel degree, `gemm_flops_efficiency`, `roofline_knee` (p of the
    p-norm that joins the two sides of the roofline; infinity is the sharp corner), `layer_overhead_s` per layer and
    `layer_token_overhead_s` per layer and sequence (norms, RoPE, sampling), all-reduces of `all_reduce_latency_s` at
    `link_efficiency`. Attention side: `attention_memory_efficiency`, `attention_flops_efficiency`,
    `attention_layer_overhead_s`. Memory: the share that a coupled instance and an attention worker give to weights
    and KV. Host: seconds per step, fixed and per sequence, of a coupled and of an offloaded engine. Attention on
    prefill devices (`helper_*`): the shares of their bandwidth and of their free memory that it may take, and by how
    much it slows prefill.
    """

    name: str
    gemm_memory_efficiency: Mapping[int, float] = dataclasses.field(hash=False)
    gemm_flops_efficiency: float
    roofline_knee: float
    layer_overhead_s: float
    layer_token_overhead_s: float
    all_reduce_latency_s: float
    link_efficiency: float
    attention_memory_efficiency: float
    attention_flops_efficiency: float
    attention_layer_overhead_s: float
    network: NetworkStack
    coupled_memory_share: float
    attention_memory_share: float
    coupled_overhead_s: float
    coupled_sequence_overhead_s: float
    offload_overhead_s: float
    offload_sequence_overhead_s: float
    overlap: bool = True
    helper_bandwidth_share: float = 0.6
    helper_memory_share: float = 0.8
    helper_prefill_slowdown: float = 0.1

    def __post_init__(self) -> None:
        shares = {name: value for name, value in vars(self).items() if name.endswith(("efficiency", "share"))}
        efficiencies = shares.pop("gemm_memory_efficiency")
        shares |= {f"gemm_memory_efficiency of {tp} devices": value for tp, value in efficiencies.items()}
        for name, value in shares.items():
            if not 0 < value <= 1:
                raise OffloadError(f"Knob `{name}` is a share between 0 and 1, got {value}.")
        for name, value in vars(self).items():
            if name.endswith("_s") and not value >= 0:
                raise OffloadError(f"Knob `{name}` is a time and cannot be negative, got {value}.")
        if 1 not in efficiencies:
            raise OffloadError("Knob `gemm_memory_efficiency` needs an entry for 1 device.")

    def gemm_bandwidth_share(self, tp: int) -> float:
        """Returns the memory efficiency of a GEMM over `tp` devices: the entry of the largest degree up to `tp`."""
        return self.gemm_memory_efficiency[max(degree for degree in self.gemm_memory_efficiency if degree <= tp)]

    def changed(self, **knobs: Any) -> "Knobs":
        """Returns these knobs with some replaced. Raises `OffloadError` for names that are not knobs."""
        known = {field.name for field in dataclasses.fields(self)}
        if unknown := knobs.keys() - known:
            raise OffloadError(f"No knob {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}.")
        return dataclasses.replace(self, **knobs)


# Efficiencies of the dense side: from the public H100 profiles of the Vidur simulator (Llama-2-70B MLP and all-reduce).
A_PRIORI = Knobs(
    name="a_priori",
    gemm_memory_efficiency={1: 0.86, 2: 0.83, 4: 0.75, 8: 0.70},
    gemm_flops_efficiency=0.65,
    roofline_knee=4.0,
    layer_overhead_s=20e-6,
    layer_token_overhead_s=0.13e-6,
    all_reduce_latency_s=15e-6,
    link_efficiency=0.7,
    attention_memory_efficiency=0.75,
    attention_flops_efficiency=0.5,
    attention_layer_overhead_s=6e-6,
    network=FHBN,
    coupled_memory_share=0.90,
    attention_memory_share=0.95,
    coupled_overhead_s=4e-3,
    coupled_sequence_overhead_s=20e-6,
    offload_overhead_s=2e-3,
    offload_sequence_overhead_s=4e-6,
)
# Only assumed knobs are moved to meet the range of Fig 10: host overheads and the attention workers' memory share.
FITTED = A_PRIORI.changed(name="fitted", coupled_overhead_s=6e-3, offload_overhead_s=0.0, attention_memory_share=0.92)
# The hardware alone: sharp rooflines at the datasheet's peaks and no software on either side.
IDEAL = A_PRIORI.changed(
    name="ideal",
    gemm_memory_efficiency={1: 1.0},
    gemm_flops_efficiency=1.0,
    roofline_knee=math.inf,
    layer_overhead_s=0.0,
    layer_token_overhead_s=0.0,
    all_reduce_latency_s=0.0,
    link_efficiency=1.0,
    attention_memory_efficiency=1.0,
    attention_flops_efficiency=1.0,
    attention_layer_overhead_s=0.0,
    network=LINE_RATE,
    coupled_overhead_s=0.0,
    coupled_sequence_overhead_s=0.0,
    offload_overhead_s=0.0,
    offload_sequence_overhead_s=0.0,
)
# Engines that schedule while the device computes, on both sides: what the paper's baseline did not do.
MODERN = A_PRIORI.changed(
    name="modern",
    coupled_overhead_s=1e-3,
    coupled_sequence_overhead_s=2e-6,
    offload_overhead_s=1e-3,
    offload_sequence_overhead_s=2e-6,
)
KNOBS = {knobs.name: knobs for knobs in (IDEAL, A_PRIORI, FITTED, MODERN)}


def load_knobs(preset: str, calibration: str | os.PathLike[str] | None = None) -> Knobs:
    """A preset ("ideal", "a_priori", "fitted", "modern"), or "measured": `a_priori` changed by a calibration file.

    The calibration file is JSON or TOML: knob names and values, written by `attention_offload.costs.calibration` or by
    hand; `network` is a stack's name. Raises `OffloadError` naming the unknown preset or knob.
    """
    if preset == "measured" and calibration is None:
        raise OffloadError("The knobs `measured` need a calibration file; give one, or choose a preset.")
    if preset not in (*KNOBS, "measured"):
        raise OffloadError(f"No knobs `{preset}`; known: {', '.join(KNOBS)}, measured.")
    if calibration is None:
        return KNOBS[preset]
    path = pathlib.Path(calibration)
    try:
        text = path.read_text()
        changes = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise OffloadError(f"Cannot read the calibration file {path}: {error}.") from error
    changes = dict(changes.get("knobs", changes))
    if "network" in changes:
        if changes["network"] not in NETWORKS:
            raise OffloadError(f"No network stack `{changes['network']}`; known: {', '.join(NETWORKS)}.")
        changes["network"] = NETWORKS[changes["network"]]
    if "gemm_memory_efficiency" in changes:
        changes["gemm_memory_efficiency"] = {int(k): v for k, v in changes["gemm_memory_efficiency"].items()}
    return KNOBS.get(preset, A_PRIORI).changed(**{"name": preset} | changes)
