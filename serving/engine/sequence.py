"""A request on its way through the engine: its phase, its tokens, its pages, and how far its KV is computed."""

import enum
from collections.abc import Sequence as Items

from kvcache.allocator import PageTable
from kvcache.blocks import BlockKey, page_keys
from serving.request import Request


class SequencePhase(enum.Enum):
    """Where a sequence is in its life. Preemption leads back to WAITING.

    Attributes:
        WAITING: queued; holds no pages.
        LOADING: holds its pages, and another tier is writing KV into some of them; no step computes it.
        PREFILL: its known tokens are computed in chunks; in a deterministic engine those of its prompt only.
        DECODE: each step computes one token. In a deterministic engine a sequence that starts again has its emitted
            tokens computed so, and chooses the next token at the last of them.
    """

    WAITING = enum.auto()
    LOADING = enum.auto()
    PREFILL = enum.auto()
    DECODE = enum.auto()


class Sequence:
    """Mutable state of one request. Sequences order by (priority, arrival, order of addition).

    Args:
        request: what to generate.
        order: number of the request within its engine.
        max_pages: most pages of a sequence.
        page_size: tokens per page.
        eos_ids: token ids that end a sequence unless its request ignores them.
        root: key before the first page.
        keys: keys of the prompt's full pages, which those of the output continue.
        emitted: tokens that the request has generated elsewhere.
        chunk_tokens: in a deterministic engine, prompt chunks end at multiples of so many tokens and only whole ones
            are reused; `None` lets chunks end anywhere.

    Attributes:
        phase: changed by the methods here alone.
        tokens: prompt and generated tokens.
        computed: leading tokens whose KV is in the pool.
        cached_tokens: prompt tokens whose KV was reused when the sequence was first admitted.
        preemptions: times that the sequence lost its pages and started again.
        stop_ids: token ids that end the sequence.
    """

    def __init__(
        self,
        request: Request,
        order: int,
        *,
        max_pages: int,
        page_size: int,
        eos_ids: frozenset[int],
        root: BlockKey,
        keys: list[BlockKey],
        emitted: Items[int] = (),
        chunk_tokens: int | None = None,
    ):
        self.request = request
        self.order = order
        self.rank = (request.priority, request.arrival_s, order)
        self.phase = SequencePhase.WAITING
        self.tokens: list[int] = [*request.prompt, *emitted]
        self.computed = 0
        self.cached_tokens = 0
        self.preemptions = 0
        self.page_table = PageTable(max_pages)
        self._page_size = page_size
        self._chunk_tokens = chunk_tokens
        self._keys: list[BlockKey] = keys
        self._root = root
        self._published = 0
        sampling = request.sampling
        self.stop_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else eos_ids)

    def __lt__(self, other: "Sequence") -> bool:
        return self.rank < other.rank

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def pending(self) -> int:
        """Known tokens whose KV is still to be computed."""
        return len(self.tokens) - self.computed

    def keys(self) -> list[BlockKey]:
        """Returns the keys of all full pages of tokens known so far; each is hashed once."""
        hashed = len(self._keys) * self._page_size
        parent = self._keys[-1] if self._keys else self._root
        self._keys += page_keys(self.tokens[hashed:], self._page_size, parent)
        return self._keys

    @property
    def reusable_pages(self) -> int:
        """Leading pages whose KV need not be computed here; the last known token always is, to choose the next one."""
        if self._chunk_tokens is None:
            return (len(self.tokens) - 1) // self._page_size
        return self._whole_chunks(min(len(self.request.prompt), len(self.tokens) - 1)) // self._page_size

    def next_chunk(self, budget: int) -> int:
        """Returns the tokens of the next prompt chunk; 0 if chunks end at fixed places and it is over `budget`."""
        if self._chunk_tokens is None:
            return min(self.pending, budget)
        size = min(self._chunk_tokens, len(self.request.prompt) - self.computed)
        return size if size <= budget else 0

    def unpublished(self) -> list[tuple[int, BlockKey]]:
        """Returns (page, key) of pages that became full of reusable KV since the last call."""
        computed = self.computed
        if self._chunk_tokens is not None:
            # What decode steps or a shorter chunk computed has other bits than a whole chunk.
            computed = min(computed, self._whole_chunks(len(self.request.prompt)))
        full = computed // self._page_size
        if full == self._published:
            return []
        start, self._published = self._published, full
        return list(zip(self.page_table.pages[start:full], self.keys()[start:full], strict=True))

    def take_pages(self, cached_pages: list[int], new_pages: list[int]) -> None:
        """Takes pages, of which the first hold KV already; `load` or `start` follows."""
        self.page_table.extend([*cached_pages, *new_pages])
        self.computed = len(cached_pages) * self._page_size
        self._published = len(cached_pages)

    def load(self) -> None:
        """Waits for KV that another tier writes into the pages: WAITING -> LOADING."""
        self.phase = SequencePhase.LOADING

    def start(self, computed_tokens: int) -> None:
        """Begins to compute behind the first `computed_tokens` tokens: WAITING or LOADING -> PREFILL.

        With fixed chunks: behind the last whole chunk of these tokens; with all of the prompt there, -> DECODE.
        """
        whole_prompt = computed_tokens >= len(self.request.prompt)
        self.phase = SequencePhase.DECODE if whole_prompt and self._chunk_tokens else SequencePhase.PREFILL
        self.computed = computed_tokens if whole_prompt else self._whole_chunks(computed_tokens)
        if not self.preemptions:
            self.cached_tokens = self.computed

    def advance(self, tokens: int) -> None:
        """Counts `tokens` more tokens as computed: PREFILL -> DECODE once at most the newest token is pending.

        With fixed chunks: once the prompt is computed.
        """
        self.computed += tokens
        left = self.pending - 1 if self._chunk_tokens is None else len(self.request.prompt) - self.computed
        if left <= 0:
            self.phase = SequencePhase.DECODE

    def _whole_chunks(self, tokens: int) -> int:
        unit = self._chunk_tokens or 1
        return tokens // unit * unit

    def stop(self) -> list[int]:
        """Gives the pages up and returns them, in order; tokens and keys stay: any phase -> WAITING."""
        self.phase = SequencePhase.WAITING
        pages = self.page_table.pages
        self.page_table.clear()
        self.computed = self._published = 0
        return pages
