"""Plan table: forecasts of many requests as one table, one JSON document or results of a benchmark."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tiermem.cli.human import NOTHING, count_text
from tiermem.cli.plan_run import find_hardware
from tiermem.cli.plan_text import LIMITS, gb_text
from tiermem.cli.screen import terminal_width
from tiermem.cli.table import Align, Table
from tiermem.errors import ConfigError
from tiermem.forecast import Request, WeightFormat, find_model
from tiermem.forecast.survey import ALL, CONTEXTS, MACHINES, MODELS, RAM_SHARE, Surveyed, survey
from tiermem.units import Size, SizeKind

FOR_ONE = ("dtype", "ssd")
"""Options of a single forecast that a table has not."""
HOW = "how each comes about: tiermem plan --model MODEL --context TOKENS --profile MACHINE"
ESTIMATED = "of {}: rates of the CPU's attention are estimates"


def run(options: argparse.Namespace) -> int:
    """Predict all of it, and show or save it.

    Raises
    ------
    ConfigError: an option that cannot be.
    """
    rows = _survey(options)
    if options.save is not None:
        _save(rows, options.save)
    if options.json:
        print(json.dumps({"rows": [row.to_table() for row in rows]}, indent=2))
    else:
        print("\n".join(table_lines(rows, terminal_width(sys.stdout))))
    return 0


def table_lines(rows: Sequence[Surveyed], width: int | None) -> list[str]:
    """A row a request, and what is to be known of them."""
    titles = (
        "machine", "model", "context", "weights", "K and V", "GPU tier", "tokens/s predicted", "mode",
        "limited by",
    )  # fmt: skip
    align = (*[Align.LEFT] * 2, Align.RIGHT, Align.LEFT, *[Align.RIGHT] * 3, *[Align.LEFT] * 2)
    body = tuple(_row(row) for row in rows)
    guessed = dict.fromkeys(row.machine for row in rows if row.forecast.hardware.estimated)
    notes = [ESTIMATED.format(", ".join(guessed))] if guessed else []
    return [*Table(titles, body, align).lines(width), "", *notes, HOW]


def _row(row: Surveyed) -> tuple[str, ...]:
    found = row.forecast
    budget, best = found.budget, found.modes[0] if found.modes else None
    fitted = best is not None
    return (
        row.machine,
        found.request.shape.name,
        count_text(found.request.context),
        f"{found.request.weights.value}, {gb_text(budget.weights_bytes)}",
        gb_text(budget.kv_bytes),
        gb_text(budget.tiers[0].num_bytes) if fitted else NOTHING,
        NOTHING if best is None else f"{best.tokens_per_s:.3g}",
        "does not fit" if best is None else best.mode.value,
        "the weights" if not budget.weights_fit else LIMITS[found.limit],
    )


def _save(rows: Sequence[Surveyed], path: Path) -> None:
    """Write all rows as results of a benchmark."""
    from tiermem.bench.environment import commit
    from tiermem.bench.forecast_rows import ENVIRONMENT, forecast_results
    from tiermem.bench.result_file import SavedResult, check_writable, write_results

    check_writable(path)
    name = commit()
    results = [result for row in rows for result in forecast_results(row)]
    write_results(path, [SavedResult(result, ENVIRONMENT, name) for result in results])


def _survey(options: argparse.Namespace) -> list[Surveyed]:
    for name in FOR_ONE:
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name}: is for one forecast, not for --table")
    machines = _parts(options.profile, MACHINES)
    first = Request(
        shape=find_model(MODELS[0]),
        context=1,
        batch=options.batch,
        weights=WeightFormat(options.weights),
        page_tokens=options.page_tokens,
        ram=RAM_SHARE if options.ram is None else options.ram,
    )
    rows = survey(
        first,
        [find_model(name) for name in _parts(options.model, MODELS)],
        options.context or CONTEXTS,
        {name: find_hardware(name, options.ssd_path) for name in machines},
        None if options.gpu is None else [_hot(text) for text in _parts(options.gpu, ())],
    )
    return list(rows)


def _parts(text: str | None, default: Sequence[str]) -> list[str]:
    return list(default) if text is None else [part.strip() for part in text.split(",")]


def _hot(text: str) -> str:
    if text != ALL and Size.parse(text, "gpu").kind is not SizeKind.EXPLICIT:
        raise ConfigError(f"gpu={text!r}: must be sizes such as 8GiB, or {ALL}, joined by commas")
    return text
