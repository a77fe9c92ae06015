"""Calibration run: measures one part of the machine after another, keeps the figures and shows them."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from tiermem import calibration
from tiermem.bench.step_rates import ON_CPU, ON_GPU, measure_steps
from tiermem.calibration import Calibration, DiskPlace, Found
from tiermem.cli.calibration_text import calibration_lines
from tiermem.cli.disk_probe import nearest_directory
from tiermem.cli.notes import Progress, note
from tiermem.cli.screen import terminal_width
from tiermem.device.copy_measure import measure_copies
from tiermem.device.copy_rates import CopyRates
from tiermem.device.discovery import choose, open_device, survey
from tiermem.device.host import host_free_bytes
from tiermem.device.protocol import Device
from tiermem.disk_rates import LEAST_BYTES, measure_disk
from tiermem.errors import TierMemError
from tiermem.machine import Machine
from tiermem.measure.ceilings import FULL, QUICK, Ceilings, Effort
from tiermem.measure.machine_rates import ceiling_rates, ram_attention_rates
from tiermem.rates import Rates

COPY_S, QUICK_COPY_S = 6.0, 1.0
"""How long the ways of copying are measured, about."""
RAM_REPEATS = 5
"""Of attention in RAM, at most: it takes a tenth of a second each, for every dtype and beside the link again."""
QUICK_FACTOR = 4
"""How many times shorter the context of a quick measurement is."""


@dataclass(frozen=True, slots=True)
class DiskEffort:
    """At most so many bytes of disk and memory, and about so long."""

    num_bytes: int
    seconds: float


DISK = DiskEffort(4 << 30, 12.0)
QUICK_DISK = DiskEffort(512 << 20, 2.0)


@dataclass
class Run:
    """One measurement of a machine: what is found piece by piece, and what went wrong."""

    device: str
    ssd_path: Path
    quick: bool
    rates: Rates = field(default_factory=Rates)
    copies: CopyRates | None = None
    disks: tuple[DiskPlace, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def measure(self) -> None:
        """Measure every part; one that fails is noted, and the others are measured all the same."""
        parts = self._parts()
        for i, (name, part) in enumerate(parts):
            Progress.show(f"calibrating {i + 1} of {len(parts)}: {name}")
            start_s = time.perf_counter()
            try:
                part()
            except (TierMemError, OSError, RuntimeError) as error:  # torch reports CUDA's so
                self.problems.append(f"{name}: {error}")
            self.seconds[name] = time.perf_counter() - start_s
        Progress.clear()

    def _parts(self) -> list[tuple[str, Callable[[], None]]]:
        return [
            ("memory and link", self._measure_ceilings),
            ("ways to copy", self._measure_copies),
            ("attention in RAM", self._measure_ram_attention),
            ("attention and steps", self._measure_steps),
            ("disk", self._measure_disk),
        ]

    def _measure_ceilings(self) -> None:
        self._measure_with(QUICK if self.quick else FULL, ceiling_rates)

    def _measure_ram_attention(self) -> None:
        whole = QUICK if self.quick else FULL
        repeats = min(whole.repeats, RAM_REPEATS)
        effort = replace(whole, hot_bytes=QUICK.hot_bytes, repeats=repeats)
        self._measure_with(effort, ram_attention_rates)

    def _measure_with(self, effort: Effort, rates: Callable[[Ceilings, Device], Rates]) -> None:
        device = open_device(self.device)[0]
        try:
            with Ceilings(device, effort) as ceilings:
                self.rates = rates(ceilings, device).over(self.rates)
        finally:
            device.close()

    def _measure_copies(self) -> None:
        device = open_device(self.device)[0]
        try:
            found = measure_copies(device, seconds=QUICK_COPY_S if self.quick else COPY_S)
        finally:
            device.close()
        self.copies = found if found.rows else None

    def _measure_disk(self) -> None:
        place = nearest_directory(self.ssd_path)
        effort = QUICK_DISK if self.quick else DISK
        free = min(shutil.disk_usage(place).free // 2, host_free_bytes() // 8)
        num_bytes = max(min(effort.num_bytes, free), LEAST_BYTES)
        found = measure_disk(place, num_bytes=num_bytes, seconds=effort.seconds)
        self.disks = (DiskPlace.at(self.ssd_path, time.time(), found),)

    def _measure_steps(self) -> None:
        reference = ON_GPU if self.device.startswith("cuda") else ON_CPU
        if self.quick:
            reference = reference.reduced(QUICK_FACTOR)
        self.rates = measure_steps(reference, self.device).over(self.rates)


def measure_and_keep(device: str, ssd_path: Path | None, *, quick: bool, as_json: bool) -> int:
    """Measure, keep, show; the exit code: 1 if a part could not be measured."""
    from tiermem.cli.tier_options import device_name, private_base

    calibration.make_cache_dir()  # before anything takes its time
    place = private_base() / "tiermem" if ssd_path is None else ssd_path.expanduser()
    name = device_name(choose(device, survey()))
    run = Run(name, place, quick)
    run.measure()
    machine = _machine(device)
    made = Calibration(machine, time.time(), quick, run.rates, run.disks, run.copies)
    made = made.with_disks_of(calibration.load(machine).calibration)
    path = calibration.save(made)
    _show(Found(path, made), as_json, seconds=run.seconds, problems=run.problems)
    for problem in run.problems:
        note(problem)
    return 1 if run.problems else 0


def show_kept(device: str, as_json: bool) -> int:
    """Show what is kept; none is no error."""
    _show(calibration.load(_machine(device)), as_json)
    return 0


def forget_kept(device: str, as_json: bool) -> int:
    """Remove what is kept; none is no error."""
    path = calibration.forget(_machine(device))
    if as_json:
        print(json.dumps({"removed": None if path is None else str(path)}))
    else:
        print("there was no calibration" if path is None else f"removed {path}")
    return 0


def _machine(device: str) -> Machine:
    report = survey()
    return Machine.here(choose(device, report).gpu, report.driver_version)


def _show(found: Found, as_json: bool, **more: object) -> None:
    if as_json:
        print(json.dumps({**found.to_table(), **more}, indent=2))
    else:
        print("\n".join(_lines(found)))


def _lines(found: Found) -> Iterator[str]:
    made = found.calibration
    if made is None:
        yield found.problem or f"no calibration of this machine: {calibration.FIX}"
        return
    yield from calibration_lines(made, time.time(), terminal_width(sys.stdout))
    yield f"kept in {found.path}"
