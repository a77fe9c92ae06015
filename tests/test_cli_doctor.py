"""`tiermem doctor`: tells what there is, with or without a GPU, and whether a path would do."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from cli_support import Cli

from tiermem import PageLayout, TierConfig, TierManager, _core
from tiermem.calibration import Calibration, DiskPlace, save
from tiermem.cli import checkup, disk_probe, hardware_bounds
from tiermem.cli.checkup import examine
from tiermem.cli.checkup_text import checkup_lines
from tiermem.cli.disk_probe import probe_disk
from tiermem.cli.hardware_bounds import link_bound
from tiermem.device.report import DeviceReport, GpuInfo
from tiermem.disk_rates import DiskOptions, DiskRate, DiskRates
from tiermem.machine import Machine
from tiermem.rates import Rates

NO_GPU = DeviceReport(0, 13000, "2.13.0", None, (), "no NVIDIA driver is installed")
H200 = GpuInfo(0, "NVIDIA H200", (9, 0), 141 << 30, 139 << 30, 132, "0000:01:00.0")
K80 = GpuInfo(1, "Tesla K80", (3, 7), 12 << 30, None, 13, "0000:02:00.0", "too old")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERMEM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def with_devices(monkeypatch: pytest.MonkeyPatch, report: DeviceReport) -> None:
    monkeypatch.setattr(checkup, "probe", lambda: report)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)


def test_without_a_gpu_it_says_so_and_succeeds(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with_devices(monkeypatch, NO_GPU)
    found = cli("doctor")
    assert (found.code, found.err) == (0, "")
    for words in (
        "tiermem ", "python ", "torch ", "triton ", "cuda-bindings ", "transformers ", "GPU ",
        "none, runtime 13.0", "cores", "memory", "file system", "a test file was read back",
        "CPU, profile cpu", "all of what is in RAM", "warning: no GPU is usable: no NVIDIA driver is installed",
    ):  # fmt: skip
        assert words in found.out, words


def test_with_gpus_it_says_which_is_used_and_why(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with_devices(monkeypatch, DeviceReport(13020, 13000, "2.13.0", "13.0", (H200, K80), None))
    text = cli("doctor").out
    for words in (
        "NVIDIA H200, capability 9.0, 141.0 GiB, 139.0 GiB free", "13.2, runtime 13.0",
        "GPU 0 (NVIDIA H200), profile h200", "takes torch's current GPU", "GPU tier   111.2 GiB",
        "warning: GPU 1 is not usable: too old",
    ):  # fmt: skip
        assert words in text, words
    assert "no GPU is usable" not in text


def test_the_json_has_every_part(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_devices(monkeypatch, NO_GPU)
    document = cli("doctor", "--json", "--ssd-path", tmp_path / "new").json()
    assert set(document) == {
        "tiermem", "python", "versions", "host", "devices", "disk", "plan", "warnings",
        "calibration", "bounds", "shares_of_bounds", "shares_of_rates",
    }  # fmt: skip
    assert set(document["versions"]) == set(checkup.PACKAGES)
    assert document["devices"]["problem"] == NO_GPU.problem
    assert document["host"]["total_bytes"] >= document["host"]["free_bytes"] > 0
    disk = document["disk"]
    assert disk["path"] == str(tmp_path / "new")
    assert (disk["exists"], disk["is_store"], disk["problem"]) == (False, False, None)
    assert disk["free_bytes"] > 0
    assert disk["io"] in {"io_uring", "threads"}
    assert document["plan"]["profile"] == "cpu"
    assert document["plan"]["ssd_bytes"] > 0
    assert document["warnings"][0] == "no GPU is usable: no NVIDIA driver is installed"


def test_it_says_how_to_calibrate(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with_devices(monkeypatch, NO_GPU)
    assert "calibration  none: run `tiermem calibrate`" in cli("doctor").out
    assert cli("doctor", "--json").json()["calibration"]["calibration"] is None


def test_measured_rates_are_shown_with_their_share_of_the_hardwares(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_devices(monkeypatch, DeviceReport(13020, 13000, "2.13.0", "13.0", (H200,), None))
    place = tmp_path / "0000:01:00.0"
    place.mkdir()
    (place / "max_link_speed").write_text("32.0 GT/s PCIe\n")
    (place / "current_link_width").write_text("16\n")
    monkeypatch.setattr(hardware_bounds, "link_bound", partial(link_bound, devices=tmp_path))
    rates = Rates(link_to_device=55.5e9, hbm_read=4.5e12, step_s=1e-4)
    options = DiskOptions(_core.EngineKind.THREADS, 1 << 20, 8)
    machine = Machine.here(H200, 13020)
    disk = DiskRates(True, 4.5, 4.3, 2.0, (DiskRate(options, 4.4, 4.2),))
    disks = (DiskPlace.at(tmp_path, time.time(), disk),)
    save(Calibration(machine, time.time() - 7200, False, rates, disks))
    text = cli("doctor").out
    for words in (
        "RAM to device", "55.5 GB/s", "88.1%", "4,500 GB/s", "100 µs", "4.50 GB/s",
        "measured with care 2 h 0 min ago",
    ):  # fmt: skip
        assert words in text, words
    document = cli("doctor", "--json").json()
    assert document["shares_of_bounds"] == {
        "link_to_device": pytest.approx(55.5 / 63.015, rel=1e-3)
    }
    assert document["calibration"]["calibration"]["rates"]["link_to_device"] == 55.5e9


def test_attention_in_ram_is_shown_with_its_share_of_ram_reads(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_devices(monkeypatch, DeviceReport(13020, 13000, "2.13.0", "13.0", (H200,), None))
    monkeypatch.setattr(checkup, "cpus_beside_gpu", lambda: 15)
    rates = Rates(
        link_to_device=55e9, ram_read=160e9, cpu_attend_fp16=120e9, cpu_attend_fp16_beside=100e9,
        link_beside_fp16=50e9, cpu_attend_threads=15,
    )  # fmt: skip
    save(Calibration(Machine.here(H200, 13020), time.time(), False, rates))
    text = " ".join(cli("doctor").out.split())
    for words in (
        "CPU attention, fp16 120 GB/s 75.0% of RAM reads",
        "... beside the link 100 GB/s 62.5% of RAM reads",
        "the link meanwhile 50.0 GB/s 90.9% of the link alone",
        "CPU attention: 15 threads, one new token",
        "CPU share 66.7% of what is in RAM, by the measured rates; 15 threads",
    ):
        assert words in text, words
    document = cli("doctor", "--json").json()
    assert document["shares_of_rates"] == {
        "cpu_attend_fp16": 0.75, "cpu_attend_fp16_beside": 0.625,
        "link_beside_fp16": pytest.approx(50 / 55),
    }  # fmt: skip
    assert document["plan"]["cpu_share"] == pytest.approx(2 / 3)
    assert document["plan"]["cpu_threads"] == 15


def test_beside_a_gpu_without_rates_the_cpu_attends_nothing_and_it_says_why(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_devices(monkeypatch, DeviceReport(13020, 13000, "2.13.0", "13.0", (H200,), None))
    text = " ".join(cli("doctor").out.split())
    assert "CPU share none of what is in RAM: how fast it attends is not known; run `tie" in text
    assert cli("doctor", "--json").json()["plan"]["cpu_share"] == 0


def test_a_calibration_that_is_not_used_is_a_warning(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_devices(monkeypatch, NO_GPU)
    other = replace(Machine.here(None), kernel="2.6.32")
    save(Calibration(other, time.time(), False, Rates()))
    found = cli("doctor")
    assert found.code == 0
    text = " ".join(found.out.split())
    assert "calibration not used, see the warning" in text
    assert "made on another machine: kernel '2.6.32'" in text


@pytest.mark.parametrize(
    ("speed", "width", "gb_per_s"),
    [
        ("8.0 GT/s PCIe", "16", 15.75), ("16.0 GT/s PCIe", "16", 31.5), ("5.0 GT/s", "8", 4.0),
        ("2.5 GT/s PCIe", "1", 0.25), ("Unknown", "16", None), ("8.0 GT/s", "63", None),
        ("8.0 GT/s", "0", None), ("8.0 GT/s", "", None),
    ],
)  # fmt: skip
def test_the_link_is_known_by_generation_and_width(
    tmp_path: Path, speed: str, width: str, gb_per_s: float | None
) -> None:
    assert link_bound("0000:0A:00.0", tmp_path) is None
    place = tmp_path / "0000:0a:00.0"
    place.mkdir()
    (place / "max_link_speed").write_text(speed)
    (place / "current_link_width").write_text(width)
    bound = link_bound("0000:0A:00.0", tmp_path)
    assert bound == (None if gb_per_s is None else pytest.approx(gb_per_s * 1e9, rel=1e-3))


def test_a_bound_that_was_exceeded_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware_bounds, "link_bound", lambda _bus_id: 8e9)
    measured = Rates(link_to_device=55e9, link_to_host=7e9, link_both=15e9)
    bounds = hardware_bounds.gpu_bounds(H200, measured)
    assert bounds == Rates(link_to_host=8e9, link_both=16e9)


def test_looking_leaves_nothing_behind(tmp_path: Path) -> None:
    assert probe_disk(tmp_path / "a" / "b").problem is None
    assert probe_disk(tmp_path).problem is None
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_used_fails(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused = cli("doctor", "--ssd-path", tmp_path / "file" / "store")
    assert refused.code == 1
    assert "is not a directory" in refused.out
    others = cli("doctor", "--ssd-path", tmp_path)
    assert others.code == 1
    assert "neither empty nor a store" in others.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_cannot_be_used(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    problem = probe_disk(tmp_path / "store").problem
    tmp_path.chmod(0o700)
    assert problem == "a file cannot be written there: Permission denied"


def test_a_store_is_known_as_one_even_while_it_is_open(cli: Cli, tmp_path: Path) -> None:
    store = tmp_path / "store"
    layout = PageLayout(2, 2, 16, dtype="float32", page_tokens=16)
    config = TierConfig(gpu="32KiB", ram=0, ssd="2MiB", ssd_path=store, device="cpu")
    with TierManager(layout, config):
        before = sorted(store.iterdir())
        found = cli("doctor", "--ssd-path", store)
        assert sorted(store.iterdir()) == before
    assert found.code == 0
    assert "(a store of tiermem)" in found.out


def test_bytes_that_come_back_wrong_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(disk_probe.np, "array_equal", lambda _out, _back: False)
    assert probe_disk(tmp_path).problem == "what was read is not what was written"


def test_a_disk_that_fails_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    faults = _core.FaultOps()
    faults.fail(_core.FileCall.READ, 1, 5, 100)
    engine = _core.IoEngine(_core.EngineKind.THREADS, faults=faults)
    monkeypatch.setattr(disk_probe, "_open_engine", lambda: (engine, "Operation not permitted"))
    report = probe_disk(tmp_path)
    assert report.problem is not None
    assert report.io == "threads"
    assert report.uring_problem == "Operation not permitted"


def test_each_weakness_of_a_disk_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weak = replace(
        probe_disk(tmp_path),
        file_system="tmpfs",
        direct_io=False,
        io="threads",
        uring_problem="Operation not permitted",
        free_bytes=2**20,
    )
    monkeypatch.setattr(checkup, "probe_disk", lambda _path: weak)
    with_devices(monkeypatch, NO_GPU)
    found = examine(tmp_path)
    text = "\n".join(checkup_lines(found, None))
    for words in ("memory, not a disk", "no direct I/O", "refuses io_uring", "less than 1 GiB"):
        assert sum(words in warning for warning in found.warnings) == 1, words
        assert words in text


def test_lines_fit_the_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_devices(monkeypatch, NO_GPU)
    found = examine(tmp_path)
    assert max(map(len, checkup_lines(found, 60))) <= 60
