"""The main job from end to end: serve the model that ships, replay a slice of a trace over HTTP, show what happened.

    python -m experiments.demo
    python -m experiments.demo --trace=path/to/conversation_trace.jsonl --limit=100

Starts `experiments.serve` in a process of its own on a free port, lets the model say something, sends it the first
requests of the trace when they are due, and ends with a table, `result.json`, `requests.jsonl` and `replay.png`.
"""

import pathlib
import signal
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import httpx
from absl import flags
from rich.console import Console

from experiments.common.assets import DEMO_MODEL, DEMO_TRACE, demo_text
from experiments.common.flags import define_float
from experiments.common.replay_report import report_replay
from experiments.common.replaying import ReplayPlan, run_replay
from experiments.common.results import start_result
from experiments.common.script import SEED, run
from experiments.common.server_process import ServerDiedError, ServerProcess
from serving.replay import ReplayError
from serving.workload.errors import TraceError
from serving.workload.traces import read_trace

TRACE = flags.DEFINE_string(
    "trace", str(DEMO_TRACE), "Mooncake JSONL or Azure CSV file to replay; by default the trace that ships."
)
LIMIT = flags.DEFINE_integer("limit", 200, "Requests to take from the trace; by default all.", lower_bound=1)
SPEED = define_float("speed", 4.0, "Offered load as a multiple of the trace's own.", lower_bound=1e-9)
SCALE = define_float(
    "scale",
    None,
    "Factor of all prompt and output lengths; by default the largest at which 95 % of the requests fit.",
    lower_bound=1e-9,
)
TTFT_SLO_S = define_float("ttft_slo_s", 30.0, "Limit of TTFT, in seconds.", lower_bound=1e-9)
TBT_SLO_S = define_float("tbt_slo_s", 0.1, "Limit of TBT, in seconds.", lower_bound=1e-9)

# Pages that are small against the shrunken blocks of the trace; 96 MiB of KV.
_SERVER_FLAGS = ("--page_size=16", "--max_batch=16", "--kv_gib=0.09375")
_QUESTIONS = ("read(self, size)", "close(self)", "get(self, key, default)")
_ANSWER_TOKENS = 60


def _starting(console: Console) -> Callable[[str], None]:
    """Shows what the server says while it starts, each line once."""
    last = ""

    def show(line: str) -> None:
        nonlocal last
        if line and line != last:
            console.print(f"  {line}", end="\r" if console.is_terminal else "\n", soft_wrap=True)
        last = line

    return show


def _samples(url: str, console: Console) -> None:
    """Prints what the model answers to a few questions."""
    console.print(f"\n{DEMO_MODEL.name} says:")
    for question in _QUESTIONS:
        body = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": _ANSWER_TOKENS,
            "temperature": 0.0,
        }
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False)
        answer.raise_for_status()
        text = " ".join(answer.json()["choices"][0]["message"]["content"].split())
        console.print(f"  [bold]{question}[/bold]  {text}", highlight=False)
    console.print()


def _demonstrate(out: pathlib.Path, meta: Mapping[str, Any], console: Console) -> None:
    started_cpu_s = time.process_time()
    trace = read_trace(TRACE.value, limit=LIMIT.value, speed=SPEED.value)
    console.print("Starting the server: the first time, it compiles every step that it may need ...")
    with ServerProcess(DEMO_MODEL, out / "server.log", *_SERVER_FLAGS, on_output=_starting(console)) as server:
        console.print(f"Serving {DEMO_MODEL.name} at {server.url}")
        try:
            _samples(server.url, console)
            plan = ReplayPlan(url=server.url, trace=trace, text=demo_text(), scale=SCALE.value, seed=SEED.value)
            run = run_replay(plan)
        except (ReplayError, httpx.HTTPError) as error:
            server.check(wait_s=1.0)  # a dead server's sockets close before it can be waited for
            raise SystemExit(str(error)) from error
    found = report_replay(
        out,
        meta,
        run,
        ttft_slo_s=TTFT_SLO_S.value,
        tbt_slo_s=TBT_SLO_S.value,
        cpu_s=time.process_time() - started_cpu_s,
    )
    console.print(f"Picture: {out / 'replay.png'}; everything: {out}")
    if found["failed"]:
        raise SystemExit(f"{found['failed']} of {found['requests']} requests failed; {out / 'server.log'} may say why.")


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # so that the server is ended on the way out


def main() -> None:
    signal.signal(signal.SIGTERM, _terminated)
    out, meta = start_result()
    try:
        _demonstrate(out, meta, Console())
    except KeyboardInterrupt:
        raise SystemExit("Interrupted; the server was stopped.") from None
    except ServerDiedError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    run(main, TraceError)
