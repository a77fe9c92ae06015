"""Words: how the commands on a store call keys, roots, times and reasons."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tiermem.cli.human import NOTHING, count_text, duration_text
from tiermem.layout import PageLayout
from tiermem.store_names import ChainRoot, GoneReason

KEY_DIGITS = 12
"""Of a key in tables: enough to tell some million pages apart."""
MODEL_CHARACTERS = 16

GONE_TEXTS = {
    GoneReason.EVICTED: "evicted: it was colder than others when room was wanted",
    GoneReason.UNREACHABLE: "dropped: a page before it in its chain went, so that nothing would have found it",
    GoneReason.QUARANTINED: "quarantined: its bytes were found damaged",
    GoneReason.CAP: "dropped: the store was opened with a smaller cap",
    GoneReason.COLLECTED: "removed by `tiermem gc` or `tiermem verify --repair`",
}


def key_text(key: bytes) -> str:
    """The beginning of a key."""
    return key.hex()[:KEY_DIGITS]


def age_text(when_s: float, now_s: float | None = None) -> str:
    """How long ago that was; NOTHING for never."""
    if when_s <= 0:
        return NOTHING
    return duration_text((time.time() if now_s is None else now_s) - when_s)


def when_text(when_s: float) -> str:
    """A time of day with its date, and how long ago it was."""
    if not 0 < when_s < 1 << 40:
        return NOTHING
    local = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when_s))
    return f"{local} ({age_text(when_s)} ago)"


def when_json(when_s: float) -> float | None:
    """Seconds since the epoch; None for never."""
    return when_s if when_s > 0 else None


def model_text(root: ChainRoot) -> str:
    """A model id, shortened where it is a long fingerprint; the store's own fingerprint where it is not known."""
    if not root.model_id:
        return f"id unknown, fingerprint {root.model.hex()}"
    if len(root.model_id) == 64 and set(root.model_id) <= set("0123456789abcdef"):
        return root.model_id[:MODEL_CHARACTERS]
    return root.model_id


def salt_text(salt: bytes) -> str:
    """A salt's fingerprint."""
    return f"fingerprint {salt.hex()}" if any(salt) else "none"


def root_text(root: ChainRoot | None) -> str:
    """What a chain belongs to, in words."""
    if root is None:
        return "of an unknown model: the index does not say"
    shard, count = root.shard
    part = f", shard {shard} of {count}" if count != 1 else ""
    return f"model {model_text(root)}, salt {salt_text(root.salt)}{part}"


def root_json(root: ChainRoot | None) -> dict[str, object] | None:
    """What a chain belongs to, for JSON."""
    if root is None:
        return None
    return {
        "hash": root.hash.hex(),
        "model_id": root.model_id or None,
        "model_fingerprint": root.model.hex(),
        "salt_fingerprint": root.salt.hex() if any(root.salt) else None,
        "shard": list(root.shard),
    }


def layout_text(layout: PageLayout) -> str:
    """A layout in words."""
    return (
        f"{layout.num_layers} layers, {layout.num_kv_heads} KV heads of {layout.head_dim}, {layout.dtype}, "
        f"{layout.page_tokens} tokens a page"
    )


def layout_json(layout: PageLayout) -> dict[str, object]:
    """A layout, for JSON."""
    return {
        "num_layers": layout.num_layers,
        "num_kv_heads": layout.num_kv_heads,
        "head_dim": layout.head_dim,
        "dtype": layout.dtype,
        "page_tokens": layout.page_tokens,
        "fingerprint": layout.fingerprint().hex(),
    }


def tokens_text(first_page: int, num_pages: int, layout: PageLayout) -> str:
    """Which tokens some pages hold, the end not included."""
    start = first_page * layout.page_tokens
    return f"{count_text(start)} - {count_text(start + num_pages * layout.page_tokens)}"


def count_of(count: int, noun: str, plural: str = "") -> str:
    """A count with its noun: "1 page", "2,000 pages"."""
    return f"{count_text(count)} {noun if count == 1 else plural or noun + 's'}"


def places_text(numbers: Sequence[int]) -> str:
    """Numbers in ascending order as ranges: "0, 2 - 5"; at most the first ten ranges."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    shown = [f"{low}" if low == high else f"{low} - {high}" for low, high in ranges[:10]]
    return ", ".join(shown) + (", ..." if len(ranges) > 10 else "")
