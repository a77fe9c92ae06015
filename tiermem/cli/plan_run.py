"""Plan run: finds the model and the machine, and shows what is to be expected."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tiermem.cli.plan_text import forecast_lines
from tiermem.cli.screen import terminal_width
from tiermem.errors import ConfigError
from tiermem.forecast import Hardware, Request, WeightFormat, find_model, predict

AUTO = "auto"


def run(options: argparse.Namespace) -> int:
    """Predict and show.

    Raises
    ------
    ConfigError: an option is missing, or is for --table.
    """
    _check(options)
    request = Request(
        shape=find_model(options.model),
        context=options.context[0],
        batch=options.batch,
        dtype=options.dtype,
        weights=WeightFormat(options.weights),
        page_tokens=options.page_tokens,
        gpu=options.gpu,
        ram=options.ram,
        ssd=options.ssd,
    )
    forecast = predict(request, find_hardware(options.profile or AUTO, options.ssd_path))
    if options.json:
        print(json.dumps(forecast.to_table(), indent=2))
    else:
        print("\n".join(forecast_lines(forecast, terminal_width(sys.stdout))))
    return 0


def find_hardware(profile: str, ssd_path: Path | None) -> Hardware:
    """The machine of a profile, or this one for AUTO.

    Raises
    ------
    ConfigError: there is no such profile.
    """
    if profile != AUTO:
        return Hardware.from_profile(profile)
    from tiermem.cli.this_machine import hardware_here

    return hardware_here(ssd_path)


def _check(options: argparse.Namespace) -> None:
    for name in ("model", "context"):
        if getattr(options, name) is None:
            raise ConfigError(f"--{name}: is needed, unless --table is given")
    if len(options.context) > 1:
        raise ConfigError(f"--context: {len(options.context)} are given; several need --table")
    if options.save is not None:
        raise ConfigError(f"--save {options.save}: needs --table")
