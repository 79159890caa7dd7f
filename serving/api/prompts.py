"""Turns a request's body into the engine's requests: tokenises, checks lengths, makes one request per choice."""

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from model.chat_template import ChatTemplateError
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from serving.api.errors import ApiError, invalid
from serving.api.schemas import ChatBody, CompletionBody, GenerationBody, Message
from serving.request import Request


async def completion_prompts(
    body: CompletionBody, tokenizer: Tokenizer, vocab_size: int, max_model_len: int
) -> list[list[int]]:
    """Returns token ids of every prompt.

    Raises ApiError for an empty prompt, one far too long, or an id outside the vocabulary.
    """
    prompts = []
    for index, prompt in enumerate(body.prompts()):
        if isinstance(prompt, str):
            check_bytes(prompt, tokenizer, max_model_len, "prompt")
            prompt = await encode(tokenizer, prompt, add_special_tokens=body.add_special_tokens)
        if not prompt:
            raise invalid(f"Prompt {index} has no tokens; send at least one.", "prompt")
        check_ids(prompt, vocab_size, "prompt")
        prompts.append(prompt)
    return prompts


async def chat_prompt(body: ChatBody, tokenizer: Tokenizer, max_model_len: int) -> list[int]:
    """Returns token ids of the chat of `body`. Raises ApiError as `render` does, and for a chat far too long."""
    text = await render(tokenizer, body.messages, body.add_generation_prompt, body.chat_template_kwargs)
    check_bytes(text, tokenizer, max_model_len, "messages")
    return await encode(tokenizer, text, add_special_tokens=False)  # the template writes them itself


async def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Returns token ids of `text`, computed off the event loop: a long text takes many milliseconds."""
    try:
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)
    except ValueError as error:
        raise invalid(str(error), "prompt") from error


async def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Returns the prompt that the model's chat template makes of `messages`.

    Raises ApiError if the model has no chat template, or the template refuses the messages.
    """
    rows = [message.for_template() for message in messages]
    try:
        return await asyncio.to_thread(
            tokenizer.render_chat, rows, add_generation_prompt=add_generation_prompt, variables=variables
        )
    except ChatTemplateError as error:
        raise invalid(str(error), "messages") from error


def check_count(choices: int, max_open_requests: int) -> None:
    """Raises ApiError for more choices than the server can ever hold; called before any prompt is tokenised."""
    if choices > max_open_requests:
        raise invalid(
            f"{choices} choices were asked for at once, and the server lets in {max_open_requests} open requests "
            "(`--max_open_requests`). Ask for fewer."
        )


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises ApiError if one of `ids` is outside the vocabulary."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(id for id in ids if not 0 <= id < vocab_size)
        raise invalid(f"`{param}` has the token id {wrong}; this model's ids are 0 to {vocab_size - 1}.", param)


def check_bytes(text: str, tokenizer: Tokenizer, max_model_len: int, param: str) -> None:
    """Raises ApiError for a text that cannot fit even if all its tokens are the longest: it is not tokenised then."""
    size = len(text.encode(errors="replace"))
    if size > max_model_len * tokenizer.longest_token_bytes:
        raise ApiError(
            400,
            f"This model's maximum context length is {max_model_len} tokens, but the {size} bytes in `{param}` are "
            f"{-(-size // tokenizer.longest_token_bytes)} tokens or more. Shorten it.",
            param=param,
            code="context_length_exceeded",
        )


def check_length(
    prompt: Sequence[int], max_tokens: int | None, max_model_len: int, param: str, *, default: int | None = None
) -> int:
    """Returns the most tokens to generate: `max_tokens`, else at most `default` of those that fit.

    Raises ApiError if `max_tokens`, or one token, does not fit.
    """
    room = max_model_len - len(prompt)
    asked = 1 if max_tokens is None else max_tokens
    if asked > room:
        raise ApiError(
            400,
            f"This model's maximum context length is {max_model_len} tokens, but {len(prompt) + asked} were asked for: "
            f"{len(prompt)} in `{param}` and {asked} to generate. Shorten one of the two.",
            param=param,
            code="context_length_exceeded",
        )
    if max_tokens is not None:
        return max_tokens
    return room if default is None else min(room, default)


def engine_requests(
    answer_id: str,
    body: GenerationBody,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    now_s: float,
) -> list[Request]:
    """Returns one request per choice: `body.choices` for each prompt, in the order of OpenAI's indices.

    Choice k of a body with a `seed` samples with `seed` + k, so that choices differ and are reproducible.
    """
    requests = []
    for prompt, sampling in zip(prompts, params, strict=True):
        for choice in range(body.choices):
            chosen = sampling
            if sampling.seed is not None:
                chosen = dataclasses.replace(sampling, seed=(sampling.seed + choice) % 2**64)
            requests.append(
                Request(
                    id=f"{answer_id}-{len(requests)}",
                    arrival_s=now_s,
                    prompt=tuple(prompt),
                    priority=body.priority,
                    salt=body.cache_salt,
                    sampling=chosen,
                )
            )
    return requests
