"""Trace: named ranges for NVIDIA's profilers around steps, transfers and kernels; off unless TIERMEM_NVTX=1.

Whether ranges are on is decided once, when the module is loaded: where they are off, nothing is wrapped and
`traced` gives functions back as they are.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

VARIABLE = "TIERMEM_NVTX"
ENABLED = os.environ.get(VARIABLE, "") not in {"", "0"} and torch.version.cuda is not None
PREFIX = "tiermem: "


def traced(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Show every call of the decorated function as a range `name` on its thread's timeline."""

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        if not ENABLED:
            return function
        return _ranged(PREFIX + name, function)

    return wrap


def begin(name: str) -> None:
    """Start a range on this thread that `end` ends; ranges nest."""
    if ENABLED:
        torch.cuda.nvtx.range_push(PREFIX + name)


def end() -> None:
    """End the range that was started last on this thread."""
    if ENABLED:
        torch.cuda.nvtx.range_pop()


def _ranged(name: str, function: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(function)
    def inside(*arguments: P.args, **options: P.kwargs) -> R:
        torch.cuda.nvtx.range_push(name)
        try:
            return function(*arguments, **options)
        finally:
            torch.cuda.nvtx.range_pop()

    return inside
