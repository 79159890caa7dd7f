"""The engine over a real (tiny, random) model: tokens depend on the request alone; nothing is copied or recompiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.kernels.paged_attention import cpu_library
from model.sampling import SamplingParams
from model.sharding import MeshError, parse_mesh
from model.transformer import Transformer, causal_attend
from serving.engine import EngineError, RequestRefusedError, TokenEvent
from serving.engine.batch import step_inputs
from serving.engine.buckets import Bucket
from serving.engine.build import build_engine
from serving.engine.compiles import compiles
from serving.engine.engine import Engine
from serving.engine.runner import ModelRunner
from serving.engine.scheduler import StepPlan
from serving.request import Request
from tests.serving.engine.tiny import CONFIG, SIZES, prompts

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG, nnx.Rngs(0))


def serve(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    for request in requests:
        engine.add(request)
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    while engine.has_work:
        for event in engine.step():
            tokens[event.request_id].append(event.token)
    assert engine.stats().pages_used == 0
    return tokens


def make(model: Transformer, **changes: int | bool | str) -> Engine:
    return build_engine(model, dataclasses.replace(SIZES, **changes))


def greedy_by_full_forward(model: Transformer, prompt: tuple[int, ...], steps: int) -> list[int]:
    """The obvious decoder: runs the whole sequence through dense attention for every token."""

    @jax.jit
    def logits_at(tokens: jax.Array, last: jax.Array) -> jax.Array:
        hidden, _ = model(tokens[None], jnp.arange(tokens.size)[None], causal_attend(CONFIG), None)
        return model.logits(hidden[0, last])

    padded = np.zeros(64 + 16, np.int32)
    padded[: len(prompt)] = prompt
    out: list[int] = []
    for length in range(len(prompt), len(prompt) + steps):
        out.append(int(logits_at(padded, length - 1).argmax()))
        padded[length] = out[-1]
    return out


@pytest.fixture(scope="module")
def alone(model: Transformer) -> dict[str, list[int]]:
    """Tokens of every prompt served alone."""
    engine = make(model, prefix_cache=False)
    return {
        f"r{index}": serve(engine, [Request(id=f"r{index}", prompt=prompt, sampling=GREEDY)])[f"r{index}"]
        for index, prompt in enumerate(prompts(8))
    }


def test_the_engine_decodes_what_the_model_says(model: Transformer, alone: dict[str, list[int]]) -> None:
    for index, prompt in enumerate(prompts(8)[:3]):
        assert alone[f"r{index}"] == greedy_by_full_forward(model, prompt, 12)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"token_budget": 5},
        {"token_budget": 100, "max_prefill_rows": 8},
        {"page_size": 4},
        {"prefix_cache": False},
        {"max_batch": 2},
        {"num_pages": 17, "prefix_cache": False},
        {"num_pages": 17},
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_mates_chunks_pages_or_preemption(
    model: Transformer, alone: dict[str, list[int]], changes: dict[str, int]
) -> None:
    engine = make(model, **changes)
    requests = [Request(id=f"r{index}", prompt=prompt, sampling=GREEDY) for index, prompt in enumerate(prompts(8))]
    assert serve(engine, requests) == alone
    if "num_pages" in changes:
        assert engine.stats().preemptions > 0


def test_prefix_hits_change_no_token(model: Transformer) -> None:
    shared = prompts(1, seed=3)[0] * 3
    requests = [Request(id=f"r{index}", prompt=(*shared[:40], index, 5, 6), sampling=GREEDY) for index in range(4)]
    cold = {request.id: serve(make(model, prefix_cache=False), [request])[request.id] for request in requests}
    engine = make(model)
    assert {request.id: serve(engine, [request])[request.id] for request in requests} == cold
    assert engine.stats().prefix_hit_tokens == 3 * 40


def test_a_mesh_changes_no_token(model: Transformer, alone: dict[str, list[int]]) -> None:
    engine = build_engine(model, dataclasses.replace(SIZES, max_batch=2), mesh=parse_mesh("tp:2"))
    requests = [Request(id=f"r{index}", prompt=prompt, sampling=GREEDY) for index, prompt in enumerate(prompts(8)[:4])]
    assert serve(engine, requests) == {request.id: alone[request.id] for request in requests}


def test_a_mesh_and_a_dtype_change_what_keys_stand_for(model: Transformer) -> None:
    """Two KV heads over two devices have pools of the same shape, and another key for every page."""
    engines = [make(model), make(model, kv_dtype="bfloat16"), build_engine(model, SIZES, mesh=parse_mesh("tp:2"))]
    assert len({engine.namespace.root() for engine in engines}) == 3


def test_a_mesh_that_does_not_divide_the_heads_is_refused(model: Transformer) -> None:
    with pytest.raises(MeshError, match=r"over 4 devices does not divide 2 \(KV heads\)"):
        build_engine(model, SIZES, mesh=parse_mesh("tp:4"))


def test_a_length_that_the_model_does_not_take_is_refused(model: Transformer) -> None:
    longest = model.config.max_position_embeddings
    assert make(model, max_model_len=longest).max_model_len == longest
    with pytest.raises(EngineError, match=f"`max_model_len` is {longest + 1}, and the model takes {longest} tokens"):
        make(model, max_model_len=longest + 1)


def test_sampled_tokens_depend_on_the_seed_alone(model: Transformer) -> None:
    sampling = SamplingParams(temperature=0.9, top_p=0.9, seed=7, max_tokens=10, logprobs=2, repetition_penalty=1.2)
    request = Request(id="seeded", prompt=prompts(1)[0], sampling=sampling)
    first = serve(make(model), [request])["seeded"]
    mates = [Request(id=f"r{index}", prompt=prompt, sampling=GREEDY) for index, prompt in enumerate(prompts(3, seed=9))]
    assert serve(make(model), [*mates, request])["seeded"] == first
    other = dataclasses.replace(request, sampling=dataclasses.replace(sampling, seed=8))
    assert serve(make(model), [other])["seeded"] != first


def test_events_carry_logprobs_reasons_and_hits(model: Transformer) -> None:
    engine = make(model)
    prompt = tuple(range(20))
    engine.add(Request(id="a", prompt=prompt, sampling=SamplingParams(temperature=0.0, max_tokens=3, logprobs=2)))
    events: list[TokenEvent] = []
    while engine.has_work:
        events += engine.step()
    assert [event.finish_reason for event in events] == [None, None, "length"]
    for event in events:
        (best, logprob), second = event.top_logprobs
        assert (event.token, event.logprob) == (best, logprob)
        assert logprob >= second[1]
    stop = SamplingParams(temperature=0.0, max_tokens=9, stop_token_ids=(events[1].token,))
    engine.add(Request(id="b", prompt=prompt, sampling=stop))
    events = []
    while engine.has_work:
        events += engine.step()
    assert events[-1].finish_reason == "stop"
    assert len(events) <= 2
    assert events[-1].cached_tokens == 16


def test_end_of_sequence_stops_unless_ignored(model: Transformer, alone: dict[str, list[int]]) -> None:
    prompt, eos = prompts(8)[0], alone["r0"][2]
    engine = build_engine(model, SIZES, eos_ids=[eos])
    first = alone["r0"].index(eos) + 1
    ignoring = dataclasses.replace(GREEDY, ignore_eos=True)
    got = serve(
        engine,
        [Request(id="stops", prompt=prompt, sampling=GREEDY), Request(id="goes on", prompt=prompt, sampling=ignoring)],
    )
    assert got == {"stops": alone["r0"][:first], "goes on": alone["r0"]}


def test_abort_at_any_moment_frees_pages_and_leaves_mates_alone(
    model: Transformer, alone: dict[str, list[int]], rng: np.random.Generator
) -> None:
    engine = make(model, num_pages=17)
    tokens: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts(8)):
        engine.add(Request(id=f"r{index}", prompt=prompt, sampling=GREEDY))
    doomed = {f"r{index}": int(rng.integers(0, 12)) for index in (1, 3, 6)}
    for step in range(200):
        for name in [name for name, when in doomed.items() if when == step]:
            engine.abort(name)
        for event in engine.step():
            tokens.setdefault(event.request_id, []).append(event.token)
    assert not engine.has_work
    assert engine.stats().pages_used == 0
    assert {name: got for name, got in tokens.items() if name not in doomed} == {
        name: got for name, got in alone.items() if name not in doomed
    }


def test_nothing_is_compiled_after_warm_up(model: Transformer) -> None:
    # Engines of one model share their steps: a pool of a size that no other test has compiled anything for.
    engine = make(model, num_pages=48)
    done: list[tuple[int, int]] = []
    engine.warm_up(lambda *progress: done.append(progress))
    assert done[-1][0] == done[-1][1] == len(done)
    samplings = [
        GREEDY,
        SamplingParams(temperature=0.8, seed=1, max_tokens=5),
        SamplingParams(presence_penalty=0.5, max_tokens=6),
        SamplingParams(logprobs=3, max_tokens=4, logit_bias=((5, 3.0),)),
    ]
    requests = [
        Request(id=f"r{i}", prompt=prompt, sampling=samplings[i % 4]) for i, prompt in enumerate(prompts(12, seed=5))
    ]
    serve(engine, requests)
    assert engine.stats().compiles_after_warm_up == 0


@pytest.mark.parametrize("mesh", [None, "tp:2"])
def test_moves_between_steps_compile_nothing_and_steps_neither(model: Transformer, mesh: str | None) -> None:
    sizes = dataclasses.replace(SIZES, num_pages=62)
    runner = ModelRunner(model, sizes, parse_mesh(mesh) if mesh else None)
    runner.warm_up_moves(max_pages=3, num_layers=CONFIG.num_layers)
    engine = Engine(runner, sizes)
    engine.warm_up()
    asked = prompts(3, seed=5)
    first = engine.generate(asked, GREEDY)
    for count in (1, 2, 3):
        block = runner.extract(range(count), range(CONFIG.num_layers)).to_host()
        runner.insert(range(61, 61 - count, -1), block).block_until_ready()
    assert [generation.tokens for generation in engine.generate(asked, GREEDY)] == [g.tokens for g in first]
    assert engine.stats().compiles_after_warm_up == 0


def test_a_step_compiled_ahead_is_not_compiled_again(model: Transformer) -> None:
    runner = ModelRunner(model, dataclasses.replace(SIZES, num_pages=63))
    bucket = Bucket(2, 0, 0)
    inputs = step_inputs(StepPlan((), ()), bucket, runner.layout, max_pages=16)
    before = compiles()
    runner.compile(inputs, bucket)
    assert compiles() == before + 1
    runner.forward(inputs, bucket)
    assert compiles() == before + 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("head_dim", "page_size"), [(16, 16), (64, 64), (128, 64)])
def test_the_pool_is_never_copied(dtype: str, head_dim: int, page_size: int) -> None:
    if dtype == "bfloat16" and jax.__version_info__ < (0, 11) and (reason := cpu_library.unavailable()):
        pytest.skip(f"XLA:CPU of jax 0.10 widens a bfloat16 pool to read or write it, and ours cannot: {reason}")
    sizes = dataclasses.replace(SIZES, num_pages=4096, page_size=page_size, kv_dtype=dtype)
    config = dataclasses.replace(CONFIG, head_dim=head_dim)
    runner = ModelRunner(Transformer(config, nnx.Rngs(0)), sizes)
    pool_bytes = runner.layout.page_bytes * runner.layout.num_pages
    for bucket in (Bucket(4, 0, 0), Bucket(0, 2, 24), Bucket(4, 2, 24)):
        inputs = step_inputs(StepPlan((), ()), bucket, runner.layout, max_pages=16)
        assert runner.step_temp_bytes(inputs, bucket) < pool_bytes / 8


def test_bad_requests_are_refused_before_they_are_queued(model: Transformer) -> None:
    engine = make(model)
    with pytest.raises(RequestRefusedError, match="prompt token 97 is outside the vocabulary of 97"):
        engine.add(Request(id="a", prompt=(1, 97), sampling=GREEDY))
    with pytest.raises(RequestRefusedError, match="exceed the model length 128"):
        engine.add(Request(id="a", prompt=tuple(range(90)) * 2, sampling=GREEDY))
    assert not engine.has_work
