"""Prompts for the blocks of a workload: tokens that depend on a block's key alone, so equal keys are equal prefixes."""

import hashlib
from collections.abc import Sequence

from serving.request import TraceRequest
from serving.workload.errors import TraceError

# A text for engines that need no sense: ids that every vocabulary here has, as many as a byte has values.
BYTE_IDS = range(3, 259)
_MARK_TOKENS = 3


class PromptWriter:
    """Writes prompts of exactly as many tokens as a workload asks for.

    A block begins with three tokens that spell its key, with the text's tokens as digits, and goes on with a passage of
    the text from a place that the key chooses. Different keys below the cube of the number of different tokens in the
    text therefore give different blocks, from three tokens of length on. The same arguments give the same prompts on
    every machine.

    Args:
        text: token ids of a text, in the vocabulary of the model that will read the prompts.
        block_size: tokens per block.
        seed: another seed, other passages.

    Raises:
        TraceError: a text of fewer than two different tokens.
    """

    def __init__(self, text: Sequence[int], block_size: int, seed: int = 0) -> None:
        self._alphabet = sorted(set(text))
        if len(self._alphabet) < 2:
            raise TraceError(
                f"A text of {len(text)} tokens, {len(self._alphabet)} of them different, is too poor to write prompts "
                "from. Use a longer text."
            )
        self._text = list(text)
        self._block_size = block_size
        self._seed = seed

    def block(self, key: int, tokens: int) -> list[int]:
        """Returns the first `tokens` tokens of a block; they depend on its key and the seed alone."""
        return self._passage("block", key, tokens)

    def prompt(self, request: TraceRequest) -> list[int]:
        """Returns `request.input_tokens` tokens: its blocks, then a passage of its own where it has no more keys."""
        tokens: list[int] = []
        for key in request.keys:
            tokens += self.block(key, min(self._block_size, request.input_tokens - len(tokens)))
        return tokens + self._passage("request", int(request.id), request.input_tokens - len(tokens))

    def _passage(self, kind: str, number: int, tokens: int) -> list[int]:
        mark, base = [], len(self._alphabet)
        rest = number
        for _ in range(_MARK_TOKENS):
            rest, digit = divmod(rest, base)
            mark.append(self._alphabet[digit])
        digest = hashlib.sha256(f"{self._seed}/{kind}/{number}".encode()).digest()
        start = int.from_bytes(digest[:8], "big") % len(self._text)
        passage = self._text[start : start + tokens]
        while len(passage) < tokens:
            passage += self._text[: tokens - len(passage)]
        return [*mark, *passage][:tokens]
