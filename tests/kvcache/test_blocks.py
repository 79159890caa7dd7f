"""Keys: equal exactly when everything up to the end of the block is equal, whatever KV depends on."""

import dataclasses
import hashlib
import itertools
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvcache.blocks import Namespace, block_keys, page_keys
from kvcache.layout import KVLayout

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=20)
ROOT = Namespace().root()
LAYOUT = KVLayout(num_layers=4, num_pages=9, page_size=8, num_kv_heads=2, head_dim=64, dtype="bfloat16")
NAMES = [field.name for field in dataclasses.fields(Namespace)]
# Short texts of few characters, so that parts run together in every way.
PARTS = st.tuples(*[st.text("ab\0", max_size=2)] * (len(NAMES) + 1))


def namespace(layout: KVLayout = LAYOUT, **names: str) -> Namespace:
    return Namespace(**({"model": "m", "revision": "1"} | names), layout=layout.fingerprint, dtype=layout.dtype)


@given(TOKENS, TOKENS, st.integers(1, 5))
def test_keys_agree_as_far_as_the_tokens_do(a: list[int], b: list[int], size: int) -> None:
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    keys_a, keys_b = page_keys(a, size, ROOT), page_keys(b, size, ROOT)
    assert len(keys_a) == len(a) // size
    for index, (x, y) in enumerate(zip(keys_a, keys_b, strict=False)):
        assert (x == y) == ((index + 1) * size <= same)


@given(TOKENS, st.integers(1, 5), st.integers(0, 3))
def test_a_sequence_may_be_hashed_in_pieces(tokens: list[int], size: int, pages: int) -> None:
    whole = page_keys(tokens, size, ROOT)
    first = page_keys(tokens[: pages * size], size, ROOT)
    rest = page_keys(tokens[pages * size :], size, first[-1] if first else ROOT)
    assert first + rest == whole


@given(TOKENS, TOKENS, st.integers(1, 3), st.integers(1, 4))
def test_a_block_has_the_key_of_its_last_page(a: list[int], b: list[int], size: int, pages: int) -> None:
    blocks_a, blocks_b = (block_keys(page_keys(tokens, size, ROOT), pages) for tokens in (a, b))
    assert len(blocks_a) == len(a) // (size * pages)
    for index, (x, y) in enumerate(zip(blocks_a, blocks_b, strict=False), 1):
        assert (x == y) == (a[: index * size * pages] == b[: index * size * pages])


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"revision": "2"},
        {"tokenizer": "other"},
        {"adapter": "lora"},
        {"layout": dataclasses.replace(LAYOUT, dtype="float16")},
        {"layout": dataclasses.replace(LAYOUT, page_size=4)},
        {"layout": dataclasses.replace(LAYOUT, num_layers=5)},
        {"layout": dataclasses.replace(LAYOUT, head_dim=32)},
        {"layout": dataclasses.replace(LAYOUT, num_kv_heads=4)},
        {"layout": dataclasses.replace(LAYOUT, shards=2)},
        {"salt": "tenant"},
    ],
    ids=str,
)
def test_whatever_kv_depends_on_changes_every_key(change: dict) -> None:
    tokens = list(range(64))
    salt = change.pop("salt", "")
    changed = namespace(**change)
    size = change.get("layout", LAYOUT).page_size
    keys = page_keys(tokens, LAYOUT.page_size, namespace().root())
    others = page_keys(tokens, size, changed.root(salt))
    assert len(others) == len(tokens) // size
    assert not set(keys) & set(others)


def test_the_size_of_the_pool_changes_no_key() -> None:
    assert namespace(dataclasses.replace(LAYOUT, num_pages=1000)) == namespace()


def test_layouts_of_equal_shape_have_different_keys() -> None:
    """Two KV heads: over one device and over two, and with two slots in a row of 128 beside heads of 128."""
    one = KVLayout(num_layers=1, num_pages=4, page_size=32, num_kv_heads=2, head_dim=64)
    two = dataclasses.replace(one, shards=2)
    packed = dataclasses.replace(one, page_size=16, head_dim=128)
    assert one.shape == two.shape == packed.shape
    assert len({namespace(layout).root() for layout in (one, two, packed)}) == 3


@given(PARTS, PARTS)
@example(("ab", "", "", "", "", "", ""), ("a", "b", "", "", "", "", ""))
@example(("", "", "", "", "", "a", ""), ("", "", "", "", "", "", "a"))
def test_no_two_namespaces_have_one_root(a: tuple[str, ...], b: tuple[str, ...]) -> None:
    roots = [Namespace(**dict(zip(NAMES, parts[:-1], strict=True))).root(parts[-1]) for parts in (a, b)]
    assert (roots[0] == roots[1]) == (a == b)


def test_a_lone_surrogate_is_a_salt_like_any_other() -> None:
    assert len({Namespace().root(salt) for salt in ("", "\ud800", "\ud801")}) == 3


def test_keys_are_the_same_on_every_machine() -> None:
    parts = [b"m", b"1", b"", b"", b"l", b"float32", b"salt"]
    framed = b"".join(itertools.chain.from_iterable((struct.pack("<Q", len(part)), part) for part in parts))
    root = hashlib.sha256(framed).digest()
    assert Namespace(model="m", revision="1", layout="l", dtype="float32").root("salt") == root
    expected = hashlib.sha256(root + struct.pack("<2I", 7, 70_000)).digest()
    assert page_keys([7, 70_000, 1], 2, root) == [expected]
