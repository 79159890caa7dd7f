"""Turn measurements into assumptions of the cost model.

    python -m experiments.bench_linear --dtype=bfloat16 --out=out/bench_linear
    python -m experiments.bench_paged_attention --dtype=bfloat16 --out=out/bench_paged_attention
    python -m experiments.measured_knobs --device=cpu --cores=192 --linear=out/bench_linear/result.json \\
        --attention=out/bench_paged_attention/result.json
    python -m experiments.plan_deployment --measured=out/measured_knobs/knobs.json --trace=trace.jsonl

Efficiencies are shares of the peaks of the device that was measured, and hold for every device of a plan. What is not
measured stays as in the `a_priori` knobs.
"""

from absl import app, flags

from attention_offload.costs.calibration import from_attention, from_engine, from_linear, write_knobs
from attention_offload.costs.knobs import A_PRIORI
from attention_offload.costs.model_table import load_shape
from attention_offload.devices import load_devices
from attention_offload.errors import OffloadError
from experiments.common.flags import define_float
from experiments.common.results import start_result, write_result
from experiments.common.script import run
from experiments.common.tables import print_table

DEVICE = flags.DEFINE_string("device", None, "Name in the device table of what was measured.", required=True)
DEVICE_FILE = flags.DEFINE_string(
    "device_file", None, "TOML file that adds devices to the device table, or replaces their figures."
)
COUNT = flags.DEFINE_integer("count", 1, "Devices that the engine ran on.", lower_bound=1)
CORES = define_float(
    "cores",
    1.0,
    "CPU cores of the measured device, where that is a CPU; --linear counts core-seconds.",
    lower_bound=1e-9,
)
ATTENTION_CORES = define_float(
    "attention_cores",
    None,
    "CPU cores that the bench in --attention ran on, where the device is a CPU; by default --cores.",
    lower_bound=1e-9,
)
LINEAR = flags.DEFINE_string("linear", None, "File result.json of bench_linear.")
ATTENTION = flags.DEFINE_string("attention", None, "File result.json of a bench of decode attention, with gb_s.")
ENGINE = flags.DEFINE_string("engine", None, "File calibration.json of calibrate; needs --model.")
MODEL = flags.DEFINE_string(
    "model", None, "Model that the engine in --engine ran: a preset, or the folder of a config.json."
)


def main() -> None:
    if not (LINEAR.value or ATTENTION.value or ENGINE.value):
        raise app.UsageError("Nothing was measured; give --linear=, --attention= or --engine=.")
    if ENGINE.value and not MODEL.value:
        raise app.UsageError("--engine= needs --model=: times mean nothing without the model that took them.")
    out, meta = start_result()
    device = load_devices(extra=DEVICE_FILE.value)[DEVICE.value]
    measured = []
    if ENGINE.value and MODEL.value:
        measured += from_engine(ENGINE.value, device, COUNT.value, load_shape(MODEL.value))
    if LINEAR.value:
        measured += from_linear(LINEAR.value, device, CORES.value)
    if ATTENTION.value:
        measured += from_attention(ATTENTION.value, device, CORES.value / (ATTENTION_CORES.value or CORES.value))
    knobs = write_knobs(out / "knobs.json", measured)
    rows = [
        {"knob": one.knob, "a_priori": str(getattr(A_PRIORI, one.knob)), "measured": str(getattr(knobs, one.knob))}
        | {"source": one.source}
        for one in measured
    ]
    print_table(rows, f"Knobs of {device.name}, written to {out / 'knobs.json'}")
    write_result(out, meta, rows)


if __name__ == "__main__":
    run(main, OffloadError)
