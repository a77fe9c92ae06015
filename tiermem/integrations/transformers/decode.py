"""Decode: calls of one new token a row, which are alike but for their values, as captured decode steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.utils.generic import ModelOutput

from tiermem.graphs import CapturedDecode
from tiermem.integrations.transformers.call import Call
from tiermem.integrations.transformers.rows import Rows
from tiermem.manager import TierManager
from tiermem.step import Step

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "input_ids": (),
    "attention_mask": (),
    "position_ids": (),
    "cache_position": (),
    "past_key_values": (),
    "use_cache": (None, True),
    "return_dict": (None, True),
    "logits_to_keep": (None, 0, 1),
}
"""Arguments of a call that can be captured, and the values they may have; none given: looked at elsewhere."""


class DecodeCalls:
    """Runs the calls of a model that add one token to each row: replayed where they were captured.

    `forward` is the model's own with the arguments of `run`, in a step; it is the same work for every call with as
    many rows.
    """

    def __init__(
        self,
        manager: TierManager,
        forward: Callable[[Step, torch.Tensor, torch.Tensor], ModelOutput],
    ) -> None:
        self._captured = CapturedDecode(manager, forward)

    @property
    def num_graphs(self) -> int:
        """Graphs that can be replayed now."""
        return self._captured.num_graphs

    def forget_graphs(self) -> None:
        """Give the graphs' memory back."""
        self._captured.forget_graphs()

    @staticmethod
    def can_run(call: Call, arguments: Mapping[str, object]) -> bool:
        """Whether a call is one that `run` carries out as the model would."""
        if call.columns != 1 or call.ids is None or not call.real.all():
            return False
        if torch.is_grad_enabled():
            return False
        return all(_is_neutral(name, value) for name, value in arguments.items())

    def run(self, rows: Rows, arguments: Mapping[str, Any]) -> ModelOutput:
        """What the model returns for `arguments`, its tokens stored in `rows`; tensors are the caller's own."""
        ids: torch.Tensor = arguments["input_ids"]
        positions = arguments.get("position_ids")
        if positions is None:
            positions = torch.full_like(ids, rows.columns)
        result = self._captured.run(rows.sequences, ids, positions.expand(ids.shape))
        # A replay writes the tensors of the one before.
        own = {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in result.items()
        }
        return type(result)(**own)


def _is_neutral(name: str, value: object) -> bool:
    if value is None:
        return True
    if name not in NEUTRAL:
        return False
    allowed = NEUTRAL[name]
    return not allowed or (not isinstance(value, torch.Tensor) and value in allowed)
