"""Request bodies: OpenAI's fields, and vLLM's further ones under vLLM's names.

Types are strict: a number in quotes is an error, not a number. A field that would change the answer and is not
supported is refused; any other unknown field is ignored.
"""

import functools
import json
import logging
import reprlib
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from model.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, SamplingParams, SamplingParamsError
from serving.api.errors import invalid

_logger = logging.getLogger(__name__)

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_NAME = 1024  # characters of a stop string or a salt

# Unsupported field -> values that leave the answer as it is, and are accepted.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "allowed_token_ids": (None, []),
    "audio": (None,),
    "bad_words": (None, []),
    "chat_template": (None,),
    "continue_final_message": (None, False),
    "custom_logit_processor": (None,),
    "documents": (None, []),
    "ebnf": (None,),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "json_schema": (None,),
    "length_penalty": (None, 1),
    "logits_processors": (None, []),
    "max_new_tokens": (None,),
    "min_new_tokens": (None, 0),
    "mirostat": (None, 0),
    "modalities": (None, ["text"]),
    "prompt_embeds": (None,),
    "prompt_logprobs": (None,),
    "regex": (None,),
    "response_format": (None, {"type": "text"}),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "stop_regex": (None, []),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "truncate_prompt_tokens": (None,),
    "typical_p": (None, 1),
    "use_beam_search": (None, False),
}


@functools.lru_cache(maxsize=256)
def _log_unknown(name: str) -> None:
    """Logs the name of an unknown field, once and not for every request that has it."""
    _logger.warning("Ignored the unknown field %r of a request; this line comes once.", name)


def _prompt_kind(prompt: object) -> str | None:
    if isinstance(prompt, str):
        return "a text"
    if not isinstance(prompt, list):
        return None
    first = prompt[0] if prompt else ""
    return "many texts" if isinstance(first, str) else "lists of token ids" if isinstance(first, list) else "token ids"


def _text_or_list_kind(value: object) -> str | None:
    return "a text" if isinstance(value, str) else "a list" if isinstance(value, list) else None


def _encodable(text: str) -> str:
    """JSON can spell half a surrogate pair, which no UTF-8, and so no hash and no answer, can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = "Input should be valid Unicode, without the lone surrogate at character {place}"
        raise PydanticCustomError("surrogate", message, {"place": error.start}) from None
    return text


def _few_biases(biases: object) -> object:
    """Refuses too many entries before pydantic reads, and reports, each of them."""
    if isinstance(biases, dict) and len(biases) > MAX_LOGIT_BIAS:
        message = "Input should have at most {limit} token ids, not {count}"
        raise PydanticCustomError("too_long", message, {"limit": MAX_LOGIT_BIAS, "count": len(biases)})
    return biases


def _short(text: str) -> str:
    if len(text) > MAX_NAME:
        message = "Input should have at most {limit} characters, not {count}"
        raise PydanticCustomError("too_long", message, {"limit": MAX_NAME, "count": len(text)})
    return text


_Text = Annotated[str, AfterValidator(_encodable)]
_Name = Annotated[_Text, AfterValidator(_short)]

# A discriminated union reports one error, of the type that its first element suggests, not one error per type.
# `fail_fast`: a list reports its first wrong element, not a million of them.
_TokenIds = Annotated[list[int], Field(fail_fast=True)]
_Prompt = Annotated[
    Annotated[_Text, Tag("a text")]
    | Annotated[list[_Text], Field(fail_fast=True), Tag("many texts")]
    | Annotated[_TokenIds, Tag("token ids")]
    | Annotated[list[_TokenIds], Field(fail_fast=True), Tag("lists of token ids")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_type",
        custom_error_message="Input should be a string, a list of strings, token ids, or a list of lists of token ids",
    ),
]
_TEXT_OR_LIST = Discriminator(
    _text_or_list_kind,
    custom_error_type="text_or_list_type",
    custom_error_message="Input should be a string or a list",
)
_Stop = Annotated[
    Annotated[_Name, Tag("a text")]
    | Annotated[list[_Name], Field(max_length=MAX_STOP_STRINGS, fail_fast=True), Tag("a list")],
    _TEXT_OR_LIST,
]


class StreamOptions(BaseModel):
    """Usage reports in a stream."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationBody(BaseModel):
    """Fields of completions and chat completions. `None` means the field's default."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: _Name | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: _Text | None = None

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Annotated[dict[_Name, float], BeforeValidator(_few_biases)] | None = None
    seed: int | None = None
    stop: _Stop | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    best_of: int | None = None

    priority: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    cache_salt: _Name = ""

    @property
    def continues_prompt(self) -> bool:
        """Whether the text goes on from the prompt, so that a space between the two belongs to it."""
        return False

    @property
    def choices(self) -> int:
        """Choices per prompt."""
        return self.n or 1

    def refuse_unsupported(self) -> None:
        """Raises ApiError if a field asks for something that this server does not support."""
        for name, value in (self.model_extra or {}).items():
            if name not in _UNSUPPORTED:
                _log_unknown(name[:MAX_NAME])
            elif value not in _UNSUPPORTED[name]:
                raise invalid(f"`{name}` is not supported by this server; leave it out.", name)
        if self.best_of is not None and self.best_of != self.choices:
            raise invalid(
                f"`best_of` is {self.best_of}; only the value of `n`, {self.choices}, is supported.", "best_of"
            )
        if self.stream_options is not None and not self.stream:
            raise invalid("`stream_options` needs `stream` to be true.", "stream_options")

    def sampling_params(self, max_tokens: int, logprobs: int | None, vocab_size: int) -> SamplingParams:
        """Returns how to sample at most `max_tokens` tokens. Raises ApiError for a value out of its range."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        chosen: dict[str, Any] = {
            "temperature": self.temperature,
            # vLLM writes "all tokens" as -1 or 0.
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "logit_bias": None if self.logit_bias is None else _biases(self.logit_bias),
            "seed": self.seed,
            "logprobs": logprobs,
            "stop": None if stop is None else tuple(stop),
            "stop_token_ids": None if self.stop_token_ids is None else tuple(self.stop_token_ids),
            "ignore_eos": self.ignore_eos,
            "min_tokens": self.min_tokens,
            "max_tokens": max_tokens,
        }
        try:
            params = SamplingParams(**{name: value for name, value in chosen.items() if value is not None})
            params.check_vocabulary(vocab_size)
        except SamplingParamsError as error:
            raise invalid(str(error), error.parameter) from error
        return params


# Of a token id; Python refuses to read some thousands of them.
_MAX_DIGITS = 20


def _biases(biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    """Returns pairs of token id and bias: JSON's keys are strings, so token ids arrive as text."""
    for token in biases:
        if not (token.isdecimal() and len(token) <= _MAX_DIGITS):
            raise invalid(f'`logit_bias` has the key {token!r}: its keys are token ids, such as "42".', "logit_bias")
    return tuple((int(token), bias) for token, bias in biases.items())


class CompletionBody(GenerationBody):
    """Body of `POST /v1/completions`."""

    prompt: _Prompt
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0)] | None = None
    add_special_tokens: bool = True

    @property
    def continues_prompt(self) -> bool:
        return True

    def prompts(self) -> list[str] | list[list[int]]:
        """Returns the prompts, each a text or token ids. Raises ApiError if there is none."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise invalid("`prompt` is an empty list; send at least one prompt.", "prompt")
        return [prompt] if isinstance(prompt[0], int) else prompt  # pyrefly: ignore[bad-return]


class ContentPart(BaseModel):
    """One part of a message, of type text: the only type supported."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: _Text


_Content = Annotated[
    Annotated[_Text, Tag("a text")] | Annotated[list[ContentPart], Field(fail_fast=True), Tag("a list")],
    _TEXT_OR_LIST,
]


class Message(BaseModel):
    """One message of a chat; further fields go to the chat template unchanged."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: _Text
    content: _Content | None = None

    def for_template(self) -> dict[str, Any]:
        """Returns the message as chat templates expect it: its content one string, arguments of tool calls objects."""
        parts = self.content
        content = "\n".join(part.text for part in parts) if isinstance(parts, list) else parts or ""
        extra = dict(self.model_extra or {})
        if isinstance(calls := extra.get("tool_calls"), list):
            extra["tool_calls"] = [_with_object_arguments(call) for call in calls]
        return {**extra, "role": self.role, "content": content}


def _with_object_arguments(call: Any) -> Any:
    """OpenAI's API carries the arguments of a tool call as JSON text; templates iterate over them. Raises ApiError."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError) as error:
        name = reprlib.repr(function.get("name"))
        raise invalid(
            f"`messages` has a tool call of {name} whose `arguments` are no JSON: {error}.", "messages"
        ) from error
    return {**call, "function": {**function, "arguments": arguments}}


class ChatBody(GenerationBody):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def logprobs_wanted(self) -> int | None:
        """Alternatives per token; `None` without log-probabilities. Raises ApiError for `top_logprobs` alone."""
        if not self.logprobs:
            if self.top_logprobs:
                raise invalid("`top_logprobs` needs `logprobs` to be true.", "top_logprobs")
            return None
        return self.top_logprobs or 0


class TokenizeBody(BaseModel):
    """Body of `POST /tokenize`: a text, or the messages of a chat."""

    model_config = ConfigDict(strict=True)

    prompt: _Text | None = None
    messages: Annotated[list[Message], Field(fail_fast=True)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeBody(BaseModel):
    """Body of `POST /detokenize`."""

    model_config = ConfigDict(strict=True)

    tokens: _TokenIds
