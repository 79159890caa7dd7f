"""Engine speed: prefill and decode tokens per second, beside a peer on the same model in the same run.

    python -m experiments.bench_engine --peer=transformers
    python -m experiments.bench_engine --model=path/to/hf/folder --batches=1,8 --contexts=512 --mesh=tp:2 --cores=2

Both read the weights of `--model`; of a shape alone, each draws random ones of its own, as no speed depends on them.
`tok_core_s` is tokens per second of CPU time of one core: it does not change when others use the machine.
`--peer=deterministic` shows what bits independent of the load cost. Its test `mixed` serves prompts and answers
of many lengths and counts the tokens of both.
`peer_ratio` is ours over the peer's at the same test; beside an accelerator, whose host only waits, it is of `tok_s`.
"""

from absl import app, flags

from experiments.common.engine_speed import BenchmarkError, run_benchmark
from experiments.common.engine_workload import Workload
from experiments.common.flags import define_integers, define_names
from experiments.common.mesh_flags import MESH
from experiments.common.process import with_huge_pages
from experiments.common.results import start_result, write_result
from experiments.common.script import SEED, run
from experiments.common.tables import print_table
from model.checkpoints import CheckpointError
from model.config import ConfigError
from model.presets import PRESETS
from model.sharding import MeshError
from serving.engine import EngineError

MODEL = flags.DEFINE_string("model", None, "HF folder of the model; by default random weights in a --shape.")
SHAPE = flags.DEFINE_enum(
    "shape", None, sorted(PRESETS), "Preset to draw random weights for; by default bench-58m where there is no --model."
)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of weights and KV.")
PEER = define_names(
    "peer",
    [],
    ["deterministic", "transformers", "vllm"],
    "Engines to run beside ours; deterministic is ours in its deterministic mode, with one test more.",
)
BATCHES = define_integers("batches", [1, 8, 32], "Sequences that decode together, one measurement for each number.")
CONTEXTS = define_integers(
    "contexts", [512, 2048], "Tokens of context that each sequence decodes on, one measurement for each number."
)
PREFILL = flags.DEFINE_integer(
    "prefill", 512, "Prompt tokens of the prefill test; a power of 2 is not padded.", lower_bound=1
)
STEPS = flags.DEFINE_integer("steps", 16, "Decode steps per measurement.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 3, "Measurements of each case; the median is reported.", lower_bound=1)
CORES = flags.DEFINE_integer("cores", 1, "CPU cores that each engine may use.", lower_bound=1)


def main() -> None:
    if MODEL.value and SHAPE.value:
        raise app.UsageError("--model has a shape of its own; leave --shape out.")
    with_huge_pages()
    out, meta = start_result()
    workload = Workload(
        dtype=DTYPE.value,
        batches=tuple(BATCHES.value),
        contexts=tuple(CONTEXTS.value),
        prefill=PREFILL.value,
        steps=STEPS.value,
        repeats=REPEATS.value,
        cores=CORES.value,
        seed=SEED.value,
        shape=SHAPE.value or (None if MODEL.value else "bench-58m"),
        mesh=MESH.value,
        mixed="deterministic" in PEER.value,
    )
    rows = run_benchmark(workload, MODEL.value, PEER.value)
    print_table(rows, title=f"engine speed, {DTYPE.value}, {CORES.value} core(s)")
    write_result(out, meta, rows)


if __name__ == "__main__":
    run(main, BenchmarkError, CheckpointError, ConfigError, EngineError, FileNotFoundError, MeshError)
