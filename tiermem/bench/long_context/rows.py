"""Rows: the results of one case, and how they are found again among those of a run or of joined files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tiermem.bench.long_context import NAME
from tiermem.bench.long_context.case import Case, Fill
from tiermem.bench.long_context.decoding import Decoded, Traffic
from tiermem.bench.long_context.rates import MachineRates
from tiermem.bench.result import GIGA, Better, Ceiling, Parameters, Result, Subject, measured

DECODE = "decode"
STEP = "step"
NOT_RESIDENT = "a step: not resident"
ATTENDED_MS = "step: CPU attention"
LINK_MS = "step: streamed bytes at the link's rate"
HOT_MS = "step: hot K and V at the memory's rate"
OTHER_MS = "step: all other work, by itself"
OVER_STREAMING = "over streaming all that is not resident"
WITH_OTHER = "decode, against the ceiling and other work"
PASS = "pass of several tokens, over a pass of one"
LOGITS, OUTPUT = "difference of logits", "difference of attention from float64"

SHARED_TARGET, LINK_TARGET = 80.0, 97.0
"""Percent of the ceiling, with and without the CPU's share."""
STREAMING_TARGET = 2.5
PART = "a part of a step; see decode"
RATIO = "a ratio has no ceiling"
ERROR = "an error has no ceiling; see the budget"
MILLI = 1e-3
VARYING = ("context", "gpu_bytes")
"""Parameters that differ within a sweep."""


def request_parameters(model: str, context: int, fill: Fill, dtype: str) -> dict[str, str | int]:
    """What tells one request from another: its baselines have no more."""
    return {"model": model, "context": context, "kv": fill.value, "dtype": dtype}


def case_parameters(request: Parameters, case: Case) -> dict[str, str | int | float]:
    """And what tells its cases from each other."""
    return {**request, "gpu_bytes": case.gpu_bytes, "cpu_share": case.share.text}


@dataclass(frozen=True, slots=True)
class Aims:
    """Whether figures have aims: full ones of a GPU, of the shape that they were set for."""

    apply: bool

    def of(self, value: float) -> float | None:
        """`value`, or None."""
        return value if self.apply else None


def case_results(
    parameters: Parameters,
    done: Decoded,
    moved: Traffic,
    rates: MachineRates,
    other_s: float,
    aims: Aims,
    note: str,
) -> Iterator[Result]:
    """The rows of one case with the tiers in use."""
    ceiling = rates.ceiling(moved)
    shared = moved.attended > 0
    target = aims.of(SHARED_TARGET if shared else LINK_TARGET)
    subject = Subject(
        NAME, DECODE, parameters, "tokens/s",
        target_percent=target if isinstance(ceiling, Ceiling) else None, note=note,
    )  # fmt: skip
    yield measured(subject, done.rates, ceiling)
    if isinstance(ceiling, Ceiling):
        whole = Ceiling(
            f"{ceiling.name}, and then all other work", 1 / (rates.least_s(moved) + other_s)
        )
        yield measured(Subject(NAME, WITH_OTHER, parameters, "tokens/s"), done.rates, whole)
        ratios = [rate * moved.not_resident / rates.link for rate in done.rates]
        subject = Subject(
            NAME, OVER_STREAMING, parameters, "x",
            budget=aims.of(STREAMING_TARGET) if shared else None,
        )  # fmt: skip
        yield measured(subject, ratios, RATIO)
    yield from _times(parameters, done, moved, rates, other_s)
    yield from _bytes(parameters, moved)


def plain_result(
    name: str, parameters: Parameters, done: Decoded, ceiling: Ceiling | str, note: str = ""
) -> Result:
    """The row of a baseline."""
    return measured(Subject(NAME, name, parameters, "tokens/s", note=note), done.rates, ceiling)


def pass_result(
    parameters: Parameters, new_tokens: int, seconds: Sequence[float], one: Decoded
) -> Result:
    """The row of passes of several tokens, as multiples of the time of a pass of one."""
    given = {**parameters, "new_tokens": new_tokens}
    ratios = [each / one.step_s for each in seconds]
    return measured(Subject(NAME, PASS, given, "x", Better.LOWER), ratios, RATIO)


def error_result(name: str, parameters: Parameters, worst: float, tolerance: float) -> Result:
    """The row of a check that was passed."""
    subject = Subject(NAME, name, parameters, "of the norm", Better.LOWER, budget=tolerance)
    return measured(subject, [worst], ERROR)


def _times(
    parameters: Parameters, done: Decoded, moved: Traffic, rates: MachineRates, other_s: float
) -> Iterator[Result]:
    link_s = (moved.streamed + moved.promoted) / rates.link
    for name, values in (
        (STEP, list(done.seconds)),
        (ATTENDED_MS, [moved.attended_s]),
        (LINK_MS, [link_s]),
        (HOT_MS, [moved.in_tiers["GPU"] / rates.hbm]),
        (OTHER_MS, [other_s]),
    ):
        subject = Subject(NAME, name, parameters, "ms", Better.LOWER)
        yield measured(subject, [value / MILLI for value in values], PART)


def _bytes(parameters: Parameters, moved: Traffic) -> Iterator[Result]:
    in_tiers = {f"K and V in {name}": num_bytes for name, num_bytes in moved.in_tiers.items()}
    for name, num_bytes in {
        NOT_RESIDENT: moved.not_resident,
        "a step: streamed": moved.streamed + moved.promoted,
        "a step: attended by the CPU": moved.attended,
        **in_tiers,
    }.items():
        subject = Subject(NAME, name, parameters, "GB", Better.LOWER)
        yield measured(subject, [num_bytes / GIGA], PART)


# ---- finding them again ---------------------------------------------------------------------------


def find(case: Sequence[Result], name: str) -> float | None:
    """The median of the row `name` of one case; None where there is none."""
    for result in case:
        if result.subject.name == name and result.figures is not None:
            return result.figures.median
    return None


def groups(
    results: Sequence[Result],
) -> Iterator[tuple[dict[str, str | int | float], list[list[Result]]]]:
    """Sweeps: what their cases have in common, and the rows of each case, in the order of the results."""
    sweeps: dict[str, dict[str, list[Result]]] = {}
    commons: dict[str, dict[str, str | int | float]] = {}
    for result in results:
        given = result.subject.parameters
        is_case = set(VARYING) <= set(given) and result.subject.name != PASS
        if result.subject.benchmark != NAME or not is_case:
            continue
        common = {key: value for key, value in given.items() if key not in VARYING}
        commons.setdefault(str(common), common)
        sweeps.setdefault(str(common), {}).setdefault(str(given), []).append(result)
    for key, cases in sweeps.items():
        yield commons[key], list(cases.values())
