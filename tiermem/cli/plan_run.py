"""Plan run: finds the model and the machine, and shows what is to be expected."""

from __future__ import annotations

import argparse
import json
import sys

from tiermem.cli.plan_text import forecast_lines
from tiermem.cli.screen import terminal_width
from tiermem.forecast import Hardware, Request, WeightFormat, find_model, predict

AUTO = "auto"


def run(options: argparse.Namespace) -> int:
    """Predict and show."""
    request = Request(
        shape=find_model(options.model),
        context=options.context,
        batch=options.batch,
        dtype=options.dtype,
        weights=WeightFormat(options.weights),
        page_tokens=options.page_tokens,
        gpu=options.gpu,
        ram=options.ram,
        ssd=options.ssd,
    )
    forecast = predict(request, _hardware(options))
    if options.json:
        print(json.dumps(forecast.to_table(), indent=2))
    else:
        print("\n".join(forecast_lines(forecast, terminal_width(sys.stdout))))
    return 0


def _hardware(options: argparse.Namespace) -> Hardware:
    if options.profile != AUTO:
        return Hardware.from_profile(options.profile)
    from tiermem.cli.this_machine import hardware_here

    return hardware_here(options.ssd_path)
