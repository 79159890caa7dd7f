"""A request on its way through the engine: its phase, its tokens, its pages, and how far its KV is computed."""

import enum

from kvcache.allocator import PageTable
from kvcache.blocks import BlockKey, page_keys
from serving.request import Request


class SequencePhase(enum.Enum):
    """Where a sequence is in its life. Preemption leads back to WAITING.

    Attributes:
        WAITING: queued; holds no pages.
        LOADING: holds its pages, and another tier is writing KV into some of them; no step computes it.
        PREFILL: its known tokens are computed in chunks.
        DECODE: each step computes one token.
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
    ):
        self.request = request
        self.order = order
        self.rank = (request.priority, request.arrival_s, order)
        self.phase = SequencePhase.WAITING
        self.tokens: list[int] = list(request.prompt)
        self.computed = 0
        self.cached_tokens = 0
        self.preemptions = 0
        self.page_table = PageTable(max_pages)
        self._page_size = page_size
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

    def unpublished(self) -> list[tuple[int, BlockKey]]:
        """Returns (page, key) of pages that became full of computed KV since the last call."""
        full = self.computed // self._page_size
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
        """Begins to compute behind the first `computed_tokens` tokens: WAITING or LOADING -> PREFILL."""
        self.phase = SequencePhase.PREFILL
        self.computed = computed_tokens
        if not self.preemptions:
            self.cached_tokens = computed_tokens

    def advance(self, tokens: int) -> None:
        """Counts `tokens` more tokens as computed: PREFILL -> DECODE once at most the newest token is pending."""
        self.computed += tokens
        if self.pending <= 1:
            self.phase = SequencePhase.DECODE

    def stop(self) -> list[int]:
        """Gives the pages up and returns them, in order; tokens and keys stay: any phase -> WAITING."""
        self.phase = SequencePhase.WAITING
        pages = self.page_table.pages
        self.page_table.clear()
        self.computed = self._published = 0
        return pages
