"""Kills: processes that own a store one after the other, each killed at a random instant.

Each one checks what the one before left: no wrong byte, no page lost that flush() had returned for.
"""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from torture.content import Prompts
from torture.life import Life
from torture.oracle import Oracle, Phase
from torture.process import FAILED, Child
from torture.setting import Setting
from torture.tally import Finding, Tally

LIVES = 25
"""Of one store."""
LIMIT_S = 30.0
"""A life takes tens of milliseconds; one that has not ended by then hangs."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Kill when `phase` was told `times` times and `delay_s` have passed; None: let it live."""

    phase: Phase | None
    times: int = 1
    delay_s: float = 0.0

    @classmethod
    def made(cls, rng: random.Random) -> Plan:
        """Mostly somewhere in the work; often while it opens, flushes or closes."""
        phase = rng.choices(
            (Phase.OPENING, Phase.CHECKING, Phase.WORKING, Phase.FLUSHING, Phase.FLUSHED,
             Phase.CLOSING, None),
            (20, 6, 34, 14, 6, 14, 6),
        )[0]  # fmt: skip
        if phase is None:
            return cls(None)
        spread_s = {Phase.OPENING: 0.03, Phase.FLUSHING: 0.004, Phase.CLOSING: 0.004}
        delay_s = rng.uniform(0.0, spread_s.get(phase, 0.05))
        return cls(phase, rng.randint(1, 3) if phase is Phase.FLUSHING else 1, delay_s)


def run_kills(seed: int, where: Path, tally: Tally) -> None:
    """One store and LIVES processes; the last one is let live."""
    rng = random.Random(seed)
    setting, prompts, oracle = Setting.made(rng), Prompts.made(rng), Oracle()
    for number in range(LIVES):
        plan = Plan.made(rng) if number < LIVES - 1 else Plan(None)
        life_seed = rng.getrandbits(60)

        def body(report: int, life_seed: int = life_seed) -> None:
            Life(setting, where / "store", prompts, oracle, report, life_seed).run()

        child = Child.start(body, oracle.tell)
        problem = _end(child, plan, tally) or oracle.text
        child.forget()
        if problem:
            text = f"process {number + 1} of {LIVES}, {plan}, {setting}: {problem}"
            tally.findings.append(Finding("kill", seed, text))
            break
    oracle.add_to(tally)


def _end(child: Child, plan: Plan, tally: Tally) -> str:
    """Kill as planned, or wait for the end; what went wrong, if anything did."""
    end_s = time.monotonic() + LIMIT_S
    met = 0
    while met < plan.times and (told := child.next_byte(end_s - time.monotonic())) is not None:
        met += told == plan.phase
    status = child.wait(plan.delay_s if met == plan.times else end_s - time.monotonic())
    if status is None and plan.phase is not None and met == plan.times:
        status = child.kill()
        if status == -signal.SIGKILL:
            tally.kills[plan.phase.name.lower()] += 1
            return ""
    if status is None:
        tally.hangs += 1
        return f"hangs\n{child.explain_hang()}"
    return f"ended with status {status}\n{child.hang_text()}" if status not in (0, FAILED) else ""
