"""The measurements of `bench_engine`: our engine and its peers, each in a process of its own on the same cores."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from model.presets import PRESETS

Row = dict[str, Any]


class BenchmarkError(ValueError):
    """What was asked cannot be measured here, and what to do about it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What every engine is asked to do."""

    dtype: str
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prefill: int
    steps: int
    repeats: int
    cores: int
    seed: int
    shape: str | None = None  # a preset; each engine draws weights of its own then: their values do not change speed
    mesh: str | None = None  # of our engine; peers run on one device
    mixed: bool = False  # whether our engines also serve prompts and answers of many lengths at once

    @property
    def decoded(self) -> int:
        """Tokens asked of each decoding sequence: none ends before the last measured step."""
        return self.steps * (self.repeats + 1) + 2

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, decoding included."""
        return max(*self.contexts, self.prefill) + self.decoded

    def prompts(self, batch: int, context: int, repeat: int) -> list[list[int]]:
        """Random token ids, different in each repeat so that no prefix cache answers; `context` tokens each."""
        rng = np.random.default_rng((self.seed, batch, context, repeat))
        return rng.integers(3, 1000, (batch, context)).tolist()


def measure(tokens: int, work: Callable[[], None]) -> tuple[float, float]:
    """Tokens per wall second and per core-second of `work()`."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return tokens / (time.perf_counter() - wall), tokens / (time.process_time() - cpu)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Tells on stderr that a part of the benchmark begins, and then how long it took."""
    start = time.perf_counter()
    tqdm.write(f"{name} ...", file=sys.stderr)
    yield
    tqdm.write(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)


def row(engine: str, device: str, test: str, batch: int, context: int, speeds: list[tuple[float, float]]) -> Row:
    """One result row, of an engine that computes on that kind of device: medians over the repeats.

    Told on stderr at once: a run that is cut off has then shown what it had.
    """
    tok_s, tok_core_s = (statistics.median(column) for column in zip(*speeds, strict=True))
    tqdm.write(f"{engine}, {test} {batch}x{context}: {tok_s:.4g} tok/s", file=sys.stderr)
    return {
        "engine": engine,
        "device": device,
        "test": test,
        "batch": batch,
        "context": context,
        "tok_s": tok_s,
        "tok_core_s": tok_core_s,
    }


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


def run_transformers(folder: str, workload: Workload) -> list[Row]:
    """HF transformers with torch's scaled-dot-product attention."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(workload.cores)
    torch.manual_seed(workload.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, workload.dtype)
    with phase("transformers, weights"):
        if workload.shape:
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype).eval()
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def prefill(prompts: list[list[int]]) -> Any:
        out = model(torch.tensor(prompts, device=device), use_cache=True, logits_to_keep=1)
        wait()
        return out

    rows, speeds = [], []
    with phase(f"transformers, prefill 1x{workload.prefill}"):
        for repeat in range(workload.repeats + 1):
            prompts = workload.prompts(1, workload.prefill, repeat)
            speeds.append(measure(workload.prefill, functools.partial(prefill, prompts)))
    rows.append(row("transformers", device, "prefill", 1, workload.prefill, speeds[1:]))

    for context in workload.contexts:
        for batch in workload.batches:
            with phase(f"transformers, prompts {batch}x{context}"):
                # Prompts one by one, so that prefill needs no more memory than the cache that it leaves.
                parts = [prefill([p]) for p in workload.prompts(batch, context, 0)]
                cache = parts[0].past_key_values
                for layer, *others in zip(*(part.past_key_values.layers for part in parts), strict=True):
                    layer.keys = torch.cat([layer.keys, *(other.keys for other in others)])
                    layer.values = torch.cat([layer.values, *(other.values for other in others)])
                state = {"tokens": torch.cat([part.logits[:, -1:].argmax(-1) for part in parts])}
                del parts

            @torch.inference_mode()
            def decode(cache: Any = cache, state: dict[str, Any] = state) -> None:
                for _ in range(workload.steps):
                    out = model(state["tokens"], past_key_values=cache, use_cache=True)
                    state["tokens"] = out.logits[:, -1:].argmax(-1)
                wait()

            with phase(f"transformers, decode {batch}x{context}"):
                decode()
                speeds = [measure(batch * workload.steps, decode) for _ in range(workload.repeats)]
            rows.append(row("transformers", device, "decode", batch, context, speeds))
    return rows


def run_vllm(folder: str, workload: Workload) -> list[Row]:
    """vLLM's CPU build, offline; decode speed is the difference between a long and a short generation."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ["OMP_NUM_THREADS"] = str(workload.cores)
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        load_format="dummy" if workload.shape else "auto",
        dtype=workload.dtype,
        max_model_len=workload.longest,
        skip_tokenizer_init=True,
        gpu_memory_utilization=0.5,  # of the CPU's memory; by default it claims nearly all and fails beside others
    )

    def generate(prompts: list[list[int]], tokens: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)

    rows, speeds = [], []
    for repeat in range(workload.repeats + 1):
        prompts = workload.prompts(1, workload.prefill, repeat)
        speeds.append(measure(workload.prefill, lambda prompts=prompts: generate(prompts, 1)))
    rows.append(row("vllm", "cpu", "prefill", 1, workload.prefill, speeds[1:]))
    for context in workload.contexts:
        for batch in workload.batches:
            prompts = workload.prompts(batch, context, 0)
            generate(prompts, 1)  # fills the prefix cache: what follows is decode
            speeds = []
            for _ in range(workload.repeats):
                short = measure(batch, lambda prompts=prompts: generate(prompts, 1))
                long = measure(batch, lambda prompts=prompts: generate(prompts, workload.steps + 1))
                decode_s = [batch / more - batch / one for more, one in zip(long, short, strict=True)]
                speeds.append((batch * workload.steps / decode_s[0], batch * workload.steps / decode_s[1]))
            rows.append(row("vllm", "cpu", "decode", batch, context, speeds))
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
