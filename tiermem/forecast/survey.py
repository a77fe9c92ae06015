"""Survey: forecasts of several models and contexts on several machines, each with the widest weights that fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tiermem.errors import ConfigError
from tiermem.forecast.answer import Forecast, Request, predict
from tiermem.forecast.hardware import Hardware
from tiermem.forecast.weights import WeightFormat
from tiermem.model_shape import ModelShape
from tiermem.units import SizeLike

MODELS = ("7b", "13b", "33b", "70b")
CONTEXTS = (16384, 32768, 65536, 131072)
MACHINES = ("t4", "h200")
HOT = "8GiB"
"""A GPU tier that is small beside long contexts, for where weights leave more."""
RAM_SHARE = 0.9
"""Of the RAM that a machine has left, for K and V that are not on the GPU."""
ALL = "profile"
"""In the place of a size: the GPU tier that the machine's profile has, as far as the weights leave it."""


@dataclass(frozen=True, slots=True)
class Surveyed:
    """One answer. machine: the name of the hardware. hot: the GPU tier that was asked for, or ALL."""

    machine: str
    hot: str
    forecast: Forecast

    def to_table(self) -> dict[str, object]:
        """Names and plain values, for `json.dumps`; what `tiermem plan --json` has more of."""
        found = self.forecast
        budget = found.budget
        best = found.modes[0] if found.modes else None
        return {
            "machine": self.machine,
            "model": found.request.shape.name,
            "context": found.request.context,
            "gpu": self.hot,
            "fits": found.fits,
            "problems": list(budget.problems),
            "weights": found.request.weights.value,
            "weights_bytes": budget.weights_bytes,
            "kv_bytes": budget.kv_bytes,
            "gpu_tier_bytes": budget.tiers[0].num_bytes,
            "predicted_tokens_per_s": found.tokens_per_s,
            "mode": None if best is None else best.mode.value,
            "limit": found.limit.value,
            "cpu_share": best.shared.share if best is not None and best.shared else 0.0,
            "predicted_modes": {step.mode.value: step.tokens_per_s for step in found.modes},
            "estimated": bool(found.hardware.estimated),
        }


def widest(request: Request, hardware: Hardware) -> Forecast:
    """With the widest weights that fit, from those of `request` on; where none do, with the narrowest.

    Raises
    ------
    ConfigError: as `predict`.
    """
    formats = list(WeightFormat)
    for weights in formats[formats.index(request.weights) :]:
        found = predict(replace(request, weights=weights), hardware)
        if found.fits:
            break
    return found


def beside_widest(request: Request, hot: SizeLike, hardware: Hardware) -> Forecast | None:
    """With a GPU tier of `hot` and the weights of `widest`; None where these leave no room for it."""
    weights = widest(request, hardware).request.weights
    try:
        found = predict(replace(request, gpu=hot, weights=weights), hardware)
    except ConfigError:  # the profile has no such tier
        return None
    return found if found.fits else None


def survey(
    like: Request,
    shapes: Sequence[ModelShape],
    contexts: Sequence[int],
    machines: Mapping[str, Hardware],
    hots: Sequence[str] | None = None,
) -> Iterator[Surveyed]:
    """One answer for each machine, GPU tier, model and context, in this order.

    Parameters
    ----------
    like: all else that is asked. machines: name -> hardware.
    hots: GPU tiers, ALL for the profile's; None: that, and 8 GiB where the same weights leave more.

    Raises
    ------
    ConfigError: as `predict`.
    """
    for machine, hardware in machines.items():
        for hot in (ALL, HOT) if hots is None else hots:
            for shape in shapes:
                for context in contexts:
                    request = replace(like, shape=shape, context=context)
                    if hot == ALL:
                        yield Surveyed(machine, hot, widest(request, hardware))
                    elif hots is not None:
                        found = widest(replace(request, gpu=hot), hardware)
                        yield Surveyed(machine, hot, found)
                    elif (smaller := _smaller(request, hot, hardware)) is not None:
                        yield Surveyed(machine, hot, smaller)


def _smaller(request: Request, hot: str, hardware: Hardware) -> Forecast | None:
    """The answer with a GPU tier of `hot`, if the widest weights that fit would leave more."""
    free, found = widest(request, hardware), beside_widest(request, hot, hardware)
    if found is None or found.budget.tiers[0].num_bytes >= free.budget.tiers[0].num_bytes:
        return None
    return found
