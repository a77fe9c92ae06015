"""Predicted: what `tiermem plan` expects of the same requests, on other machines and of models that do not fit."""

from __future__ import annotations

from collections.abc import Iterator

from tiermem.bench.long_context import NAME
from tiermem.bench.result import GIGA, Parameters, Result, Subject, measured, not_measured
from tiermem.errors import ConfigError
from tiermem.forecast import Forecast, Hardware, Request, WeightFormat, predict
from tiermem.model_shape import ModelShape

PREDICTED = "predicted"
MACHINES = ("t4", "h200")
RAM_SHARE = 0.9
"""Of the RAM that a machine has left: the benchmark's warm tier takes what a request needs."""
NO_CEILING = "a prediction has no ceiling"


def predicted_results(shape: ModelShape, context: int, gpu_bytes: int) -> Iterator[Result]:
    """One row a machine: tokens a second with the widest weights that fit there, or why none do."""
    for machine in MACHINES:
        parameters: Parameters = {"model": shape.name, "context": context, "machine": machine}
        hardware = Hardware.from_profile(machine)
        found = _widest(shape, context, gpu_bytes, hardware)
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


def _widest(shape: ModelShape, context: int, gpu_bytes: int, hardware: Hardware) -> Forecast:
    """With the hot tier that was asked for, else with what the weights leave; the narrowest weights at last."""
    for weights in WeightFormat:
        for gpu in (gpu_bytes, None):
            try:
                request = Request(shape, context, weights=weights, gpu=gpu, ram=RAM_SHARE)
                found = predict(request, hardware)
            except ConfigError:
                continue  # such a hot tier cannot be there
            if found.fits:
                return found
    return predict(Request(shape, context, weights=WeightFormat.INT4, ram=RAM_SHARE), hardware)
