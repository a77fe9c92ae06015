"""Derived: what follows from the rows of several cases, of one run or of joined files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tiermem.bench.long_context import NAME
from tiermem.bench.long_context.case import Baseline
from tiermem.bench.long_context.fit import fit_results
from tiermem.bench.long_context.rows import DECODE, RATIO, VARYING
from tiermem.bench.result import Parameters, Result, Subject, measured

OVER = {
    Baseline.RESIDENT: "over everything in device memory",
    Baseline.STREAMING: "over streaming where nothing stays",
    Baseline.OFFLOADED: "over transformers' offloaded cache",
}
BASELINE_NAMES = {
    Baseline.RESIDENT: "everything in device memory",
    Baseline.STREAMING: "streaming, nothing stays",
    Baseline.OFFLOADED: "transformers' offloaded cache",
}
OFFLOADED_TARGET = 4.5
FIT = "fit: "


def is_derived(result: Result) -> bool:
    """Whether `derived_results` would make it again."""
    name = result.subject.name
    return result.subject.benchmark == NAME and (name in OVER.values() or name.startswith(FIT))


def derived_results(results: Sequence[Result]) -> Iterator[Result]:
    """Every case over each baseline of the same request, and the lines through sweeps."""
    measured_rows = [
        result
        for result in results
        if result.subject.benchmark == NAME and result.figures is not None
    ]
    baselines = {
        (result.subject.name, _request(result.subject.parameters)): result
        for result in measured_rows
        if result.subject.name in BASELINE_NAMES.values()
    }
    for case in measured_rows:
        if case.subject.name != DECODE:
            continue
        for kind, name in BASELINE_NAMES.items():
            other = baselines.get((name, _request(case.subject.parameters)))
            if other is not None:
                yield _ratio(kind, case, other)
    yield from fit_results(results)


def _ratio(kind: Baseline, case: Result, other: Result) -> Result:
    assert case.figures is not None
    assert other.figures is not None
    # the case that has an aim of its own has this one too
    aimed = case.subject.target_percent is not None and case.subject.parameters["cpu_share"] != "0"
    budget = OFFLOADED_TARGET if aimed and kind is Baseline.OFFLOADED else None
    subject = Subject(NAME, OVER[kind], case.subject.parameters, "x", budget=budget)
    return measured(subject, [case.figures.median / other.figures.median], RATIO)


def _request(parameters: Parameters) -> tuple[object, ...]:
    """What a case and its baselines have in common."""
    of_case = {*VARYING[1:], "cpu_share"}
    return tuple(sorted((key, value) for key, value in parameters.items() if key not in of_case))
