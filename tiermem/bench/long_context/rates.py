"""Rates: what the machine could do at most for a request that is not resident, measured in the same run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tiermem.attention.cpus import usable_cpus
from tiermem.bench.long_context import NAME
from tiermem.bench.long_context.decoding import Traffic
from tiermem.bench.result import GIGA, Ceiling, Result, Subject, measured
from tiermem.device.protocol import Device, DeviceKind, Direction
from tiermem.measure.beside_link import BesideLink
from tiermem.measure.ceilings import Ceilings

LINK = "bytes that are not resident at the link's rate"
BESIDE = (
    "bytes that are not resident at the rates of plain RAM reads and the link beside each other"
)
RAM = "bytes that are not resident at the rate of plain RAM reads"
MACHINE = "machine: "
HBM = "weights and KV read once a token at the memory's read rate"


@dataclass(frozen=True, slots=True)
class MachineRates:
    """Bytes/s. beside: None where the device is the CPU, whose `ram` counts then."""

    hbm: float
    link: float
    ram: float
    beside: BesideLink | None
    threads: int

    @classmethod
    def measure(cls, ceilings: Ceilings, device: Device, cpu_threads: int | None) -> MachineRates:
        """With as many threads as attend, or one less where that leaves more for both."""
        threads = cpu_threads or usable_cpus()
        beside = None
        if device.kind is DeviceKind.CUDA:
            tried = [ceilings.ram_beside_link(count) for count in {threads, max(1, threads - 1)}]
            beside = max(tried, key=lambda each: each.total)
        return cls(
            hbm=ceilings.hbm_read_rate(),
            link=ceilings.link_rate(Direction.HOST_TO_DEVICE),
            ram=ceilings.ram_read_rate(threads),
            beside=beside,
            threads=threads,
        )

    def results(self) -> Iterator[Result]:
        """One row a rate."""
        rates = {"device memory, read": self.hbm, "link": self.link, "RAM, read alone": self.ram}
        if self.beside is not None:
            rates["RAM, read beside the link"] = self.beside.ram
            rates["link, beside RAM reads"] = self.beside.link
        for name, rate in rates.items():
            subject = Subject(NAME, f"{MACHINE}{name}", {"threads": self.threads}, "GB/s")
            yield measured(subject, [rate / GIGA], "what the machine can do")

    def least_s(self, moved: Traffic) -> float:
        """What a step's bytes that are not resident take at the least."""
        return moved.not_resident / self._rate(moved)[1]

    def ceiling(self, moved: Traffic) -> Ceiling | str:
        """Tokens/s that these bytes allow, or why that is not known."""
        if moved.not_resident == 0:
            return "everything is resident"
        if moved.cold > 0:
            return "some of it comes from the SSD, whose rate is not measured here"
        return Ceiling(self._rate(moved)[0], 1 / self.least_s(moved))

    def _rate(self, moved: Traffic) -> tuple[str, float]:
        if moved.attended == 0:
            return LINK, self.link
        if self.beside is None:
            return RAM, self.ram
        return BESIDE, self.beside.total
