"""Markdown: tables of saved results for documents, between markers that a command replaces."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tiermem.bench import forecast_rows, long_context
from tiermem.bench.forecast_rows import forecast_tables
from tiermem.bench.long_context.markdown import chief_rows, summary_rows, sweep_tables
from tiermem.bench.result import Result
from tiermem.bench.result_file import SavedResult
from tiermem.bench.words import parameters_text, value_text
from tiermem.errors import ConfigError

_MARKED = re.compile(r"(<!-- bench:([a-z0-9_-]+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)
SHORT_COMMIT = 12
SUMMARY = "summary"
"""The name of the table with one row for all figures of one name."""


def markdown_tables(saved: Sequence[SavedResult]) -> dict[str, str]:
    """One table for each benchmark, in the order of the results, and the summary."""
    names = dict.fromkeys(item.result.subject.benchmark for item in saved)
    tables = {
        name: _table([item for item in saved if item.result.subject.benchmark == name])
        for name in names
    }
    if forecast_rows.NAME in tables:
        tables[forecast_rows.NAME] = forecast_tables(saved)
    measured = [
        item.result for item in saved if item.result.subject.benchmark != forecast_rows.NAME
    ]
    return {**tables, SUMMARY: _summary(measured)}


def fill_markers(text: str, tables: Mapping[str, str], where: str) -> str:
    """`text` with each table between its markers; markers of other names stay as they are.

    Raises
    ------
    ConfigError: `text` has none of the markers.
    """
    names = {match[2] for match in _MARKED.finditer(text)}
    if not names & set(tables):
        wanted = " or ".join(f"<!-- bench:{name} -->" for name in tables)
        raise ConfigError(f"{where}: has no {wanted} with <!-- /bench --> behind it")

    def fill(match: re.Match[str]) -> str:
        table = tables.get(match[2])
        return match[0] if table is None else f"{match[1]}{table}{match[4]}"

    return _MARKED.sub(fill, text)


def _table(saved: Sequence[SavedResult]) -> str:
    """Rows of all runs, each run under a line that names its machine and commit."""
    lines: list[str] = []
    for machine, commit in dict.fromkeys((item.machine, item.commit) for item in saved):
        chosen = [item.result for item in saved if (item.machine, item.commit) == (machine, commit)]
        if chosen[0].subject.benchmark == long_context.NAME:
            lines += sweep_tables(chosen)
            chosen = summary_rows(chosen)
        lines += [
            "| what | parameters | median | p5 – p95 | of the ceiling | aim | ceiling |",
            "|---|---|---|---|---|---|---|",
            *(_row(result) for result in chosen),
            "",
            f"{machine}; commit {_short(commit)}.",
            "",
        ]
    return "\n".join(lines)


def _summary(results: Sequence[Result]) -> str:
    """Benchmark and name, how many figures, from the lowest to the highest, and how many aims are met."""
    groups: dict[tuple[str, str], list[Result]] = {}
    long = [result for result in results if result.subject.benchmark == long_context.NAME]
    others = [result for result in results if result.subject.benchmark != long_context.NAME]
    for result in [*others, *chief_rows(long)]:
        if result.figures is not None:
            groups.setdefault((result.subject.benchmark, result.subject.name), []).append(result)
    rows = [_summary_row(*key, group) for key, group in groups.items()]
    return "\n".join(
        [
            "| benchmark | what | figures | lowest – highest | aims met |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _summary_row(benchmark: str, name: str, group: Sequence[Result]) -> str:
    shares = [share for result in group if (share := result.percent_of_ceiling) is not None]
    medians = [result.figures.median for result in group if result.figures is not None]
    if len(shares) == len(group):
        spread = f"{_span([f'{min(shares):.1f}', f'{max(shares):.1f}'])} % of the ceiling"
    else:
        spread = _span([value_text(min(medians)), value_text(max(medians))])
        spread += f" {group[0].subject.unit}"
    aims = [result.meets_aim for result in group if result.meets_aim is not None]
    met = f"{sum(aims)} of {len(aims)}" if aims else ""
    return f"| {benchmark} | {name} | {len(group)} | {spread} | {met} |"


def _span(ends: Sequence[str]) -> str:
    return " – ".join(dict.fromkeys(ends))


def _row(result: Result) -> str:
    subject, figures, ceiling = result.subject, result.figures, result.ceiling
    share = result.percent_of_ceiling
    cells = [
        subject.name,
        "; ".join(filter(None, (parameters_text(subject.parameters), subject.note))),
        "skipped" if figures is None else f"{value_text(figures.median)} {subject.unit}",
        "" if figures is None else f"{value_text(figures.p5)} – {value_text(figures.p95)}",
        "" if share is None else f"{share:.1f} %",
        _aim(result),
        result.skipped or "" if ceiling is None else f"{ceiling.name}: {value_text(ceiling.value)}",
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _aim(result: Result) -> str:
    subject = result.subject
    if subject.target_percent is not None:
        text = f"{subject.target_percent:g} %"
    elif subject.budget is not None:
        text = f"{subject.budget:g} {subject.unit}"
    else:
        return ""
    return {True: f"{text}: met", False: f"{text}: missed", None: text}[result.meets_aim]


def _short(commit: str) -> str:
    name, _, changes = commit.partition("+")
    return f"{name[:SHORT_COMMIT]} with changes" if changes else name[:SHORT_COMMIT]
