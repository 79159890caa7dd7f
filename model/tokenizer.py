"""Text to token ids and back: a checkpoint's `tokenizer.json`, streaming detokenisation, stop strings."""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from model.chat_template import ChatTemplate, ChatTemplateError, find_chat_template

# What a decoder writes for bytes that are not, or not yet, a character.
_REPLACEMENT = "\ufffd"
_FEW = 256
# Tokens that may be decoded again with each new one: more than a character has bytes.
_MAX_PENDING = 8


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


def _special_token(value: str | Mapping[str, Any] | None) -> str | None:
    """A special token of `tokenizer_config.json`: the text itself, or an object that holds it."""
    return value["content"] if isinstance(value, Mapping) else value


class Tokenizer:
    """The tokenizer of one checkpoint.

    Attributes:
        eos_ids: ids that end a text: all that `generation_config.json`, `config.json` and `tokenizer_config.json` name.
        vocab_size: number of token ids, special ones included.
        longest_token_bytes: no token spells more bytes of UTF-8.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template = ChatTemplate(chat_template) if chat_template else None
        self._template_variables = dict(template_variables or {})
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self._added_ids = frozenset(added)
        self._decoder_kinds = _decoder_kinds(json.loads(tokenizer.to_str())["decoder"])
        self.eos_ids = tuple(eos_ids)
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        # Byte-level vocabularies write bytes as characters of one or two bytes: a bound all the same.
        self.longest_token_bytes = max((len(token.encode()) for token in tokenizer.get_vocab()), default=1)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the vocabulary and of all rules by which text becomes tokens."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
        """Reads an HF folder. Raises FileNotFoundError without a `tokenizer.json`, ValueError where it is broken."""
        folder = pathlib.Path(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist: the folder needs a `tokenizer.json`. One made from other tokenizer files "
                "comes out of `transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`."
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is not a tokenizer of the `tokenizers` library: {error}.") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config = _read_json(folder / "tokenizer_config.json")
        special = {
            name: _special_token(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        }
        # All of them: a fine-tune often changes one file and leaves the base model's token in the others.
        named = [_read_json(folder / name).get("eos_token_id") for name in ("generation_config.json", "config.json")]
        if special["eos_token"] is not None:
            named.append(tokenizer.token_to_id(special["eos_token"]))
        eos_ids: dict[int, None] = {}
        for ids in named:
            eos_ids |= dict.fromkeys([ids] if isinstance(ids, int) else ids or ())
        return cls(
            tokenizer,
            eos_ids=tuple(eos_ids),
            chat_template=find_chat_template(folder, config),
            template_variables={name: token or "" for name, token in special.items()},
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Raises ValueError for a text that is not Unicode (a lone surrogate)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The text has a lone surrogate at character {error.start}; send valid Unicode."
            ) from error
        # `encode` holds the interpreter's lock for seconds per megabyte, and with it every other thread.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of token ids; bytes that are no character become U+FFFD."""
        if len(ids) > _FEW:  # `decode` holds the interpreter's lock, which is cheaper for a few tokens
            return self._tokenizer.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0]
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes of one token as it stands inside a text: its leading space, or a part of a character."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added_ids:
            return token.encode()
        if "ByteLevel" in self._decoder_kinds and all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        if "ByteFallback" in self._decoder_kinds and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        if self._decoder_kinds & {"Metaspace", "Replace"}:
            return token.replace("▁", " ").encode()
        return self.decode([token_id], skip_special_tokens=False).encode()

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Returns token ids of `render_chat`."""
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, variables=variables)
        return self.encode(text, add_special_tokens=False)  # the template writes them itself

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Returns the prompt that the checkpoint's template makes of `messages`.

        Args:
            messages: each with `role` and `content`, oldest first.
            add_generation_prompt: open the assistant's answer at the end.
            variables: further names that the template may read, such as `tools`.

        Raises:
            ChatTemplateError: the checkpoint has no template, or the template refuses the messages.
        """
        if self._chat_template is None:
            raise ChatTemplateError("This checkpoint has no chat template; send a plain prompt for completion instead.")
        variables = self._template_variables | dict(variables or {})
        return self._chat_template.render(messages, variables, add_generation_prompt=add_generation_prompt)


# GPT-2 writes printable bytes as themselves in Latin-1, and the others from U+0100 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_HIDDEN)}
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


def _decoder_kinds(decoder: Mapping[str, Any] | None) -> set[str]:
    """Types of a decoder of `tokenizer.json`, those of a sequence included."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_decoder_kinds(part) for part in decoder.get("decoders", ())))


class StreamDecoder:
    """Turns the token ids of one answer into text, a piece at a time, never half a character.

    The pieces joined are what `Tokenizer.decode` returns for all ids at once, whatever bytes a byte-level vocabulary
    yields. (A decoder with byte fallback takes a whole run of bytes back if one of them is wrong; text that went out
    stays.) Special tokens have no text. Each token costs the decoding of a few.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        """`before` are the ids that the answer continues: a decoder may drop the space before a text's first token."""
        self._tokenizer = tokenizer
        # A decoder may treat the first token of a text apart, so new ids are decoded after those of the last piece.
        self._context = [id for id in before[-_MAX_PENDING:] if id not in tokenizer.special_ids]
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Text that `token_id` completes; empty while its last character is incomplete."""
        if token_id in self._tokenizer.special_ids:
            return ""
        self._pending.append(token_id)
        text = self._new_text()
        if text.endswith(_REPLACEMENT):
            return self._flush(text) if len(self._pending) > _MAX_PENDING else ""
        if text:
            self._context = self._pending
        elif len(self._context) < _MAX_PENDING:
            self._context = self._context + self._pending
        self._pending = []
        return text

    def _flush(self, text: str) -> str:
        """Returns what no later byte can change of `text`, the undecodable text of all pending tokens.

        A character has at most four bytes, so the last three tokens may yet become one; those before them cannot, if
        they decode by themselves to how `text` begins. Without this a run of bytes that are no text is decoded again
        from its start with each of them, and shown only at its end.
        """
        context, pending = self._context, self._pending
        for cut in range(len(pending) - 3, len(pending) - 7, -1):
            self._pending = pending[:cut]
            head = self._new_text()
            self._context, self._pending = pending[:cut], pending[cut:]
            if head + self._new_text() == text:
                return head
            self._context = context
        self._pending = pending
        return ""

    def finish(self) -> str:
        """The rest, U+FFFD where it ends inside a character."""
        text = self._new_text()
        self._context, self._pending = self._context + self._pending, []
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._context)
        after = self._tokenizer.decode(self._context + self._pending)
        return after[len(before) :] if after.startswith(before) else self._tokenizer.decode(self._pending)


class StopStrings:
    """Finds the first stop string of a streamed text and holds back whatever may yet become one.

    The string that is complete first wins, the longest of several, so the cut does not depend on the pieces.

    Attributes:
        matched: the stop string found, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that is safe to show; check `matched` afterwards: nothing follows once it is set."""
        if self.matched is not None:
            return ""
        held = self._held + text
        found = [(held.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in held]
        if found:
            end, _, self.matched = min(found)
            self._held = ""
            return held[: end - len(self.matched)]
        keep = max((self._overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """What was held back, at the end of a text that no stop string ended."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
