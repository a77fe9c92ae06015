"""ModelCalls: how a TieredCache carries out the calls of its model: in a step, replayed, and again if need be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from tiermem.errors import ConfigError, TierMemError
from tiermem.integrations.transformers.attention import NAME, register
from tiermem.integrations.transformers.call import Call
from tiermem.integrations.transformers.columns import Gap
from tiermem.integrations.transformers.decode import DecodeCalls
from tiermem.integrations.transformers.forward import CURRENT, Forward
from tiermem.integrations.transformers.hooks import Hooks
from tiermem.integrations.transformers.recovery import Recovery
from tiermem.integrations.transformers.rows import Rows
from tiermem.integrations.transformers.support import ModelAttention
from tiermem.manager import TierManager
from tiermem.pools import Tier
from tiermem.sequence import Sequence
from tiermem.step import Step

LEAST_CHUNK_TOKENS, MOST_CHUNK_TOKENS = 256, 2048
"""Tokens that are computed again at once."""


class ModelCalls:
    """Calls of `model` with the cache `key` as past_key_values; other calls run as they are.

    `forward` is the call that is on its way through the layers. `columns` is how long the cache looks to the
    model: in a call that computes lost tokens again, as long as it was when they were computed first.
    """

    def __init__(
        self,
        key: object,
        model: PreTrainedModel,
        manager: TierManager,
        attention: ModelAttention,
        rows: Rows,
    ) -> None:
        self.forward: Forward | None = None
        self.decode = DecodeCalls(manager, self._decode_forward)
        self._key = key
        self._manager = manager
        self._attention = attention
        self._rows = rows
        self._model_config = model.config
        self._model_attention: str | None = None
        self._decoded: Call | None = None
        self._most_columns = 0
        self._columns_before: int | None = None
        register()
        self.hooks = Hooks(model, self)
        self._recovery = Recovery(rows, self, self._why_not_recoverable())

    @property
    def columns(self) -> int:
        """Columns before those of the call that is running."""
        return self._rows.columns if self._columns_before is None else self._columns_before

    def undo(self) -> None:
        """Undo a call that never ended, because it was interrupted; its rows are to be settled, or reset."""
        self._decoded = self._columns_before = None
        forward = self.forward
        self._release()
        if forward is not None:
            forward.abandon(TierMemError("the call of the model did not end"))

    def close(self) -> None:
        """Leave the model as it was."""
        self.hooks.remove()
        self.decode.forget_graphs()

    # ---- a call ------------------------------------------------------------------------------------

    def run_call(self, arguments: Mapping[str, object], compute: Callable[[], Any]) -> Any:
        """The model is called; if it is with this cache, its tokens are stored when all went well."""
        self.undo()
        self._rows.settle()
        if arguments.get("past_key_values") is not self._key:
            return compute()
        if self._model_config.output_attentions:
            raise ConfigError("output_attentions=True: TieredCache never has the attention weights")
        call = Call.read(arguments)
        self._rows.fit(call)
        self._check_windows(call)
        self._most_columns = max(self._most_columns, call.columns)
        with self._rows.growing(call):
            return self._recovery.carry_out(lambda: self._attempt(call, arguments, compute))

    def _attempt(
        self, call: Call, arguments: Mapping[str, object], compute: Callable[[], Any]
    ) -> Any:
        """Replayed where it can be, else in a step of its own; stores nothing when it raises."""
        if not self._can_decode(call, arguments):
            return self._compute_in_step(self._rows.sequences, call, compute)
        self._decoded = call
        try:
            return self.decode.run(self._rows, arguments)
        finally:
            self._decoded = None

    def _can_decode(self, call: Call, arguments: Mapping[str, object]) -> bool:
        """Whether a call may be replayed: alike but for values, seen by nobody within the model."""
        can_run = self._attention.reusable and self.decode.can_run(call, arguments)
        return can_run and not self.hooks.others_listen()

    def _decode_forward(
        self, step: Step, ids: torch.Tensor, positions: torch.Tensor
    ) -> ModelOutput:
        """The model's own forward of one token a row within `step`."""
        assert self._decoded is not None
        arguments = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": positions,
            "past_key_values": self._key,
            "use_cache": True,
        }
        forward = Forward.within(step, self._attention, self._decoded)
        result: ModelOutput = self._run(forward, lambda: self.hooks.original(**arguments))
        return result

    def _compute_in_step(
        self, sequences: list[Sequence], call: Call, compute: Callable[[], Any]
    ) -> Any:
        """What `compute` returns, in a step of `sequences` that it fills."""
        return self._run(Forward.of(self._manager, self._attention, sequences, call), compute)

    def _run(self, forward: Forward, compute: Callable[[], Any]) -> Any:
        """What `compute` returns, with the model's attention taken over by `forward`."""
        try:
            self._take_attention(forward)
            forward.begin()
            result = compute()
            forward.finish()
        except BaseException as error:
            forward.abandon(error)
            self._release()  # not before: `undo` finds the forward where this is interrupted
            raise
        self._release()
        return result

    def _take_attention(self, forward: Forward) -> None:
        self._model_attention = self._model_config._attn_implementation
        self.forward = forward
        self._model_config._attn_implementation = NAME
        CURRENT.set(forward)

    def _release(self) -> None:
        """Give the model its own attention back."""
        if self.forward is not None:
            self._model_config._attn_implementation = self._model_attention
            CURRENT.set(None)
            self.forward = None

    def _check_windows(self, call: Call) -> None:
        """Windows count tokens; transformers counts columns, which is the same unless padding lies between."""
        if all(window is None for window in self._attention.windows):
            return
        if call.real.all() and not self._rows.padded:
            return
        real = np.concatenate([self._rows.real, call.real], axis=1)
        if (np.diff(real.astype(np.int8), axis=1) < 0).any():
            raise ConfigError(
                "attention_mask: padding after tokens; with sliding windows it must be on the left"
            )

    # ---- tokens that were lost ---------------------------------------------------------------------

    def compute_again(self, sequence: Sequence, gap: Gap) -> None:
        """Store tokens behind those of `sequence`: a call of one row, which sees what it saw the first time."""
        device = self._attention.device
        arguments = {
            "input_ids": torch.from_numpy(gap.ids).to(device),
            "attention_mask": torch.from_numpy(gap.real.astype(np.int64)).to(device),
            "position_ids": torch.from_numpy(gap.positions).to(device),
            "past_key_values": self._key,
            "use_cache": True,
            **({"logits_to_keep": 1} if self.hooks.takes("logits_to_keep") else {}),
        }
        self._columns_before = gap.start
        try:
            with torch.no_grad():
                self._compute_in_step(
                    [sequence], gap.as_call(), lambda: self.hooks.original(**arguments)
                )
        finally:
            self._columns_before = None
        self._manager.note_computed_again(gap.num_tokens)

    def chunk_tokens(self) -> int:
        """As many as the largest call had, within bounds: their activations found room."""
        return min(max(self._most_columns, LEAST_CHUNK_TOKENS), MOST_CHUNK_TOKENS)

    def fits_near(self) -> bool:
        """Whether the GPU and the RAM tier can hold all rows."""
        stats, layout = self._manager.stats(), self._attention.layout
        slots = sum(tier.slots for tier in stats.tiers if tier.tier != Tier.SSD.name)
        counts = self._rows.real.sum(axis=1)
        return sum(layout.pages_for(int(count)) for count in counts) <= slots

    def _why_not_recoverable(self) -> str | None:
        """Why tokens of this model cannot be computed again to the same K and V; None where they can."""
        if not self._attention.reusable:
            return "K and V of this model depend on the length of the text they were computed in"
        if not (self.hooks.takes("position_ids") and self.hooks.takes("input_ids")):
            return "the model takes no position_ids"
        return None
