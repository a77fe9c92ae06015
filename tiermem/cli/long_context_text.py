"""Long-context text: sweeps, the parts of a step, fits and predictions as tables for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from tiermem.bench.long_context.case import Baseline
from tiermem.bench.long_context.derived import BASELINE_NAMES, FIT, OVER
from tiermem.bench.long_context.predicted import PREDICTED
from tiermem.bench.long_context.rates import MACHINE
from tiermem.bench.long_context.rows import (
    ATTENDED_MS,
    DECODE,
    HOT_MS,
    LINK_MS,
    LOGITS,
    NOT_RESIDENT,
    OTHER_MS,
    OUTPUT,
    OVER_STREAMING,
    PASS,
    STEP,
    WITH_OTHER,
    find,
    groups,
)
from tiermem.bench.result import Result
from tiermem.bench.words import parameters_text, value_text
from tiermem.cli.bench_text import MET, TEXT_WIDTH, aim_text
from tiermem.cli.human import NOTHING, count_text
from tiermem.cli.table import Align, Table
from tiermem.forecast.survey import MACHINES
from tiermem.units import format_bytes


def long_context_lines(results: Sequence[Result], width: int | None) -> list[str]:
    """The machine's rates, all runs, then sweeps, the parts of a step, fits, predictions and checks."""
    lines = [*_values(results, MACHINE).lines(width), ""]
    lines += [*_runs(results).lines(width), ""]
    for common, cases in groups(results):
        lines += [f"{parameters_text(common)}:", *_sweep(cases).lines(width), ""]
        steps = _steps(cases, results)
        lines += [*steps.lines(width), ""] if steps.rows else []
    for part in (_values(results, PASS), _values(results, FIT), _shapes(results)):
        lines += [*part.lines(width), ""] if part.rows else []
    return [*lines, *_notes(results, width)]


def _values(results: Sequence[Result], prefix: str) -> Table:
    """Rows of one figure each, whose names begin with `prefix`."""
    rows = [
        (result.subject.name, parameters_text(result.subject.parameters),
         f"{value_text(result.figures.median)} {result.subject.unit}")
        for result in results
        if result.subject.name.startswith(prefix) and result.figures is not None
    ]  # fmt: skip
    return Table(("", "", ""), tuple(rows), (Align.LEFT, Align.LEFT, Align.RIGHT))


def _runs(results: Sequence[Result]) -> Table:
    """Every run with a rate: cases and baselines."""
    titles = ("run", "of", "tokens/s", "p5", "p95", "ceiling", "of it", "aim", "")
    names = (DECODE, *BASELINE_NAMES.values())
    rows = tuple(_run(result) for result in results if result.subject.name in names)
    return Table(titles, rows, (Align.LEFT, Align.LEFT, *[Align.RIGHT] * 6, Align.LEFT))


def _run(result: Result) -> tuple[str, ...]:
    subject, figures, share = result.subject, result.figures, result.percent_of_ceiling
    of = "; ".join(filter(None, (parameters_text(subject.parameters), subject.note)))
    if figures is None:
        return (subject.name, of, "skipped", *[""] * 6)
    return (
        subject.name,
        of,
        value_text(figures.median),
        value_text(figures.p5),
        value_text(figures.p95),
        NOTHING if result.ceiling is None else value_text(result.ceiling.value),
        NOTHING if share is None else f"{share:.1f}%",
        aim_text(result),
        MET[result.meets_aim],
    )


def _notes(results: Sequence[Result], width: int | None) -> Iterator[str]:
    """What was checked, what the ceilings are, and why something was skipped."""
    for name in (LOGITS, OUTPUT):
        found = [r.figures.median for r in results if r.subject.name == name and r.figures]
        if found:
            yield f"checked: {name}, at most {value_text(max(found))} of the norm"
    texts = [f"ceiling: {result.ceiling.name}" for result in results if result.ceiling]
    skipped = [result for result in results if result.figures is None]
    texts += [f"{result.subject.name}: {result.skipped}" for result in skipped]
    for text in dict.fromkeys(texts):
        yield from textwrap.wrap(text, width or TEXT_WIDTH, subsequent_indent="  ")


def _sweep(cases: Sequence[Sequence[Result]]) -> Table:
    """Tokens a second by context and hot budget, and their share of the ceiling."""
    cells = {}
    for case in cases:
        row = next((result for result in case if result.subject.name == DECODE), None)
        if row is not None:
            given = row.subject.parameters
            cells[int(given["context"]), int(given["gpu_bytes"])] = _cell(row)
    contexts = sorted({context for context, _ in cells})
    budgets = sorted({budget for _, budget in cells})
    rows = tuple(
        (count_text(context), *(cells.get((context, budget), NOTHING) for budget in budgets))
        for context in contexts
    )
    return Table(("tokens/s: context", *(f"gpu {format_bytes(b)}" for b in budgets)), rows)


def _cell(row: Result) -> str:
    if row.figures is None:
        return "skipped"
    share = row.percent_of_ceiling
    part = "" if share is None else f" ({share:.0f}%)"
    return f"{value_text(row.figures.median)}{part}"


def _steps(cases: Sequence[Sequence[Result]], results: Sequence[Result]) -> Table:
    """What a step's time is made of, as far as it can be seen from outside, and what it is better than."""
    titles = (
        "a step: context", "gpu", "not resident", "time", "CPU attends", "link, at its rate",
        "hot, at its rate", "other work", "of ceiling + other work", "over streaming", "over offloaded",
    )  # fmt: skip
    over = {
        str(result.subject.parameters): result.figures.median
        for result in results
        if result.subject.name == OVER[Baseline.OFFLOADED] and result.figures is not None
    }
    rows = [_step(case, over) for case in cases if find(case, STEP) is not None]
    return Table(titles, tuple(rows))


def _step(case: Sequence[Result], over: Mapping[str, float]) -> tuple[str, ...]:
    given = case[0].subject.parameters
    shares = [row.percent_of_ceiling for row in case if row.subject.name == WITH_OTHER]
    values = (
        (find(case, NOT_RESIDENT), "GB"),
        *((find(case, name), "ms") for name in (STEP, ATTENDED_MS, LINK_MS, HOT_MS, OTHER_MS)),
        (shares[0] if shares else None, "%"),
        (find(case, OVER_STREAMING), "x"),
        (over.get(str(given)), "x"),
    )
    texts = (NOTHING if value is None else f"{value_text(value)} {unit}" for value, unit in values)
    return (count_text(int(given["context"])), format_bytes(int(given["gpu_bytes"])), *texts)


def _shapes(results: Sequence[Result]) -> Table:
    """Predicted and measured tokens a second of each model; rows only where something was predicted."""
    predicted = {
        (str(given["model"]), int(given["context"]), str(given["machine"])): result
        for result in results
        if result.subject.name == PREDICTED
        for given in (result.subject.parameters,)
    }
    keys = dict.fromkeys((model, context) for model, context, _ in predicted)
    rows = tuple(
        (
            f"{model}, {count_text(context)}",
            *(_prediction(predicted.get((model, context, machine))) for machine in MACHINES),
            "; ".join(_measured(results, model, context)) or "predicted only",
        )
        for model, context in keys
    )
    return Table(("model, context", *(f"predicted, {m}" for m in MACHINES), "measured here"), rows)


def _prediction(row: Result | None) -> str:
    if row is None:
        return NOTHING
    if row.figures is None:
        return "does not fit"
    return f"{value_text(row.figures.median)} ({row.subject.note.partition(',')[0]})"


def _measured(results: Sequence[Result], model: str, context: int) -> Iterator[str]:
    """Every measured case of a model and a context."""
    for result in results:
        given = result.subject.parameters
        if result.subject.name != DECODE or result.figures is None:
            continue
        if (given["model"], given["context"]) == (model, context):
            budget = format_bytes(int(given["gpu_bytes"]))
            rate = value_text(result.figures.median)
            yield f"{rate} with gpu {budget}, CPU share {given['cpu_share']}"
