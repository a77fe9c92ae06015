"""Forecasts of shipped shapes and machines, and a step with round figures."""

from __future__ import annotations

from typing import Any

from tiermem.forecast import Forecast, Hardware, Request, predict
from tiermem.forecast.speed import FUSED, Work
from tiermem.model_shape import ModelShape
from tiermem.rates import Rates

# Round figures, so that times can be worked out in one's head.
ROUND = Rates(
    hbm_read=1e12, matmul=1e14, link_to_device=1e10, link_to_host=1e10, disk_read=1e9,
    linear_read=1e12, decode_read=5e11, prefill=5e13, attend_s=1e-5,
    product_s=3e-6, kernel_s=1e-6, queued_kernel_s=3e-6, launch_s=5e-6, step_s=1e-4, layer_s=5e-5,
    hand_over_s=1e-4,
)  # fmt: skip


def ask(profile: str, model: str = "33b", context: int = 32768, **more: Any) -> Forecast:
    """What is predicted of a shape on a machine."""
    request = Request(shape=ModelShape.from_profile(model), context=context, **more)
    return predict(request, Hardware.from_profile(profile))


def work(**changes: Any) -> Work:
    """A step of 20 GB of weights and 10 GB of K and V, but for `changes`."""
    values = {
        "program": FUSED, "batch": 1, "num_layers": 10, "weight_bytes": 2 * 10**10, "parameters": 10**10,
        "kv_bytes": 10**10,
    }  # fmt: skip
    return Work(**{**values, **changes})
