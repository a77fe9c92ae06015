"""Sweep plot: tokens a second over the hot budget, one line a context, and the time of a step over its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tiermem.bench.long_context import NAME
from tiermem.bench.long_context.fit import fit_line, points
from tiermem.bench.long_context.rows import DECODE
from tiermem.bench.result import Result
from tiermem.bench.words import parameters_text, value_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT_IN = 4.0
GIB = 1 << 30
Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Sweep:
    """What the cases of one panel have in common, and its lines: (GiB of the hot tier, tokens/s) by context."""

    title: str
    lines: dict[int, Points]
    gigabytes: list[float]
    ms: list[float]


def sweeps(results: Sequence[Result]) -> list[Sweep]:
    """Panels of what has at least two budgets or contexts."""
    of_steps = {parameters_text(common): (x, y) for common, x, y in points(results)}
    lines: dict[str, dict[int, Points]] = {}
    for result in results:
        subject = result.subject
        if (subject.benchmark, subject.name) != (NAME, DECODE) or result.figures is None:
            continue
        given = dict(subject.parameters)
        context, gpu_bytes = int(given.pop("context")), int(given.pop("gpu_bytes"))
        line = lines.setdefault(parameters_text(given), {}).setdefault(context, [])
        line.append((gpu_bytes / GIB, result.figures.median))
    return [
        Sweep(title, by_context, *of_steps.get(title, ([], [])))
        for title, by_context in lines.items()
        if sum(map(len, by_context.values())) > 1
    ]


def draw_sweep(rates: Axes, steps: Axes, sweep: Sweep) -> None:
    """One sweep, in two panels beside each other."""
    for context, line in sorted(sweep.lines.items()):
        x, y = zip(*sorted(line), strict=True)
        rates.plot(x, y, marker="o", markersize=3, linewidth=1, label=f"{context:,} tokens")
    rates.set_xscale("log", base=2)
    budgets = sorted({x for line in sweep.lines.values() for x, _ in line})
    rates.set_xticks(budgets, [f"{budget:.3g}" for budget in budgets], fontsize=7)
    rates.minorticks_off()
    rates.set_ylim(bottom=0)
    rates.set_xlabel("hot tier, GiB", fontsize=7)
    rates.set_ylabel("tokens/s", fontsize=7)
    rates.legend(fontsize=6.5)
    rates.set_title(f"{NAME}: {sweep.title}", fontsize=8, loc="left")
    _draw_steps(steps, sweep.gigabytes, sweep.ms)
    for axis in (rates, steps):
        axis.tick_params(labelsize=7)


def _draw_steps(axis: Axes, gigabytes: Sequence[float], ms: Sequence[float]) -> None:
    axis.plot(gigabytes, ms, "o", markersize=3)
    axis.set_xlabel("K and V that are not resident, GB", fontsize=7)
    axis.set_ylabel("time of a step, ms", fontsize=7)
    line = fit_line(gigabytes, ms)
    if line is not None:
        ends = np.array([min(gigabytes), max(gigabytes)])
        axis.plot(ends, line.start_ms + line.ms_a_gb * ends, linewidth=1)
        axis.set_title(
            f"{value_text(line.start_ms)} ms + bytes at {value_text(line.gb_per_s)} GB/s; at most "
            f"{100 * line.residual:.1f} % off",
            fontsize=8,
            loc="left",
        )
