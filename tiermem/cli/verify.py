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
    one exceeded that of the other, in the run where that was less. rounding: the distance of two numbers of the
    model's dtype next to each other, at the size of these logits.
    """

    position: int
    tiered: int
    untiered: int
    gap: float
    rounding: float = 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the runs compare.

    A difference is a tie where its gap is below `tie_logits`, or below one rounding of the logits, which is more
    in half precision; 0 says that the runs round alike and no difference is a tie.
    """

    positions: int
    tie_logits: float
    differences: tuple[Difference, ...]

    @property
    def ties(self) -> tuple[Difference, ...]:
        """Differences that rounding explains."""
        return tuple(found for found in self.differences if self._is_tie(found))

    @property
    def errors(self) -> tuple[Difference, ...]:
        """Differences that nothing explains."""
        return tuple(found for found in self.differences if not self._is_tie(found))

    def _is_tie(self, found: Difference) -> bool:
        return self.tie_logits > 0 and found.gap < max(self.tie_logits, found.rounding)


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
    """Compares the choices of an untiered run with those of a tiered one, and makes it follow them.

    `dtype` is that in which the model computed its logits.
    """

    def __init__(
        self, token_ids: Sequence[int], tiered: Choices, dtype: torch.dtype = torch.float32
    ) -> None:
        self.differences: list[Difference] = []
        self.positions = 0
        self._token_ids = token_ids
        self._tiered = tiered
        self._eps = torch.finfo(dtype).eps

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Note a difference, and leave the tiered run's token the only one possible."""
        position, self.positions = self.positions, self.positions + 1
        wanted, chosen = self._token_ids[position], int(scores[0].argmax())
        if chosen != wanted:
            gap = float(scores[0, chosen] - scores[0, wanted])
            gap = min(gap, self._gap_in_tiered_run(position, chosen))
            rounding = self._eps * abs(float(scores[0, chosen]))
            self.differences.append(Difference(position, wanted, chosen, gap, rounding))
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
    sampling: Sampling,
    chunk_tokens: int,
    watcher: Watcher,
) -> Verdict:
    """Compare greedy choices of a tiered run with an untiered run of `model`, one token a pass.

    Parameters
    ----------
    ids: the prompt, (1, tokens). token_ids: what the tiered run added to it, at least one.
    tiered: what the tiered run saw. sampling: of the tiered run. Where it drafted, its passes were of several
        tokens; the model's own products round otherwise then, on any device and in any dtype: ties are possible.
    """
    referee = Referee(token_ids, tiered, model.dtype)
    cache = DynamicCache(config=model.config)
    generate(model, cache, ids, Sampling(len(token_ids)), chunk_tokens, watcher, referee)
    rounds_alike = sampling.draft_tokens == 0 and model.device.type == "cpu"
    exact = rounds_alike and model.dtype == torch.float32
    return Verdict(referee.positions, 0.0 if exact else TIE_LOGITS, tuple(referee.differences))
