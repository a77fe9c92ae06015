"""Predicted: what `tiermem plan` expects of the same requests, on other machines and of models that do not fit."""

from __future__ import annotations

from collections.abc import Iterator

from tiermem.bench.long_context import NAME
from tiermem.bench.result import GIGA, Parameters, Result, Subject, measured, not_measured
from tiermem.forecast import Hardware, Request
from tiermem.forecast.survey import MACHINES, RAM_SHARE, beside_widest, widest
from tiermem.model_shape import ModelShape

PREDICTED = "predicted"
NO_CEILING = "a prediction has no ceiling"


def predicted_results(shape: ModelShape, context: int, gpu_bytes: int) -> Iterator[Result]:
    """One row a machine: tokens a second with the widest weights that fit there, or why none do.

    With a hot tier of `gpu_bytes` where these leave so much.
    """
    for machine in MACHINES:
        parameters: Parameters = {"model": shape.name, "context": context, "machine": machine}
        hardware = Hardware.from_profile(machine)
        request = Request(shape, context, ram=RAM_SHARE)
        found = beside_widest(request, gpu_bytes, hardware) or widest(request, hardware)
        if not found.fits:
            reason = "; ".join(found.budget.problems)
            yield not_measured(Subject(NAME, PREDICTED, parameters, "tokens/s"), reason)
            continue
        hot = next(tier.num_bytes for tier in found.budget.tiers if tier.name == "gpu")
        note = (
            f"{found.request.weights.value} weights, hot tier {hot / GIGA:.1f} GB, "
            f"{found.modes[0].mode.value}; limited by {found.limit.value}"
        )
        subject = Subject(NAME, PREDICTED, parameters, "tokens/s", note=note)
        yield measured(subject, [found.tokens_per_s], NO_CEILING)
