"""Measure an engine on this machine, and write the performance model that the simulator and the Conductor read.

    python -m experiments.calibrate --model=bench-58m --out=out/calibrate
    python -m experiments.simulate_cluster --calibration=out/calibrate/calibration.json \\
        --prefill=0 --decode=0 --coupled=4 --trace=trace.jsonl

Measured through the engine's own `add` and `step`: prompts over (length, cached prefix), decode iterations over (batch,
context), chunked prefill beside decodes, and every padded shape of a step. A fifth of the scenarios is held out of the
fit whose errors are printed; what is written was fitted to all of them. KV transfers are not measured: an instance's
NIC and SSD are what the flags say.
"""

from absl import flags

from experiments.common import measuring_flags
from experiments.common.engine_calibration import calibrate
from experiments.common.process import with_huge_pages
from experiments.common.results import start_result, write_result
from experiments.common.script import run
from experiments.common.tables import print_table
from serving.simulator.calibration_file import write_performance

REPEATS = flags.DEFINE_integer("repeats", 3, "Runs of each scenario; the median counts.", lower_bound=1)


def main() -> None:
    with_huge_pages()
    measuring_flags.pin()
    out, meta = start_result()
    engine, options = measuring_flags.make_engine(REPEATS.value)
    calibration = calibrate(engine, measuring_flags.engine_sizes(engine), options)
    path = out / "calibration.json"
    made_by = {name: meta[name] for name in ("command", "machine", "versions", "started_at")}
    write_performance(path, calibration.performance, made_by)
    print_table(calibration.rows, f"{options.source}; written to {path}")
    errors = [{"relative error of": name} | numbers for name, numbers in calibration.errors.items()]
    print_table(errors)
    write_result(out, meta, calibration.rows, {"errors": calibration.errors})


if __name__ == "__main__":
    run(main)
