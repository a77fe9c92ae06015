"""The calibration file: what is written is read back, and nothing else is ever used."""

from __future__ import annotations

import copy
import json
import logging
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tiermem import calibration
from tiermem._core import EngineKind
from tiermem.calibration import (
    DAY_S,
    FORMAT,
    MAX_FILE_BYTES,
    VALID_DAYS,
    Calibration,
    DiskPlace,
    cache_dir,
    forget,
    load,
    load_logged,
    save,
)
from tiermem.device.copy_rates import CopyCase, CopyMethod, CopyRate, CopyRates
from tiermem.device.protocol import Direction
from tiermem.device.report import GpuInfo
from tiermem.disk_rates import DiskOptions, DiskRate, DiskRates
from tiermem.errors import ConfigError
from tiermem.machine import Machine
from tiermem.rates import Rates

NOW_S = 1.8e9
MACHINE = Machine(
    gpu="NVIDIA H200", gpu_uuid="GPU-1b2c", pci_bus_id="0000:01:00.0", driver="580.1", cpu="Xeon",
    cores=16, ram_units=2048, kernel="6.18.0",
)  # fmt: skip
COPIES = CopyRates((
    CopyRate(CopyCase(Direction.HOST_TO_DEVICE, False, 1 << 16, 1), CopyMethod.KERNEL, 51.0),
))  # fmt: skip
DISK = DiskRates(
    True, 4.5, 4.25, 2.0, (DiskRate(DiskOptions(EngineKind.THREADS, 1 << 20, 8), 4.4, 4.1),)
)
RATES = Rates(
    link_to_device=55.5e9, hbm_read=4.55e12, matmul=7e14, step_s=9.5e-5, cpu_attend_fp16=120e9,
    cpu_attend_fp16_beside=105e9, link_beside_fp16=50e9, cpu_attend_threads=15,
)  # fmt: skip


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("TIERMEM_CACHE_DIR", str(path))
    return path


def made(**changes: Any) -> Calibration:
    values = {
        "machine": MACHINE, "made_s": NOW_S - DAY_S, "quick": False, "rates": RATES,
        "disks": (DiskPlace("/mnt/ssd", 66, NOW_S - DAY_S, DISK),), "copies": COPIES,
    }  # fmt: skip
    return Calibration(**{**values, **changes})


def write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o600)


def problem_of(change: Any) -> str:
    """What is said of a file in which `change` changed the table."""
    path = save(made())
    table = copy.deepcopy(json.loads(path.read_text()))
    change(table)
    write(path, json.dumps(table))
    found = load(MACHINE, NOW_S)
    assert found.calibration is None
    assert found.problem is not None
    assert str(path) in found.problem
    assert found.problem.endswith("run `tiermem calibrate`")
    return found.problem


def test_what_was_saved_is_loaded() -> None:
    path = save(made())
    found = load(MACHINE, NOW_S)
    assert (found.path, found.calibration, found.problem) == (path, made(), None)


def test_the_file_is_private_and_nothing_is_left_beside_it(directory: Path) -> None:
    before = os.umask(0)
    try:
        path = save(made())
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    save(made(quick=True))
    assert [item.name for item in directory.iterdir()] == ["calibration-GPU-1b2c.json"]


def test_no_file_is_no_problem() -> None:
    found = load(MACHINE, NOW_S)
    assert (found.calibration, found.problem) == (None, None)


def test_the_directory_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("TIERMEM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "tiermem"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "tiermem"


def test_forgetting_removes_the_file() -> None:
    path = save(made())
    assert forget(MACHINE) == path
    assert forget(MACHINE) is None
    assert load(MACHINE, NOW_S).calibration is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gpu", "NVIDIA A100"), ("gpu_uuid", "GPU-9"), ("pci_bus_id", "0000:02:00.0"),
        ("driver", "590.2"), ("cpu", "EPYC"), ("cores", 8), ("ram_units", 9), ("kernel", "6.19"),
    ],
)  # fmt: skip
def test_a_file_of_another_machine_is_not_used(field: str, value: object) -> None:
    problem = problem_of(lambda table: table["machine"].update({field: value}))
    assert "made on another machine" in problem
    assert f"{field} {value!r}, here {getattr(MACHINE, field)!r}" in problem


def test_machines_with_and_without_a_gpu_have_files_of_their_own() -> None:
    bare = replace(MACHINE, gpu="", gpu_uuid="", pci_bus_id="", driver="")
    assert save(made()) != save(made(machine=bare))
    assert load(bare, NOW_S).calibration == made(machine=bare)
    assert bare.key == "cpu"
    assert replace(MACHINE, gpu_uuid="").key == "0000-01-00-0"
    assert replace(MACHINE, gpu_uuid="../../etc/x").key == "etc-x"


def test_it_expires(directory: Path) -> None:
    save(made())
    last_s = made().made_s + VALID_DAYS * DAY_S
    assert load(MACHINE, last_s - 1).calibration is not None
    problem = load(MACHINE, last_s + DAY_S).problem
    assert problem is not None
    assert "31 days old, good for 30" in problem


def test_a_file_from_the_future_is_not_used() -> None:
    assert "in the future" in problem_of(lambda table: table.update(made_s=NOW_S + 2 * DAY_S))


def test_another_version_is_not_used() -> None:
    assert "made by tiermem 9.9" in problem_of(lambda table: table.update(tiermem="9.9"))
    for value in (FORMAT + 1, 0, None, "2", True):
        problem = problem_of(lambda table, value=value: table.update(format=value))
        assert f"format={value!r}" in problem


def test_a_file_of_an_older_format_is_out_of_date() -> None:
    """Whatever else it holds: it may lack what is needed, and have what is not known any more."""
    problem = problem_of(lambda table: table.update(format=1, rates={"long_gone": 1}))
    assert "out of date: of format 1, this is 2" in problem


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("link_to_device", 0), ("link_to_device", -1), ("link_to_device", 1e18),
        ("link_to_device", True), ("link_to_device", "fast"), ("link_to_device", None),
        ("link_to_device", [1]), ("step_s", 100), ("step_s", 0), ("speed", 1),
        ("link_to_device", 10**400),
    ],
)  # fmt: skip
def test_a_rate_that_cannot_be_spoils_the_file(key: str, value: object) -> None:
    assert key in problem_of(lambda table: table["rates"].update({key: value}))


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.pop("machine"),
        lambda table: table.update(machine=[]),
        lambda table: table["machine"].update(cores=0),
        lambda table: table["machine"].update(cpu="x" * 1000),
        lambda table: table["machine"].update(gpu=None),
        lambda table: table.update(rates=None),
        lambda table: table.update(disks={}),
        lambda table: table.update(disks=[{}]),
        lambda table: table["disks"][0].update(path=""),
        lambda table: table["disks"][0].update(device_id=-1),
        lambda table: table["disks"][0].update(made_s=-1),
        lambda table: table["disks"][0].update(rates=[]),
        lambda table: table["disks"][0]["rates"].update(read_ceiling_gbs=0),
        lambda table: table["disks"][0]["rates"]["rates"][0].update(depth=0),
        lambda table: table.update(disks=table["disks"] * 100),
        lambda table: table.update(copies=[]),
        lambda table: table["copies"].update(format=99),
        lambda table: table["copies"]["rows"][0].update(gb_per_s=-1),
        lambda table: table.update(made_s="now"),
        lambda table: table.update(tiermem=5),
        lambda table: table.update(more=1),
    ],
)
def test_a_damaged_table_is_not_used(change: Any) -> None:
    problem_of(change)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 1, "format": 1}', '{"a": NaN}', "[" * 100000, "\0", "1" * 9999],
)  # fmt: skip
def test_text_that_is_no_table_is_not_used(text: str) -> None:
    write(save(made()), text)
    found = load(MACHINE, NOW_S)
    assert found.calibration is None
    assert found.problem is not None


def test_bytes_that_are_no_text_and_too_many_bytes_are_not_used() -> None:
    path = save(made())
    path.write_bytes(b"\xff\xfe")
    assert "UTF-8" in (load(MACHINE, NOW_S).problem or "")
    write(path, " " * (MAX_FILE_BYTES + 1))
    assert "larger than" in (load(MACHINE, NOW_S).problem or "")


def test_links_and_files_that_others_can_write_are_not_followed(
    directory: Path, tmp_path: Path
) -> None:
    path = save(made())
    path.chmod(0o666)
    assert "only this user" in (load(MACHINE, NOW_S).problem or "")
    path.chmod(0o600)
    elsewhere = tmp_path / "elsewhere.json"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert "cannot be read" in (load(MACHINE, NOW_S).problem or "")
    path.unlink()
    os.mkfifo(path, 0o600)  # nobody writes to it: opening it must not wait
    assert "not a regular file" in (load(MACHINE, NOW_S).problem or "")
    path.unlink()
    path.mkdir()
    assert load(MACHINE, NOW_S).problem is not None


def test_saving_replaces_a_link_and_not_what_it_names(directory: Path, tmp_path: Path) -> None:
    path = save(made())
    path.unlink()
    target = tmp_path / "target"
    target.write_text("mine")
    path.symlink_to(target)
    save(made())
    assert target.read_text() == "mine"
    assert not path.is_symlink()


def test_a_directory_that_others_can_write_to_is_refused(directory: Path, tmp_path: Path) -> None:
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(ConfigError, match="only this user"):
        save(made())
    assert "only this user" in (load(MACHINE, NOW_S).problem or "")
    directory.rmdir()
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    directory.symlink_to(real)
    with pytest.raises(ConfigError, match="only this user"):
        save(made())


def test_a_failed_save_leaves_the_old_file(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(made())
    before = path.read_bytes()

    def fail(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(calibration.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        save(made(quick=True))
    assert [item.read_bytes() for item in directory.iterdir()] == [before]


def test_the_log_says_once_why_a_file_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    write(save(made()), "{")
    calibration._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="tiermem"):
        assert load_logged(MACHINE) is None
        assert load_logged(MACHINE) is None
    assert [record.getMessage() for record in caplog.records] == [load(MACHINE).problem]


def test_a_disk_is_found_by_its_path_then_by_its_file_system(tmp_path: Path) -> None:
    device_id = tmp_path.stat().st_dev
    other = DiskPlace("/elsewhere", device_id, NOW_S, DISK)
    exact = DiskPlace(str(tmp_path / "store"), device_id, NOW_S, DISK)
    foreign = DiskPlace(str(tmp_path / "third"), device_id + 1, NOW_S, DISK)
    found = made(disks=(foreign, other, exact))
    assert found.disk_at(tmp_path / "store") == exact
    assert found.disk_at(tmp_path / "third") == other
    assert made(disks=(foreign,)).disk_at(tmp_path) is None
    here = DiskPlace.at(tmp_path / "new", NOW_S, DISK)
    assert (here.path, here.device_id) == (str(tmp_path / "new"), device_id)
    assert (here.read, here.write) == (4.5e9, 4.25e9)


def test_places_on_disks_are_kept_until_each_is_out_of_date() -> None:
    first = made(disks=(DiskPlace("/a", 1, NOW_S, DISK), DiskPlace("/b", 2, NOW_S, DISK)))
    later_s = NOW_S + 20 * DAY_S
    again = made(made_s=later_s, disks=(DiskPlace("/a", 1, later_s, DISK),))
    both = again.with_disks_of(first)
    assert [(disk.path, disk.made_s) for disk in both.disks] == [("/a", later_s), ("/b", NOW_S)]
    assert again.with_disks_of(None) == again
    save(both)
    assert load(MACHINE, later_s).calibration == both
    assert load(MACHINE, NOW_S + 31 * DAY_S).calibration == again


def test_this_machine_is_itself_and_reads_back() -> None:
    gpu = GpuInfo(0, "NVIDIA H200", (9, 0), 141 << 30, None, 132, "0000:01:00.0")
    for machine in (Machine.here(None), Machine.here(gpu, 13000)):
        assert Machine.from_table(machine.to_table()) == machine
        assert machine.difference(machine) is None
    assert Machine.here(None) == Machine.here(None)
    assert Machine.here(gpu, 13000).driver


def test_rates_read_back_and_fill_gaps() -> None:
    assert Rates.from_table(RATES.to_table()) == RATES
    assert Rates(hbm_read=1e12).over(RATES) == replace(RATES, hbm_read=1e12)
    assert RATES.over(Rates(ram_read=1e11)) == replace(RATES, ram_read=1e11)
