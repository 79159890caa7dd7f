"""Models, traces and equal-cost configurations of the paper's evaluation (Tables 1 and 3-5)."""

import dataclasses
from collections.abc import Mapping

from attention_offload.costs.deployments import (
    CoupledDeployment,
    DecodeDeployment,
    DecodeStep,
    OffloadedDeployment,
    max_batch,
)
from attention_offload.costs.knobs import Knobs
from attention_offload.costs.model_table import load_shape
from attention_offload.costs.shapes import ModelShape
from attention_offload.costs.workloads import DecodeWorkload
from attention_offload.devices import load_devices

# Table 3, in bytes. They are not quite two per parameter of the public configurations; the paper's are used throughout.
MODEL_BYTES = {"llama-33b": 64.7e9, "llama-65b": 130.1e9, "llama3-70b": 137.5e9}

# Table 4: requests, mean prompt and mean generated tokens. The context of a decode step is a mean over steps, which the
# paper does not print: computed from the public traces for the first three, from the means for the last.
TRACES: Mapping[str, tuple[int, DecodeWorkload]] = {
    "Azure-Conv": (19366, DecodeWorkload(name="Azure-Conv", mean_prompt=1154.7, mean_generated=211.1, context=1226.5)),
    "Azure-Code": (8819, DecodeWorkload(name="Azure-Code", mean_prompt=2047.8, mean_generated=27.9, context=2130.4)),
    "Kimi-Conv": (12031, DecodeWorkload(name="Kimi-Conv", mean_prompt=12035.1, mean_generated=342.6, context=13125.4)),
    "Kimi-TA": (23608, DecodeWorkload.from_means("Kimi-TA", 8560.0, 182.1)),
}

DEVICES = load_devices("paper")
COMPUTE, MEMORY = DEVICES["h100"], DEVICES["h20"]

# Table 5: dense and attention devices of Lamina, devices of the baseline, and what the paper says they cost per hour.
EQUAL_COST = {
    "llama-33b": ((1, 2), 2, (20.32, 22.12)),
    "llama-65b": ((2, 4), 4, (40.64, 44.24)),
    "llama3-70b": ((2, 4), 4, (40.64, 44.24)),
}


def paper_shape(model: str) -> ModelShape:
    """The public configuration with the paper's weight bytes."""
    weights = MODEL_BYTES[model] / 2
    return dataclasses.replace(load_shape(model), parameters=weights, active_parameters=weights)


def baseline(model: str) -> CoupledDeployment:
    return CoupledDeployment(COMPUTE, EQUAL_COST[model][1])


def lamina(model: str, in_flight: int = 2) -> OffloadedDeployment:
    (dense, attention), _, _ = EQUAL_COST[model]
    return OffloadedDeployment(
        dense=COMPUTE, dense_count=dense, attention=MEMORY, attention_count=attention, in_flight=in_flight
    )


def fullest_step(
    deployment: DecodeDeployment, shape: ModelShape, context: float, knobs: Knobs, largest: float = float("inf")
) -> DecodeStep:
    """A step with all the batch that fits, up to `largest`."""
    return deployment.decode_step(shape, min(max_batch(deployment, shape, context, knobs), largest), context, knobs)
