"""Markdown of long contexts: sweeps as tables of contexts and hot budgets, instead of a row for every figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tiermem.bench.long_context.derived import BASELINE_NAMES, FIT, OVER
from tiermem.bench.long_context.predicted import PREDICTED
from tiermem.bench.long_context.rates import MACHINE
from tiermem.bench.long_context.rows import (
    DECODE,
    LOGITS,
    OUTPUT,
    OVER_STREAMING,
    PASS,
    groups,
)
from tiermem.bench.result import Result
from tiermem.bench.words import parameters_text, value_text
from tiermem.units import format_bytes

NEVER = "skipped"


def summary_rows(results: Sequence[Result]) -> list[Result]:
    """The rows that are worth a line of their own: no parts of steps, and one of each error, the largest."""
    largest: dict[str, Result] = {}
    for result in results:
        name = result.subject.name
        if name in (LOGITS, OUTPUT):
            largest[name] = max(result, largest.get(name, result), key=_median)
    return [*(result for result in results if _is_of_a_whole_run(result)), *largest.values()]


def chief_rows(results: Sequence[Result]) -> list[Result]:
    """Those without the machine's rates and the fits."""
    return [
        result
        for result in summary_rows(results)
        if not result.subject.name.startswith((MACHINE, FIT))
    ]


def _is_of_a_whole_run(result: Result) -> bool:
    name = result.subject.name
    if name.startswith((MACHINE, FIT)):
        return True
    if name == OVER_STREAMING:
        return result.subject.budget is not None
    return name in (DECODE, PASS, PREDICTED, *OVER.values(), *BASELINE_NAMES.values())


def sweep_tables(results: Sequence[Result]) -> Iterator[str]:
    """One table a sweep of at least two cases: tokens/s, and percent of the ceiling."""
    for common, cases in groups(results):
        cells = {}
        for row in (row for case in cases for row in case if row.subject.name == DECODE):
            given = row.subject.parameters
            cells[int(given["context"]), int(given["gpu_bytes"])] = _cell(row)
        if len(cells) > 1:
            yield _table(parameters_text(common), cells)


def _table(title: str, cells: dict[tuple[int, int], str]) -> str:
    contexts = sorted({context for context, _ in cells})
    budgets = sorted({budget for _, budget in cells})
    lines = [
        f"Tokens/s (percent of the ceiling), {title}:",
        "",
        f"| context | {' | '.join(f'gpu {format_bytes(budget)}' for budget in budgets)} |",
        f"|---|{'---|' * len(budgets)}",
    ]
    for context in contexts:
        row = " | ".join(cells.get((context, budget), "") for budget in budgets)
        lines.append(f"| {context:,} | {row} |")
    return "\n".join([*lines, ""])


def _cell(row: Result) -> str:
    if row.figures is None:
        return NEVER
    share = row.percent_of_ceiling
    part = "resident" if share is None else f"{share:.0f} %"
    return f"{value_text(row.figures.median)} ({part})"


def _median(result: Result) -> float:
    return 0.0 if result.figures is None else result.figures.median
