"""An interrupt may come at any instruction: `with TierManager` closes, and what is found later is never wrong."""

from __future__ import annotations

import contextlib
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from liveness_support import PAGE, check_content, grow, open_manager, tokens_of
from world import LAYOUT, kv_of

from tiermem import OutOfPagesError, Sequence, TierManager
from tiermem.device.cpu import CpuDevice
from tiermem.device.protocol import Device
from tiermem.device.simulated import SimulatedDevice

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""Python drops what is raised in a callback of a weak reference."""

ROUNDS = 6
LONGEST_S = 0.03
SLOTS = (4, 4, 16)


@pytest.fixture(name="alarm", autouse=True)
def alarm_fixture() -> Iterator[None]:
    """The alarm clock interrupts as Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def work(manager: TierManager, rng: random.Random, seconds: float) -> None:
    """Sequences of two prompts that grow, leave the GPU, are dropped and written, until an interrupt comes."""
    # again and again: Python drops what is raised while it collects garbage
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.05)
    try:
        while True:
            for salt in (1, 2):
                sequence = manager.open_sequence(tokens_of(salt, 6 * PAGE))
                with contextlib.suppress(OutOfPagesError):
                    sequence.rollback(sequence.num_tokens - min(sequence.num_tokens, 2 * PAGE))
                    grow(manager, sequence, rng.choice([1, PAGE, PAGE + 3]), salt)
                    sequence.suspend()
                    grow(manager, sequence, PAGE, salt)
                    manager.flush()
                sequence.close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.mark.parametrize("make", [CpuDevice, SimulatedDevice])
def test_a_manager_closes_wherever_an_interrupt_comes(
    tmp_path: Path, make: type[CpuDevice] | type[SimulatedDevice]
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    sys.stdout.write(f"seed {seed}\n")  # shown when the test fails
    rng = random.Random(seed)
    num_again = 0
    for _ in range(ROUNDS):
        device: Device = make()
        manager = open_manager(tmp_path / "s", SLOTS, device, io_timeout_s=30.0)
        with pytest.raises(KeyboardInterrupt), manager:
            work(manager, rng, rng.uniform(1e-4, LONGEST_S))
        signal.setitimer(signal.ITIMER_REAL, 0)
        manager.close()
        with open_manager(tmp_path / "s", SLOTS, io_timeout_s=30.0) as again:
            num_again += 1
            for salt in (1, 2):
                found = again.open_sequence(tokens_of(salt, 6 * PAGE))
                check_content(found, salt)
    assert num_again == ROUNDS


@pytest.mark.parametrize("make", [CpuDevice, SimulatedDevice])
def test_an_interrupt_while_a_manager_closes_is_made_up_for_by_the_next_close(
    tmp_path: Path, make: type[CpuDevice] | type[SimulatedDevice]
) -> None:
    rng = random.Random(7)
    num_interrupted = 0
    for salt in range(1, 7):
        manager = open_manager(tmp_path / "s", SLOTS, make(), io_timeout_s=30.0)
        grow(manager, manager.open_sequence(), 3 * PAGE, salt)
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 1e-2))
            manager.close()
        except KeyboardInterrupt:
            num_interrupted += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        manager.close()
        with open_manager(tmp_path / "s", SLOTS, io_timeout_s=30.0) as again:
            found = again.open_sequence(tokens_of(salt, 3 * PAGE))
            check_content(found, salt)
    assert num_interrupted > 0


@pytest.mark.parametrize("slots", [(8, 8, 0), (3, 12, 0)], ids=["hot", "streamed"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_step_that_is_interrupted_while_its_tokens_are_taken_over_breaks_no_sequence(
    slots: tuple[int, int, int], number: int
) -> None:
    with open_manager(None, slots, CpuDevice()) as manager:
        sequences = [manager.open_sequence(), manager.open_sequence()]
        for sequence in sequences:
            grow(manager, sequence, PAGE + 3)
        advance, left = Sequence.advance, number

        def interrupt(sequence: Sequence, pages: np.ndarray, new_tokens: int) -> None:
            nonlocal left
            advance(sequence, pages, new_tokens)
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        def step_of_both() -> None:
            tokens = np.array(tokens_of(0, 3 * PAGE + 3)[PAGE + 3 :])
            with manager.step(sequences, 2 * PAGE) as step:
                for layer in range(LAYOUT.num_layers):
                    kv = kv_of(b"", tokens, PAGE + 3, layer).repeat(1, 2, 1, 1)
                    step.append(layer, kv[0], kv[1])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Sequence, "advance", interrupt)
            with pytest.raises(KeyboardInterrupt):
                step_of_both()
        assert [sequence.num_tokens for sequence in sequences] == [PAGE + 3, PAGE + 3]
        for sequence in sequences:
            check_content(sequence)
            grow(manager, sequence, 5)
            check_content(sequence)
            sequence.close()
        manager._core.in_flight.drain()
        manager.check()
