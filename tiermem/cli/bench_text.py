"""Bench text: results and comparisons as tables for people."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from tiermem.bench.compare import Comparison
from tiermem.bench.result import Result
from tiermem.bench.result_file import SavedResult
from tiermem.bench.words import parameters_text, value_text
from tiermem.cli.human import NOTHING
from tiermem.cli.table import Align, Table, pairs

TEXT_WIDTH = 100
MET = {True: "met", False: "missed", None: ""}
ALIGNS = (Align.LEFT, Align.LEFT, Align.RIGHT, Align.RIGHT, Align.RIGHT, Align.RIGHT, Align.RIGHT,
          Align.LEFT)  # fmt: skip


def environment_lines(saved: SavedResult, width: int | None) -> list[str]:
    """The machine, the software and the commit."""
    environment = saved.environment
    software = ", ".join(
        f"{name} {environment[name]}"
        for name in ("tiermem", "torch", "triton", "python", "cuda", "driver")
        if environment.get(name)
    )
    rows = [
        ("machine", f"{saved.machine}, {environment.get('cores')} cores, {environment.get('os')}"),
        ("software", software),
        ("commit", saved.commit),
    ]
    return pairs(rows).lines(width)


def result_lines(results: Sequence[Result], width: int | None) -> list[str]:
    """One table a benchmark, with notes on what was skipped and what the ceilings are."""
    lines: list[str] = []
    for benchmark in dict.fromkeys(result.subject.benchmark for result in results):
        chosen = [result for result in results if result.subject.benchmark == benchmark]
        lines += [*_table(benchmark, chosen).lines(width), *_notes(chosen, width), ""]
    return lines[:-1]


def comparison_lines(comparison: Comparison, tolerance: float, width: int | None) -> list[str]:
    """Ratios of all figures, then what one of the runs lacks."""
    rows = [
        (
            ratio.key,
            f"{value_text(ratio.then)} {ratio.unit}",
            f"{value_text(ratio.now)} {ratio.unit}",
            f"{ratio.ratio:.3f}",
            "worse" if ratio.is_worse(tolerance) else "",
        )
        for ratio in comparison.ratios
    ]
    table = Table(("figure", "then", "now", "now / then", ""), tuple(rows))
    return [
        "",
        *table.lines(width),
        *(f"only then: {key}" for key in comparison.missing_now),
        *(f"only now: {key}" for key in comparison.missing_then),
    ]


def _table(benchmark: str, results: Sequence[Result]) -> Table:
    titles = (benchmark, "parameters", "median", "p5", "p95", "of ceiling", "aim", "")
    return Table(titles, tuple(_row(result) for result in results), ALIGNS)


def _row(result: Result) -> tuple[str, ...]:
    subject, figures = result.subject, result.figures
    parameters = "; ".join(filter(None, (parameters_text(subject.parameters), subject.note)))
    if figures is None:
        return (subject.name, parameters, "skipped", "", "", "", "", "")
    share = result.percent_of_ceiling
    return (
        subject.name,
        parameters,
        f"{value_text(figures.median)} {subject.unit}",
        value_text(figures.p5),
        value_text(figures.p95),
        NOTHING if share is None else f"{share:.1f}%",
        aim_text(result),
        MET[result.meets_aim],
    )


def aim_text(result: Result) -> str:
    """The share of the ceiling or the value that is aimed at."""
    subject = result.subject
    if subject.target_percent is not None:
        return f"{subject.target_percent:g}%"
    return "" if subject.budget is None else f"{subject.budget:g} {subject.unit}"


def _notes(results: Sequence[Result], width: int | None) -> list[str]:
    """What the ceilings are, and why figures were skipped; each once."""
    ceilings = {
        f"ceiling: {result.ceiling.name}, {value_text(result.ceiling.value)} {result.subject.unit}"
        for result in results
        if result.ceiling is not None
    }
    skipped: Mapping[str, None] = dict.fromkeys(
        f"{result.subject.name}: {result.skipped}" for result in results if result.skipped
    )
    return [
        line
        for text in [*sorted(ceilings), *skipped]
        for line in textwrap.wrap(text, width or TEXT_WIDTH, subsequent_indent="  ")
    ]
