"""The prefix index as Python sees it: hashes against hashlib, entries against a dictionary."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import numpy.typing as npt
import pytest

from tiermem._core import PrefixIndex
from tiermem.errors import InvariantError

Ids = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint8]

FIRST = 1 << 32
"""The lowest page id."""


def ids_of(*ids: int) -> Ids:
    return np.array(ids, dtype=np.int64)


def rows(keys: list[bytes]) -> Hashes:
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 32)


def keys_of(hashes: Hashes) -> list[bytes]:
    return [row.tobytes() for row in hashes]


def slow_root(parts: list[bytes]) -> bytes:
    message = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return hashlib.sha256(b"tiermem prefix root, version 1\0\0" + message).digest()


def slow_chain(parent: bytes, tokens: list[int], page_tokens: int) -> list[bytes]:
    keys = []
    for start in range(0, len(tokens) - page_tokens + 1, page_tokens):
        page = tokens[start : start + page_tokens]
        message = parent + b"".join(token.to_bytes(4, "little") for token in page)
        parent = hashlib.sha256(message).digest()
        keys.append(parent)
    return keys


# -- Hashes


@pytest.mark.parametrize("seed", range(20))
def test_root_hash_is_its_formula(seed: int) -> None:
    rng = random.Random(seed)
    parts = [rng.randbytes(rng.choice([0, 1, 31, 55, 64, 200])) for _ in range(rng.randrange(6))]
    assert PrefixIndex.root_hash(parts) == slow_root(parts)


def test_roots_do_not_depend_on_how_bytes_are_divided_alone() -> None:
    lists = [[], [b""], [b"", b""], [b"ab"], [b"a", b"b"], [b"ab", b""], [b"", b"ab"], [b"b", b"a"]]
    assert len({PrefixIndex.root_hash(parts) for parts in lists}) == len(lists)


@pytest.mark.parametrize("page_tokens", [1, 3, 16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [np.int64, np.uint32])
def test_chain_is_its_formula(page_tokens: int, dtype: type[np.int64 | np.uint32]) -> None:
    rng = np.random.default_rng(page_tokens)
    index = PrefixIndex(page_tokens)
    root = rng.bytes(32)
    for num_tokens in (0, 1, page_tokens - 1, page_tokens, page_tokens + 1, 7 * page_tokens + 1):
        tokens = rng.integers(0, 1 << 32, num_tokens, dtype=np.int64)
        tokens[:2] = (1 << 32) - 1
        keys = index.chain(root, tokens.astype(dtype))  # type: ignore[arg-type]
        assert keys.shape == (num_tokens // page_tokens, 32)
        assert keys_of(keys) == slow_chain(root, tokens.tolist(), page_tokens)


def test_a_chain_goes_on_from_any_of_its_keys() -> None:
    index = PrefixIndex(16)
    tokens = np.arange(160)
    whole = index.chain(bytes(32), tokens)
    rest = index.chain(whole[3].tobytes(), tokens[64:])
    assert keys_of(rest) == keys_of(whole[4:])


@pytest.mark.parametrize("token", [-1, 1 << 32, -(1 << 63), (1 << 63) - 1])
def test_tokens_out_of_range_are_value_errors(token: int) -> None:
    tokens = np.array([1, 2, token], dtype=np.int64)
    for page_tokens in (1, 64):
        with pytest.raises(ValueError, match=rf"tokens\[2\]={token}: must be in \[0, 4294967295\]"):
            PrefixIndex(page_tokens).chain(bytes(32), tokens)


# -- Bad arguments


def test_hashes_of_another_length_are_value_errors() -> None:
    index = PrefixIndex(16)
    for bad in (b"", bytes(31), bytes(33)):
        with pytest.raises(ValueError, match=r"parent: .* bytes: must be 32"):
            index.chain(bad, np.arange(16))
        with pytest.raises(ValueError, match="must be 32"):
            index.contains(bad)
        with pytest.raises(ValueError, match="must be 32"):
            index.insert(bad, bytes(32), FIRST, 0)
        with pytest.raises(ValueError, match="must be 32"):
            index.insert(bytes(32), bad, FIRST, 0)


def test_arrays_of_another_type_or_shape_are_type_errors() -> None:
    index = PrefixIndex(16)
    for hashes in (np.zeros((2, 31), np.uint8), np.zeros(64, np.uint8), np.zeros((2, 32), np.int8)):
        with pytest.raises(TypeError):
            index.match(hashes)  # type: ignore[arg-type]
    for tokens in (np.zeros(16), np.zeros(16, np.int32), np.zeros((4, 4), np.int64)):
        with pytest.raises(TypeError):
            index.chain(bytes(32), tokens)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        PrefixIndex.root_hash(["text"])  # type: ignore[list-item]


def test_page_tokens_out_of_range_is_a_value_error() -> None:
    for page_tokens in (0, -1, 1 << 31):
        with pytest.raises(ValueError, match="page_tokens="):
            PrefixIndex(page_tokens)


# -- Entries


def chain_of(index: PrefixIndex, count: int, first_page: int = FIRST) -> tuple[bytes, list[bytes]]:
    """A root and `count` keys under it, inserted as the pages from `first_page` on."""
    root = PrefixIndex.root_hash([b"test"])
    keys = keys_of(index.chain(root, np.arange(count * index.page_tokens)))
    for i, (parent, key) in enumerate(zip([root, *keys[:-1]], keys, strict=True)):
        assert index.insert(parent, key, first_page + i, i)
    return root, keys


def test_the_longest_stored_prefix_matches() -> None:
    index = PrefixIndex(4)
    _, keys = chain_of(index, 5)
    index.remove(ids_of(FIRST + 3))
    assert index.match(rows(keys)).tolist() == [FIRST, FIRST + 1, FIRST + 2]
    assert index.match(rows(keys[:2])).tolist() == [FIRST, FIRST + 1]
    assert index.match(rows([])).tolist() == []
    assert not index.contains(keys[4])


def test_names_say_key_parent_and_position() -> None:
    index = PrefixIndex(4)
    root, keys = chain_of(index, 2)
    found, parents, positions, named = index.names(ids_of(FIRST + 1, FIRST + 7, FIRST))
    assert keys_of(found) == [keys[1], bytes(32), keys[0]]
    assert keys_of(parents) == [keys[0], bytes(32), root]
    assert positions.tolist() == [1, 0, 0]
    assert named.tolist() == [True, False, True]
    assert keys_of(index.keys(ids_of(FIRST))) == keys[:1]
    with pytest.raises(InvariantError, match=f"page {FIRST + 7}: must have a name"):
        index.keys(ids_of(FIRST, FIRST + 7))


def test_what_cannot_be_found_is_not_inserted() -> None:
    index = PrefixIndex(4)
    root, keys = chain_of(index, 2)
    assert not index.insert(root, keys[0], FIRST + 9, 0)
    assert not index.insert(bytes(32), bytes([1]) * 32, FIRST + 9, 1)
    assert index.size == 2


def test_contradictions_change_nothing() -> None:
    index = PrefixIndex(4)
    root, keys = chain_of(index, 2)
    new = bytes([7]) * 32
    for parent, page, position in (
        (keys[1], FIRST, 2),  # has a name
        (keys[1], FIRST + (1 << 32), 2),  # another page of that index has one
        (keys[1], FIRST + 9, 1),
        (keys[1], FIRST + 9, 0),
        (root, FIRST + 9, 1),
    ):
        with pytest.raises(InvariantError, match="insert: page"):
            index.insert(parent, new, page, position)
    for page, position in ((0, 2), (-1, 2), (FIRST + 9, -1), (FIRST + 9, 1 << 31)):
        with pytest.raises(ValueError, match="insert"):
            index.insert(keys[1], new, page, position)
    assert index.size == 2
    assert not index.contains(new)


def test_a_store_is_taken_in_any_order() -> None:
    source = PrefixIndex(4)
    root, keys = chain_of(source, 6)
    order = [4, 1, 0, 5, 3]  # 2 is missing, so nothing after it can be found
    parents = [root, *keys]
    index = PrefixIndex(4)
    strays = index.insert_many(
        rows([parents[i] for i in order]),
        rows([keys[i] for i in order]),
        ids_of(*(FIRST + i for i in order)),
        ids_of(*order),
    )
    assert sorted(strays.tolist()) == [FIRST + 3, FIRST + 4, FIRST + 5]
    assert index.match(rows(keys)).tolist() == [FIRST, FIRST + 1]
    assert index.pages().tolist() == [FIRST, FIRST + 1]


def test_insert_many_refuses_pages_given_twice() -> None:
    index = PrefixIndex(4)
    keys = rows([bytes([i]) * 32 for i in range(4)])
    with pytest.raises(InvariantError, match="must be given once"):
        index.insert_many(keys[:2], keys[2:], ids_of(FIRST, FIRST), ids_of(0, 0))
    with pytest.raises(ValueError, match="differ in length"):
        index.insert_many(keys[:2], keys[2:], ids_of(FIRST), ids_of(0, 0))
    assert index.size == 0


@pytest.mark.parametrize("seed", range(4))
def test_random_trees_agree_with_a_dictionary(seed: int) -> None:
    rng = random.Random(seed)
    index = PrefixIndex(2)
    roots = [PrefixIndex.root_hash([bytes([i])]) for i in range(3)]
    entries: dict[bytes, tuple[bytes, int, int]] = {}  # key -> parent, page, position
    next_page = FIRST

    def below(key: bytes) -> list[int]:
        pages = [entries[key][1]]
        for other, (parent, _, _) in entries.items():
            if parent == key:
                pages += below(other)
        return pages

    for _ in range(1500):
        parent = rng.choice([*roots, *entries])
        if rng.random() < 0.85 or parent in roots:
            tokens = np.array([rng.randrange(4), rng.randrange(2)])
            key = index.chain(parent, tokens)[0].tobytes()
            position = entries[parent][2] + 1 if parent in entries else 0
            assert index.insert(parent, key, next_page, position) == (key not in entries)
            entries.setdefault(key, (parent, next_page, position))
            next_page += 1
        else:
            wanted = below(parent)
            pages, names = index.remove(ids_of(entries[parent][1]))
            removed = pages.tolist()
            by_page = {entry[1]: key for key, entry in entries.items()}
            assert keys_of(names) == [by_page[page] for page in removed]
            assert sorted(removed) == sorted(wanted)
            assert removed[-1] == entries[parent][1]
            entries = {k: e for k, e in entries.items() if e[1] not in wanted}
        assert index.size == len(entries)
        key = rng.choice([*roots, *entries])
        assert index.contains(key) == (key in entries)
    every = index.pages().tolist()
    assert sorted(every) == sorted(page for _, page, _ in entries.values())
    for key, (parent, page, position) in entries.items():
        keys, parents, positions, _ = index.names(ids_of(page))
        assert (keys_of(keys), keys_of(parents), positions[0]) == ([key], [parent], position)
        if parent in entries:
            assert every.index(entries[parent][1]) < every.index(page)
