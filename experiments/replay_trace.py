"""Replay a trace over HTTP against a running OpenAI-compatible server.

    python -m experiments.serve --model=experiments/assets/demo_model --page_size=16
    python -m experiments.replay_trace --url=http://localhost:8000 --limit=100

Arrivals and shared prefixes are the trace's; all lengths shrink by one factor to what the model takes. Every request is
sent when it is due, whether or not earlier ones were answered, and generates exactly its number of tokens.
"""

import pathlib
import time

from absl import flags

from experiments.common.assets import DEMO_TRACE, demo_text
from experiments.common.flags import define_float
from experiments.common.replay_report import report_replay
from experiments.common.replaying import ReplayPlan, run_replay
from experiments.common.results import start_result
from experiments.common.script import SEED, run
from model.tokenizer import Tokenizer
from serving.replay import ReplayError
from serving.workload.errors import TraceError
from serving.workload.traces import read_trace

URL = flags.DEFINE_string("url", "http://localhost:8000", "Base URL of the server, without /v1.")
TRACE = flags.DEFINE_string(
    "trace", str(DEMO_TRACE), "Mooncake JSONL or Azure CSV file to replay; by default the trace that ships."
)
SPEED = define_float("speed", 1.0, "Offered load as a multiple of the trace's own.", lower_bound=1e-9)
LIMIT = flags.DEFINE_integer("limit", None, "Requests to take from the trace; by default all.", lower_bound=1)
START = flags.DEFINE_integer("start", 0, "Requests of the trace to skip first.", lower_bound=0)
JITTER_S = define_float(
    "jitter_s", 0.0, "Seconds over which arrivals of one coarse time stamp are spread.", lower_bound=0.0
)
SCALE = define_float(
    "scale",
    None,
    "Factor of all prompt and output lengths; by default the largest at which 95 % of the requests fit.",
    lower_bound=1e-9,
)
MAX_MODEL_LEN = flags.DEFINE_integer(
    "max_model_len",
    None,
    "Most tokens of a request, prompt and output; by default what the server reports.",
    lower_bound=2,
)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Folder of the model's tokenizer, for a server without /tokenize.")
TEXT = flags.DEFINE_string("text", None, "UTF-8 file that prompts are made from; by default a text that ships.")
TTFT_SLO_S = define_float("ttft_slo_s", 30.0, "Limit of TTFT, in seconds.", lower_bound=1e-9)
TBT_SLO_S = define_float("tbt_slo_s", 0.1, "Limit of TBT, in seconds.", lower_bound=1e-9)
TIMEOUT_S = define_float(
    "timeout_s", 600.0, "Seconds without a token after which a request has failed.", lower_bound=1e-9
)


def _plan() -> ReplayPlan:
    trace = read_trace(
        TRACE.value,
        start=START.value,
        limit=LIMIT.value,
        speed=SPEED.value,
        jitter_s=JITTER_S.value,
        seed=SEED.value,
    )
    return ReplayPlan(
        url=URL.value,
        trace=trace,
        text=pathlib.Path(TEXT.value).read_text(encoding="utf-8") if TEXT.value else demo_text(),
        scale=SCALE.value,
        max_tokens=MAX_MODEL_LEN.value,
        encode=Tokenizer.from_folder(TOKENIZER.value).encode if TOKENIZER.value else None,
        seed=SEED.value,
        timeout_s=TIMEOUT_S.value,
    )


def main() -> None:
    started_cpu_s = time.process_time()
    out, meta = start_result()
    try:
        run = run_replay(_plan())
    except KeyboardInterrupt:
        raise SystemExit("Interrupted; nothing was written.") from None
    except ReplayError as error:
        raise SystemExit(str(error)) from error
    found = report_replay(
        out,
        meta,
        run,
        ttft_slo_s=TTFT_SLO_S.value,
        tbt_slo_s=TBT_SLO_S.value,
        cpu_s=time.process_time() - started_cpu_s,
    )
    if found["failed"]:
        raise SystemExit(f"{found['failed']} of {found['requests']} requests failed; the table says of what.")


if __name__ == "__main__":
    run(main, TraceError, OSError, UnicodeDecodeError)
