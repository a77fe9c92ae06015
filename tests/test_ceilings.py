"""Ceilings: what is measured is counted right, once, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tiermem.attention.cpus import usable_cpus
from tiermem.device.cpu import CpuDevice
from tiermem.device.protocol import Direction
from tiermem.measure import ceilings as module
from tiermem.measure.ceilings import Ceilings, Effort, Reduction
from tiermem.measure.launches import kernel_time_s, launch_time_s, queued_kernel_time_s
from tiermem.measure.machine_rates import ceiling_rates, ram_attention_rates
from tiermem.measure.products import LARGE, SMALL, ProductCosts, _layers, solve
from tiermem.measure.timing import Samples

SMALL_EFFORT = Effort(hot_bytes=1 << 20, host_bytes=1 << 20, repeats=2)


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    device = CpuDevice()
    yield device
    device.close()


@pytest.fixture
def one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything takes a second, after it was run once."""

    def on_device(_device: object, run: object, *_: object, **__: object) -> Samples:
        run()  # type: ignore[operator]
        return Samples((1.0,))

    def on_host(run: object, *_: object, **__: object) -> Samples:
        run()  # type: ignore[operator]
        return Samples((1.0,))

    monkeypatch.setattr(module, "time_device", on_device)
    monkeypatch.setattr(module, "time_host", on_host)


def test_bytes_and_operations_are_counted(device: CpuDevice, one_second: None) -> None:
    with Ceilings(device, SMALL_EFFORT) as ceilings:
        half = 1 << 19
        assert ceilings.link_rate(Direction.HOST_TO_DEVICE) == half
        assert ceilings.link_rate(Direction.DEVICE_TO_HOST) == half
        assert ceilings.two_way_link_rate() == 2 * half
        assert ceilings.hbm_read_rate() == 1 << 20
        assert ceilings.hbm_copy_rate() == 1 << 20  # half is read, half is written
        assert ceilings.ram_read_rate(1) == 1 << 20
        assert ceilings.ram_copy_rate(2) == 1 << 20
        assert ceilings.attend_rate("float16", 1) == half  # two layers of one page
        side = module.CPU_MATRIX_SIDE[4]
        assert ceilings.matmul_rate(torch.float32) == 8 * 2 * side**3


def test_both_directions_have_bytes_of_their_own(
    device: CpuDevice, one_second: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: dict[Direction, tuple[int, int, int]] = {}

    def copy(way: Direction, dst: object, src: object, num_bytes: int, _stream: object) -> None:
        places[way] = (int(dst[0]), int(src[0]), num_bytes)  # type: ignore[index]

    monkeypatch.setattr(device, "copy", copy)
    with Ceilings(device, SMALL_EFFORT) as ceilings:
        ceilings.two_way_link_rate()
        hot, host = ceilings._hot.address, ceilings._host.address
    half = 1 << 19
    assert places == {
        Direction.HOST_TO_DEVICE: (hot, host, half),
        Direction.DEVICE_TO_HOST: (host + half, hot + half, half),
    }


def test_each_is_measured_once_and_known_afterwards(
    device: CpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ceilings(device, SMALL_EFFORT) as ceilings:
        first = ceilings.hbm_read_rate()
        assert ceilings.hbm_read_rate() == first
        assert set(ceilings.reduction_rates()) == set(module.CPU_REDUCTIONS)
        assert first == max(ceilings.reduction_rates().values())
        copied = ceilings.ram_copy_rate(1)
    assert (ceilings.hbm_read_rate(), ceilings.ram_copy_rate(1)) == (first, copied)


@pytest.mark.parametrize("reductions", [module.GPU_REDUCTIONS, module.CPU_REDUCTIONS])
def test_every_reduction_reads_everything(reductions: dict[str, Reduction]) -> None:
    """A byte that differs, wherever it lies, changes the result."""
    for name, reduction in reductions.items():
        data = torch.full((1 << 17,), module.PATTERN, dtype=torch.uint8)
        plain = reduction(data).clone()
        for place in (7, 70_007, (1 << 17) - 1):
            data[place] = 0x7E
            assert not torch.equal(reduction(data), plain), name
            data[place] = module.PATTERN


def test_sizes_follow_what_is_free() -> None:
    assert module._room(8 << 30, 1 << 40) == 8 << 30
    assert module._room(8 << 30, 8 << 30) == 1 << 30
    assert module._room(8 << 30, 100) == 2 * module.ROW_BYTES
    assert module._room(1_000_000, 1 << 40) % (2 * module.ROW_BYTES) == 0


def test_what_cannot_be_measured_is_refused(device: CpuDevice) -> None:
    with Ceilings(device, SMALL_EFFORT) as ceilings:
        with pytest.raises(ValueError, match="direction"):
            ceilings.link_rate(Direction.DEVICE_TO_DEVICE)
        with pytest.raises(ValueError, match="threads=0"):
            ceilings.ram_read_rate(0)


def test_the_number_of_threads_is_put_back(device: CpuDevice) -> None:
    before = torch.get_num_threads()
    with Ceilings(device, SMALL_EFFORT) as ceilings:
        ceilings.ram_read_rate(before + 1)
    assert torch.get_num_threads() == before


def test_a_second_buffer_without_room_gives_the_first_back(
    device: CpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_num_bytes: int) -> None:
        raise MemoryError

    monkeypatch.setattr(device, "allocate_host", refuse)
    with pytest.raises(MemoryError):
        Ceilings(device, SMALL_EFFORT)
    assert device._memories == set()


def test_product_costs_are_solved_from_two_layers() -> None:
    # 10 bytes/s and half a second for each of 4 products
    costs = solve([1000, 400], [100 + 2.0, 40 + 2.0], 4)
    assert (costs.read_rate, costs.each_s) == (pytest.approx(10), pytest.approx(0.5))
    # times that do not fit: the smaller layer took longer, or less than by the rate of both
    assert solve([1000, 400], [40.0, 50.0], 4) == ProductCosts(25.0, 0.0)
    assert solve([1000, 400], [100.0, 10.0], 4) == ProductCosts(10.0, 0.0)


def test_layers_have_the_weights_of_their_models() -> None:
    assert LARGE.num_weights == 7168 * (2 * 7168 + 2 * 1024 + 3 * 19200)
    assert SMALL.num_weights == 4096 * (4 * 4096 + 3 * 11008)
    assert SMALL.divided(1024).hidden == 16
    weights = torch.arange(3 * SMALL.divided(64).num_weights + 5)
    layers = _layers(SMALL.divided(64), weights)
    assert len(layers) == 3
    flat = torch.cat([matrix.flatten() for layer in layers for matrix in layer])
    assert torch.equal(flat, weights[:-5])


def test_products_are_measured_in_what_memory_there_is(device: CpuDevice) -> None:
    with Ceilings(device, SMALL_EFFORT) as ceilings:
        costs = ceilings.product_costs(torch.float32)
        assert costs.read_rate > 0
        assert ceilings.product_costs(torch.float32) is costs


def test_launches_take_some_time(device: CpuDevice) -> None:
    assert 0 < launch_time_s(device, 2) < 0.1
    assert kernel_time_s(device, 2) is None
    assert queued_kernel_time_s(device, 2) is None


def test_all_rates_at_once(device: CpuDevice) -> None:
    with Ceilings(device, SMALL_EFFORT) as ceilings:
        rates = ceiling_rates(ceilings, device).to_table()
    assert rates.keys() == {
        "link_to_device", "link_to_host", "link_both", "hbm_read", "hbm_copy", "ram_read_one",
        "ram_read", "ram_copy", "matmul", "linear_read", "launch_s",
    }  # fmt: skip
    assert all(value > 0 for value in rates.values())


def test_attention_in_ram_without_a_link_beside_it(device: CpuDevice) -> None:
    with Ceilings(device, SMALL_EFFORT) as ceilings:
        rates = ram_attention_rates(ceilings, device).to_table()
    assert rates.keys() == {"cpu_attend_fp16", "cpu_attend_bf16", "cpu_attend_threads"}
    assert rates["cpu_attend_threads"] == usable_cpus()
    assert all(value > 0 for value in rates.values())
