"""Decoding: timed tokens of one cache, and what the manager moved and attended meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from tiermem.bench.long_context.model import Model
from tiermem.stats import Stats

FIRST_TOKENS = 2
"""They compile, capture and settle; not timed."""
PASSES, FIRST_PASSES = 14, 6
"""Of several tokens, of each size; the first ones compile, and the CPU's share settles."""


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """Seconds of each timed token, and the logits (tokens, vocabulary) in float32 of all, on the host."""

    seconds: tuple[float, ...]
    logits: torch.Tensor

    @property
    def step_s(self) -> float:
        """The median."""
        return median(self.seconds)

    @property
    def rates(self) -> list[float]:
        """Tokens a second of each."""
        return [1 / seconds for seconds in self.seconds]


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one step moved and attended, on the mean of the timed ones. Bytes of K and V; seconds.

    streamed: layers of pages that crossed the link for the step. promoted: whole pages that did. attended: by the
    CPU where they lie in RAM, in `attended_s`. cold: what was read from the SSD for all of that. in_tiers: what
    lies in each tier at the end, by its name.
    """

    streamed: float
    promoted: float
    attended: float
    attended_s: float
    cold: float
    in_tiers: dict[str, int]

    @property
    def not_resident(self) -> float:
        """K and V that a step needs and that are not in the hot tier."""
        return self.streamed + self.promoted + self.attended


def decode(
    model: Model,
    cache: object,
    tokens: Sequence[int],
    synchronize: Callable[[], None],
    begins: Callable[[], None] | None = None,
) -> Decoded:
    """Give the model `tokens` one at a time; all but the first ones are timed.

    Parameters
    ----------
    begins: called when the timed ones begin.
    """
    seconds, logits = [], []
    for i, token in enumerate(tokens):
        if i == FIRST_TOKENS and begins is not None:
            begins()
        ids = torch.tensor([token], device=model.device)
        synchronize()
        start_s = time.perf_counter()
        found = model.feed(cache, ids)
        synchronize()
        seconds.append(time.perf_counter() - start_s)
        logits.append(found.float().cpu())
    return Decoded(tuple(seconds[FIRST_TOKENS:]), torch.stack(logits))


def passes(
    model: Model,
    cache: object,
    tokens: Sequence[int],
    size: int,
    synchronize: Callable[[], None],
) -> list[float]:
    """Seconds of passes that give the model `size` of the tokens each; the first FIRST_PASSES are not timed."""
    seconds = []
    for start in range(0, len(tokens) - size + 1, size):
        ids = torch.tensor(tokens[start : start + size], device=model.device)
        synchronize()
        start_s = time.perf_counter()
        model.feed(cache, ids)
        synchronize()
        seconds.append(time.perf_counter() - start_s)
    return seconds[FIRST_PASSES:]


def traffic(before: Stats, after: Stats) -> Traffic:
    """What happened between two pictures of one manager, a step.

    Raises
    ------
    ValueError: no step lies between them.
    """
    steps = after.steps - before.steps
    if steps < 1:
        raise ValueError(f"steps={steps}: must be at least 1")
    return Traffic(
        streamed=(_streamed(after) - _streamed(before)) / steps,
        promoted=(_promoted(after) - _promoted(before)) / steps,
        attended=(after.attended_bytes - before.attended_bytes) / steps,
        attended_s=(after.attended_s - before.attended_s) / steps,
        cold=(_cold(after) - _cold(before)) / steps,
        in_tiers={tier.tier: tier.used * tier.page_bytes for tier in after.tiers if tier.slots},
    )


def _streamed(stats: Stats) -> int:
    return sum(flow.streamed_bytes for flow in stats.flows if flow.dst == "GPU")


def _promoted(stats: Stats) -> int:
    return sum(flow.num_bytes for flow in stats.flows if flow.dst == "GPU")


def _cold(stats: Stats) -> int:
    return sum(flow.num_bytes + flow.streamed_bytes for flow in stats.flows if flow.src == "SSD")
