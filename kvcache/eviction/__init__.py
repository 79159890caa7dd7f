"""Which block leaves a tier: one interface, and the policies by name. Live pools and simulators share them."""

from collections.abc import Callable

from kvcache.errors import KVCacheError
from kvcache.eviction.arc import ARC as ARC
from kvcache.eviction.belady import Belady as Belady
from kvcache.eviction.policy import EvictionPolicy as EvictionPolicy
from kvcache.eviction.queues import FIFO as FIFO
from kvcache.eviction.queues import LRU as LRU
from kvcache.eviction.queues import S3FIFO as S3FIFO
from kvcache.eviction.queues import Sieve as Sieve
from kvcache.eviction.ranked import LFU as LFU
from kvcache.eviction.ranked import LengthAware as LengthAware
from kvcache.eviction.turns import Turns as Turns

_POLICIES: dict[str, Callable[[int, bool], EvictionPolicy]] = {
    "lru": LRU,
    "fifo": FIFO,
    "lfu": LFU,
    "length_aware": LengthAware,
    "sieve": Sieve,
    "s3fifo": S3FIFO,
    "arc": ARC,
    "turns": Turns,
}
_PREFIX_RULE = "+prefix"
# A parent is used whenever its child is, so LRU, LFU and length-aware obey the rule as they are.
POLICIES = (*_POLICIES, *(name + _PREFIX_RULE for name in ("fifo", "sieve", "s3fifo", "arc", "turns")))


def eviction_policy(name: str, capacity: int) -> EvictionPolicy:
    """Returns the policy called `name`, one of `POLICIES`, for `capacity` blocks; "+prefix" adds the prefix rule.

    Raises:
        KVCacheError: names a policy that does not exist, or a capacity below 1.
    """
    if name not in POLICIES:
        raise KVCacheError(f"No eviction policy `{name}`; known: {', '.join(POLICIES)}.")
    return _POLICIES[name.removesuffix(_PREFIX_RULE)](capacity, name.endswith(_PREFIX_RULE))
