"""Block keys: a chained hash names a block by its tokens and by everything before them (Mooncake, section 3.2.1).

Equal keys mean equal KV, so a block may be reused wherever its key is found. Keys are the same on every machine.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

BlockKey = bytes


def block_keys(
    tokens: Sequence[int] | np.ndarray, block_size: int, salt: bytes = b"", parent: BlockKey | None = None
) -> list[BlockKey]:
    """SHA-256 keys of the full blocks of `tokens`; a partial last block has none.

    Args:
        tokens: token ids, each from 0 to 2**32 - 1.
        block_size: tokens per block.
        salt: only sequences of equal salt share keys (a tenant's name hides its prompts from other tenants' timing).
        parent: key of the block before `tokens`; `None` at the start of a sequence, where the salt enters.
    """
    previous = hashlib.sha256(salt).digest() if parent is None else parent
    words = np.asarray(tokens, "<u4")
    keys = []
    for start in range(0, len(words) - block_size + 1, block_size):
        previous = hashlib.sha256(previous + words[start : start + block_size].tobytes()).digest()
        keys.append(previous)
    return keys
