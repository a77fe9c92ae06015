"""What pages must hold: bytes that follow from the page's own key, so that any mix-up shows.

K and V of a token are a function of (salt, every token up to it, layer, K or V, dimension): a page of another
prompt, tenant, position or layer differs in nearly all of its bytes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from world import LAYOUT

PAGE = LAYOUT.page_tokens
SALTS = (b"", b"one tenant", b"another")
NUM_PROMPTS = 6
PROMPT_PAGES = 9
PROMPT_TOKENS = PROMPT_PAGES * PAGE

Uint64s = NDArray[np.uint64]
_ODD = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], dtype=np.uint64)


def mix(words: Uint64s) -> Uint64s:
    """Each word scrambled (the finalizer of splitmix64)."""
    words = (words ^ (words >> np.uint64(30))) * _ODD[1]
    words = (words ^ (words >> np.uint64(27))) * _ODD[2]
    return words ^ (words >> np.uint64(31))


def chain_words(salt: bytes, tokens: NDArray[np.int64]) -> Uint64s:
    """One word for each token, that depends on the salt and on every token up to it."""
    places = np.arange(1, len(tokens) + 1, dtype=np.uint64)
    own = mix(tokens.astype(np.uint64) * _ODD[0] + places * _ODD[1])
    start = np.uint64(int.from_bytes(salt[:8].ljust(8, b"\0"), "little"))
    return mix(np.cumsum(own, dtype=np.uint64) + start)


def kv_of(words: Uint64s, layer: int) -> torch.Tensor:
    """(2, n, 1, head_dim) K and V, in [-1, 1), of tokens with these words."""
    places = np.arange(2 * LAYOUT.head_dim, dtype=np.uint64).reshape(2, 1, LAYOUT.head_dim)
    places += np.uint64(1 + layer * 2 * LAYOUT.head_dim)
    bits = mix(words[None, :, None] + places * _ODD[0]) >> np.uint64(40)
    kv = bits.astype(np.float32) / np.float32(1 << 23) - np.float32(1)
    return torch.from_numpy(kv)[:, :, None, :]


def num_wrong_bytes(found: torch.Tensor, wanted: torch.Tensor) -> int:
    """How many bytes differ between two tensors of one shape and dtype."""
    one, other = (t.contiguous().numpy().view(np.uint8) for t in (found, wanted))
    return int((one != other).sum())


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids of NUM_PROMPTS prompts, PROMPT_TOKENS each; each three share what they start with."""

    tokens: tuple[tuple[int, ...], ...]

    @classmethod
    def made(cls, rng: random.Random) -> Prompts:
        """New ones."""
        prompts: list[tuple[int, ...]] = []
        for number in range(NUM_PROMPTS):
            shared = prompts[number - number % 3][: rng.randint(1, 5) * PAGE] if number % 3 else ()
            own = [rng.randrange(2**32) for _ in range(PROMPT_TOKENS - len(shared))]
            prompts.append((*shared, *own))
        return cls(tuple(prompts))
