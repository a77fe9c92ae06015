"""RamSplit: which part of the pages in RAM the CPU attends there, so that it ends when the link does.

Of a step, X bytes of K and V lie in RAM alone, and Y bytes more on the SSD, which cross the link in any case. The
link streams (1 - f) X + Y at B_link from the step's beginning. The CPU attends f X at B_cpu, but only while it has
queries: not in T_gpu, in which the GPU reads weights and attends what is resident, and not while L layers are
handed over, each in T_h. Both end at once for

    f = ((X + Y) / B_link - T_gpu - L T_h) / (X / B_link + X / B_cpu)

or, where that is not between 0 and 1, for the nearer of them. Either is left to itself where it is faster so: a
step never takes longer than with the link or the CPU alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SplitRates:
    """Bytes/s of K and V: streamed over the link, and attended by the CPU where they lie in RAM.

    Parameters
    ----------
    link, cpu: beside each other.
    link_alone, cpu_alone: without the other, at least as fast; None: as beside it.

    Raises
    ------
    ValueError: a rate that is not above 0.
    """

    link: float
    cpu: float
    link_alone: float | None = None
    cpu_alone: float | None = None

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: must be above 0 bytes a second")

    @property
    def only_link(self) -> float:
        """Of the link while the CPU does not attend."""
        return max(self.link, self.link_alone or 0.0)

    @property
    def only_cpu(self) -> float:
        """Of the CPU while nothing streams."""
        return max(self.cpu, self.cpu_alone or 0.0)


@dataclass(frozen=True, slots=True)
class SplitWork:
    """What a step has to do.

    Parameters
    ----------
    ram_bytes: X, of K and V that are in RAM alone. cold_bytes: Y, of those on the SSD.
    gpu_s: T_gpu. hand_over_s: L T_h, of all layers. Seconds; 0 where they are not known.

    Raises
    ------
    ValueError: one of them is below 0.
    """

    ram_bytes: float
    cold_bytes: float = 0.0
    gpu_s: float = 0.0
    hand_over_s: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"{name}={value}: must be at least 0")


@dataclass(frozen=True, slots=True)
class Split:
    """fraction: of what is in RAM alone, 0 to 1, that the CPU attends. step_s: what the step takes then."""

    fraction: float
    step_s: float


def best_split(work: SplitWork, rates: SplitRates) -> Split:
    """The fraction with which a step ends first; of equal ones the smallest."""
    tried = (0.0, balance(work, rates), 1.0)
    times = [Split(fraction, split_time(work, rates, fraction)) for fraction in tried]
    return min(times, key=lambda split: split.step_s)


def balance(work: SplitWork, rates: SplitRates) -> float:
    """The fraction, 0 to 1, with which link and CPU end at once, or as nearly as can be."""
    if work.ram_bytes == 0:
        return 0.0
    link_s, cpu_s = work.ram_bytes / rates.link, work.ram_bytes / rates.cpu
    ahead_s = link_s + work.cold_bytes / rates.link - work.gpu_s - work.hand_over_s
    return min(max(ahead_s / (link_s + cpu_s), 0.0), 1.0)


def split_time(work: SplitWork, rates: SplitRates, fraction: float) -> float:
    """Seconds of a step whose CPU attends `fraction`, 0 to 1, of what is in RAM alone."""
    attended = fraction * work.ram_bytes
    streamed = work.ram_bytes - attended + work.cold_bytes
    if attended == 0:
        return max(work.gpu_s, streamed / rates.only_link)
    cpu_rate = rates.cpu if streamed else rates.only_cpu
    cpu_s = work.gpu_s + work.hand_over_s + attended / cpu_rate
    return max(cpu_s, streamed / rates.link)
