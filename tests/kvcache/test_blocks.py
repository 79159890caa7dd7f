"""Block keys: equal exactly when everything up to the end of the block is equal."""

import hashlib
import struct

from hypothesis import given
from hypothesis import strategies as st

from kvcache.blocks import block_keys

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=20)


@given(TOKENS, TOKENS, st.integers(1, 5))
def test_keys_agree_as_far_as_the_tokens_do(a: list[int], b: list[int], size: int) -> None:
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    keys_a, keys_b = block_keys(a, size), block_keys(b, size)
    assert len(keys_a) == len(a) // size
    for index, (x, y) in enumerate(zip(keys_a, keys_b, strict=False)):
        assert (x == y) == ((index + 1) * size <= same)


@given(TOKENS, st.integers(1, 5), st.integers(0, 3))
def test_a_sequence_may_be_hashed_in_pieces(tokens: list[int], size: int, blocks: int) -> None:
    whole = block_keys(tokens, size, b"salt")
    first = block_keys(tokens[: blocks * size], size, b"salt")
    rest = block_keys(tokens[blocks * size :], size, b"salt", first[-1] if first else None)
    assert first + rest == whole


def test_the_salt_separates_tenants() -> None:
    assert block_keys([1, 2], 2, b"a") != block_keys([1, 2], 2, b"b")


def test_keys_are_the_same_on_every_machine() -> None:
    expected = hashlib.sha256(hashlib.sha256(b"").digest() + struct.pack("<2I", 7, 70_000)).digest()
    assert block_keys([7, 70_000, 1], 2) == [expected]
