"""An application in this process, over whatever backend, and its client."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

from model.tokenizer import Tokenizer
from serving.api.app import create_app
from serving.api.backend import Backend

MAX_MODEL_LEN = 2000


@contextlib.asynccontextmanager
async def client_of(backend: Backend, tokenizer: Tokenizer) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the model "fake", served by `backend`."""
    app = create_app(
        backend, tokenizer, model_name="fake", max_model_len=MAX_MODEL_LEN, vocab_size=tokenizer.vocab_size
    )
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield client


def completion(client: httpx.AsyncClient, **fields: object) -> asyncio.Task[httpx.Response]:
    """Five tokens after "abc", unless `fields` ask for others."""
    body = {"prompt": "abc", "max_tokens": 5} | fields
    return asyncio.create_task(client.post("/v1/completions", json=body))


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The server-sent events of a stream, without `[DONE]`."""
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]
