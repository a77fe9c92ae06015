"""PageLayout: where every byte of a page lies, in every tier.

A page is one contiguous run of bytes ``[layer][K, V][kv_head][token][head_dim]``, the same in every tier,
so that a copy of a page is one copy and a layer's slice of a page is contiguous too.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

SLOT_ALIGN_BYTES = 4096
"""Slots start at multiples of this: what direct file I/O and memory pages need."""

PAGE_TOKENS = (16, 32, 64, 128)
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
MAX_LAYERS = 448
"""A page's trailer on the SSD has room for one checksum a layer, 448 at most."""


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Shape and dtype of one page of K and V.

    Parameters
    ----------
    num_layers: 1 to 448, layers whose K and V a page holds.
    num_kv_heads: 1 to 1024, heads of K and V in this process (one shard's, not the model's).
    head_dim: a multiple of 16 from 16 to 256, elements.
    dtype: "float16", "bfloat16" or "float32".
    page_tokens: 16, 32, 64 or 128 tokens.

    Raises
    ------
    TypeError, ValueError: naming the field, its value and the allowed range.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "float16"
    page_tokens: int = 64

    def __post_init__(self) -> None:
        _check_int("num_layers", self.num_layers, range(1, MAX_LAYERS + 1))
        _check_int("num_kv_heads", self.num_kv_heads, range(1, 1025))
        _check_int("head_dim", self.head_dim, range(16, 257, 16))
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"dtype={self.dtype!r}: must be one of {', '.join(ITEM_BYTES)}")
        if type(self.page_tokens) is not int:
            raise TypeError(f"page_tokens={self.page_tokens!r}: must be an int")
        if self.page_tokens not in PAGE_TOKENS:
            raise ValueError(f"page_tokens={self.page_tokens}: must be one of {PAGE_TOKENS}")

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return ITEM_BYTES[self.dtype]

    @property
    def head_items(self) -> int:
        """Elements of one head's K (or V) in one layer of a page."""
        return self.page_tokens * self.head_dim

    @property
    def kv_items(self) -> int:
        """Elements of one layer's K in a page; V starts this many elements after K."""
        return self.num_kv_heads * self.head_items

    @property
    def layer_items(self) -> int:
        """Elements of one layer's slice (K and V) of a page."""
        return 2 * self.kv_items

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's slice of a page; layer l starts at l times this."""
        return self.layer_items * self.item_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, without padding."""
        return self.num_layers * self.layer_bytes

    @property
    def slot_bytes(self) -> int:
        """Stride between slots in memory: `page_bytes` rounded up to 4,096."""
        return round_up(self.page_bytes, SLOT_ALIGN_BYTES)

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token in all layers."""
        return self.page_bytes // self.page_tokens

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens take."""
        return -(-num_tokens // self.page_tokens)

    def fingerprint(self) -> bytes:
        """32 bytes that differ whenever two layouts put any byte elsewhere."""
        text = (
            f"tiermem-layout-1 layers={self.num_layers} kv_heads={self.num_kv_heads} "
            f"head_dim={self.head_dim} dtype={self.dtype} page_tokens={self.page_tokens}"
        )
        return hashlib.sha256(text.encode()).digest()


def _check_int(name: str, value: int, allowed: range) -> None:
    if type(value) is not int:
        raise TypeError(f"{name}={value!r}: must be an int")
    if value not in allowed:
        step = f" in steps of {allowed.step}" if allowed.step != 1 else ""
        raise ValueError(f"{name}={value}: must be {allowed[0]} to {allowed[-1]}{step}")
