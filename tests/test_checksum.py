"""The checksum against a slow implementation of its specification, on every path there is here."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import numpy.typing as npt
import pytest

from tiermem import _core

Bytes = npt.NDArray[np.uint8]

MASK = (1 << 64) - 1
LOW = (1 << 32) - 1
BLOCK_BYTES = 1024
PATHS = [path for path in _core.ChecksumPath if _core.checksum_path_supported(path)]


def mix64(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def slow_tables() -> tuple[list[int], list[int]]:
    draws = [mix64((0x74696572_6D656D31 + n * 0x9E3779B97F4A7C15) & MASK) for n in range(1, 257)]
    multipliers = [(d & LOW & ~0xFF) | (2 * i + 1) for i, d in enumerate(draws[128:])]
    return draws[:128], multipliers


KEYS, MULTIPLIERS = slow_tables()


def slow_block(words: list[int], block: int) -> int:
    s1 = s2 = 0
    for word, key, multiplier in zip(words, KEYS, MULTIPLIERS, strict=False):
        low = (word + key) & LOW
        high = ((word >> 32) + (key >> 32)) & LOW
        s1 += low * high
        s2 += word * multiplier
    first = mix64((s1 + (block + 1) * 0xD6E8FEB86659FD93) & MASK)
    return first + mix64((s2 ^ ((block + 1) * 0xA0761D6478BD642F)) & MASK)


def slow_checksum(data: bytes) -> int:
    total = (len(data) + 1) * 0xE7037ED1A0B428DB
    for block, start in enumerate(range(0, len(data), BLOCK_BYTES)):
        piece = data[start : start + BLOCK_BYTES]
        words = [int.from_bytes(piece[i : i + 8], "little") for i in range(0, len(piece), 8)]
        total += slow_block(words, block)
    return mix64(total & MASK)


def checksum(data: Bytes, path: _core.ChecksumPath = _core.ChecksumPath.AUTO) -> int:
    return _core.checksum(data.ctypes.data, data.nbytes, path)


def distinct_sums(variants: npt.NDArray[np.uint8]) -> int:
    """Number of different checksums among the rows."""
    sums = _core.checksum_slices(variants.ctypes.data, variants.shape[1], len(variants))
    return len(np.unique(sums))


@pytest.fixture
def rng() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    sys.stdout.write(f"seed {seed}\n")  # shown when the test fails
    return np.random.default_rng(seed)


def random_bytes(rng: np.random.Generator, count: int) -> Bytes:
    return rng.integers(0, 256, count, dtype=np.uint8)


def test_tables_are_those_of_the_specification() -> None:
    keys, multipliers = _core.checksum_tables()
    assert keys.tolist() == KEYS
    assert multipliers.tolist() == MULTIPLIERS
    assert len(set(MULTIPLIERS)) == 128 and all(m % 2 == 1 for m in MULTIPLIERS)


@pytest.mark.parametrize("path", PATHS)
def test_fixed_vectors(path: _core.ChecksumPath) -> None:
    # Printed by slow_checksum once: a stored checksum stays valid as long as these hold.
    vectors = {
        b"": 0x9A63C6065BD325C1,
        b"\0": 0x8129145629915C68,
        bytes(range(256)) * 5: 0xC0A6A1B750E7E792,
        bytes(4096): 0xB3B313822DC43EED,
    }
    for data, expected in vectors.items():
        assert slow_checksum(data) == expected
        assert checksum(np.frombuffer(data + b"\xaa", np.uint8)[:-1], path) == expected


@pytest.mark.parametrize("path", PATHS)
def test_every_path_equals_the_specification(
    path: _core.ChecksumPath, rng: np.random.Generator
) -> None:
    lengths = [*range(80), *range(1000, 1050), 2048, 4096, *rng.integers(0, 9000, 30).tolist()]
    for length in lengths:
        data = random_bytes(rng, length)
        assert checksum(data, path) == slow_checksum(data.tobytes()), f"length {length}"


@pytest.mark.parametrize("path", PATHS)
def test_extreme_words(path: _core.ChecksumPath) -> None:
    for value in (0x00, 0xFF, 0x80, 0x7F):
        data = np.full(3000, value, dtype=np.uint8)
        assert checksum(data, path) == slow_checksum(data.tobytes())


@pytest.mark.parametrize("path", PATHS)
def test_any_alignment(path: _core.ChecksumPath, rng: np.random.Generator) -> None:
    data = random_bytes(rng, 2500)
    expected = slow_checksum(data.tobytes())
    for shift in range(1, 65):
        moved = np.concatenate([random_bytes(rng, shift), data, random_bytes(rng, 64)])
        assert checksum(moved[shift : shift + data.size], path) == expected, f"shift {shift}"


@pytest.mark.parametrize("length", [1, 8, 9, 64, 200, 1024, 1100])
def test_every_bit_flip_shows(length: int, rng: np.random.Generator) -> None:
    data = random_bytes(rng, length)
    bits = np.arange(length * 8)
    variants = np.tile(data, (bits.size + 1, 1))
    variants[bits, bits // 8] ^= (1 << (bits % 8)).astype(np.uint8)
    assert distinct_sums(variants) == bits.size + 1


@pytest.mark.parametrize("kind", ["random", "small", "top bits"])
def test_every_swap_of_two_words_shows(kind: str, rng: np.random.Generator) -> None:
    words = rng.integers(0, 1 << 63, 128, dtype=np.uint64)
    if kind == "small":
        words = rng.permutation(128).astype(np.uint64)
    if kind == "top bits":  # s2 cannot tell two such words 64 places apart; s1 must
        words = np.uint64(0x3C003C003C00) | (np.arange(128, dtype=np.uint64) << np.uint64(57))
    pairs = list(itertools.combinations(range(128), 2))
    variants = np.tile(words, (len(pairs) + 1, 1))
    for row, (i, j) in enumerate(pairs):
        variants[row, [i, j]] = variants[row, [j, i]]
    assert distinct_sums(variants.view(np.uint8)) == len(pairs) + 1


def test_moved_doubled_and_zeroed_blocks_show(rng: np.random.Generator) -> None:
    blocks = rng.integers(0, 1 << 63, (8, 128), dtype=np.uint64)
    variants = [blocks]
    for i, j in itertools.permutations(range(8), 2):
        swapped, doubled = blocks.copy(), blocks.copy()
        swapped[[i, j]] = swapped[[j, i]]
        doubled[i] = blocks[j]
        variants += [swapped, doubled] if i < j else [doubled]
    for i in range(8):
        zeroed = blocks.copy()
        zeroed[i] = 0
        variants.append(zeroed)
    assert distinct_sums(np.stack(variants).reshape(len(variants), -1).view(np.uint8)) == len(
        variants
    )


def test_shifts_show(rng: np.random.Generator) -> None:
    data = random_bytes(rng, 4096)
    shifts = [1, 2, 4, 8, 16, 64, 512, 1024, 2048]
    rotated = np.stack([data, *(np.roll(data, shift) for shift in shifts)])
    assert distinct_sums(rotated) == len(rotated)


def test_lengths_of_zeros_show() -> None:
    zeros = np.zeros(5000, dtype=np.uint8)
    assert len({checksum(zeros[:length]) for length in range(5000)}) == 5000


@pytest.mark.parametrize("fill", [0, 0x3C, 0xFF])
def test_no_collision_among_nearly_equal_inputs(fill: int, rng: np.random.Generator) -> None:
    count = 100_000
    variants = np.full((count, 256), fill, dtype=np.uint8).view(np.uint64)
    # Each row differs from the others in one or two words, by small amounts.
    rows = np.arange(count)
    variants[rows, rows % 32] += (rows // 32 + 1).astype(np.uint64)
    variants[rows[::2], (rows[::2] + 7) % 32] -= (rows[::2] // 32 + 1).astype(np.uint64)
    assert distinct_sums(variants.view(np.uint8)) == count


@pytest.mark.parametrize("path", PATHS)
def test_slices_and_pages(path: _core.ChecksumPath, rng: np.random.Generator) -> None:
    slice_bytes, num_slices = 1000, 5
    pages = rng.integers(0, 256, (7, slice_bytes * num_slices), dtype=np.uint8)
    expected = [
        [slow_checksum(page[s * slice_bytes :][:slice_bytes].tobytes()) for s in range(num_slices)]
        for page in pages
    ]
    order = rng.permutation(7)
    addresses = pages.ctypes.data + order.astype(np.int64) * pages.strides[0]
    sums = _core.checksum_pages(addresses, slice_bytes, num_slices, path)
    assert sums.dtype == np.uint64 and sums.shape == (7, num_slices)
    assert sums.tolist() == [expected[i] for i in order]
    whole = _core.checksum_slices(pages.ctypes.data, slice_bytes, 7 * num_slices, path)
    assert whole.reshape(7, num_slices).tolist() == expected


def test_empty_batches() -> None:
    assert _core.checksum_pages(np.empty(0, np.int64), 8, 3).shape == (0, 3)
    assert _core.checksum_pages(np.array([8], np.int64), 8, 0).shape == (1, 0)
    assert _core.checksum_slices(8, 0, 2).tolist() == [slow_checksum(b"")] * 2


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_bytes=-1"):
        _core.checksum(8, -1)
    with pytest.raises(ValueError, match="address=0"):
        _core.checksum(0, 8)
    with pytest.raises(ValueError, match="slice_bytes=-8"):
        _core.checksum_slices(8, -8, 1)
    with pytest.raises(ValueError, match="num_slices=-1"):
        _core.checksum_pages(np.array([8], np.int64), 8, -1)
    with pytest.raises(TypeError):
        _core.checksum_pages(np.array([8.0]), 8, 1)
    for path in set(_core.ChecksumPath) - set(PATHS):
        with pytest.raises(ValueError, match="not supported"):
            _core.checksum(8, 0, path)
