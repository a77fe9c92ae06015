"""Heading: what every view of a store says first: which one, how much is in it, and who has it in use."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tiermem.cli.human import count_text, size_text
from tiermem.cli.snapshot import Snapshot
from tiermem.cli.store.words import count_of, layout_json, layout_text
from tiermem.snapshots import live_snapshots
from tiermem.stats import Stats
from tiermem.store_content import StoreContent
from tiermem.store_reader import StoreReader


def heading_lines(reader: StoreReader, content: StoreContent) -> list[str]:
    """A few lines of text."""
    pages = len(content)
    tokens = count_text(pages * reader.layout.page_tokens)
    size = size_text(pages * reader.slot_stride)
    chains, sessions = _counts(content)
    counts = (
        f"{count_of(chains, 'chain')} of {count_of(sessions, 'session')}, {count_of(pages, 'page')}"
    )
    lines = [
        f"{reader.path}: {counts}, {tokens} tokens, {size}",
        f"{layout_text(reader.layout)}, {size_text(reader.slot_stride)} each",
    ]
    if content.strays:
        records = count_of(len(content.strays), "record")
        lines.append(f"{records} of the index damaged and left out: see `tiermem verify`")
    users = users_of(reader)
    lines += [_user_text(stats) for stats in users]
    if not users and reader.owner_pid() is not None:
        lines.append("in use by a process of which `tiermem stats` knows nothing")
    return lines


def heading_json(reader: StoreReader, content: StoreContent) -> dict[str, object]:
    """The same for JSON."""
    chains, sessions = _counts(content)
    return {
        "store": str(reader.path),
        "layout": layout_json(reader.layout),
        "in_use": reader.owner_pid() is not None,
        "pids": [stats.pid for stats in users_of(reader)],
        "total_chains": chains,
        "total_sessions": sessions,
        "total_pages": len(content),
        "total_tokens": len(content) * reader.layout.page_tokens,
        "total_bytes": len(content) * reader.slot_stride,
        "damaged_records": len(content.strays),
    }


def users_of(reader: StoreReader) -> list[Stats]:
    """What the managers that have the store open say of themselves."""
    found = [Snapshot.of(document).stats for document in live_snapshots()]
    here = str(reader.path.resolve())
    return [stats for stats in found if stats is not None and stats.ssd_path is not None
            and _resolved(stats.ssd_path) == here]  # fmt: skip


def _resolved(path: str) -> str:
    return str(Path(path).resolve())


def _user_text(stats: Stats) -> str:
    tiers = ", ".join(
        f"{count_text(tier.used)} on the {tier.tier.upper()}" for tier in stats.tiers if tier.slots
    )
    return f"in use by process {stats.pid}, which holds pages: {tiers} (`tiermem stats --pid {stats.pid}`)"


def _counts(content: StoreContent) -> tuple[int, int]:
    """Chains and sessions."""
    chains = int(content.forest().stretches.is_end.sum())
    return chains, len(np.unique(content.entries["label"]))
