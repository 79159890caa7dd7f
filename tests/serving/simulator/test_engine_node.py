"""A simulated engine plans what the engine plans, and skips what needs no planning."""

import dataclasses
import random

import numpy as np
import pytest
from flax import nnx

from model.config import ModelConfig
from model.transformer import Transformer
from serving.conductor import ConductorConfig
from serving.engine import EngineConfig, RequestRefusedError
from serving.engine.build import build_engine
from serving.request import Request, TraceRequest
from serving.simulator.calibration_file import read_performance, write_performance
from serving.simulator.config import ClusterConfig
from serving.simulator.dry_engine import DryEngine
from serving.simulator.errors import SimulatorError
from serving.simulator.performance import Performance, mooncake_a800
from serving.simulator.simulation import Simulation
from serving.simulator.steps import EngineModel, StepModel, StepWork
from serving.workload.outcomes import COMPLETED, tbt_s
from serving.workload.prompts import BYTE_IDS, PromptWriter
from serving.workload.requests import Trace
from tests.serving.simulator.equivalence import SIZE, random_trace

TINY = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
    }
)


def engine_model(**sizes: int | bool) -> EngineModel:
    """Shapes cost about what their padding suggests."""
    defaults = {"page_size": 8, "num_pages": 40, "max_batch": 4, "token_budget": 24, "max_prefill_rows": 2}
    fields = defaults | {"max_model_len": 128, "prefix_cache": True} | sizes
    dry = DryEngine(
        EngineModel(
            **fields,
            steps=StepModel(shapes=(), decode_sequence=0.0, decode_token=0.0, prefill_token=0.0, prefill_pair=0.0),
        )
    )
    shapes = tuple(
        (b.decode_rows, b.prefill_rows, b.prefill_tokens, 1e-3 + 1e-4 * b.tokens + 1e-5 * b.prefill_rows)
        for b in dry.shapes
    )
    return EngineModel(
        **fields,
        steps=StepModel(shapes=shapes, decode_sequence=1e-4, decode_token=3e-6, prefill_token=2e-5, prefill_pair=1e-8),
    )


def performance_of(model: EngineModel) -> Performance:
    return dataclasses.replace(mooncake_a800(), engine=model)


def request_of(number: int, prompt: list[int], outputs: int) -> Request:
    return TraceRequest(id=str(number), arrival_s=float(number), output_tokens=outputs).with_prompt(prompt)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("pages", "preempts"), [(64, False), (14, True)])
def test_every_step_is_the_one_that_the_engine_computes(pages: int, preempts: bool, deterministic: bool) -> None:
    model = engine_model(num_pages=pages, deterministic=deterministic)
    sizes = EngineConfig(
        page_size=8, num_pages=pages, max_batch=4, token_budget=24, max_prefill_rows=2, deterministic=deterministic
    )
    engine, dry = build_engine(Transformer(TINY, nnx.Rngs(0)), sizes), DryEngine(model)
    rng = np.random.default_rng(pages)
    texts = rng.integers(3, 97, (6, 128))
    coming = [
        request_of(i, texts[rng.integers(6), : rng.integers(1, 80)].tolist(), int(rng.integers(1, 25)))
        for i in range(40)
    ]
    finished = 0
    while coming or engine.has_work:
        for _ in range(int(rng.integers(0, 3))):
            if coming:
                request = coming.pop()
                engine.add(request)
                dry.add(request)
        events = engine.step()
        assert (dry.plan() is None) == (not engine.stats().steps or not (events or engine.has_work or dry.has_work))
        progress = dry.complete()
        assert [(e.request_id, e.finish_reason is not None, e.cached_tokens) for e in events] == [
            (p.request_id, p.finished, p.cached_tokens) for p in progress
        ]
        finished += sum(p.finished for p in progress)
    assert finished == 40
    assert not dry.has_work
    assert bool(engine.stats().preemptions) == preempts
    assert dry.preemptions == engine.stats().preemptions


def serve_step_by_step(trace: Trace, model: EngineModel) -> list[tuple[float, float, float | None, int]]:
    """(time of the first token, of the last, TBT, hit tokens) of each request, one engine step after the other."""
    dry, prompts = DryEngine(model), PromptWriter(BYTE_IDS, trace.block_size)
    coming, now, stamps, hits = list(trace.requests), 0.0, {}, {}
    while coming or dry.has_work:
        if not dry.has_work:
            now = max(now, coming[0].arrival_s + 1e-4)
        while coming and coming[0].arrival_s <= now:
            r = coming.pop(0)
            dry.add(r.with_prompt(prompts.prompt(r)))
            stamps[r.id] = []
        work = dry.plan()
        assert work is not None
        now += model.steps.seconds(work)
        for progress in dry.complete():
            stamps[progress.request_id].append(now)
            hits[progress.request_id] = progress.cached_tokens
    result = []
    for r in trace.requests:
        gaps = np.diff(stamps[r.id]).tolist()
        result.append((stamps[r.id][0], stamps[r.id][-1], tbt_s(gaps), hits[r.id]))
    return result


@pytest.mark.parametrize("seed", range(12))
def test_runs_of_steps_equal_single_steps(seed: int) -> None:
    rng = random.Random(seed)
    trace = random_trace(rng, 60, rng.choice([5.0, 30.0, 200.0]))
    requests = tuple(
        dataclasses.replace(
            r, input_tokens=min(r.input_tokens, 900), keys=r.keys[: -(-min(r.input_tokens, 900) // SIZE)]
        )
        for r in trace.requests
    )
    trace = dataclasses.replace(trace, requests=requests)
    pages = rng.choice([140, 1000])
    model = engine_model(
        page_size=16, num_pages=pages, max_batch=rng.choice([1, 5, 16]), token_budget=64, max_model_len=2048
    )
    result = Simulation(ClusterConfig(prefill=0, decode=0, coupled=1), performance_of(model)).run(trace)
    for outcome, (first_s, last_s, expected_tbt_s, hit) in zip(
        result.outcomes, serve_step_by_step(trace, model), strict=True
    ):
        assert outcome.outcome == COMPLETED
        assert outcome.hit_tokens == hit
        assert outcome.ttft_s == pytest.approx(first_s - outcome.arrival_s, rel=1e-9)
        assert outcome.finished_s == pytest.approx(last_s, rel=1e-9)
        assert outcome.tbt_s == (None if expected_tbt_s is None else pytest.approx(expected_tbt_s, rel=1e-7))
    assert sum(result.hits_by_tier.values()) == sum(outcome.hit_tokens for outcome in result.outcomes)


def noisy(model: EngineModel, decode: tuple[float, ...], prefill: tuple[float, ...]) -> EngineModel:
    return dataclasses.replace(
        model, steps=dataclasses.replace(model.steps, decode_noise=decode, prefill_noise=prefill)
    )


def test_noise_of_one_factor_is_a_slower_engine() -> None:
    """Drawn steps pass through the same events as even ones, interruptions and stalls included."""
    trace = random_trace(random.Random(3), 80, 40.0)
    requests = tuple(dataclasses.replace(r, input_tokens=min(r.input_tokens, 700), keys=()) for r in trace.requests)
    trace = dataclasses.replace(trace, requests=requests)
    model = engine_model(page_size=16, num_pages=1000, max_batch=8, token_budget=64, max_model_len=4096)
    steps = StepModel(
        shapes=tuple((*shape, 1.5 * seconds) for *shape, seconds in model.steps.shapes),
        decode_sequence=1.5e-4,
        decode_token=4.5e-6,
        prefill_token=3e-5,
        prefill_pair=1.5e-8,
    )
    slower = dataclasses.replace(model, steps=steps)
    config = ClusterConfig(prefill=0, decode=0, coupled=1)
    drawn = Simulation(config, performance_of(noisy(model, (1.5,), (1.5, 1.5)))).run(trace)
    even = Simulation(config, performance_of(slower)).run(trace)
    for one, other in zip(drawn.outcomes, even.outcomes, strict=True):
        assert one.ttft_s == pytest.approx(other.ttft_s, rel=1e-9)
        assert one.tbt_s == (None if other.tbt_s is None else pytest.approx(other.tbt_s, rel=1e-9))
        assert one.finished_s == pytest.approx(other.finished_s, rel=1e-9)


def test_steps_scatter_as_they_were_measured() -> None:
    """A request alone: the mean of its longest tenth of gaps is that of the slowest tenth of the factors."""
    model = engine_model(num_pages=4000, max_model_len=32_768)
    model = dataclasses.replace(model, steps=dataclasses.replace(model.steps, decode_token=0.0))
    model = noisy(model, (*[1.0] * 18, 3.0, 5.0), (1.0,))
    trace = Trace("one", (TraceRequest(id="0", arrival_s=0.0, input_tokens=20, output_tokens=20_000),))

    def tbt(seed: int) -> float:
        config = ClusterConfig(prefill=0, decode=0, coupled=1, conductor=ConductorConfig(seed=seed))
        return Simulation(config, performance_of(model)).run(trace).outcomes[0].tbt_s or 0.0

    even = (
        Simulation(ClusterConfig(prefill=0, decode=0, coupled=1), performance_of(noisy(model, (), ())))
        .run(trace)
        .outcomes[0]
        .tbt_s
    )
    assert tbt(0) == tbt(0)
    assert tbt(0) != tbt(1)
    assert tbt(0) == pytest.approx(4.0 * (even or 0.0), rel=0.1)


def test_decoding_alone_is_one_event_whatever_its_length() -> None:
    model = engine_model(num_pages=1000, max_model_len=4096)
    requests = (
        TraceRequest(id="0", arrival_s=0.0, input_tokens=100, output_tokens=2000),
        TraceRequest(id="1", arrival_s=0.0, input_tokens=50, output_tokens=3000),
    )
    result = Simulation(ClusterConfig(prefill=0, decode=0, coupled=1), performance_of(model)).run(
        Trace("two", requests)
    )
    assert all(outcome.outcome == COMPLETED for outcome in result.outcomes)
    # Two arrivals, one waking, seven chunks of at most 24 tokens, two runs of decode steps.
    assert result.events <= 14


def test_engines_behind_one_conductor_share_nothing_and_lose_nothing() -> None:
    trace = random_trace(random.Random(5), 200, 40.0)
    model = engine_model(page_size=16, num_pages=2000, max_batch=8, token_budget=512, max_model_len=32_768)
    conductor = ConductorConfig(placement="cache_aware", admission="baseline")
    config = ClusterConfig(prefill=0, decode=0, coupled=3, conductor=conductor, failures=((2.0, 1),))
    first, again = (Simulation(config, performance_of(model)).run(trace) for _ in range(2))
    assert first == again
    assert [outcome.id for outcome in first.outcomes] == [request.id for request in trace.requests]
    assert {outcome.outcome for outcome in first.outcomes} <= {"completed", "rejected", "failed"}


def test_an_engine_without_work_is_empty() -> None:
    simulation = Simulation(
        ClusterConfig(prefill=0, decode=0, coupled=1), performance_of(engine_model(max_model_len=128))
    )
    requests = tuple(
        TraceRequest(id=str(i), arrival_s=0.01 * i, input_tokens=5 + i, output_tokens=1 + i) for i in range(30)
    )
    simulation.run(Trace("short", requests))
    node = simulation.mirror.decode[0]
    assert (node.assigned, node.assigned_tokens, node.present, node.present_tokens) == (0, 0, 0, 0)


def test_a_calibrated_engine_survives_its_file(tmp_path) -> None:
    performance = performance_of(noisy(engine_model(), (0.9, 1.0, 1.4), (1.0,)))
    write_performance(tmp_path / "calibration.json", performance, {"command": "calibrate"})
    assert read_performance(tmp_path / "calibration.json") == performance


def test_a_shape_that_was_not_measured_is_an_error() -> None:
    model = engine_model()
    with pytest.raises(SimulatorError, match=r"No step of shape \(9, 0, 0\)"):
        model.steps.seconds(
            StepWork(shape=(9, 0, 0), decodes=9, decode_tokens=100, chunks=0, prefill_tokens=0, prefill_pairs=0)
        )


def test_what_the_engine_refuses_the_simulator_rejects() -> None:
    for model in (engine_model(), engine_model(num_pages=9)):
        requests = []
        for prompt, outputs in ((1, 1), (100, 28), (100, 29), (129, 1), (128, 1), (72, 1), (72, 2), (73, 1), (60, 13)):
            request = TraceRequest(
                id=str(len(requests)),
                arrival_s=len(requests) * 9.0,
                input_tokens=prompt,
                output_tokens=outputs,
                keys=(),
            )
            requests.append(request)
            try:
                DryEngine(model).add(request.with_prompt([5] * prompt))
                refused = False
            except RequestRefusedError:
                refused = True
            assert model.fits(prompt, outputs) is not refused
        config = ClusterConfig(prefill=0, decode=0, coupled=2)
        result = Simulation(config, performance_of(model)).run(Trace("t", tuple(requests), SIZE))
        served = [outcome.outcome == COMPLETED for outcome in result.outcomes]
        assert served == [model.fits(request.input_tokens, request.output_tokens) for request in requests]
        assert result.rejections == {"request too long": served.count(False)}
        assert 0 < sum(served) < len(served)


@pytest.mark.parametrize("seed", range(2))
def test_requests_of_an_engine_that_dies_go_on_elsewhere(seed: int) -> None:
    trace = random_trace(random.Random(seed), 80, 40.0)
    model = engine_model(page_size=16, num_pages=2000, max_batch=8, token_budget=512, max_model_len=32_768)
    config = ClusterConfig(
        prefill=0,
        decode=0,
        coupled=3,
        conductor=ConductorConfig(placement="cache_aware"),
        failures=((0.3, 1), (0.9, 2), (1.5, 1)),
        joins=((0.6, 1), (1.8, 2)),
    )
    simulation = Simulation(config, performance_of(model))
    result = simulation.run(trace)
    assert result.reruns > 0
    for outcome, request in zip(result.outcomes, trace.requests, strict=True):
        assert (outcome.outcome, outcome.output_tokens) == (COMPLETED, request.output_tokens)
        if outcome.tbt_s is not None and outcome.ttft_s is not None:
            assert outcome.ttft_s + outcome.tbt_s <= outcome.finished_s - outcome.arrival_s + 1e-9
    assert sum(result.hits_by_tier.values()) == sum(outcome.hit_tokens for outcome in result.outcomes)
    for node in simulation.mirror.decode:
        assert (node.assigned, node.assigned_tokens, node.present, node.present_tokens) == (0, 0, 0, 0)
