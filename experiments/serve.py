"""Serve a model over HTTP, OpenAI-compatible.

    python -m experiments.serve --model=path/to/hf/folder
    python -m experiments.serve --model=llama3.2-1b --mesh=tp:4 --port=8001    # random weights in a published shape

    curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "The dict class"}'

SIGTERM takes no more requests and lets the open ones finish.
"""

import pathlib

from absl import flags, logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.common import engine_flags, mesh_flags, model_flags
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
from serving.engine import EngineError
from serving.engine.build import build_engine
from serving.engine.engine import Engine

MODEL = flags.DEFINE_string(
    "model", None, "Model to serve: an HF or Orbax folder, or a preset (random weights).", required=True
)
TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "Folder with a tokenizer.json; by default the model's, and single bytes for a preset."
)
SERVED_MODEL_NAME = flags.DEFINE_string(
    "served_model_name", None, "Name that clients call the model by; by default the name of its folder."
)
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to serve on; 0.0.0.0 for every interface.")
PORT = flags.DEFINE_integer("port", 8000, "Port to serve on; 0 takes a free one.", lower_bound=0, upper_bound=65535)
MAX_OPEN = flags.DEFINE_integer(
    "max_open_requests", 1024, "Most requests served or queued at once; further ones get HTTP 429.", lower_bound=1
)
DRAIN_S = flags.DEFINE_integer("drain_s", 60, "Seconds that open requests get to finish after SIGTERM.", lower_bound=0)
LOG_LEVEL = flags.DEFINE_enum(
    "log_level", "warning", ["debug", "info", "warning", "error"], "Log level of the HTTP server."
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
    engine_flags.keep_compiled_steps()
    sizes = engine_flags.engine_config()
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
