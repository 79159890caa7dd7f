"""`python -m tests.serving.api.broken_server FOLDER`: a server whose engine fails at its 20th step."""

import pathlib
import sys

from model.tokenizer import Tokenizer
from serving.api.app import create_app
from serving.api.server import ServerError, bind, serve, url_of
from serving.api.worker import EngineWorker
from tests.serving.api.conftest import write_tokenizer
from tests.serving.api.fakes import ScriptedEngine


def main(folder: pathlib.Path) -> None:
    write_tokenizer(folder)
    tokenizer = Tokenizer.from_folder(folder)
    engine = ScriptedEngine(step_s=0.01)
    engine.breaks_at = 20
    backend = EngineWorker(engine, max_open_requests=8)
    app = create_app(backend, tokenizer, model_name="broken", max_model_len=2000, vocab_size=tokenizer.vocab_size)
    bound = bind("127.0.0.1", 0)
    bound.listen()
    sys.stdout.write(f"{url_of(bound)}\n")
    sys.stdout.flush()
    try:
        serve(app, backend, bound, drain_s=5)
    except ServerError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
