"""Forecast plot: predicted tokens a second over the context, one line a model, a panel a machine and GPU tier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tiermem.bench.forecast_rows import NAME, PREDICTED
from tiermem.bench.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = dict[str, list[tuple[int, float]]]
"""Model -> (context, tokens/s) of what fits."""


def forecast_panels(results: Sequence[Result]) -> dict[str, Lines]:
    """Title -> lines of every machine and GPU tier on which something fits."""
    panels: dict[str, Lines] = {}
    for result in results:
        subject, given = result.subject, result.subject.parameters
        if (subject.benchmark, subject.name) != (NAME, PREDICTED) or result.figures is None:
            continue
        lines = panels.setdefault(f"{NAME}: {given['machine']}, gpu {given['gpu']}", {})
        point = (int(given["context"]), result.figures.median)
        lines.setdefault(str(given["model"]), []).append(point)
    return panels


def draw_forecast(axis: Axes, title: str, lines: Lines) -> None:
    """One panel, both axes logarithmic."""
    for model, points in lines.items():
        x, y = zip(*sorted(points), strict=True)
        axis.plot(x, y, marker="o", markersize=3, linewidth=1, label=model)
    contexts = sorted({x for points in lines.values() for x, _ in points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axis.minorticks_off()
    axis.set_yscale("log")
    axis.set_xlabel("context, tokens", fontsize=7)
    axis.set_ylabel("predicted tokens/s", fontsize=7)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=6.5)
    axis.set_title(title, fontsize=8, loc="left")
