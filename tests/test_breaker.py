"""Breaker: when a tier is switched off, for what, how long, and what brings it back."""

from __future__ import annotations

import pytest

from tiermem import TransferError
from tiermem.breaker import FIRST_PAUSE_S, LONGEST_PAUSE_S, MOST_FAILURES, Breaker, TierState, Use


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(name="clock")
def clock_fixture() -> Clock:
    return Clock()


@pytest.fixture(name="breaker")
def breaker_fixture(clock: Clock) -> Breaker:
    return Breaker("SSD", clock)


def fail(breaker: Breaker, use: Use, count: int = MOST_FAILURES) -> None:
    for _ in range(count):
        breaker.note_failure(use, "no space left")


def test_failures_in_a_row_switch_writing_off_and_reading_goes_on(breaker: Breaker) -> None:
    fail(breaker, Use.WRITE, MOST_FAILURES - 1)
    breaker.note_good(Use.WRITE)
    fail(breaker, Use.WRITE, MOST_FAILURES - 1)
    breaker.note_good(Use.READ)
    assert breaker.state is TierState.ON
    fail(breaker, Use.WRITE, 1)
    assert breaker.state is TierState.READ_ONLY
    breaker.check(Use.READ)
    with pytest.raises(TransferError, match=r"SSD tier is read-only .*no space left.* in 1\.0 s"):
        breaker.check(Use.WRITE)


def test_failing_reads_switch_everything_off(breaker: Breaker) -> None:
    fail(breaker, Use.READ)
    assert breaker.state is TierState.OFF
    assert not breaker.allows(Use.READ)
    assert not breaker.allows(Use.WRITE)


def test_a_missed_deadline_switches_off_at_once_and_until_what_is_late_has_ended(
    breaker: Breaker, clock: Clock
) -> None:
    breaker.note_late("it does not answer")
    assert breaker.state is TierState.OFF
    clock.now_s += 2 * LONGEST_PAUSE_S
    assert not breaker.is_probe_due()
    with pytest.raises(TransferError, match="when what is late there has ended"):
        breaker.check(Use.READ)
    breaker.late_ended()
    assert breaker.is_probe_due()


def test_it_is_tried_again_after_pauses_that_double(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, Use.WRITE)
    pause_s = FIRST_PAUSE_S
    for _ in range(12):
        clock.now_s += pause_s - 0.01
        assert not breaker.is_probe_due()
        clock.now_s += 0.02
        assert breaker.is_probe_due()
        breaker.begin_probe()
        assert not breaker.is_probe_due()  # there is only one
        breaker.probe_ended(TransferError("still broken"))
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        assert breaker.report().retry_in_s == pytest.approx(pause_s)
    assert pause_s == LONGEST_PAUSE_S
    assert breaker.num_trips == 1
    clock.now_s += pause_s
    breaker.probe_ended(None)
    assert breaker.state is TierState.ON
    assert breaker.report().retry_in_s is None


def test_only_what_is_started_as_a_probe_passes(breaker: Breaker) -> None:
    fail(breaker, Use.READ)
    with breaker.probing():
        breaker.check(Use.WRITE)
        breaker.check(Use.READ)
    assert not breaker.allows(Use.READ)


def test_a_tier_that_fails_again_soon_is_left_alone_for_longer(
    breaker: Breaker, clock: Clock
) -> None:
    fail(breaker, Use.WRITE)
    clock.now_s += FIRST_PAUSE_S
    breaker.probe_ended(None)
    fail(breaker, Use.WRITE)
    assert breaker.report().retry_in_s == pytest.approx(2 * FIRST_PAUSE_S)
    clock.now_s += 2 * FIRST_PAUSE_S
    breaker.probe_ended(None)
    clock.now_s += 100 * FIRST_PAUSE_S
    fail(breaker, Use.WRITE)
    assert breaker.report().retry_in_s == pytest.approx(FIRST_PAUSE_S)
    assert breaker.num_trips == 3
