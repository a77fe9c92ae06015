"""Words: parameters and values of results as people read them."""

from __future__ import annotations

from tiermem.bench.result import Parameters
from tiermem.units import format_bytes


def parameters_text(parameters: Parameters) -> str:
    """Names and values: "piece 64KiB, direction h2d"."""
    return ", ".join(_one(key, value) for key, value in parameters.items())


def value_text(value: float) -> str:
    """Four digits, or all of those before the point."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _one(key: str, value: str | int | float) -> str:
    if key.endswith("_bytes") and isinstance(value, int):
        return f"{key.removesuffix('_bytes')} {format_bytes(value)}"
    return f"{key.replace('_', ' ')} {value}"
