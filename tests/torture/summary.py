"""The summary of a run: a line while it goes on, a table at its end."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable

from torture.tally import Finding, Tally

LINE_S = 30.0
"""Between lines where there is no terminal."""
SHOWN = 20
"""Findings that are told in full; the JSON has all."""


def progress_line(seconds: float, tally: Tally) -> str:
    """What was done so far."""
    return (
        f"{int(seconds) // 60:3d}:{int(seconds) % 60:02d}  {tally.cases.total()} cases, "
        f"{tally.kills.total()} kills, {tally.faults.total()} faults, {tally.flips.total()} flips, "
        f"{tally.inputs.total()} inputs, {tally.bytes_checked / 1e6:,.0f} MB checked; "
        f"wrong bytes {tally.wrong_bytes}, lost pages {tally.lost_pages}, hangs {tally.hangs}, "
        f"findings {len(tally.findings)}"
    )


def shower() -> Callable[[float, Tally], None]:
    """Shows progress: one line that is written anew on a terminal, else a line now and then."""
    next_s = 0.0

    def show(seconds: float, tally: Tally) -> None:
        nonlocal next_s
        if seconds < next_s:
            return
        on_terminal = sys.stderr.isatty()
        next_s = seconds + (0.5 if on_terminal else LINE_S)
        line = progress_line(seconds, tally)
        sys.stderr.write(f"\r\x1b[K{line}" if on_terminal else f"{line}\n")
        sys.stderr.flush()

    return show


def table(tally: Tally, seconds: float) -> str:
    """All counts, a line each."""
    slopes = "; ".join(
        f"{name} {slope.middle:+.2g} [{slope.low:+.2g}, {slope.high:+.2g}]"
        for name, slope in tally.slopes.items()
    )
    rows = [
        ("time", f"{seconds:,.0f} s"),
        ("cases", counts(tally.cases)),
        ("operations", f"{tally.operations:,} ({tally.refused:,} refused with an error)"),
        ("kills, by phase", counts(tally.kills)),
        ("stores reopened and checked", f"{tally.reopened:,}"),
        ("faults, by kind", counts(tally.faults)),
        ("flipped bits, by place", counts(tally.flips)),
        ("damaged and foreign stores", counts(tally.stores)),
        ("inputs of parsers", counts(tally.inputs)),
        ("bytes checked", f"{tally.bytes_checked:,}"),
        ("wrong bytes", f"{tally.wrong_bytes:,}"),
        ("lost pages", f"{tally.lost_pages:,}"),
        ("not found by damaged indexes", f"{tally.index_lost:,} pages"),
        ("damaged copies found", f"{tally.corrupt_found:,}"),
        ("hangs", f"{tally.hangs:,}"),
        ("calls beyond deadline + 1 s", f"{tally.late:,}"),
        ("slowest opening", f"{tally.open_s:.3f} s"),
        ("slowest other call", f"{tally.call_s:.3f} s"),
        ("disk, most of its cap", f"{tally.disk_share:.1%} ({tally.disk_samples:,} samples)"),
        ("growth an operation", slopes or "not judged: too short"),
        ("findings", f"{len(tally.findings):,}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def finding_text(finding: Finding) -> str:
    """What happened, and how to see it again."""
    return (
        f"--- {finding.kind}: {finding.text.rstrip()}\n"
        f"    again: make torture KIND={finding.kind} CASE={finding.seed}"
    )


def counts(counter: Counter[str]) -> str:
    """The sum, and its parts."""
    parts = ", ".join(f"{name} {number:,}" for name, number in counter.most_common())
    return f"{counter.total():,} ({parts})" if len(counter) > 1 else parts or "0"
