"""A request on its way through the engine: its tokens, its pages, and how far its KV is computed."""

from kvcache.allocator import PageTable
from kvcache.blocks import BlockKey, block_keys
from serving.request import Request


class Sequence:
    """Mutable state of one request. Sequences order by (priority, arrival, order of addition)."""

    def __init__(self, request: Request, order: int, max_pages: int, page_size: int, eos_ids: frozenset[int]):
        self.request = request
        self.order = order
        self.rank = (request.priority, request.arrival_s, order)
        self.tokens: list[int] = list(request.prompt)
        self.computed = 0  # tokens whose KV is in the pool
        self.cached_tokens = 0  # prompt tokens found in the prefix cache when first admitted
        self.admitted = False
        self.page_table = PageTable(max_pages)
        self._page_size = page_size
        self._keys: list[BlockKey] = []
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
        """Tokens whose KV is still to be computed; 1 while decoding."""
        return len(self.tokens) - self.computed

    def keys(self) -> list[BlockKey]:
        """Keys of all full pages of tokens known so far; each is hashed once."""
        done = len(self._keys) * self._page_size
        parent = self._keys[-1] if self._keys else None
        self._keys += block_keys(self.tokens[done:], self._page_size, self.request.salt.encode(), parent)
        return self._keys

    def unpublished(self) -> list[tuple[int, BlockKey]]:
        """(page, key) of pages that became full of computed KV since the last call."""
        full = self.computed // self._page_size
        if full == self._published:
            return []
        start, self._published = self._published, full
        return list(zip(self.page_table.pages[start:full], self.keys()[start:full], strict=True))

    def start(self, cached_pages: list[int], new_pages: list[int]) -> None:
        """Takes pages: the first hold KV already, the rest are empty."""
        self.page_table.extend([*cached_pages, *new_pages])
        self.computed = len(cached_pages) * self._page_size
        self._published = len(cached_pages)
        if not self.admitted:
            self.cached_tokens = self.computed
            self.admitted = True

    def stop(self) -> list[int]:
        """Gives its pages up, in order, and forgets their KV; tokens stay, so it can start again."""
        pages = self.page_table.pages
        self.page_table.clear()
        self.computed = self._published = 0
        return pages
