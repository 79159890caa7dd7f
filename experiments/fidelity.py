"""How far is the simulator from the engine? Serve a trace live, simulate the same, and print both and their distance.

    python -m experiments.fidelity --trace=trace.jsonl --shrink=16 --speed=0.7 --out=out/fidelity
    python -m experiments.fidelity --trace=trace.jsonl --shrink=16 --calibration=out/calibrate/calibration.json

Without a calibration the engine is measured first: the grid of `calibrate`, and the first `--calibration_requests` of
the trace. What is compared is the slice after those, served in open loop by the engine in this process. `error` is
simulated over live; `spread` is how far the live runs are from one another, below which no error means anything; a
machine that computes faster or slower than when it was calibrated shows in `step_speed`, and `error_at_speed` is the
error left once every simulated step is scaled by that one number.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from absl import flags
from tqdm import tqdm

from experiments.common import measuring_flags
from experiments.common.engine_calibration import CalibrationOptions, calibrate
from experiments.common.flags import define_float
from experiments.common.live_engine import CLOCKS, LiveEngine, step_samples
from experiments.common.process import with_huge_pages
from experiments.common.results import flat, start_result, write_result
from experiments.common.script import SEED, run
from experiments.common.tables import print_table
from serving.conductor import ConductorConfig
from serving.engine.engine import Engine
from serving.simulator.calibration import StepSample, errors
from serving.simulator.calibration_file import read_performance, write_performance
from serving.simulator.config import ClusterConfig
from serving.simulator.dry_engine import DryEngine
from serving.simulator.errors import SimulatorError
from serving.simulator.performance import Performance
from serving.simulator.simulation import Simulation
from serving.simulator.steps import EngineModel
from serving.workload.errors import TraceError
from serving.workload.fidelity import fidelity_rows
from serving.workload.outcomes import RequestOutcome, totals
from serving.workload.requests import Trace
from serving.workload.resize import fitting, part, shrink
from serving.workload.traces import read_trace

TRACE = flags.DEFINE_string(
    "trace", None, "Trace to serve and simulate, a Mooncake JSONL or Azure CSV file.", required=True
)
START = flags.DEFINE_integer("start", 0, "Requests of the trace to skip first.", lower_bound=0)
REQUESTS = flags.DEFINE_integer("requests", 200, "Requests to compare live and simulated.", lower_bound=1)
CALIBRATION_REQUESTS = flags.DEFINE_integer(
    "calibration_requests", 60, "Requests before the compared ones that the engine is calibrated on."
)
SHRINK = flags.DEFINE_integer("shrink", 16, "Divisor of all prompt and output lengths of the trace.", lower_bound=1)
SHRINK_OUTPUTS = flags.DEFINE_integer(
    "shrink_outputs", None, "Divisor of output lengths; by default that of --shrink.", lower_bound=1
)
SPEED = define_float("speed", 1.0, "Offered load as a multiple of the trace's own.", lower_bound=1e-9)
JITTER_S = define_float(
    "jitter_s", 0.0, "Seconds over which arrivals of one coarse time stamp are spread.", lower_bound=0.0
)
CALIBRATION = flags.DEFINE_string(
    "calibration", None, "File that `calibrate` wrote; by default the engine is measured first."
)
RUNS = flags.DEFINE_integer("runs", 3, "Live runs, and as many simulated ones; the median counts.", lower_bound=1)
TTFT_SLO_S = define_float("ttft_slo_s", 2.0, "Limit of TTFT, in seconds.", lower_bound=1e-9)
TBT_SLO_S = define_float("tbt_slo_s", 0.25, "Limit of TBT, in seconds.", lower_bound=1e-9)


class SimulatedEngine:
    """The simulator's coupled node, served as `LiveEngine` is."""

    def __init__(self, performance: Performance, seed: int) -> None:
        """`seed` is that of how steps scatter."""
        self._performance, self._seed = performance, seed

    def serve(self, trace: Trace) -> Sequence[RequestOutcome]:
        config = ClusterConfig(prefill=0, decode=0, coupled=1, conductor=ConductorConfig(seed=self._seed))
        return Simulation(config, self._performance).run(trace).outcomes


def _read_trace() -> Trace:
    trace = read_trace(TRACE.value, start=START.value, speed=SPEED.value, jitter_s=JITTER_S.value, seed=SEED.value)
    return shrink(trace, SHRINK.value, SHRINK_OUTPUTS.value)


def _slices(trace: Trace) -> tuple[Trace | None, Trace]:
    """The slice to calibrate on, if one is wanted, and the slice to compare."""
    first = 0 if CALIBRATION.value else CALIBRATION_REQUESTS.value
    return part(trace, 0, first) if first else None, part(trace, first, REQUESTS.value)


def _performance(engine: Engine, options: CalibrationOptions, trace: Trace | None) -> Performance:
    sizes = measuring_flags.engine_sizes(engine)
    if CALIBRATION.value is None:
        return calibrate(engine, sizes, options, trace).performance
    performance = read_performance(CALIBRATION.value)
    if performance.engine is None or dataclasses.replace(performance.engine, steps=sizes.steps) != sizes:
        raise SimulatorError(f"{CALIBRATION.value} was not made for an engine of {sizes}; give the same flags to both.")
    return performance


def _scaled(performance: Performance, speed: float) -> Performance:
    """With every step `speed` times as long."""
    if performance.engine is None:
        return performance
    steps = performance.engine.steps
    rates = ("decode_sequence", "decode_token", "prefill_token", "prefill_pair")
    scaled = dataclasses.replace(
        steps,
        shapes=tuple((d, r, t, seconds * speed) for d, r, t, seconds in steps.shapes),
        **{name: getattr(steps, name) * speed for name in rates},
    )
    engine = dataclasses.replace(performance.engine, steps=scaled)
    return dataclasses.replace(performance, engine=engine)


def _summary(outcomes: Sequence[RequestOutcome]) -> dict[str, Any]:
    return totals(outcomes, TTFT_SLO_S.value, TBT_SLO_S.value)


def _median(runs: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Median of every total over the runs, and its spread (largest less smallest over the median)."""
    middle, spread = {}, {}
    for name, value in runs[0].items():
        if isinstance(value, dict):
            middle[name], spread[name] = _median([run[name] for run in runs])
        elif value is None:
            middle[name] = spread[name] = None
        else:
            values = [run[name] for run in runs]
            middle[name] = statistics.median(values)
            spread[name] = (max(values) - min(values)) / middle[name] if middle[name] else 0.0
    return middle, spread


def _simulate(performance: Performance, trace: Trace) -> dict[str, Any]:
    """Median totals over seeds of how steps scatter."""
    runs = (SimulatedEngine(performance, SEED.value + run).serve(trace) for run in range(RUNS.value))
    return _median([_summary(outcomes) for outcomes in runs])[0]


def _serve_live(engine: Engine, model: EngineModel, trace: Trace) -> tuple[dict[str, Any], list[StepSample], float]:
    """Totals of one run, its steps on the chosen clock, and wall over CPU seconds of those."""
    with tqdm(total=len(trace.requests), desc="live", unit="request") as bar:
        live = LiveEngine(
            engine, CLOCKS[measuring_flags.CLOCK.value], seed=SEED.value, progress=lambda n: bar.update(n - bar.n)
        )
        outcomes = live.serve(trace)
    samples = step_samples(DryEngine(model), live.steps, measuring_flags.CLOCK.value)
    disturbance = sum(step.wall_s for step in live.steps) / sum(step.cpu_s for step in live.steps)
    return _summary(outcomes), samples, disturbance


def main() -> None:
    with_huge_pages()
    measuring_flags.pin()
    out, meta = start_result()
    trace = _read_trace()
    _slices(trace)  # too short a trace is refused before the engine compiles its steps
    engine, options = measuring_flags.make_engine(repeats=2)
    calibration_trace, trace = _slices(fitting(trace, engine.max_model_len))
    performance = _performance(engine, options, calibration_trace)
    write_performance(out / "calibration.json", performance)
    model = performance.engine
    assert model is not None
    runs = [_serve_live(engine, model, trace) for _ in range(RUNS.value)]
    samples = [sample for _, steps, _ in runs for sample in steps]
    predicted = [model.steps.seconds(sample.work) for sample in samples]
    expected_s = sum(model.steps.mean_s(sample.work) for sample in samples)
    step_speed = sum(sample.seconds for sample in samples) / expected_s
    live, spread = _median([summary for summary, _, _ in runs])
    simulated = _simulate(performance, trace)
    at_speed = _simulate(_scaled(performance, step_speed), trace)
    rows = fidelity_rows(live, simulated)
    spreads = flat(spread)
    for row, scaled in zip(rows, fidelity_rows(live, at_speed), strict=True):
        row |= {"spread": spreads[row["metric"]], "error_at_speed": scaled["error"]}
    busy = sum(sample.seconds for sample in samples) / (RUNS.value * live["duration_s"])
    notes = {
        "requests": len(trace.requests),
        "live_runs": RUNS.value,
        "clock": measuring_flags.CLOCK.value,
        "utilisation": busy,
        "steps": len(samples) // RUNS.value,
        "step_speed": step_speed,
        "step_error": errors(predicted, [sample.seconds for sample in samples]),
        "wall_over_cpu": statistics.median(disturbance for _, _, disturbance in runs),
        "compiles_after_warm_up": engine.stats().compiles_after_warm_up,
    }
    print_table(rows, f"{trace.name}: {', '.join(trace.notes) or 'read as it is'}; {performance.source}")
    print_table([notes])
    write_result(out, meta, rows, notes)


if __name__ == "__main__":
    run(main, TraceError, SimulatorError)
