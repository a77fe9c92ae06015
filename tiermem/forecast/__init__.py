"""Forecast: whether a model and its contexts fit a machine, where they lie, and how fast they decode."""

from __future__ import annotations

from tiermem.forecast.answer import Forecast, Request, predict
from tiermem.forecast.hardware import Hardware, machine_profiles
from tiermem.forecast.models import find_model
from tiermem.forecast.weights import WeightFormat

__all__ = [
    "Forecast",
    "Hardware",
    "Request",
    "WeightFormat",
    "find_model",
    "machine_profiles",
    "predict",
]
