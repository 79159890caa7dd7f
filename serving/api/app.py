"""The HTTP application: OpenAI's routes, health and metrics around one engine."""

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from model.tokenizer import Tokenizer
from serving.api.errors import ApiError, install_error_handlers
from serving.api.handlers import Services
from serving.api.metrics import ServerMetrics
from serving.api.routes import generation_routes, model_routes, token_routes
from serving.api.worker import EngineWorker, ServedEngine


def create_app(
    engine: ServedEngine,
    tokenizer: Tokenizer,
    *,
    model_name: str,
    max_model_len: int,
    vocab_size: int,
    max_open_requests: int,
) -> FastAPI:
    """An application that serves `engine`, which nobody else may touch from now on.

    Args:
        engine: warmed up.
        tokenizer: the model's.
        model_name: what clients call the model.
        max_model_len: most tokens of one request, prompt and output.
        vocab_size: token ids are below it.
        max_open_requests: further requests get HTTP 429.
    """
    metrics = ServerMetrics(model_name, max_model_len)
    worker = EngineWorker(engine, metrics, max_open_requests=max_open_requests)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.stop()

    app = FastAPI(title="Halfmoon", lifespan=lifespan)
    install_error_handlers(app)
    services = Services(worker, tokenizer, metrics, model_name, max_model_len, vocab_size)
    for router in (generation_routes(services), token_routes(services), model_routes(services)):
        app.include_router(router)

    @app.get("/health")
    async def health() -> Response:
        if worker.failure is not None:
            raise ApiError(503, str(worker.failure))
        return JSONResponse({"status": "ok", "open_requests": worker.open_requests})

    @app.get("/metrics")
    async def scrape() -> Response:
        return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    return app
