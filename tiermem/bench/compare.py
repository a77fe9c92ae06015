"""Compare: the results of a run against those of a saved one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tiermem.bench.result import Better, Result


@dataclass(frozen=True, slots=True)
class Ratio:
    """One figure now over the same figure then; above 1 is better when `better` is HIGHER."""

    key: str
    unit: str
    then: float
    now: float
    better: Better

    @property
    def ratio(self) -> float:
        """Now / then; infinite where there was nothing."""
        return self.now / self.then if self.then else float("inf")

    def is_worse(self, tolerance: float) -> bool:
        """Whether it is worse by more than the share `tolerance`."""
        if self.better is Better.HIGHER:
            return self.now < self.then * (1 - tolerance)
        return self.now > self.then * (1 + tolerance)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Figures that both runs have, and the names of those that one of them lacks."""

    ratios: tuple[Ratio, ...]
    missing_now: tuple[str, ...]
    missing_then: tuple[str, ...]

    def worse(self, tolerance: float) -> list[Ratio]:
        """What became worse by more than `tolerance`."""
        return [ratio for ratio in self.ratios if ratio.is_worse(tolerance)]


def compare(now: Sequence[Result], then: Sequence[Result]) -> Comparison:
    """Match figures by benchmark, name and parameters; benchmarks that were not run now are left out."""
    ran = {result.subject.benchmark for result in now}
    old = {r.subject.key: r for r in then if r.subject.benchmark in ran and r.figures is not None}
    new = {r.subject.key: r for r in now if r.figures is not None}
    ratios = []
    for key, result in new.items():
        before = old.get(key)
        if before is None or before.figures is None or result.figures is None:
            continue
        subject = result.subject
        ratios.append(
            Ratio(key, subject.unit, before.figures.median, result.figures.median, subject.better)
        )
    return Comparison(
        tuple(ratios),
        missing_now=tuple(key for key in old if key not in new),
        missing_then=tuple(key for key in new if key not in old),
    )
