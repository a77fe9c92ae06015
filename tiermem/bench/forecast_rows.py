"""Forecast rows: predicted tokens a second of many requests as results, and in tables with measured ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tiermem.bench.long_context import NAME as LONG_CONTEXT
from tiermem.bench.long_context.case import Baseline
from tiermem.bench.long_context.derived import BASELINE_NAMES
from tiermem.bench.long_context.rows import DECODE
from tiermem.bench.result import GIGA, Parameters, Result, Subject, measured, not_measured
from tiermem.bench.result_file import SavedResult
from tiermem.bench.words import value_text
from tiermem.forecast import Hardware, machine_profiles
from tiermem.forecast.speed import Mode
from tiermem.forecast.survey import ALL, Surveyed
from tiermem.units import Size
from tiermem.version import VERSION

NAME = "forecast"
PREDICTED = "predicted"
NO_CEILING = "a prediction has no ceiling"
NOT_THERE = "does not fit"
SHORT = {Mode.FIXED.value: "streamed"}
"""What tables call a mode, where that is not its name."""
ENVIRONMENT = {
    "cpu": "no machine: predicted from profiles",
    "torch": torch.__version__,
    "tiermem": VERSION,
}
"""Of rows that follow from profiles alone."""


def forecast_results(found: Surveyed) -> Iterator[Result]:
    """Rows of one answer: its best mode, and each other one that tiermem has there."""
    forecast = found.forecast
    parameters: Parameters = {
        "machine": found.machine,
        "gpu": found.hot,
        "model": forecast.request.shape.name,
        "context": forecast.request.context,
    }
    if not forecast.fits:
        reason = "; ".join(forecast.budget.problems)
        yield not_measured(Subject(NAME, PREDICTED, parameters, "tokens/s"), reason)
        return
    hot = forecast.budget.tiers[0].num_bytes
    for i, step in enumerate(step for step in forecast.modes if step.mode is not Mode.LRU):
        note = f"{step.mode.value}; {forecast.request.weights.value} weights; GPU tier {hot / GIGA:.1f} GB; "
        note += f"limited by {step.limit.value}"
        if step.shared is not None:
            note += f"; CPU share {step.shared.share:.3f}"
            note += ", by estimated rates" if forecast.hardware.estimated else ""
        name = f"{PREDICTED}: {step.mode.value}" if i else PREDICTED
        subject = Subject(NAME, name, parameters, "tokens/s", note=note)
        yield measured(subject, [step.tokens_per_s], NO_CEILING)


def forecast_tables(saved: Sequence[SavedResult]) -> str:
    """A table for each machine and GPU tier: models and contexts, predicted tokens/s, measured ones beside."""
    rows = [item.result for item in saved if item.result.subject.benchmark == NAME]
    best = [row for row in rows if row.subject.name == PREDICTED]
    blocks = []
    for machine, hot in dict.fromkeys(map(_place, best)):
        cells = {_request(row): row for row in best if _place(row) == (machine, hot)}
        blocks.append(_table(machine, hot, cells, _Measured(saved, machine, hot)))
    return "\n".join(blocks)


class _Measured:
    """What was measured on a machine of this kind with this GPU tier."""

    def __init__(self, saved: Sequence[SavedResult], machine: str, hot: str) -> None:
        gpu = Hardware.from_profile(machine).gpu if machine in machine_profiles() else ""
        self._rows = [
            item.result
            for item in saved
            if gpu
            and item.environment.get("gpu") == gpu
            and item.result.subject.benchmark == LONG_CONTEXT
        ]
        self._hot_bytes = None if hot == ALL else Size.parse(hot, "gpu").num_bytes

    def text(self, model: str, context: int) -> str:
        """ "measured 5.6 tokens/s", of the best case; empty where none was measured."""
        rates = [
            row.figures.median
            for row in self._rows
            if row.figures is not None and self._is_of(row, model, context)
        ]
        return f"; **measured {value_text(max(rates))}**" if rates else ""

    def _is_of(self, row: Result, model: str, context: int) -> bool:
        given, name = row.subject.parameters, row.subject.name
        if (given.get("model"), given.get("context")) != (model, context):
            return False
        if self._hot_bytes is None:
            return name == BASELINE_NAMES[Baseline.RESIDENT]
        return name == DECODE and given["gpu_bytes"] == self._hot_bytes


def _table(machine: str, hot: str, cells: dict[tuple[str, int], Result], seen: _Measured) -> str:
    models = dict.fromkeys(model for model, _ in cells)
    contexts = sorted({context for _, context in cells})
    tier = "the profile's GPU tier" if hot == ALL else f"a GPU tier of {hot}"
    lines = [
        f"Tokens/s predicted for the profile `{machine}`, with {tier}:",
        "",
        f"| model | {' | '.join(f'{context:,}' for context in contexts)} |",
        f"|---|{'---|' * len(contexts)}",
    ]
    for model in models:
        texts = (
            _cell(cells[model, context]) + seen.text(model, context)
            if (model, context) in cells
            else ""
            for context in contexts
        )
        lines.append(f"| {model} | {' | '.join(texts)} |")
    return "\n".join([*lines, ""])


def _cell(row: Result) -> str:
    if row.figures is None:
        return NOT_THERE
    mode, weights, *_ = row.subject.note.split("; ")
    weights = weights.removesuffix(" weights")
    return f"{value_text(row.figures.median)} ({SHORT.get(mode, mode)}, {weights})"


def _place(row: Result) -> tuple[str, str]:
    return str(row.subject.parameters["machine"]), str(row.subject.parameters["gpu"])


def _request(row: Result) -> tuple[str, int]:
    return str(row.subject.parameters["model"]), int(row.subject.parameters["context"])
