"""Stats view: finds live managers and shows them, once or again and again."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tiermem.cli.manager_text import Rates, manager_lines
from tiermem.cli.screen import Screen, terminal_width
from tiermem.cli.snapshot import Snapshot
from tiermem.snapshots import live_snapshots

NONE = (
    "no live TierManager of this user on this machine",
    "(one appears here as soon as a program makes a TierManager, or runs `tiermem generate`)",
)


def show(pid: int | None, as_json: bool) -> None:
    """Print every live manager, or those of process `pid`, once."""
    found = find(pid)
    if as_json:
        print(json.dumps(to_json(found), indent=2))
        return
    print("\n".join(lines_of(found, pid, terminal_width(sys.stdout), {})))


def watch(interval_s: float, pid: int | None, as_json: bool) -> int:
    """Do the same every `interval_s` seconds until Ctrl-C, in place where stdout is a terminal."""
    rates: dict[str, Rates] = {}
    with Screen(sys.stdout, in_place=not as_json) as screen, _interrupts() as interrupts:
        try:
            while not interrupts:
                found = find(pid)
                if as_json:
                    print(json.dumps(to_json(found)), flush=True)
                else:
                    rates = {item.key: rates.get(item.key, Rates()) for item in found}
                    for item in found:
                        rates[item.key].update(item)
                    screen.draw([_heading(interval_s), *lines_of(found, pid, screen.width, rates)])
                time.sleep(interval_s)
        except KeyboardInterrupt:
            pass
    return 0


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C so far: Python drops the exception that it raises where that happens in a finalizer or a callback."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, or taken by whoever embeds this
        yield seen
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def find(pid: int | None) -> list[Snapshot]:
    """The live managers of this user, or those of process `pid`."""
    found = [Snapshot.of(document) for document in live_snapshots()]
    return [item for item in found if pid is None or item.pid == pid]


def to_json(found: list[Snapshot]) -> dict[str, object]:
    """One document: the managers as they describe themselves, each with the age of its figures."""
    return {"managers": [{**item.document, "age_s": item.age_s} for item in found]}


def lines_of(
    found: list[Snapshot], pid: int | None, width: int | None, rates: dict[str, Rates]
) -> list[str]:
    """The managers as text, with an empty line between them."""
    if not found:
        return list(NONE) if pid is None else [f"no live TierManager in process {pid}"]
    lines: list[str] = []
    for item in found:
        lines += [""] * bool(lines) + manager_lines(item, width, rates.get(item.key))
    return lines


def _heading(interval_s: float) -> str:
    return f"tiermem stats, every {interval_s:g} s, {time.strftime('%H:%M:%S')}; Ctrl-C ends it"
