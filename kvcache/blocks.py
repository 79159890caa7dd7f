"""Block keys: a chained hash names a block by its tokens and by everything before them (Mooncake, section 3.2.1).

Equal keys mean equal KV, so a block may be reused wherever its key is found. Keys are the same on every machine. They
are hashed once, per page, where a request enters; the key of a larger block is the key of its last page.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

BlockKey = bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Namespace:
    """Everything but tokens that KV depends on. No key of one namespace is a key of another.

    Empty names are enough for KV that never leaves the process that computed it.

    Attributes:
        model: name of the model.
        revision: fingerprint of its weights.
        tokenizer: fingerprint of the tokenizer.
        adapter: name and revision of an adapter on top of the model.
        layout: `KVLayout.fingerprint`.
        dtype: name of the dtype that KV is stored in.
    """

    model: str = ""
    revision: str = ""
    tokenizer: str = ""
    adapter: str = ""
    layout: str = ""
    dtype: str = ""

    def root(self, salt: str = "") -> BlockKey:
        """Returns the key before the first block: SHA-256 of every field and of `salt`, each framed by its length.

        `salt` separates tenants of one namespace: who does not know it cannot tell by timing what others asked.
        """
        digest = hashlib.sha256()
        for part in (*dataclasses.astuple(self), salt):
            encoded = part.encode(errors="surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.digest()


def page_keys(tokens: Sequence[int] | np.ndarray, page_size: int, parent: BlockKey) -> list[BlockKey]:
    """Returns the SHA-256 keys of the full pages of `tokens`; a partial last page has none.

    Args:
        tokens: token ids, each from 0 to 2**32 - 1.
        page_size: tokens per page.
        parent: key of the page before `tokens`; `Namespace.root` at the start of a sequence.
    """
    words = np.asarray(tokens, "<u4")
    keys = []
    for start in range(0, len(words) - page_size + 1, page_size):
        parent = hashlib.sha256(parent + words[start : start + page_size].tobytes()).digest()
        keys.append(parent)
    return keys


def block_keys(keys: Sequence[BlockKey], pages: int) -> Sequence[BlockKey]:
    """Returns the keys of the full blocks of `pages` pages, given the keys of all pages from the first on."""
    return keys[pages - 1 :: pages]
