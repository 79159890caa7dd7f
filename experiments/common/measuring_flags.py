"""Flags of the scripts that measure an engine in this process, under one name and one meaning."""

import os
from collections.abc import Callable

from absl import app, flags
from tqdm import tqdm

from experiments.common import engine_flags, mesh_flags, model_flags
from experiments.common.engine_calibration import CalibrationOptions
from experiments.common.flags import define_float
from experiments.common.script import SEED
from model.checkpoints import CheckpointError, load
from model.config import ConfigError
from model.sharding import MeshError
from model.transformer import split
from serving.engine import EngineError
from serving.engine.build import build_engine
from serving.engine.engine import Engine
from serving.simulator.steps import EngineModel, StepModel

MODEL = flags.DEFINE_string("model", "bench-58m", "HF or Orbax folder, or a preset (random weights).")
CORES = flags.DEFINE_integer("cores", 1, "CPU cores of the engine; 0 = all, which --clock=cpu cannot time.")
CLOCK = flags.DEFINE_enum(
    "clock", "wall", ["wall", "cpu"], "Clock of every measurement; cpu stands still while other processes run."
)
NETWORK_BANDWIDTH = define_float("network_bandwidth", 1.25e9, "Bytes/s of an instance's NIC.", lower_bound=1.0)
SSD_BANDWIDTH = define_float("ssd_bandwidth", 2e9, "Bytes/s of an instance's SSD.", lower_bound=1.0)


def pin() -> None:
    """Keeps this process, and so the engine, on `--cores` cores. Call it before JAX makes its threads."""
    if CLOCK.value == "cpu" and CORES.value != 1:
        raise app.UsageError(f"--clock=cpu --cores={CORES.value}: CPU time is a clock on one core only; use --cores=1.")
    if CORES.value and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < CORES.value:
            raise app.UsageError(f"--cores={CORES.value}, but this process may use {len(cores)}; ask for fewer.")
        os.sched_setaffinity(0, cores[-CORES.value :])


def make_engine(repeats: int) -> tuple[Engine, CalibrationOptions]:
    """The engine, loaded and warmed up with progress, and how to calibrate it."""
    _check_sizes()
    engine_flags.keep_compiled_steps()
    try:
        mesh = mesh_flags.flagged_mesh()
        config, model = load(MODEL.value, mesh, model_flags.DTYPE.value, SEED.value)
        engine = build_engine(model, engine_flags.engine_config(), mesh=mesh)
    except (CheckpointError, ConfigError, EngineError, MeshError) as error:
        raise app.UsageError(str(error)) from error
    with tqdm(desc="compiling steps", unit="step") as bar:
        engine.warm_up(_advance(bar))
    options = CalibrationOptions(
        clock=CLOCK.value,
        repeats=repeats,
        seed=SEED.value,
        kv_bytes=config.kv_bytes_per_token(engine_flags.KV_DTYPE.value or split(model)[1][0].dtype),
        layers=config.num_layers,
        network_bandwidth=NETWORK_BANDWIDTH.value,
        ssd_bandwidth=SSD_BANDWIDTH.value,
        source=f"{MODEL.value} on {CORES.value or 'all'} core(s), {CLOCK.value} clock",
    )
    return engine, options


def engine_sizes(engine: Engine) -> EngineModel:
    """The sizes of `engine`, with no steps measured yet."""
    sizes = engine_flags.engine_config()
    return EngineModel(
        page_size=sizes.page_size,
        num_pages=engine.stats().pages_total,
        max_batch=sizes.max_batch,
        token_budget=sizes.token_budget,
        max_prefill_rows=sizes.max_prefill_rows,
        max_model_len=engine.max_model_len,
        prefix_cache=sizes.prefix_cache,
        deterministic=sizes.deterministic,
        steps=StepModel(shapes=(), decode_sequence=0.0, decode_token=0.0, prefill_token=0.0, prefill_pair=0.0),
    )


def _check_sizes() -> None:
    """Refuses sizes at which the grid of a calibration cannot be measured."""
    if engine_flags.PAGE_SIZE.value < 4:
        raise app.UsageError(
            f"--page_size={engine_flags.PAGE_SIZE.value}: what is generated must not fill a page; use 4 or more."
        )
    if not engine_flags.PREFIX_CACHE.value:
        raise app.UsageError("--noprefix_cache: prompts with cached tokens are measured too; leave the cache on.")


def _advance(bar: tqdm) -> Callable[[int, int], None]:
    def advance(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return advance
