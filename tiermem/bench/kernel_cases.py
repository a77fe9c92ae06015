"""KernelCases: the shapes that the kernel benchmark asks about, and what is aimed at for each."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tiermem.bench.run import Run, Scale


@dataclass(frozen=True, slots=True)
class Heads:
    """Query heads, and heads of K and V."""

    q: int
    kv: int


@dataclass(frozen=True, slots=True)
class Decode:
    """A batch of sequences of the given lengths, one new token each.

    `num_layers` different ones are read in rotation, `rounds` times in one measurement, so that no cache holds
    what is read next. target: percent of the memory's read rate.
    """

    heads: Heads
    page_tokens: int
    lengths: tuple[int, ...]
    text: str
    target: float | None
    num_layers: int
    rounds: int


GQA = (Heads(56, 8), Heads(32, 8))
MHA = Heads(52, 52)
UNIFORM = ((1, 131072), (8, 16384), (32, 4096), (64, 1024))
# page tokens -> targets of the uniform batches above
GQA_TARGETS = {64: (93, 93.5, 94.5, 90), 16: (92, 93, 93.5, 89)}
MHA_TARGETS = {64: 98.5, 16: 97.5}
MIXED_TARGETS = (90.0, 85.0)


def cases(bench: Run) -> list[Decode]:
    """The decode rows for the device and the scale."""
    if not bench.on_gpu:
        tokens = 1 if bench.scale is Scale.QUICK else 16
        return [
            *(
                _uniform(heads, page_tokens, *batch, target=None, num_layers=2, rounds=1)
                for heads in (Heads(8, 2), Heads(4, 4))
                for page_tokens in (64, 16)
                for batch in ((1, 512 * tokens), (4, 128 * tokens))
            ),
            *_mixed(Heads(8, 2), longest=1000 * tokens, shorts=3),
        ]
    if bench.scale is Scale.QUICK:
        return [
            _uniform(Heads(32, 8), 64, 1, 32768, target=None, num_layers=4, rounds=1),
            _uniform(MHA, 16, 8, 1024, target=None, num_layers=2, rounds=1),
            *_mixed(Heads(32, 8), longest=8000, shorts=31),
        ]
    return _full()


def prefills(bench: Run) -> list[tuple[Heads, int, int]]:
    """Heads, new tokens and cached tokens of each chunk."""
    if not bench.on_gpu:
        size = 32 if bench.scale is Scale.QUICK else 128
        return [(Heads(8, 2), size, 16 * size)]
    if bench.scale is Scale.QUICK:
        return [(Heads(32, 8), 512, 4096)]
    return [(heads, 2048, 32768) for heads in GQA]


def _full() -> list[Decode]:
    rows = []
    for page_tokens in (64, 16):
        for heads in GQA:
            for batch, target in zip(UNIFORM, GQA_TARGETS[page_tokens], strict=True):
                rows.append(
                    _uniform(heads, page_tokens, *batch, target=target, num_layers=3, rounds=4)
                )
        for batch in UNIFORM:
            target = MHA_TARGETS[page_tokens]
            rows.append(_uniform(MHA, page_tokens, *batch, target=target, num_layers=2, rounds=3))
    return rows + _mixed(GQA[0], longest=120_000, shorts=31, targets=MIXED_TARGETS)


def _uniform(
    heads: Heads, page_tokens: int, batch: int, context: int, *,
    target: float | None, num_layers: int, rounds: int,
) -> Decode:  # fmt: skip
    return Decode(
        heads, page_tokens, (context,) * batch, f"{batch} x {context}", target, num_layers, rounds
    )


def _mixed(
    heads: Heads,
    *,
    longest: int,
    shorts: int,
    targets: tuple[float | None, float | None] = (None, None),
) -> list[Decode]:
    """One long sequence among short ones, and lengths from 100 to 4,000 (or the longest) at random."""
    draw = random.Random(0)
    short = tuple(draw.randint(100, 1000) for _ in range(shorts))
    most = min(4000, longest)
    spread = tuple(draw.randint(100, most) for _ in range(2 * (shorts + 1)))
    return [
        Decode(heads, 64, (longest, *short),
               f"{longest} + {shorts} of 100..1000", targets[0], 3, 4),
        Decode(heads, 64, spread,
               f"{len(spread)} of 100..{most}", targets[1], 3, 4),
    ]  # fmt: skip
