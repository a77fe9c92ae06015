"""Gc run: `tiermem gc` from options to what went."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tiermem.cli.human import size_text
from tiermem.cli.store.words import count_of
from tiermem.errors import ConfigError
from tiermem.store_collect import Collection, Wish, collect
from tiermem.store_content import StoreContent
from tiermem.store_files import slots_within
from tiermem.store_keeper import StoreKeeper
from tiermem.store_names import GoneReason
from tiermem.store_reader import StoreReader
from tiermem.store_usage import StoreUsage, strangers
from tiermem.units import Size, SizeKind

WHY = {
    GoneReason.UNREACHABLE: "that nothing would have found: a page before is not stored",
    GoneReason.COLLECTED: "as asked for",
    GoneReason.CAP: "used least recently, over the cap",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What went, or with a dry run would go. content: as it was before. after: None where nothing was done."""

    content: StoreContent
    page_bytes: int
    collection: Collection
    strangers: tuple[str, ...]
    before: StoreUsage
    after: StoreUsage | None


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    with StoreReader(options.store) as reader:
        wish = _wish(options, reader)
        _check(reader.content(), wish)
        outcome = _planned(reader, wish)
        if not options.dry_run:
            outcome = _done(options.store, wish)
        if options.json:
            print(json.dumps(_json(reader, outcome), indent=2))
        else:
            print("\n".join(_lines(reader, outcome)))
    return 0


def _wish(options: argparse.Namespace, reader: StoreReader) -> Wish:
    """What the options ask for.

    Raises
    ------
    ConfigError: a cap that is no size.
    """
    most = None
    if options.cap is not None:
        size = Size.parse(options.cap, "--cap")
        if size.kind is not SizeKind.EXPLICIT:
            raise ConfigError(f"--cap {options.cap}: must be a size with a unit, such as 50GiB")
        most = max(0, slots_within(reader.layout, size.num_bytes))
    age_s = options.unused_for
    return Wish(
        unused_since_s=None if age_s is None else int(time.time() - age_s),
        model=options.model,
        salt=options.salt_fingerprint,
        label=options.session,
        most_pages=most,
    )


def _check(content: StoreContent, wish: Wish) -> None:
    """Refuse what is meant to name something and names nothing: it would be done in silence."""
    if wish.label is not None and wish.label not in content.labels.values():
        raise ConfigError(
            f"--session {wish.label!r}: no session of this store; see `tiermem ls --sessions`"
        )
    names = [name for root in content.roots.values() for name in (root.model_id, root.model.hex())]
    if wish.model is not None and not any(name.startswith(wish.model) for name in names if name):
        raise ConfigError(f"--model {wish.model!r}: no model of this store; see `tiermem ls`")
    salts = [root.salt.hex() for root in content.roots.values()]
    if wish.salt is not None and not any(salt.startswith(wish.salt) for salt in salts):
        raise ConfigError(
            f"--salt-fingerprint {wish.salt}: no salt of this store; see `tiermem ls`"
        )


def _planned(reader: StoreReader, wish: Wish) -> Outcome:
    """What would go."""
    content = reader.content()
    before = StoreUsage.of(reader, content)
    found = collect(content, wish)
    return Outcome(content, reader.slot_stride, found, strangers(reader.directory), before, None)


def _done(path: Path, wish: Wish) -> Outcome:
    """Do it, in a store that nobody has in use."""
    with StoreKeeper(path) as keeper:
        outcome = _planned(keeper.reader, wish)
        kept = np.ones(len(keeper.content), dtype=np.bool_)
        kept[list(outcome.collection.reasons)] = False
        keeper.drop(outcome.collection.reasons)
        keeper.give_back(keeper.content.slots[kept])
        after = StoreUsage.of(keeper.reader, keeper.reader.content())
        return replace(outcome, after=after)


def _lines(reader: StoreReader, outcome: Outcome) -> list[str]:
    counts = Counter(outcome.collection.reasons.values())
    verb = "would go" if outcome.after is None else "went"
    going = len(outcome.collection.reasons)
    lines = [
        f"{count_of(going, 'page')} of {len(outcome.content)} {verb}, {size_text(going * outcome.page_bytes)}"
    ]
    lines += [
        f"  {count_of(counts[why], 'page')} {text}" for why, text in WHY.items() if counts[why]
    ]
    if outcome.collection.num_needed:
        needed = count_of(outcome.collection.num_needed, "page")
        lines.append(f"{needed} asked for stay: pages that stay are found through them")
    if outcome.strangers:
        lines.append(f"set aside or left behind, {verb}: {', '.join(outcome.strangers)}")
    if outcome.after is None:
        return [*lines, f"{reader.path}: nothing was changed (--dry-run)"]
    freed = outcome.before.total - outcome.after.total
    now = f"{size_text(outcome.after.total)} on the disk"
    return [*lines, f"{reader.path}: {now}, {size_text(max(0, freed))} less than before"]


def _json(reader: StoreReader, outcome: Outcome) -> dict[str, object]:
    content = outcome.content
    return {
        "store": str(reader.path),
        "dry_run": outcome.after is None,
        "pages_before": len(outcome.content),
        "pages_gone": len(outcome.collection.reasons),
        "pages_needed": outcome.collection.num_needed,
        "set_aside": list(outcome.strangers),
        "bytes_before": outcome.before.total,
        "bytes_after": None if outcome.after is None else outcome.after.total,
        "gone": [
            {"key": content.key(row).hex(), "why": why.name.lower()}
            for row, why in outcome.collection.reasons.items()
        ],
    }
