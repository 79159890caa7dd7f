"""The measurements of `bench_engine`: our engine and its peers, each in a process of its own on the same cores."""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import multiprocessing
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

# The model of the peer table: 58.0 M parameters, random weights.
PEER_TABLE_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

Row = dict[str, Any]


class BenchmarkError(ValueError):
    """What was asked cannot be measured here, and what to do about it."""


@dataclasses.dataclass(frozen=True)
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
    mesh: str | None = None  # of our engine; peers run on one device

    @property
    def decoded(self) -> int:
        """Tokens asked of each decoding sequence: none ends before the last measured step, whenever it began."""
        return self.steps * self.repeats + max(self.batches) + 2

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


def row(engine: str, device: str, test: str, batch: int, context: int, speeds: list[tuple[float, float]]) -> Row:
    """One result row, of an engine that computes on that kind of device: medians over the repeats."""
    tok_s, tok_core_s = (statistics.median(column) for column in zip(*speeds, strict=True))
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


def run_halfmoon(folder: str, workload: Workload) -> list[Row]:
    """Our engine, through the same `add` and `step` that serve HTTP."""
    import jax

    from experiments.common.mesh_flags import make_mesh
    from model.checkpoints import load_hf
    from model.sampling import SamplingParams
    from serving.engine import Engine, EngineConfig, Request

    mesh = make_mesh(workload.mesh)
    config, model = load_hf(folder, mesh=mesh, dtype=workload.dtype)
    largest = max(workload.batches)
    page_size = 64
    settings = EngineConfig(
        page_size=page_size,
        # With a page of growth for each, as admission wants: all of the batch must run at once.
        num_pages=largest * (-(-workload.longest // page_size) + 1) + 1,
        max_batch=largest,
        token_budget=workload.prefill + largest,
        max_model_len=workload.longest,
    )
    engine = Engine(config, model, settings, mesh=mesh)
    engine.warm_up()

    def add(prompts: list[list[int]], max_tokens: int) -> list[str]:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        ids = [f"{time.monotonic_ns()}-{index}" for index in range(len(prompts))]
        for name, prompt in zip(ids, prompts, strict=True):
            engine.add(Request(name, tuple(prompt), sampling))
        return ids

    def drain() -> None:
        while engine.has_work:
            engine.step()

    def decode(batch: int) -> None:
        for _ in range(workload.steps):
            if (tokens := len(engine.step())) != batch:
                raise RuntimeError(f"a measured step yielded {tokens} tokens, not one for each of {batch} sequences")

    platform = jax.default_backend()
    rows, speeds = [], []
    for repeat in range(workload.repeats):
        add(workload.prompts(1, workload.prefill, repeat), 1)
        speeds.append(measure(workload.prefill, drain))
    rows.append(row("halfmoon", platform, "prefill", 1, workload.prefill, speeds))
    for context in workload.contexts:
        for batch in workload.batches:
            prompts = workload.prompts(batch, context, 0)
            add(prompts, 1)  # fills the prefix cache: all sequences then begin to decode at about the same step
            drain()
            ids = add(prompts, workload.decoded)
            first: set[str] = set()
            while len(first) < batch:
                first |= {event.request_id for event in engine.step()}
            speeds = [
                measure(batch * workload.steps, functools.partial(decode, batch)) for _ in range(workload.repeats)
            ]
            rows.append(row("halfmoon", platform, "decode", batch, context, speeds))
            for name in ids:
                engine.abort(name)
    return rows


def run_transformers(folder: str, workload: Workload) -> list[Row]:
    """HF transformers with torch's scaled-dot-product attention on the same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(workload.cores)
    torch.manual_seed(workload.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, workload.dtype)).eval().to(device)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def prefill(prompts: list[list[int]]) -> Any:
        out = model(torch.tensor(prompts, device=device), use_cache=True, logits_to_keep=1)
        wait()
        return out

    rows, speeds = [], []
    for repeat in range(workload.repeats + 1):
        prompts = workload.prompts(1, workload.prefill, repeat)
        speeds.append(measure(workload.prefill, functools.partial(prefill, prompts)))
    rows.append(row("transformers", device, "prefill", 1, workload.prefill, speeds[1:]))

    for context in workload.contexts:
        for batch in workload.batches:
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

            speeds = [measure(batch * workload.steps, decode) for _ in range(workload.repeats)]
            rows.append(row("transformers", device, "decode", batch, context, speeds))
    return rows


def run_vllm(folder: str, workload: Workload) -> list[Row]:
    """vLLM's CPU build, offline; decode speed is the difference between a long and a short generation."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ["OMP_NUM_THREADS"] = str(workload.cores)
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, dtype=workload.dtype, max_model_len=workload.longest, skip_tokenizer_init=True, enforce_eager=False
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


_ENGINES = {"halfmoon": run_halfmoon, "transformers": run_transformers, "vllm": run_vllm}
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
    for peer in peers:
        if importlib.util.find_spec(peer) is None:
            install = _PEER_INSTALLS[peer]
            raise BenchmarkError(f"--peer={peer} is not installed here; install {install} or leave it out.")


def _random_checkpoint(folder: pathlib.Path, shape: str | None, dtype: str, seed: int) -> str:
    """An HF folder with random weights in the shape of a preset, or of the peer table."""
    from flax import nnx

    from model.checkpoints import save_hf
    from model.config import ModelConfig
    from model.presets import PRESETS
    from model.transformer import Transformer

    config = ModelConfig.from_hf(PEER_TABLE_MODEL) if shape is None else PRESETS[shape]
    save_hf(folder, Transformer(config, nnx.Rngs(seed), "float32" if shape is None else dtype))
    return str(folder)


def run_benchmark(
    workload: Workload, folder: str | None, shape: str | None, peers: list[str], scratch: str
) -> list[Row]:
    """Rows of our engine and of `peers`, those of peers `compared`.

    The weights are those of an HF folder, or random ones in the shape of a preset, or of the peer table.
    """
    _check(workload, peers)
    spawn = multiprocessing.get_context("spawn")

    def isolated(function: Callable[..., Any], *arguments: Any) -> Any:
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
            return pool.submit(function, *arguments).result()

    if folder is None:
        folder = isolated(_random_checkpoint, pathlib.Path(scratch) / "model", shape, workload.dtype, workload.seed)
    rows: list[Row] = []
    ours: dict[tuple[str, int, int], Row] = {}
    for engine in (progress := tqdm(["halfmoon", *peers], desc="engines")):
        progress.set_postfix_str(engine)
        for result in isolated(_run_pinned, engine, folder, workload):
            key = (result["test"], result["batch"], result["context"])
            first = ours.setdefault(key, result)
            rows.append(result if first is result else compared(first, result))
    return rows
