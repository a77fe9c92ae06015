"""RamBalance: finds the share with which a machine's steps end first, whatever it was told about that machine."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest

from tiermem.pools import Tier
from tiermem.ram_attention import MOST_ROWS, RamWork, StepBytes
from tiermem.ram_balance import RamBalance
from tiermem.ram_split import SplitRates

X = 24 * 10**9
STALL_S = 4e-3


LAYERS = 60


@dataclass(frozen=True)
class Machine:
    """What a step really takes there: rates beside each other, bytes/s, and the time without queries.

    `noise`: of a layer's time on the CPU, the deviation. `stalls`: of layers, the share in which a thread loses
    its core for STALL_S.
    """

    link: float
    cpu: float
    idle_s: float
    noise: float = 0.0
    stalls: float = 0.0

    def step(
        self, wanted: StepBytes, fraction: float, pick: random.Random | None = None
    ) -> tuple[RamWork, float]:
        """What the CPU does of it, and how long it takes: layer by layer, the link up to one layer ahead."""
        pick = pick or random.Random(0)
        attended = int(fraction * wanted.ram)
        link_s = (wanted.ram - attended + wanted.cold) / self.link / LAYERS
        begins, streamed, cpu_s, waits, late = [0.0], 0.0, 0.0, 0.0, 0
        for layer in range(LAYERS):
            room = begins[max(layer - 1, 0)]
            streamed = max(streamed, room) + link_s
            took = attended / self.cpu / LAYERS * max(pick.gauss(1, self.noise), 0.1)
            took += STALL_S if pick.random() < self.stalls else 0.0
            cpu_s += took
            wait = max(begins[-1] + took - streamed, 0.0)
            waits, late = waits + wait, late + (wait > 0.05 * took)
            begins.append(max(begins[-1] + took, streamed) + self.idle_s / LAYERS)
        return RamWork(attended, cpu_s, waits, late / LAYERS), begins[-1]

    def best_s(self, wanted: StepBytes) -> float:
        """With the best of many shares, on the mean of some steps."""
        shares = np.linspace(0, 1, 101)
        return min(
            sum(self.step(wanted, f, random.Random(i))[1] for i in range(4)) / 4 for f in shares
        )


def settled_s(balance: RamBalance, machine: Machine, wanted: StepBytes, steps: int = 30) -> float:
    """Seconds of a step, on the mean of the last ones of so many."""
    times, pick = [], random.Random(1)
    for _ in range(steps):
        work, elapsed_s = machine.step(wanted, balance.fraction(wanted), pick)
        balance.learn(wanted, work, elapsed_s)
        times.append(elapsed_s)
    return sum(times[-10:]) / 10


@pytest.mark.parametrize("seed", range(12))
def test_it_comes_close_to_the_best_share_of_any_machine(seed: int) -> None:
    pick = random.Random(seed)
    machine = Machine(pick.uniform(10e9, 60e9), pick.uniform(20e9, 150e9), pick.uniform(0, 0.05))
    told = SplitRates(machine.link * pick.uniform(0.6, 1.6), machine.cpu * pick.uniform(0.5, 2.0))
    balance = RamBalance(told)
    wanted = StepBytes(X, pick.choice([0, 10**9]), 1)
    assert settled_s(balance, machine, wanted) < 1.06 * machine.best_s(wanted)


@pytest.mark.parametrize(("noise", "stalls"), [(0.2, 0.0), (0.0, 0.05), (0.2, 0.1)])
def test_threads_that_lose_their_cores_do_not_cost_it_the_balance(
    noise: float, stalls: float
) -> None:
    machine, wanted = Machine(55e9, 95e9, 0.04, noise, stalls), StepBytes(X, 0, 1)
    balance = RamBalance(SplitRates(55e9, 70e9))
    assert settled_s(balance, machine, wanted, steps=60) < 1.08 * machine.best_s(wanted)


def test_it_follows_a_machine_that_changes() -> None:
    wanted = StepBytes(X, 0, 1)
    balance = RamBalance(SplitRates(55e9, 100e9))
    for machine in (
        Machine(55e9, 100e9, 0.03),
        Machine(55e9, 60e9, 0.03),
        Machine(30e9, 60e9, 0.01),
    ):
        assert settled_s(balance, machine, wanted) < 1.06 * machine.best_s(wanted)


def test_steps_of_several_tokens_have_a_share_of_their_own() -> None:
    balance = RamBalance(SplitRates(55e9, 100e9))
    for new_tokens, machine in ((1, Machine(55e9, 100e9, 0.03)), (8, Machine(55e9, 20e9, 0.03))):
        wanted = StepBytes(X, 0, new_tokens)
        assert settled_s(balance, machine, wanted) < 1.06 * machine.best_s(wanted)
    assert balance.fraction(StepBytes(X, 0, 8)) < balance.fraction(StepBytes(X, 0, 1))


def test_steps_that_took_far_too_long_are_passed_over_or_forgotten() -> None:
    machine, wanted = Machine(55e9, 100e9, 0.03), StepBytes(X, 0, 1)
    balance = RamBalance(SplitRates(55e9, 100e9))
    before = balance.fraction(wanted)
    balance.learn(wanted, RamWork(X // 2, 0.12, 0.3, 1.0), 5.0)  # something was compiled in it
    assert balance.fraction(wanted) == before
    for _ in range(5):
        balance.learn(wanted, RamWork(X // 2, 0.12, 0.3, 1.0), 5.0)
    assert balance.fraction(wanted) == 0
    assert settled_s(balance, machine, wanted) < 1.06 * machine.best_s(wanted)


def test_what_it_cannot_judge_changes_nothing() -> None:
    balance, wanted = RamBalance(SplitRates(55e9, 100e9)), StepBytes(X, 0, 1)
    before = balance.fraction(wanted)
    for work in (RamWork(X, 1.0, 0.5, 1.0), RamWork(X // 2, 0.2)):
        balance.learn(wanted, work, 0.3)
    balance.learn(StepBytes(X, 0, MOST_ROWS + 1), RamWork(X // 2, 0.2, 0.1, 1.0), 0.3)
    assert balance.fraction(wanted) == before
    assert balance.fraction(StepBytes(0, X, 1)) == 0


def test_long_steps_have_nothing_attended_in_ram() -> None:
    homes = np.array([Tier.GPU, Tier.RAM, Tier.RAM, Tier.SSD, Tier.RAM], dtype=np.int64)
    balance = RamBalance(SplitRates(55e9, 100e9))
    assert balance.choose(homes, MOST_ROWS, 0.7).tolist() == [1, 2]
    assert balance.choose(homes, MOST_ROWS + 1, 0.7).tolist() == []
