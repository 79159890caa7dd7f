"""Response bodies in OpenAI's shapes: a completion or a chat completion, whole or in chunks."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from model.tokenizer import Tokenizer
from serving.api.detokenize import TextDelta
from serving.engine.types import TokenEvent


@dataclasses.dataclass(frozen=True)
class AnswerHead:
    """Fields that every chunk of an answer repeats: id, creation time in Unix seconds, model name."""

    id: str
    created: int
    model: str

    def envelope(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns a body of `kind` with `choices`."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": list(choices)}


class Renderer(Protocol):
    """Renders the text of choices as one endpoint's JSON."""

    def opening(self, choice: int) -> dict[str, Any] | None:
        """Returns a choice's first chunk, before any token; `None` where the endpoint has none."""
        ...

    def chunk(self, delta: TextDelta) -> dict[str, Any]:
        """Returns one chunk of a stream."""
        ...

    def whole(self, choices: Sequence[TextDelta]) -> dict[str, Any]:
        """Returns the whole answer; each delta holds all of its choice."""
        ...

    def chunk_of(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns a chunk with `choices`, which may be empty."""
        ...


class CompletionRenderer:
    """Renders `text_completion` objects."""

    def __init__(self, head: AnswerHead, tokenizer: Tokenizer, *, logprobs: bool, echoes: Sequence[str]) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._echoes = echoes

    def opening(self, choice: int) -> dict[str, Any] | None:
        if not self._echoes[choice]:
            return None
        return self.chunk_of([{"index": choice, "text": self._echoes[choice], "logprobs": None, "finish_reason": None}])

    def chunk(self, delta: TextDelta) -> dict[str, Any]:
        return self.chunk_of([self._choice(delta, delta.text)])

    def whole(self, choices: Sequence[TextDelta]) -> dict[str, Any]:
        return self.chunk_of([self._choice(delta, self._echoes[delta.choice] + delta.text) for delta in choices])

    def chunk_of(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self._head.envelope("text_completion", choices)

    def _choice(self, delta: TextDelta, text: str) -> dict[str, Any]:
        return {
            "index": delta.choice,
            "text": text,
            "logprobs": self._token_logprobs(delta) if self._logprobs else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }

    def _token_logprobs(self, delta: TextDelta) -> dict[str, list[Any]]:
        tokens = [token_text(self._tokenizer, event.token) for event in delta.tokens]
        tops = []
        for event, token in zip(delta.tokens, tokens, strict=True):
            top = {token: _finite(event.logprob)}
            for id, logprob in event.top_logprobs:
                if id != event.token:
                    text = token_text(self._tokenizer, id)
                    # Two ids may have one text, and a dictionary only one place for it.
                    top[text if text not in top else f"token_id:{id}"] = _finite(logprob)
            tops.append(top)
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(event.logprob) for event in delta.tokens],
            "top_logprobs": tops,
            "text_offset": [len(self._echoes[delta.choice]) + offset for offset in delta.offsets],
        }


class ChatRenderer:
    """Renders `chat.completion` and `chat.completion.chunk` objects."""

    def __init__(self, head: AnswerHead, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._logprobs = logprobs

    def opening(self, choice: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return self.chunk_of([{"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}])

    def chunk(self, delta: TextDelta) -> dict[str, Any]:
        return self.chunk_of([self._choice(delta, "delta", {"content": delta.text})])

    def whole(self, choices: Sequence[TextDelta]) -> dict[str, Any]:
        messages = [{"role": "assistant", "content": delta.text, "refusal": None} for delta in choices]
        rendered = [self._choice(delta, "message", message) for delta, message in zip(choices, messages, strict=True)]
        return self._head.envelope("chat.completion", rendered)

    def chunk_of(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self._head.envelope("chat.completion.chunk", choices)

    def _choice(self, delta: TextDelta, name: str, content: dict[str, Any]) -> dict[str, Any]:
        logprobs = {"content": [self._token_logprob(event) for event in delta.tokens]} if self._logprobs else None
        return {
            "index": delta.choice,
            name: content,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }

    def _token_logprob(self, event: TokenEvent) -> dict[str, Any]:
        top = [_chat_logprob(self._tokenizer, id, logprob) for id, logprob in event.top_logprobs]
        return _chat_logprob(self._tokenizer, event.token, event.logprob) | {"top_logprobs": top}


def _chat_logprob(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    bytes_ = tokenizer.token_bytes(token)
    return {"token": token_text(tokenizer, token), "logprob": _finite(logprob), "bytes": list(bytes_)}


def _finite(logprob: float | None) -> float | None:
    """Returns -9999 for an impossible token, as OpenAI does: JSON has no infinity."""
    return None if logprob is None else max(logprob, -9999.0)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Returns one token as text, a special token by name; a part of a character as OpenAI writes it, `bytes:\\xe4`."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """Returns OpenAI's `usage` object; `cached_tokens` counts prompt tokens whose KV was reused."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
