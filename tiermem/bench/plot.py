"""Plot: the results of a file as bars of percent of their ceilings, one panel a benchmark; sweeps and
forecasts as lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tiermem.bench.forecast_plot import draw_forecast, forecast_panels
from tiermem.bench.result import Result
from tiermem.bench.result_file import SavedResult
from tiermem.bench.sweep_plot import HEIGHT_IN, draw_sweep, sweeps
from tiermem.bench.words import parameters_text, value_text
from tiermem.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_IN = 11.0
ROW_IN = 0.24
PANEL_IN = 0.9
REACHED, MISSED, NO_AIM = "#2a7f62", "#c8553d", "#4a6fa5"
TOO_FAR = 115.0


def draw(saved: Sequence[SavedResult], target: Path) -> None:
    """Write the figure to `target`; its extension names the format.

    Raises
    ------
    ConfigError: matplotlib is not installed, no result has a ceiling or a budget, or nothing can be written
        there.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "plots need matplotlib: pip install 'tiermem[bench]', or pip install matplotlib"
        ) from error
    results = [item.result for item in saved]
    panels, lines, forecasts = _panels(results), sweeps(results), forecast_panels(results)
    if not panels and not forecasts:
        raise ConfigError("none of the results has a share to draw: all of them were skipped")
    bars = [len(rows) * ROW_IN + PANEL_IN for rows in panels.values()]
    heights = [*bars, *[HEIGHT_IN] * (len(lines) + len(forecasts))]
    figure = Figure(figsize=(WIDTH_IN, sum(heights) + 0.5), layout="constrained")
    FigureCanvasSVG(figure)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    for place, (name, rows) in enumerate(panels.items()):
        _draw_panel(figure.add_subplot(grid[place, :]), name, rows)
    for place, sweep in enumerate(lines, len(panels)):
        rates, steps = (figure.add_subplot(grid[place, column]) for column in (0, 1))
        draw_sweep(rates, steps, sweep)
    for place, (title, models) in enumerate(forecasts.items(), len(bars) + len(lines)):
        draw_forecast(figure.add_subplot(grid[place, :]), title, models)
    figure.suptitle(f"{saved[0].machine}; commit {saved[0].commit[:12]}", fontsize=9)
    try:
        # without a date and with fixed ids: the same results give the same file
        with rc_context({"svg.hashsalt": "tiermem", "svg.fonttype": "none"}):
            figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{target}: cannot be written: {error}") from error


def _panels(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results with a ceiling under their benchmark, those with a budget in a panel of their own."""
    panels: dict[str, list[Result]] = {}
    for result in results:
        name = result.subject.benchmark
        if result.percent_of_ceiling is not None:
            panels.setdefault(f"{name}: percent of the ceiling", []).append(result)
        elif result.percent_of_budget is not None:
            panels.setdefault(f"{name}: percent of the budget", []).append(result)
    return panels


def _draw_panel(axis: Axes, name: str, rows: Sequence[Result]) -> None:
    shares = [_share(result) for result in rows]
    colors = [{True: REACHED, False: MISSED, None: NO_AIM}[result.meets_aim] for result in rows]
    places = range(len(rows))
    axis.barh(places, [min(share, TOO_FAR) for share in shares], color=colors, height=0.7)
    for place, result, share in zip(places, rows, shares, strict=True):
        figures, aim = result.figures, result.subject.target_percent
        assert figures is not None
        text = f" {share:.1f} %  ({value_text(figures.median)} {result.subject.unit})"
        axis.text(max(min(share, TOO_FAR), aim or 0), place, text, va="center", fontsize=6.5)
        if aim is not None:
            axis.plot([aim, aim], [place - 0.4, place + 0.4], color="black", linewidth=1)
    axis.axvline(100, color="grey", linewidth=0.8)
    axis.set_yticks(places, [_label(result) for result in rows], fontsize=6.5)
    axis.set_xlim(0, 160)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_title(name, fontsize=9, loc="left")
    axis.tick_params(axis="x", labelsize=7)


def _share(result: Result) -> float:
    share = result.percent_of_ceiling
    if share is None:
        share = result.percent_of_budget
    assert share is not None
    return share


def _label(result: Result) -> str:
    return f"{result.subject.name}: {parameters_text(result.subject.parameters)}"
