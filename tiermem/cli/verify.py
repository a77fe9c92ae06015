"""Verify: the same prompt with transformers' own cache, and every choice of a token compared.

The untiered run is made to follow the tiered one: where it would have chosen otherwise, that is noted, and it goes
on with the tiered run's token. So one difference does not hide, or cause, those after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel

from tiermem.cli.loop import Sampling, Watcher, generate

TIE_LOGITS = 1e-3
"""Closer than this, in either run, two candidates are a tie that rounding decides."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One position where the runs chose different tokens.

    position: 0 for the first new token. tiered, untiered: the token ids chosen. gap: by how much the logit of the
    one exceeded that of the other, in the run where that was less.
    """

    position: int
    tiered: int
    untiered: int
    gap: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the runs compare. `tie_logits` is the gap below which a difference is a tie; 0 for none is."""

    positions: int
    tie_logits: float
    differences: tuple[Difference, ...]

    @property
    def ties(self) -> tuple[Difference, ...]:
        """Differences that rounding explains."""
        return tuple(found for found in self.differences if found.gap < self.tie_logits)

    @property
    def errors(self) -> tuple[Difference, ...]:
        """Differences that nothing explains."""
        return tuple(found for found in self.differences if found.gap >= self.tie_logits)


class Choices(LogitsProcessor):
    """Notes of every position the likeliest token, the next one, and how far apart their logits are."""

    def __init__(self) -> None:
        self.best: list[int] = []
        self.second: list[int] = []
        self.gaps: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Look at `scores` (1, vocabulary) and give them back."""
        top = torch.topk(scores[0], 2)
        values, ids = top.values.tolist(), top.indices.tolist()
        self.best.append(ids[0])
        self.second.append(ids[1])
        self.gaps.append(values[0] - values[1])
        return scores


class Referee(LogitsProcessor):
    """Compares the choices of an untiered run with those of a tiered one, and makes it follow them."""

    def __init__(self, token_ids: Sequence[int], tiered: Choices) -> None:
        self.differences: list[Difference] = []
        self.positions = 0
        self._token_ids = token_ids
        self._tiered = tiered

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Note a difference, and leave the tiered run's token the only one possible."""
        position, self.positions = self.positions, self.positions + 1
        wanted, chosen = self._token_ids[position], int(scores[0].argmax())
        if chosen != wanted:
            gap = float(scores[0, chosen] - scores[0, wanted])
            gap = min(gap, self._gap_in_tiered_run(position, chosen))
            self.differences.append(Difference(position, wanted, chosen, gap))
        forced = torch.full_like(scores, -math.inf)
        forced[0, wanted] = 0
        return forced

    def _gap_in_tiered_run(self, position: int, other: int) -> float:
        same = self._tiered.second[position] == other
        return self._tiered.gaps[position] if same else math.inf


def verify(
    model: PreTrainedModel,
    ids: torch.Tensor,
    token_ids: Sequence[int],
    tiered: Choices,
    chunk_tokens: int,
    watcher: Watcher,
) -> Verdict:
    """Compare greedy choices of a tiered run with an untiered run of `model`.

    Parameters
    ----------
    ids: the prompt, (1, tokens). token_ids: what the tiered run added to it, at least one.
    tiered: what the tiered run saw.
    """
    referee = Referee(token_ids, tiered)
    cache = DynamicCache(config=model.config)
    generate(model, cache, ids, Sampling(len(token_ids)), chunk_tokens, watcher, referee)
    exact = model.device.type == "cpu" and model.dtype == torch.float32
    return Verdict(referee.positions, 0.0 if exact else TIE_LOGITS, tuple(referee.differences))
