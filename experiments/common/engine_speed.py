"""The measurements of `bench_engine`: our engine and its peers, each in a process of its own on the same cores."""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from experiments.common.engine_peers import run_transformers, run_vllm
from experiments.common.engine_workload import Row, Workload, measure, phase, row
from model.presets import PRESETS


class BenchmarkError(ValueError):
    """What was asked cannot be measured here, and what to do about it."""


def compared(ours: Row, theirs: Row) -> Row:
    """Their row with `peer_ratio`, ours over theirs: per core-second on CPU, per second where a core only waits."""
    speed = "tok_core_s" if ours["device"] == theirs["device"] == "cpu" else "tok_s"
    return theirs | {"peer_ratio": ours[speed] / theirs[speed]}


def run_halfmoon(folder: str, workload: Workload, deterministic: bool = False) -> list[Row]:
    """Our engine, through the same `add` and `step` that serve HTTP; only steps that it meets here are compiled."""
    import jax
    from flax import nnx

    from experiments.common.mesh_flags import make_mesh
    from model.checkpoints import load, load_hf
    from model.sampling import SamplingParams
    from serving.engine import EngineConfig
    from serving.engine.build import build_engine
    from serving.request import Request

    mesh = make_mesh(workload.mesh)
    with phase("halfmoon, weights"):
        if workload.shape:
            _, model = load(workload.shape, mesh, workload.dtype, workload.seed)
        else:
            _, model = load_hf(folder, mesh, workload.dtype)
        jax.block_until_ready(nnx.state(model))
    name = "deterministic" if deterministic else "halfmoon"
    largest, page_size = max(workload.batches), 64
    # Without mixed steps some sequences decode while prompts of others are computed.
    early = 2 * largest * -(-max(workload.contexts) // page_size) if deterministic else 0
    longest = workload.longest + early
    settings = EngineConfig(
        page_size=page_size,
        # With a page of growth for each, as admission wants: all of the batch must run at once.
        num_pages=largest * (-(-longest // page_size) + 1) + 1,
        max_batch=largest,
        # What the prefix cache leaves of all prompts, at most a page of each, fits one step: after it all decode.
        token_budget=page_size * -(-max(workload.prefill, largest * page_size) // page_size),
        max_prefill_rows=largest,
        max_model_len=min(longest, model.config.max_position_embeddings),
        deterministic=deterministic,
    )
    engine = build_engine(model, settings, mesh=mesh)

    one_token = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    many_tokens = dataclasses.replace(one_token, max_tokens=workload.decoded + early)

    def prefill(repeat: Iterator[int]) -> None:
        engine.generate(workload.prompts(1, workload.prefill, next(repeat)), one_token)

    def mixed(repeat: Iterator[int]) -> None:
        """Twice as many requests as run at once; every repeat has the same lengths, so that it meets the same steps."""
        prompts = workload.prompts(2 * largest, workload.prefill, next(repeat))
        short = [prompt[: lengths[index]] for index, prompt in enumerate(prompts)]
        engine.generate(short, [dataclasses.replace(one_token, max_tokens=count) for count in answers])

    def decode(batch: int) -> None:
        for _ in range(workload.steps):
            if (tokens := len(engine.step())) != batch:
                raise RuntimeError(f"a measured step yielded {tokens} tokens, not one for each of {batch} sequences")

    def measured(test: str, batch: int, context: int, tokens: int, work: Callable[[], None]) -> Row:
        """The row of `work`, once unmeasured: that compiles what the measured ones run, or it is an error."""
        with phase(f"{name}, {test} {batch}x{context}, compiling"):
            work()
        compiled = engine.stats().compiles_after_warm_up
        with phase(f"{name}, {test} {batch}x{context}, measuring"):
            speeds = [measure(tokens, work) for _ in range(workload.repeats)]
        if late := engine.stats().compiles_after_warm_up - compiled:
            raise RuntimeError(f"measured rounds of {test} {batch}x{context} compiled {late} times")
        return row(name, jax.default_backend(), test, batch, context, speeds)

    lengths = [1 + workload.prefill * index // (2 * largest) for index in range(2 * largest)]
    answers = [1 + workload.steps * (index % 5) for index in range(2 * largest)]
    work = functools.partial(prefill, itertools.count())
    rows = [measured("prefill", 1, workload.prefill, workload.prefill, work)]
    if workload.mixed:
        work = functools.partial(mixed, itertools.count())
        rows.append(measured("mixed", 2 * largest, workload.prefill, sum(lengths) + sum(answers), work))
    for context in workload.contexts:
        for batch in workload.batches:
            prompts = workload.prompts(batch, context, 0)
            with phase(f"{name}, prompts {batch}x{context}"):
                if batch > 1:
                    # Fills the prefix cache: all sequences then begin to decode at the same step.
                    engine.generate(prompts, one_token)
                ids = [f"{batch}x{context}-{index}" for index in range(batch)]
                for request_id, prompt in zip(ids, prompts, strict=True):
                    engine.add(Request(id=request_id, prompt=tuple(prompt), sampling=many_tokens))
                while len(engine.step()) < batch:
                    pass
            rows.append(measured("decode", batch, context, batch * workload.steps, functools.partial(decode, batch)))
            for request_id in ids:
                engine.abort(request_id)
    return rows


_ENGINES = {
    "halfmoon": run_halfmoon,
    "deterministic": functools.partial(run_halfmoon, deterministic=True),
    "transformers": run_transformers,
    "vllm": run_vllm,
}
_PEER_INSTALLS = {"transformers": "the extra `parity`", "vllm": "vLLM's CPU build"}


def _run_pinned(engine: str, folder: str, workload: Workload) -> list[Row]:
    """Runs one engine on the first `cores` cores of this process."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[: workload.cores])
    return _ENGINES[engine](folder, workload)


def _check(workload: Workload, peers: list[str]) -> None:
    """Before minutes are spent on the engines that could run. Raises `BenchmarkError`."""
    if len(cores := os.sched_getaffinity(0)) < workload.cores:
        raise BenchmarkError(f"--cores={workload.cores}, but this process may use {len(cores)}; ask for fewer.")
    for peer in set(peers) & set(_PEER_INSTALLS):
        if importlib.util.find_spec(peer) is None:
            install = _PEER_INSTALLS[peer]
            raise BenchmarkError(f"--peer={peer} is not installed here; install {install} or leave it out.")


def run_benchmark(workload: Workload, folder: str | None, peers: list[str]) -> list[Row]:
    """Rows of our engine and of `peers`, those of peers `compared`: on an HF folder, or on the workload's shape."""
    _check(workload, peers)
    spawn = multiprocessing.get_context("spawn")

    def isolated(function: Callable[..., Any], *arguments: Any) -> Any:
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
            return pool.submit(function, *arguments).result()

    rows: list[Row] = []
    ours: dict[tuple[str, int, int], Row] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if workload.shape:
            hf = PRESETS[workload.shape].to_hf() | {"dtype": workload.dtype}
            pathlib.Path(scratch, "config.json").write_text(json.dumps(hf) + "\n")
        for engine in (progress := tqdm(["halfmoon", *peers], desc="engines")):
            progress.set_postfix_str(engine)
            for result in isolated(_run_pinned, engine, folder or scratch, workload):
                key = (result["test"], result["batch"], result["context"])
                first = ours.setdefault(key, result)
                rows.append(result if first is result else compared(first, result))
    return rows
