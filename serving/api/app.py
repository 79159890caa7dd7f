"""The HTTP application: OpenAI's routes, health and metrics around a backend."""

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from model.tokenizer import Tokenizer
from serving.api.backend import Backend
from serving.api.body_limit import BodyLimit
from serving.api.errors import ApiError, install_error_handlers
from serving.api.handlers import Services
from serving.api.metrics import ServerMetrics
from serving.api.routes import generation_routes, model_routes, token_routes


def create_app(
    backend: Backend,
    tokenizer: Tokenizer,
    *,
    model_name: str,
    max_model_len: int,
    vocab_size: int,
) -> FastAPI:
    """Returns an application that serves `backend` from its startup to its shutdown.

    Args:
        backend: not started.
        tokenizer: the model's.
        model_name: what clients call the model.
        max_model_len: most tokens of one request, prompt and output.
        vocab_size: token ids are below it.
    """
    metrics = ServerMetrics(model_name, max_model_len)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        backend.start(metrics)
        yield
        await backend.stop()

    app = FastAPI(title="Halfmoon", lifespan=lifespan)
    app.add_middleware(BodyLimit)
    install_error_handlers(app)
    services = Services(
        backend=backend,
        tokenizer=tokenizer,
        metrics=metrics,
        model_name=model_name,
        max_model_len=max_model_len,
        vocab_size=vocab_size,
    )
    for router in (generation_routes(services), token_routes(services), model_routes(services)):
        app.include_router(router)

    @app.get("/health")
    async def health() -> Response:
        if backend.failure is not None:
            raise ApiError(503, str(backend.failure))
        return JSONResponse({"status": "ok", "open_requests": backend.open_requests})

    @app.get("/metrics")
    async def scrape() -> Response:
        return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    return app
