"""Token events to text: detokenisation, stop strings, and the end of each choice."""

import dataclasses
from collections.abc import AsyncIterator, Sequence

from model.tokenizer import StopStrings, StreamDecoder, Tokenizer
from serving.api.backend import Backend
from serving.api.streams import Submission, TokenStream
from serving.engine.types import TokenEvent


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextDelta:
    """Text that one or more tokens add to a choice.

    Attributes:
        choice: index of the choice.
        text: new text; empty while a character or a possible stop string is incomplete.
        tokens: the tokens, in order.
        offsets: for each token, characters of the choice's text before it.
        finish_reason: `stop` or `length` in the last delta of a choice.
        stop_reason: the stop string or the stop token id that ended the choice, where one did (as in vLLM).
    """

    choice: int
    text: str
    tokens: tuple[TokenEvent, ...]
    offsets: tuple[int, ...]
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class _Choice:
    """Decodes the tokens of one request."""

    def __init__(
        self, index: int, stream: TokenStream, tokenizer: Tokenizer, *, continues: bool, include_stop: bool
    ) -> None:
        self._index = index
        self._sampling = stream.request.sampling
        self._include_stop = include_stop
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer, stream.request.prompt if continues else ())
        self._stops = StopStrings(self._sampling.stop)
        self._tokens = 0
        self._characters = 0  # decoded, those of a stop string included
        self.done = False

    def push(self, event: TokenEvent) -> TextDelta:
        self._tokens += 1
        self._offset = self._characters
        # A stop token has no text.
        text = "" if event.finish_reason == "stop" else self._decoder.push(event.token)
        if event.finish_reason is not None:
            text += self._decoder.finish()
        self._characters += len(text)
        if text:
            self._offset = max(self._offset, self._characters - self._whole_characters(event.token))
        if self._tokens > self._sampling.min_tokens:
            text = self._stops.push(text)
        if self._stops.matched is not None:
            self.done = True
            text += self._stops.matched if self._include_stop else ""
            return self._delta(text, event, "stop", self._stops.matched)
        if event.finish_reason is None:
            return self._delta(text, event)
        self.done = True
        stopped_by = event.token if event.token in self._sampling.stop_token_ids else None
        stop_reason = stopped_by if event.finish_reason == "stop" else None
        return self._delta(text + self._stops.finish(), event, event.finish_reason, stop_reason)

    def _whole_characters(self, token: int) -> int:
        """Characters that `token` ends the decoded text with: all of its own, or the one that its bytes complete."""
        try:
            return len(self._tokenizer.token_bytes(token).decode())
        except UnicodeDecodeError:
            return self._characters - self._offset

    def _delta(
        self, text: str, event: TokenEvent, finish_reason: str | None = None, stop_reason: str | int | None = None
    ) -> TextDelta:
        return TextDelta(
            choice=self._index,
            text=text,
            tokens=(event,),
            offsets=(self._offset,),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )


async def text_deltas(
    submission: Submission,
    backend: Backend,
    tokenizer: Tokenizer,
    *,
    continues: bool = False,
    include_stop: bool = False,
) -> AsyncIterator[TextDelta]:
    """Yields the text of every choice of `submission` as it comes; ends when all choices have ended.

    A choice ends at the backend with its finish reason; one whose stop string is complete is aborted there.
    `include_stop` keeps the stop string in the text; `continues` decodes the text as one that goes on from its prompt.
    Raises BackendError if the backend ends the submission.
    """
    choices = {
        stream.request.id: _Choice(index, stream, tokenizer, continues=continues, include_stop=include_stop)
        for index, stream in enumerate(submission.streams)
    }
    while not all(choice.done for choice in choices.values()):
        arrived: dict[int, list[TextDelta]] = {}
        for stream, event in await submission.take():
            choice = choices[stream.request.id]
            if choice.done:
                continue
            stream.answered_tokens += 1
            delta = choice.push(event)
            arrived.setdefault(delta.choice, []).append(delta)
            if delta.finish_reason is not None:
                backend.end(stream, delta.finish_reason)
        for deltas in arrived.values():
            yield joined(deltas)


def joined(deltas: Sequence[TextDelta]) -> TextDelta:
    """Joins consecutive deltas of one choice into one."""
    return TextDelta(
        choice=deltas[0].choice,
        text="".join(delta.text for delta in deltas),
        tokens=tuple(token for delta in deltas for token in delta.tokens),
        offsets=tuple(offset for delta in deltas for offset in delta.offsets),
        finish_reason=deltas[-1].finish_reason,
        stop_reason=deltas[-1].stop_reason,
    )
