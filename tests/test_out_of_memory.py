"""Memory that is refused: at the start a pool shrinks or says so, later the step fails and the manager goes on."""

from __future__ import annotations

import errno
import importlib
import mmap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from liveness_support import PAGE, append, check_content, grow, open_manager, tokens_of
from world import LAYOUT, kv_of

from tiermem import ConfigError, Sequence, TierConfig, TierManager, TransferError
from tiermem._core import Tier
from tiermem.device.simulated import SimulatedDevice

SLOT = LAYOUT.slot_bytes


class Refusing:
    """Raises an error at the call of this number: if not given, what torch raises when a GPU is full."""

    def __init__(
        self, real: Callable[..., Any], number: int, error: Exception | None = None
    ) -> None:
        self._real = real
        self._number = number
        self._error = error or torch.cuda.OutOfMemoryError("CUDA out of memory")
        self.num_calls = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.num_calls += 1
        if self.num_calls == self._number:
            raise self._error
        return self._real(*arguments, **options)


def test_an_explicit_size_beside_which_staging_has_no_room_is_refused_with_counts() -> None:
    device = SimulatedDevice(total_bytes=8 * SLOT)
    with pytest.raises(ConfigError, match=r"gpu=.*cannot allocate \d+ bytes .* \d+ of \d+ bytes"):
        open_manager(None, (8, 2, 0), device)
    assert not device._hot


def test_an_automatic_size_leaves_room_for_staging(caplog: pytest.LogCaptureFixture) -> None:
    device = SimulatedDevice(total_bytes=20 * SLOT)
    with open_manager(None, (0, 2, 0), device, gpu="100%") as manager:
        slots = manager.stats().tiers[0].slots
        assert 1 <= slots < 20
        grow(manager, manager.open_sequence(), 5)
    assert "were refused, the pool has" in caplog.text


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("tiermem.step.Upload", 1),
        ("tiermem.upload.Upload.send", 1),
        ("tiermem.lower_pages.PartialSums", 1),
        ("tiermem.lower_pages.PartialSums", 2),
        ("tiermem.attention.partial_sums.PartialSums.result", 1),
        ("tiermem.streaming.Ring.start", 1),
        ("tiermem.streaming.Ring.plan", 1),
        ("tiermem.chunks.hot_tables", 1),
        ("tiermem.attention.host.HostBackend.attend", 2),
        ("tiermem.attention.host.HostBackend.store", 2),
    ],
)
def test_a_step_that_meets_a_full_gpu_is_undone_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, place: str, number: int
) -> None:
    with open_manager(None, (3, 12, 0), SimulatedDevice(2)) as manager:
        sequence = manager.open_sequence()
        for _ in range(6):  # more than the GPU tier: the next steps stream
            grow(manager, sequence, PAGE)
        with monkeypatch.context() as patch:
            refusing = refuse(patch, place, number)
            with pytest.raises(torch.cuda.OutOfMemoryError):
                grow(manager, sequence, 3)
            assert refusing.num_calls >= number
        assert sequence.num_tokens == 6 * PAGE
        manager._core.in_flight.drain()
        assert len(manager._core.in_flight) == 0
        manager.check()
        grow(manager, sequence, 3)
        check_content(sequence)


def refuse(patch: pytest.MonkeyPatch, place: str, number: int) -> Refusing:
    owner, _, name = place.rpartition(".")
    module, _, kind = owner.rpartition(".")
    target: Any = __import__(owner if kind.islower() else module, fromlist=["x"])
    if not kind.islower():
        target = getattr(target, kind)
    refusing = Refusing(getattr(target, name), number)
    if kind.islower():
        if place == "tiermem.chunks.hot_tables":
            target = __import__("tiermem.step", fromlist=["x"])
        patch.setattr(target, name, refusing)
    else:
        patch.setattr(target, name, as_method(refusing))
    return refusing


def as_method(refusing: Refusing) -> Callable[..., Any]:
    """A function is bound to the object that it is looked up on; what is called is not."""

    def call(*arguments: Any, **options: Any) -> Any:
        return refusing(*arguments, **options)

    return call


def test_buffers_for_the_cpu_that_cannot_be_had_fail_the_step_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = SimulatedDevice(4)
    manager: TierManager
    with open_manager(None, (3, 12, 0), device, cpu_share=1.0, cpu_threads=1) as manager:
        sequence = manager.open_sequence()
        for _ in range(6):
            grow(manager, sequence, PAGE)
        right = device.allocate_host

        def refused(*_: Any, **__: Any) -> None:
            raise ConfigError("cannot pin 7 bytes of host memory")

        manager._core.ram._items = (0, 0, 0)  # type: ignore[union-attr]
        monkeypatch.setattr(device, "allocate_host", refused)
        with pytest.raises(TransferError, match="the CPU cannot attend: cannot pin 7 bytes"):
            grow(manager, sequence, 1)
        monkeypatch.setattr(device, "allocate_host", right)
        assert sequence.num_tokens == 6 * PAGE
        grow(manager, sequence, 1)
        check_content(sequence)
        manager.check()


def use_suspend(manager: TierManager, sequence: Sequence) -> None:
    grow(manager, sequence, 1)
    sequence.suspend()


def use_read(manager: TierManager, sequence: Sequence) -> None:
    sequence.read(1, 0, sequence.num_tokens)


def use_step(manager: TierManager, sequence: Sequence) -> None:
    grow(manager, sequence, 3)


def use_prefetch(manager: TierManager, sequence: Sequence) -> None:
    sequence.prefetch()


def use_flush(manager: TierManager, sequence: Sequence) -> None:
    manager.flush()


@pytest.mark.parametrize("use", [use_suspend, use_read, use_step, use_prefetch, use_flush])
@pytest.mark.parametrize("slots", [(6, 0, 20), (6, 3, 20), (2, 3, 20)])
def test_host_memory_that_is_refused_leaves_no_page_on_its_way(
    tmp_path: Path, slots: tuple[int, int, int], use: Callable[[TierManager, Sequence], None]
) -> None:
    """For trailers of pages, and for what checksums are compared with."""
    num_refused = 0
    with open_manager(tmp_path / "s", slots, SimulatedDevice(5), io_timeout_s=30.0) as manager:
        sequence = manager.open_sequence()
        for _ in range(6):
            append(manager, sequence, PAGE)
        sequence.suspend()
        sequence.record(tokens_of(0, 6 * PAGE))
        core = manager._core
        for number in range(1, 9):
            refusing = [
                Refusing(mmap.mmap, number, OSError(errno.ENOMEM, "no memory")),
                Refusing(torch.zeros, number, RuntimeError("CUDA error: out of memory")),
            ]
            for name, called in zip(("mmap.mmap", "torch.zeros"), refusing, strict=True):
                if use is use_suspend and slots[0] == 2:
                    continue  # the step itself needs the memory
                with pytest.MonkeyPatch.context() as patch:
                    module = "tiermem.slot_file" if name == "mmap.mmap" else "tiermem.device.sums"
                    patch.setattr(f"{module}.{name.partition('.')[0]}", only(name, called))
                    try:
                        use(manager, sequence)
                    except TransferError:
                        num_refused += 1
                core.in_flight.drain()
                core.leases.end_all()
                manager.check()
                counts = [core.table.counts(tier) for tier in Tier]
                assert [(tier.filling, tier.pinned) for tier in counts] == [(0, 0)] * 3
                check_content(sequence)
                sequence.suspend()
    assert num_refused > 0 or (use is use_prefetch and slots[1] == 0) or slots[0] == 2


def only(name: str, called: Refusing) -> SimpleNamespace:
    """A module like the one that `name` is of, but for that."""
    module, _, attribute = name.partition(".")
    names = vars(importlib.import_module(module))
    return SimpleNamespace(**{**names, attribute: called})


@pytest.mark.gpu
def test_a_full_gpu_in_the_middle_of_a_step_undoes_it() -> None:
    slot = LAYOUT.slot_bytes
    config = TierConfig(gpu=4 * slot, ram=32 * slot, ssd=0, device="cuda:0")
    tokens = np.arange(6 * PAGE)
    kv = [kv_of(b"", tokens, 0, layer).cuda() for layer in range(LAYOUT.num_layers)]
    q = torch.ones(len(tokens), 1, LAYOUT.head_dim).cuda()

    def run(manager: TierManager, sequence: Sequence, hoard: bool) -> None:
        with manager.step([sequence], new_tokens=len(tokens)) as step:
            for layer in range(LAYOUT.num_layers):
                step.append(layer, kv[layer][0], kv[layer][1])
                step.attend(layer, q)
                if hoard:
                    torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    with TierManager(LAYOUT, config) as manager:
        sequence = manager.open_sequence()
        with pytest.raises(torch.cuda.OutOfMemoryError):
            run(manager, sequence, hoard=True)
        assert sequence.num_tokens == 0
        manager.check()
        run(manager, sequence, hoard=False)
        k, v = sequence.read(0, 0, len(tokens))
        assert torch.equal(k, kv[0][0])
        assert torch.equal(v, kv[0][1])
