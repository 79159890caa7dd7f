"""Write a synthetic workload in Mooncake's format: conversations that repeat their history, or questions on documents.

The trace that ships with the project was made by the defaults:

    python -m experiments.make_trace --trace_out=experiments/assets/demo_trace.jsonl
"""

import pathlib

from absl import flags

from experiments.common.flags import define_float
from experiments.common.script import SEED, run
from experiments.common.tables import print_table
from serving.workload.requests import Trace
from serving.workload.synthetic import Lengths, chat, documents
from serving.workload.traces import write_mooncake

TRACE_OUT = flags.DEFINE_string("trace_out", None, "Mooncake JSONL file to write.", required=True)
SESSIONS = flags.DEFINE_integer(
    "sessions", 60, "Conversations, or with --documents questions, in the trace.", lower_bound=1
)
SESSION_RATE = define_float(
    "session_rate", 0.5, "Conversations, or questions, that start per second.", lower_bound=1e-9
)
TURNS = define_float("turns", 4.0, "Mean turns per conversation.", lower_bound=1.0)
THINK_S = define_float("think_s", 12.0, "Mean seconds between turns.", lower_bound=1e-9)
SYSTEM = flags.DEFINE_integer(
    "system_tokens", 2048, "Mean tokens of a system prompt, or of a document; rounded to whole blocks.", lower_bound=1
)
QUESTION = flags.DEFINE_integer("question_tokens", 900, "Mean new tokens per turn.", lower_bound=1)
ANSWER = flags.DEFINE_integer("answer_tokens", 350, "Mean output tokens per turn.", lower_bound=1)
DOCUMENTS = flags.DEFINE_integer(
    "documents",
    0,
    "Documents; above 0, each session asks one question about one document in place of a conversation.",
    lower_bound=0,
)
ZIPF = define_float(
    "zipf", 0.8, "Zipf exponent of how often documents are asked about; 0 asks about all equally.", lower_bound=0.0
)


def _trace() -> Trace:
    system, question = Lengths(SYSTEM.value, cv=0.5), Lengths(QUESTION.value, cv=1.0)
    answer, seed = Lengths(ANSWER.value, cv=0.7), SEED.value
    if DOCUMENTS.value:
        return documents(
            SESSIONS.value,
            rate=SESSION_RATE.value,
            count=DOCUMENTS.value,
            zipf=ZIPF.value,
            document=system,
            question=question,
            answer=answer,
            seed=seed,
        )
    return chat(
        SESSIONS.value,
        session_rate=SESSION_RATE.value,
        turns=TURNS.value,
        think_s=THINK_S.value,
        system=system,
        question=question,
        answer=answer,
        seed=seed,
    )


def main() -> None:
    trace = _trace()
    path = pathlib.Path(TRACE_OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mooncake(path, trace)
    prompt_tokens = sum(request.input_tokens for request in trace.requests)
    blocks = {block for request in trace.requests for block in request.keys}
    references = sum(len(request.keys) for request in trace.requests)
    row = {
        "file": str(path),
        "requests": len(trace.requests),
        "duration_s": trace.duration_s,
        "mean_input_tokens": prompt_tokens / len(trace.requests),
        "unlimited_hit_rate": 1 - len(blocks) / references,
    }
    print_table([row])


if __name__ == "__main__":
    run(main)
