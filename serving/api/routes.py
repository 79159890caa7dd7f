"""Routes that use the model: completions, chat completions, tokens."""

import asyncio
import time
import uuid
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from serving.api.errors import ApiError, invalid
from serving.api.handlers import Services, answer
from serving.api.prompts import (
    chat_prompt,
    check_count,
    check_ids,
    check_length,
    completion_prompts,
    encode,
    engine_requests,
    render,
)
from serving.api.responses import AnswerHead, ChatRenderer, CompletionRenderer
from serving.api.schemas import ChatBody, CompletionBody, DetokenizeBody, GenerationBody, TokenizeBody

# OpenAI's default of `max_tokens` for completions.
_COMPLETION_MAX_TOKENS = 16


def generation_routes(services: Services) -> APIRouter:
    """Returns `/v1/completions` and `/v1/chat/completions`."""
    router = APIRouter()

    def head(kind: str, body: GenerationBody) -> AnswerHead:
        if body.model is not None and body.model != services.model_name:
            raise unknown_model(services, body.model)
        body.refuse_unsupported()
        return AnswerHead(f"{kind}-{uuid.uuid4().hex}", int(time.time()), services.model_name)

    @router.post("/v1/completions")
    async def completions(body: CompletionBody, http: HttpRequest) -> Response:
        answer_head = head("cmpl", body)
        if body.echo and body.logprobs is not None:
            raise invalid("`echo` with `logprobs` is not supported: prompts have no log-probabilities here.", "echo")
        check_count(len(body.prompts()) * body.choices, services.backend.max_open_requests)
        prompts = await completion_prompts(body, services.tokenizer, services.vocab_size, services.max_model_len)
        limits = [
            check_length(prompt, body.max_tokens, services.max_model_len, "prompt", default=_COMPLETION_MAX_TOKENS)
            for prompt in prompts
        ]
        params = [body.sampling_params(limit, body.logprobs, services.vocab_size) for limit in limits]
        requests = engine_requests(answer_head.id, body, prompts, params, time.monotonic())
        echoes = [services.tokenizer.decode(request.prompt) if body.echo else "" for request in requests]
        renderer = CompletionRenderer(
            answer_head, services.tokenizer, logprobs=body.logprobs is not None, echoes=echoes
        )
        return await answer(services, http, body, requests, renderer)

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, http: HttpRequest) -> Response:
        answer_head = head("chatcmpl", body)
        logprobs = body.logprobs_wanted
        check_count(body.choices, services.backend.max_open_requests)
        prompt = await chat_prompt(body, services.tokenizer, services.max_model_len)
        wanted = body.max_completion_tokens or body.max_tokens
        limit = check_length(prompt, wanted, services.max_model_len, "messages")
        params = body.sampling_params(limit, logprobs, services.vocab_size)
        requests = engine_requests(answer_head.id, body, [prompt], [params], time.monotonic())
        renderer = ChatRenderer(answer_head, services.tokenizer, logprobs=logprobs is not None)
        return await answer(services, http, body, requests, renderer)

    return router


def token_routes(services: Services) -> APIRouter:
    """Returns `/tokenize` and `/detokenize`, as vLLM has them."""
    router = APIRouter()
    tokenizer = services.tokenizer

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        if (body.prompt is None) == (body.messages is None):
            raise invalid("Send either `prompt` or `messages`.", "prompt")
        if body.messages is not None:
            text = await render(tokenizer, body.messages, body.add_generation_prompt)
            tokens = await encode(tokenizer, text, add_special_tokens=False)
        else:
            tokens = await encode(tokenizer, body.prompt or "", add_special_tokens=body.add_special_tokens)
        # Not a dictionary: FastAPI would look at each of a million ids in Python.
        return JSONResponse({"count": len(tokens), "max_model_len": services.max_model_len, "tokens": tokens})

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        check_ids(body.tokens, services.vocab_size, "tokens")
        text = await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)
        return {"prompt": text}

    return router


def model_routes(services: Services) -> APIRouter:
    """Returns `/v1/models`."""
    router = APIRouter()
    card = {
        "id": services.model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "halfmoon",
        "max_model_len": services.max_model_len,
        "vocab_size": services.vocab_size,
    }

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != services.model_name:
            raise unknown_model(services, name)
        return card

    return router


def unknown_model(services: Services, name: str) -> ApiError:
    """Returns the 404 for a model that is not served here."""
    message = f"The model {name!r} does not exist here; this server has {services.model_name!r}."
    return ApiError(404, message, param="model", code="model_not_found")
