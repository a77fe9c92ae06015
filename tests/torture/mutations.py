"""Mutations: bytes near those that a parser expects, changed at random."""

from __future__ import annotations

import random

WORDS = (
    b"-1", b"0", b"1e999", b"NaN", b"null", b"true", b'""', b"[]", b"{}", b"\xff\xff\xff\xff", b"\x00" * 8,
    b"18446744073709551616", b"9223372036854775808", b"1" * 400, b"[" * 2000, b"\\ud800", b"\xc3\x28", b"..",
    b"%", b"GiB", b"=", b"\n", b"\xf0\x9f\x92\xa9",
)  # fmt: skip
MAX_BYTES = 1 << 16


def mutated(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """`data` after one to eight changes; pieces of `others` may enter it."""
    result = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        _change(result, others, rng)
    return bytes(result[:MAX_BYTES])


def _change(data: bytearray, others: list[bytes], rng: random.Random) -> None:
    start = rng.randint(0, len(data))
    end = min(len(data), start + rng.choice([1, 1, 4, 16, 200]))
    kind = rng.randrange(7)
    if kind <= 1 and start < len(data):
        data[start] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[start:end] = rng.randbytes(end - start)
    elif kind == 3:
        del data[start:end]
    elif kind == 4:
        data[start:start] = data[start:end] * rng.choice([1, 2, 50])
    elif kind == 5:
        data[start : rng.choice([start, end])] = rng.choice(WORDS)
    else:
        other = rng.choice(others)
        at = rng.randint(0, len(other))
        data[start:end] = other[at : at + rng.choice([4, 32, 500])]
