"""What the scheduler asks of the tiers below device memory. Knows no JAX."""

from collections.abc import Sequence as Items
from typing import Protocol

from kvcache.blocks import BlockKey
from serving.engine.sequence import Sequence


class KVLoader(Protocol):
    """Loads KV into pages of the device from a tier below. The engine's thread alone calls a loader."""

    def lookup(self, keys: Items[BlockKey]) -> int:
        """Returns how many of `keys` (one per page), from the first on, can be loaded."""
        ...

    def load(self, sequence: Sequence, keys: Items[BlockKey], pages: Items[int]) -> None:
        """Starts to load the KV of `keys` into `pages`, and returns at once.

        Every load ends with one call of `Scheduler.loaded`, whether the load succeeded, failed or was of a request that
        is gone by then: until that call nobody else gets `pages`.
        """
        ...
