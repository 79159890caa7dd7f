"""Measures an engine through the same `add` and `step` that serve, for a performance model of it.

Prompts of every length with and without a cached prefix, decode batches of every size at several contexts, and prompts
that arrive while others decode. Each scenario is run several times and each of its steps counts with its median.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.common.calibration_grid import Prompt, Scenario, scenarios
from experiments.common.live_engine import CLOCKS, LiveEngine, step_samples, timed_step
from serving.engine.engine import Engine
from serving.request import Request, TraceRequest
from serving.simulator.calibration import (
    DecodeSample,
    PrefillSample,
    StepSample,
    errors,
    fit_steps,
    fit_times,
    step_noise,
)
from serving.simulator.dry_engine import DryEngine
from serving.simulator.performance import Performance
from serving.simulator.steps import EngineModel
from serving.workload.requests import Trace


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """How to measure, and what is not measured.

    Attributes:
        clock: one of `CLOCKS`.
        repeats: runs of each scenario.
        seed: of prompts, of the order of scenarios and of which are held out.
        kv_bytes: of one token.
        layers: of the model.
        network_bandwidth, ssd_bandwidth: of an instance, bytes per second.
        source: the engine in words.
    """

    clock: str
    repeats: int
    seed: int
    kv_bytes: int
    layers: int
    network_bandwidth: float
    ssd_bandwidth: float
    source: str


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A performance model, rows of what was measured and fitted, and the fit's relative errors by name."""

    performance: Performance
    rows: list[dict[str, Any]]
    errors: dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """What `measure` found.

    Attributes:
        steps: every step of every scenario, medians over the repeats.
        held_out: those of the scenarios that no fit may see.
        single: every step of every repeat.
        prefills, decodes: whole prompts and iterations, for the closed form.
    """

    steps: list[StepSample]
    held_out: list[StepSample]
    single: list[StepSample]
    prefills: list[PrefillSample]
    decodes: list[DecodeSample]


class _Bench:
    """Runs scenarios on one engine, and the same on a `DryEngine` in lockstep, which tells what each step computed."""

    def __init__(self, engine: Engine, model: EngineModel, clock: str, seed: int) -> None:
        self._engine, self._dry, self._clock = engine, DryEngine(model), clock
        self._rng = np.random.default_rng(seed)
        self._texts = self._rng.integers(3, 259, (model.max_batch, model.max_model_len)).tolist()
        self._names = itertools.count()

    def run(self, scenario: Scenario) -> list[StepSample]:
        """The steps of one run."""
        prompts = [(self._tokens(prompt), prompt) for prompt in (*scenario.first, *scenario.then)]
        self._steps([self._request(t[: p.cached], 1) for t, p in prompts if p.cached])
        requests = [self._request(tokens, prompt.outputs) for tokens, prompt in prompts]
        split = len(scenario.first)
        samples = self._steps(requests[:split], until_all_decode=bool(scenario.then))
        return samples + self._steps(requests[split:])

    def _tokens(self, prompt: Prompt) -> list[int]:
        if prompt.text is not None:
            return self._texts[prompt.text][: prompt.tokens]
        return self._rng.integers(3, 259, prompt.tokens).tolist()

    def _request(self, tokens: list[int], outputs: int) -> Request:
        return TraceRequest(id=str(next(self._names)), output_tokens=outputs).with_prompt(tokens)

    def _steps(self, requests: Sequence[Request], until_all_decode: bool = False) -> list[StepSample]:
        samples, started = [], set()
        added = tuple(requests)
        for request in added:
            self._engine.add(request)
        while self._engine.has_work and not (until_all_decode and len(started) == len(requests)):
            events, step = timed_step(self._engine, added)
            started |= {event.request_id for event in events}
            samples += step_samples(self._dry, [step], self._clock)
            added = ()
        return samples


def measure(engine: Engine, model: EngineModel, *, clock: str, repeats: int, seed: int) -> Measurement:
    """Runs the grid `repeats` times, in a new order each time so that no drift of the machine falls on one scenario.

    A fifth of the scenarios, drawn by `seed`, is held out of every fit.
    """
    grid = scenarios(model)
    bench = _Bench(engine, model, clock, seed)
    rng = np.random.default_rng(seed)
    runs: list[list[list[StepSample]]] = [[] for _ in grid]
    order = [int(index) for _ in range(repeats) for index in rng.permutation(len(grid))]
    bench.run(grid[0])
    for index in tqdm(order, desc="calibrating", unit="scenario"):
        runs[index].append(bench.run(grid[index]))
    held_out = set(rng.choice(len(grid), len(grid) // 5, replace=False).tolist())
    result = Measurement(steps=[], held_out=[], single=[], prefills=[], decodes=[])
    for index, (scenario, repeated) in enumerate(zip(grid, runs, strict=True)):
        steps = [
            StepSample(same[0].work, statistics.median(sample.seconds for sample in same))
            for same in zip(*repeated, strict=True)
        ]
        result.single.extend(itertools.chain.from_iterable(repeated))
        (result.held_out if index in held_out else result.steps).extend(steps)
        if scenario.test == "prefill" and len(scenario.first) == 1:
            prompt = scenario.first[0]
            seconds = statistics.median(sum(step.seconds for step in run) for run in repeated)
            result.prefills.append(PrefillSample(prompt.tokens, prompt.cached, seconds))
        elif scenario.test == "decode":
            works = [step for step in steps if not step.work.chunks]
            result.decodes.extend(DecodeSample(s.work.decodes, s.work.decode_tokens, s.seconds) for s in works)
    return result


def calibrate(
    engine: Engine, sizes: EngineModel, options: CalibrationOptions, trace: Trace | None = None
) -> Calibration:
    """Measures `engine`, whose sizes are those of `sizes`.

    The steps of serving `trace`, if given, are learned too, and how far steps scatter is then learned from those alone:
    between steps of one kind on a quiet grid less happens than between those of real traffic.
    """
    measured = measure(engine, sizes, clock=options.clock, repeats=options.repeats, seed=options.seed)
    learned, scattered = [*measured.steps, *measured.held_out], measured.single
    if trace is not None:
        live = LiveEngine(engine, CLOCKS[options.clock], seed=options.seed)
        live.serve(trace)
        scattered = step_samples(DryEngine(sizes), live.steps, options.clock)
        learned += scattered
    performance = Performance(
        costs=fit_times(measured.prefills, measured.decodes, options.kv_bytes / options.network_bandwidth),
        load_token=options.kv_bytes / _copy_bandwidth(),
        ssd_token=options.kv_bytes / options.ssd_bandwidth,
        kv_capacity_tokens=sizes.num_pages * sizes.page_size,
        layers=options.layers,
        source=options.source,
        engine=dataclasses.replace(sizes, steps=step_noise(fit_steps(learned), scattered)),
    )
    return Calibration(performance, _rows(measured, performance), _errors(measured, performance))


def _copy_bandwidth() -> float:
    """Bytes per second of a copy in host memory, which is how KV comes to a CPU engine."""
    source, target = np.ones(1 << 26, np.uint8), np.empty(1 << 26, np.uint8)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - begin)
    return source.nbytes / statistics.median(seconds)


def _rows(measured: Measurement, performance: Performance) -> list[dict[str, Any]]:
    """Prompts and iterations beside their closed forms, and the fitted cost of each empty shape."""
    costs = performance.costs
    rows: list[dict[str, Any]] = [
        {"test": "prefill", "tokens": p.tokens, "reused": p.reused, "measured_s": p.seconds}
        | {"fitted_s": costs.prefill_s(p.tokens, p.reused)}
        for p in measured.prefills
    ]
    decodes: dict[tuple[int, int], list[float]] = {}
    for d in measured.decodes:
        decodes.setdefault((d.batch, d.tokens // d.batch), []).append(d.seconds)
    for (batch, context), seconds in decodes.items():
        row = {"test": "decode", "batch": batch, "context": context, "measured_s": statistics.median(seconds)}
        rows.append(row | {"fitted_s": costs.decode_s(batch, batch * context)})
    for row in rows:
        row["error"] = row["fitted_s"] / row["measured_s"] - 1
    shapes = performance.engine.steps.shapes if performance.engine else ()
    for decode_rows, prefill_rows, prefill_tokens, seconds in shapes:
        shape = f"{decode_rows} decodes, {prefill_tokens} tokens of {prefill_rows} prompts"
        rows.append({"test": "padded shape", "shape": shape, "fitted_s": seconds})
    return rows


def _errors(measured: Measurement, performance: Performance) -> dict[str, dict[str, float]]:
    """Of the step model on scenarios that it did not see and on those that it saw, and of the closed forms."""
    seen = fit_steps(measured.steps)
    shapes = {sample.work.shape for sample in measured.steps}
    held_out = [sample for sample in measured.held_out if sample.work.shape in shapes]
    prefills, decodes, costs = measured.prefills, measured.decodes, performance.costs
    pairs = {
        "steps, held out": [(seen.seconds(s.work), s.seconds) for s in held_out],
        "steps, fitted": [(seen.seconds(s.work), s.seconds) for s in measured.steps],
        "prefill, closed form": [(costs.prefill_s(p.tokens, p.reused), p.seconds) for p in prefills],
        "decode, closed form": [(costs.decode_s(d.batch, d.tokens), d.seconds) for d in decodes],
    }
    return {name: errors(*zip(*pair, strict=True)) | {"samples": len(pair)} for name, pair in pairs.items()}
