"""What a simulation costs, as its user pays it: `simulate_cluster` from start to exit, one process at a time.

    python -m experiments.bench_simulator --trace=conversation_trace.jsonl

Rows: the trace, if one is given, on 8 + 8 instances; synthetic conversations of more and more `--requests`, on 8 + 8;
and `--requests[0]` of those on more and more `--instances` at the same load on each. Half the instances prefill, half
decode. Time is CPU time of user and system, start-up and files included; `us_per_request` stays level where the cost is
linear.
"""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from absl import flags
from tqdm import tqdm

from experiments.common.flags import define_integers
from experiments.common.results import start_result, write_result
from experiments.common.script import SEED, run
from experiments.common.tables import print_table

TRACE = flags.DEFINE_string("trace", None, "Mooncake JSONL or Azure CSV file to simulate beside the synthetic traces.")
REQUESTS = define_integers("requests", [100_000, 1_000_000], "Requests of each synthetic trace.", lower_bound=100)
INSTANCES = define_integers("instances", [16, 64, 256, 1000], "Instances of each simulated cluster.", lower_bound=2)
PLACEMENT = flags.DEFINE_string("placement", "kvcache_centric", "Rule that places prefills, as in simulate_cluster.")

_BASE = 16
# Conversations per second that keep 8 + 8 of the default instances busy without overload.
_SESSION_RATE, _TURNS = 0.8, 4.0


def _script(name: str, *arguments: str) -> tuple[float, float]:
    """CPU seconds and peak RSS (MiB) of a script; ends this one with what it said where it fails."""
    command = [sys.executable, "-m", f"experiments.{name}", f"--seed={SEED.value}", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"`{name}` ended with {process.returncode}.")
    # Linux counts KiB, macOS bytes.
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def _row(out: pathlib.Path, trace: pathlib.Path, requests: int | None, instances: int) -> dict[str, Any]:
    """Simulates a trace (its first `requests`) at `instances / _BASE` times its load."""
    half = instances // 2
    nodes = [f"--prefill={half}", f"--decode={instances - half}", f"--speed={instances / _BASE}"]
    limit = [f"--limit={requests}"] if requests else []
    cpu_s, rss_mib = _script(
        "simulate_cluster", f"--trace={trace}", f"--out={out}", f"--placement={PLACEMENT.value}", *nodes, *limit
    )
    totals = json.loads((out / "result.json").read_text())["totals"]
    return {
        "trace": trace.stem,
        "requests": totals["requests"],
        "instances": instances,
        "user_sys_s": cpu_s,
        "us_per_request": cpu_s / totals["requests"] * 1e6,
        "events": totals["events"],
        "events_per_request": totals["events"] / totals["requests"],
        "peak_rss_mib": rss_mib,
        "completed": totals["completed"],
        "hit_rate": totals["hit_rate"],
        "ttft_p90_s": totals["ttft_s"]["p90"],
        "tbt_p90_s": totals["tbt_s"]["p90"],
    }


def main() -> None:
    out, meta = start_result()
    synthetic = out / "synthetic.jsonl"
    # More than enough: a conversation has 4 turns only on average.
    sessions = round(max(REQUESTS.value) / _TURNS * 1.1) + 50
    cases = [(pathlib.Path(TRACE.value), None, _BASE)] if TRACE.value else []
    cases += [(synthetic, requests, _BASE) for requests in REQUESTS.value]
    cases += [(synthetic, REQUESTS.value[0], instances) for instances in INSTANCES.value if instances != _BASE]
    _script(
        "make_trace",
        *(f"--trace_out={synthetic}", f"--sessions={sessions}"),
        *(f"--session_rate={_SESSION_RATE}", f"--turns={_TURNS}"),
    )
    rows = [_row(out / "run", *case) for case in tqdm(cases, desc="simulations", unit="run")]
    print_table(rows)
    write_result(out, meta, rows, {"most_user_sys_s": max(row["user_sys_s"] for row in rows)})


if __name__ == "__main__":
    run(main)
