"""Result: one figure of a benchmark, against a ceiling measured in the same run; one line of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import numpy as np

from tiermem.errors import ConfigError
from tiermem.measure.timing import Samples

Parameters: TypeAlias = Mapping[str, "str | int | float"]
"""Names and values that tell one figure of a benchmark from another."""
GIGA = 1e9
MICRO = 1e-6


class Better(Enum):
    """Which way a figure is better."""

    HIGHER = "higher"
    LOWER = "lower"


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What the machine could do at most, in the unit of the results measured against it."""

    name: str
    value: float


@dataclass(frozen=True, slots=True)
class Subject:
    """What a figure is about: its benchmark, its name there, its parameters, and its unit.

    target_percent: the share of the ceiling that is aimed at; None where there is no aim.
    budget: for figures without a ceiling, the value that is aimed at, in the unit.
    note: how it was done, where that may differ from run to run; no part of the figure's identity.
    """

    benchmark: str
    name: str
    parameters: Parameters
    unit: str
    better: Better = Better.HIGHER
    target_percent: float | None = None
    budget: float | None = None
    note: str = ""

    @property
    def key(self) -> str:
        """Text that is equal for the same figure of two runs."""
        given = " ".join(f"{key}={value}" for key, value in self.parameters.items())
        return f"{self.benchmark} {self.name} {given}".strip()


@dataclass(frozen=True, slots=True)
class Figures:
    """Median, 5th and 95th percentile over `repeats` runs, in the subject's unit."""

    median: float
    p5: float
    p95: float
    repeats: int


@dataclass(frozen=True, slots=True)
class Result:
    """One line: figures with a ceiling, or the reason in `skipped` why there is no ceiling, or nothing at all.

    Raises
    ------
    ValueError: neither a ceiling nor a reason, both, or a ceiling without figures.
    """

    subject: Subject
    figures: Figures | None
    ceiling: Ceiling | None
    skipped: str | None

    def __post_init__(self) -> None:
        if (self.ceiling is None) == (self.skipped is None):
            raise ValueError(f"{self.subject.key}: needs a ceiling or the reason for none")
        if self.ceiling is not None and self.figures is None:
            raise ValueError(f"{self.subject.key}: a ceiling without figures")

    @property
    def percent_of_ceiling(self) -> float | None:
        """100 at the ceiling, also where lower is better; None without one."""
        if self.ceiling is None or self.figures is None:
            return None
        median, ceiling = self.figures.median, self.ceiling.value
        share = median / ceiling if self.subject.better is Better.HIGHER else ceiling / median
        return 100 * share

    @property
    def percent_of_budget(self) -> float | None:
        """Where lower is better, the share of the budget that is used; else how much of it is reached."""
        if self.subject.budget is None or self.figures is None:
            return None
        return 100 * self.figures.median / self.subject.budget

    @property
    def meets_aim(self) -> bool | None:
        """Whether the target or the budget is met; None where there is none, or no figure."""
        share = self.percent_of_ceiling
        if share is not None and self.subject.target_percent is not None:
            return share >= self.subject.target_percent
        used = self.percent_of_budget
        if used is None:
            return None
        return used >= 100 if self.subject.better is Better.HIGHER else used <= 100

    def to_json(self) -> dict[str, object]:
        """The result as JSON can hold it; without the run's environment."""
        subject, figures, ceiling = self.subject, self.figures, self.ceiling
        return {
            "benchmark": subject.benchmark,
            "name": subject.name,
            "parameters": dict(subject.parameters),
            "unit": subject.unit,
            "better": subject.better.value,
            "median": None if figures is None else figures.median,
            "p5": None if figures is None else figures.p5,
            "p95": None if figures is None else figures.p95,
            "repeats": 0 if figures is None else figures.repeats,
            "percent_of_ceiling": self.percent_of_ceiling,
            "ceiling": None if ceiling is None else ceiling.value,
            "ceiling_name": None if ceiling is None else ceiling.name,
            "target_percent": subject.target_percent,
            "budget": subject.budget,
            "percent_of_budget": self.percent_of_budget,
            "skipped": self.skipped,
            "note": subject.note,
        }

    @classmethod
    def parse(cls, document: Mapping[str, object]) -> Result:
        """Read what `to_json` wrote; keys that it does not know are passed over.

        Raises
        ------
        ConfigError: a key is missing or has a value that cannot be.
        """
        figures = ceiling = None
        if document.get("median") is not None:
            figures = Figures(
                _number(document, "median"),
                _number(document, "p5"),
                _number(document, "p95"),
                int(_number(document, "repeats")),
            )
        if document.get("ceiling") is not None:
            ceiling = Ceiling(_text(document, "ceiling_name"), _number(document, "ceiling"))
        skipped = document.get("skipped")
        try:
            return cls(
                _subject(document), figures, ceiling, None if skipped is None else str(skipped)
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error


def measured(subject: Subject, values: Sequence[float], ceiling: Ceiling | str) -> Result:
    """A result from the values of all repeats; `ceiling` may be the reason why there is none."""
    low, median, high = (float(np.percentile(values, percent)) for percent in (5, 50, 95))
    figures = Figures(median, low, high, len(values))
    if isinstance(ceiling, str):
        return Result(subject, figures, None, ceiling)
    return Result(subject, figures, ceiling, None)


def not_measured(subject: Subject, reason: str) -> Result:
    """A result without figures: this machine has not what the benchmark needs."""
    return Result(subject, None, None, reason)


def rates(samples: Samples, amount: float) -> list[float]:
    """`amount` a second of every repeat, in 10^9: bytes give GB/s, FLOP give GFLOP/s."""
    return [amount / seconds / GIGA for seconds in samples.times_s]


def line_of(document: Mapping[str, object]) -> str:
    """One line of JSON, without its end."""
    return json.dumps(document, allow_nan=False)


def _subject(document: Mapping[str, object]) -> Subject:
    parameters = document.get("parameters")
    if not isinstance(parameters, dict):
        raise ConfigError(f"parameters={parameters!r}: must be an object")
    try:
        better = Better(document.get("better"))
    except ValueError as error:
        raise ConfigError(f"better={document.get('better')!r}: must be higher or lower") from error
    return Subject(
        _text(document, "benchmark"),
        _text(document, "name"),
        parameters,
        _text(document, "unit"),
        better,
        _optional(document, "target_percent"),
        _optional(document, "budget"),
        str(document.get("note", "")),
    )


def _text(document: Mapping[str, object], key: str) -> str:
    value = document.get(key)
    if not isinstance(value, str):
        raise ConfigError(f"{key}={value!r}: must be text")
    return value


def _number(document: Mapping[str, object], key: str) -> float:
    value = document.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{key}={value!r}: must be a number")
    return float(value)


def _optional(document: Mapping[str, object], key: str) -> float | None:
    return None if document.get(key) is None else _number(document, key)
