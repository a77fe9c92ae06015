"""The soak's judgement: what grows is found in the noise, and what was warming up is not taken for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torture.soak import LEAST_OPENINGS, MOST, NUM_SAMPLES, Samples, measures
from torture.tally import ViolationError

OPERATIONS = 100_000
MIB = 1 << 20
NOISE = {"resident": 80_000, "allocated": 20_000, "objects": 200, "handles": 0.5}
"""Standard deviations; more than was seen on a busy machine."""


def samples_of(
    seed: int, growth: dict[str, float] | None = None, *, openings: int = 60, warm_bytes: float = 0
) -> Samples:
    """Of a run in which this grows an operation, and `warm_bytes` come at a fifth of it at once."""
    rng, samples = np.random.default_rng(seed), Samples()
    for number in range(NUM_SAMPLES):
        done = number * OPERATIONS // NUM_SAMPLES
        measured = [
            300 * MIB + (growth or {}).get(name, 0.0) * done + rng.normal(0, NOISE[name])
            for name in MOST
        ]
        measured[0] += warm_bytes if number > NUM_SAMPLES // 5 else 0
        samples.add(done, number * openings // NUM_SAMPLES, tuple(measured))
    return samples


@pytest.mark.parametrize("seed", range(20))
def test_noise_and_warming_up_are_no_growth(seed: int) -> None:
    samples = samples_of(seed, warm_bytes=3 * MIB)
    for slope in samples.slopes().values():
        assert slope.low <= slope.middle <= slope.high
    samples.judge()


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize("seed", range(3))
def test_what_grows_is_found_in_the_noise(seed: int, name: str) -> None:
    samples = samples_of(seed, {name: 5 * MOST[name]})
    assert samples.slopes()[name].middle == pytest.approx(5 * MOST[name], rel=0.3)
    with pytest.raises(ViolationError, match=f"{name}: grows by"):
        samples.judge()


def test_a_short_run_is_judged_by_its_growth_alone() -> None:
    few = LEAST_OPENINGS - 1
    samples_of(1, {"resident": 4 * MIB / OPERATIONS}, openings=few).judge()
    with pytest.raises(ViolationError, match="resident memory grows by"):
        samples_of(1, {"resident": 40 * MIB / OPERATIONS}, openings=few).judge()


def test_too_few_samples_say_nothing() -> None:
    samples = Samples()
    samples.judge()
    for number in range(5):
        samples.add(number, number, (1.0, 1.0, 1.0, 1.0))
    assert samples.slopes() == {}
    samples.judge()


def test_what_is_kept_is_seen() -> None:
    before = measures()
    kept = [bytearray(3000) for _ in range(4000)]
    with Path("/proc/self/stat").open("rb"):
        after = measures()
    assert len(kept) * 3000 <= after[1] - before[1] < 2 * len(kept) * 3000
    assert after[0] - before[0] > len(kept) * 2500
    assert after[2] - before[2] >= len(kept)
    assert after[3] == before[3] + 1
