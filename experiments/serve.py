"""Serve a model over HTTP, OpenAI-compatible.

    python -m experiments.serve --model=path/to/hf/folder
    python -m experiments.serve --model=llama3.2-1b --mesh=tp:4 --port=8001    # random weights in a published shape

    curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "The dict class"}'

SIGTERM takes no more requests and lets the open ones finish.
"""

import pathlib

import jax
from absl import flags, logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.common import mesh_flags, model_flags
from experiments.common.flags import define_float
from experiments.common.process import with_huge_pages
from experiments.common.script import SEED, run
from kvcache.blocks import Namespace
from model.checkpoints import CheckpointError, fingerprint, load
from model.config import ConfigError
from model.sharding import MeshError
from model.tokenizer import Tokenizer
from model.training.vocabulary import train_tokenizer
from serving.api.app import create_app
from serving.api.server import ServerError, bind, serve, url_of
from serving.api.worker import EngineWorker
from serving.engine import EngineConfig, EngineError
from serving.engine.build import build_engine
from serving.engine.engine import Engine

MODEL = flags.DEFINE_string("model", None, "HF or Orbax folder, or a preset (random weights).", required=True)
TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "Folder with a tokenizer.json; by default the model's, and single bytes for a preset."
)
SERVED_MODEL_NAME = flags.DEFINE_string(
    "served_model_name", None, "What clients call it; by default the folder's name."
)
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to serve on; 0.0.0.0 for every interface.")
PORT = flags.DEFINE_integer("port", 8000, "Port to serve on; 0 takes a free one.", lower_bound=0, upper_bound=65535)
PAGE_SIZE = flags.DEFINE_integer("page_size", 64, "Tokens per page of KV.", lower_bound=1)
NUM_PAGES = flags.DEFINE_integer("num_pages", None, "Pages of KV; by default what --kv_gib or the device holds.")
KV_GIB = define_float("kv_gib", None, "GiB of KV over all devices; by default what is free, 1 on CPU.")
KV_DTYPE = flags.DEFINE_string("kv_dtype", None, "Dtype of KV; by default the model's.")
MAX_BATCH = flags.DEFINE_integer("max_batch", 32, "Most sequences that decode in one step.", lower_bound=1)
TOKEN_BUDGET = flags.DEFINE_integer("token_budget", 512, "Most tokens computed in one step.", lower_bound=1)
MAX_MODEL_LEN = flags.DEFINE_integer("max_model_len", None, "Most tokens of a request, prompt and answer.")
PREFIX_CACHE = flags.DEFINE_bool("prefix_cache", True, "Reuse the KV of equal prefixes.")
DETERMINISTIC = flags.DEFINE_bool(
    "deterministic", False, "Same bits for a request whatever else is served; --token_budget must hold whole pages."
)
ATTENTION = flags.DEFINE_string("attention", None, "Paged-attention backend; by default the best that runs here.")
MAX_OPEN = flags.DEFINE_integer("max_open_requests", 1024, "Further requests get HTTP 429.", lower_bound=1)
DRAIN_S = flags.DEFINE_integer("drain_s", 60, "Seconds that open requests get after SIGTERM.", lower_bound=0)
COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache", ".jax_cache", "Folder that keeps compiled steps for the next start; empty keeps none."
)
LOG_LEVEL = flags.DEFINE_enum("log_level", "warning", ["debug", "info", "warning", "error"], "Of the HTTP server.")


def engine_config() -> EngineConfig:
    """The engine that the flags ask for."""
    return EngineConfig(
        page_size=PAGE_SIZE.value,
        num_pages=NUM_PAGES.value,
        kv_bytes=None if KV_GIB.value is None else int(KV_GIB.value * 2**30),
        max_batch=MAX_BATCH.value,
        token_budget=TOKEN_BUDGET.value,
        max_model_len=MAX_MODEL_LEN.value,
        prefix_cache=PREFIX_CACHE.value,
        kv_dtype=KV_DTYPE.value,
        attention=ATTENTION.value,
        deterministic=DETERMINISTIC.value,
        seed=SEED.value,
    )


def tokenizer_for(model: str) -> Tokenizer:
    """The tokenizer that the flags ask for."""
    folder = pathlib.Path(TOKENIZER.value or model)
    if TOKENIZER.value is None and not folder.is_dir():
        return Tokenizer(train_tokenizer((), vocab_size=257))
    try:
        return Tokenizer.from_folder(folder)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error


def warm_up(engine: Engine, console: Console) -> None:
    """Compiles every step of `engine`, with progress on `console`; a line per step where that is a file."""
    if not console.is_terminal:
        engine.warm_up(lambda done, total: console.print(f"compiling steps {done}/{total}"))
        return
    columns = (TextColumn("compiling steps"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        task = progress.add_task("", total=None)
        engine.warm_up(lambda done, total: progress.update(task, completed=done, total=total))


def main() -> None:
    with_huge_pages()
    logging.set_verbosity(logging.WARNING)
    console = Console(highlight=False, soft_wrap=True)
    if COMPILATION_CACHE.value:
        jax.config.update("jax_compilation_cache_dir", COMPILATION_CACHE.value)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    sizes = engine_config()
    bound = bind(HOST.value, PORT.value)
    console.print(f"Loading {MODEL.value} ...")
    mesh = mesh_flags.flagged_mesh()
    config, model = load(MODEL.value, mesh, model_flags.DTYPE.value, SEED.value)
    tokenizer = tokenizer_for(MODEL.value)
    namespace = Namespace(
        model=pathlib.Path(MODEL.value).resolve().name,
        revision=fingerprint(MODEL.value, model_flags.DTYPE.value, SEED.value),
        tokenizer=tokenizer.fingerprint,
    )
    eos_ids = {*tokenizer.eos_ids, *config.eos_ids}
    engine = build_engine(model, sizes, mesh=mesh, eos_ids=eos_ids, namespace=namespace)
    warm_up(engine, console)
    name = SERVED_MODEL_NAME.value or pathlib.Path(MODEL.value).resolve().name
    backend = EngineWorker(engine, max_open_requests=MAX_OPEN.value)
    application = create_app(
        backend,
        tokenizer,
        model_name=name,
        max_model_len=engine.max_model_len,
        vocab_size=config.vocab_size,
    )
    bound.listen()  # who connects as soon as the next line is read must not be refused
    console.print(
        f"Serving {name} at {url_of(bound)}: {config.parameter_count / 1e6:.1f} M parameters, context "
        f"{engine.max_model_len} tokens, {engine.stats().pages_total} KV pages of {sizes.page_size} tokens."
    )
    try:
        serve(application, backend, bound, drain_s=DRAIN_S.value, log_level=LOG_LEVEL.value)
    except ServerError as error:
        raise SystemExit(str(error)) from error
    console.print("Stopped.")


if __name__ == "__main__":
    run(main, CheckpointError, ConfigError, EngineError, MeshError, ServerError)
