"""Tables 1, 3, 4, 5 and Fig 13: what goes into the model, and the identities that the paper derives from it."""

from collections.abc import Mapping

from attention_offload.costs.knobs import FHBN, NCCL
from attention_offload.costs.model_table import load_shape
from attention_offload.costs.workloads import DecodeWorkload
from attention_offload.paper.setups import DEVICES, EQUAL_COST, MODEL_BYTES, TRACES, baseline, lamina
from papers.comparison import Comparison, PaperTable, blocked, compare, compare_points

_PER_DOLLAR = {
    "h100": (89, 0.303, 7.2),
    "h20": (32, 0.864, 20.7),
    "tpu-v6e": (340, 0.607, 11.9),
}


def table_1() -> PaperTable:
    """What a dollar per hour buys: the argument for heterogeneous devices."""
    rows = []
    for name, (tflops, bandwidth, memory) in _PER_DOLLAR.items():
        device = DEVICES[name]
        price = device.price_per_hour
        rows += [
            compare(f"{name}: TFLOPS per $/h", tflops, device.peak_flops() / 1e12 / price, 0.01),
            compare(f"{name}: TB/s per $/h", bandwidth, device.memory_bandwidth / 1e12 / price, 0.01),
            compare(f"{name}: GB per $/h", memory, device.memory_bytes / 1e9 / price, 0.01),
        ]
    return PaperTable("Table 1: what a dollar per hour buys", tuple(rows))


def table_3() -> PaperTable:
    """Weight bytes of the public configurations beside the paper's."""
    rows = (
        compare(f"{model}: weights (GB)", size / 1e9, load_shape(model).weight_bytes / 1e9, 0.03)
        for model, size in MODEL_BYTES.items()
    )
    return PaperTable("Table 3: models", tuple(rows))


def table_4(measured: Mapping[str, tuple[int, DecodeWorkload]]) -> PaperTable:
    """Traces; `measured` holds (requests, workload) of those that are at hand, by the paper's name."""
    rows: list[Comparison] = []
    for name, (requests, paper) in TRACES.items():
        if name not in measured:
            rows.append(blocked(f"{name}: requests", requests, "the trace was not given"))
            continue
        count, ours = measured[name]
        rows += [
            compare(f"{name}: requests", requests, count, 0.0),
            compare(f"{name}: mean prompt tokens", paper.mean_prompt, ours.mean_prompt, 1e-3),
            compare(f"{name}: mean generated tokens", paper.mean_generated, ours.mean_generated, 2e-3),
            compare(
                f"{name}: context of a decode step", paper.context, ours.context, 1e-3, note="not printed in the paper"
            ),
        ]
    return PaperTable("Table 4: traces", tuple(rows))


def table_5() -> PaperTable:
    """Hourly prices of the equal-cost configurations."""
    rows = []
    for model, (_, _, (ours, theirs)) in EQUAL_COST.items():
        rows += [
            compare(f"{model}: Lamina {lamina(model).label} ($/h)", ours, lamina(model).price_per_hour, 1e-4),
            compare(f"{model}: vLLM {baseline(model).label} ($/h)", theirs, baseline(model).price_per_hour, 1e-4),
        ]
    return PaperTable("Table 5: equal-cost configurations", tuple(rows))


def figure_13() -> PaperTable:
    """The network stack: measured by the paper and an input here, so only its ratios are checked."""
    line_rate = 50e9
    rows = (
        compare_points(
            "latency saved over NCCL", 0.505, 1 - FHBN.round_trip_s / NCCL.round_trip_s, 0.001, note="an input"
        ),
        compare_points("share of the line rate", 0.914, FHBN.efficiency, 0.001, note="an input"),
        compare("FHBN bandwidth (GB/s)", 45.7, FHBN.efficiency * line_rate / 1e9, 0.001, note="an input"),
        compare("NCCL bandwidth (GB/s)", 35.5, NCCL.efficiency * line_rate / 1e9, 0.001, note="an input"),
    )
    return PaperTable("Fig 13: network", rows)
