"""Other engines, measured as ours is: they are installed on request only, so each function imports its own."""

import functools
import os
from typing import Any

from experiments.common.engine_workload import Row, Workload, measure, phase, row


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
