"""Replaying a trace for a script: ask the server about itself, fit the trace to it, replay with a live line."""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

from experiments.common.formats import count, milliseconds, percent
from serving.replay import Replay, ReplayError, ServerClient, replay
from serving.workload.outcomes import distribution
from serving.workload.prompts import PromptWriter
from serving.workload.requests import Trace
from serving.workload.resize import fitting_block_size, rescale

Encode = Callable[[str], Sequence[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayPlan:
    """What to replay, and where.

    Attributes:
        url: of the server.
        trace: as it was read.
        text: what prompts are written from.
        scale: factor of all lengths; `None` takes the largest at which nearly every request fits.
        max_tokens: most tokens of a request; `None` asks the server.
        encode: the model's tokenizer; `None` asks the server.
        seed: of the prompts.
        timeout_s: the longest silence within one answer.
    """

    url: str
    trace: Trace
    text: str
    scale: float | None = None
    max_tokens: int | None = None
    encode: Encode | None = None
    seed: int = 0
    timeout_s: float = 600.0


def run_replay(plan: ReplayPlan) -> Replay:
    """Replays with a live line on the terminal. Raises ReplayError, and TraceError where the model is too small."""
    return asyncio.run(_run(plan))


async def _run(plan: ReplayPlan) -> Replay:
    async with ServerClient(plan.url, plan.timeout_s) as client:
        model = await client.model()
        if (max_tokens := plan.max_tokens or model.max_tokens) is None:
            raise ReplayError(f"{client.url} does not tell how long a request may be: give `--max_model_len`.")
        original = plan.trace.block_size
        size = (
            fitting_block_size(plan.trace, max_tokens) if plan.scale is None else max(1, round(plan.scale * original))
        )
        fitted = rescale(plan.trace, size, max_tokens)
        text = await client.encode(model.name, plan.text) if plan.encode is None else plan.encode(plan.text)
        prompts = PromptWriter(text, size, plan.seed)
        with _LiveLine(len(fitted.requests)) as line:
            return await replay(client, model.name, fitted, prompts, line.show)


class _LiveLine:
    """A small live table of a replay on the terminal; a line now and then where there is no terminal."""

    def __init__(self, requests: int) -> None:
        self._requests = requests
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._start_s = time.monotonic()
        self._told_s = 0.0

    def __enter__(self) -> "_LiveLine":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def show(self, run: Replay) -> None:
        """The replay as it is now."""
        now_s = time.monotonic()
        if now_s - self._told_s < (0.25 if self._console.is_terminal else 10.0):
            return
        self._told_s = now_s
        state = _state(run, self._requests, now_s - self._start_s)
        if self._console.is_terminal:
            table = Table.grid(padding=(0, 2))
            for name, value in state.items():
                table.add_row(name, value)
            self._live.update(table)
        else:
            self._console.print("; ".join(f"{name} {value}" for name, value in state.items()), soft_wrap=True)


def _state(run: Replay, requests: int, elapsed_s: float) -> dict[str, str]:
    done = len(run.outcomes)
    width = 30
    bar = "━" * (width * done // requests) + "╸" * (width * run.sent // requests - width * done // requests)
    prompt_tokens = sum(outcome.input_tokens for outcome in run.outcomes)
    latest = distribution(outcome.ttft_s for outcome in run.outcomes[-50:])["p50"]
    counters = run.samples[-1].counters if run.samples else run.counters
    return {
        "replay": f"{bar:<{width}} {run.sent} sent, {done} of {requests} done, {elapsed_s:.0f} s",
        "server": f"{count(counters.running)} running, {count(counters.waiting)} waiting, "
        f"KV {percent(counters.kv_usage)} in use",
        "so far": f"TTFT p50 {milliseconds(latest)}, "
        f"prefix hits {percent(sum(o.hit_tokens for o in run.outcomes) / prompt_tokens if prompt_tokens else None)}",
    }
