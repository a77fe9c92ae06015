"""Forward: one call of the model on its way through the layers, as one step of the manager."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager, suppress
from contextvars import ContextVar

import numpy as np
import torch

from tiermem.errors import ClosedError, ConfigError, TierMemError
from tiermem.integrations.transformers.call import Call
from tiermem.integrations.transformers.support import ModelAttention
from tiermem.manager import TierManager
from tiermem.sequence import Sequence
from tiermem.step import Step


class Forward:
    """One call's way through a step: `begin`, then each layer calls `append` and `attend`; `finish` or `abandon`
    ends it.

    `step` is None where no row of the batch has a new token; `is_owner`: it begins and ends with the call.
    """

    def __init__(
        self, attention: ModelAttention, call: Call, step: Step | None, is_owner: bool
    ) -> None:
        self.is_open = True
        self._attention = attention
        self._call = call
        self._next_layer = 0
        self._waiting: tuple[int, torch.Tensor] | None = None
        self._places = _places(call, attention.device)
        self._step = step
        self._own = step if is_owner else None

    @classmethod
    def of(
        cls,
        manager: TierManager,
        attention: ModelAttention,
        sequences: SequenceOf[Sequence],
        call: Call,
    ) -> Forward:
        """In a step of its own, which ends with the call; rows of the batch without a new token take no part."""
        counts = call.real.sum(axis=1)
        busy = np.flatnonzero(counts)
        step = None
        if len(busy):
            step = manager.step([sequences[int(i)] for i in busy], [int(counts[i]) for i in busy])
        return cls(attention, call, step, is_owner=True)

    @classmethod
    def within(cls, step: Step, attention: ModelAttention, call: Call) -> Forward:
        """In a step of all rows of `call`, each with one token; the step is its owner's to begin and to end."""
        return cls(attention, call, step, is_owner=False)

    def begin(self) -> None:
        """Enter a step of its own.

        Raises
        ------
        OutOfPagesError, CorruptPageError, TransferError: as entering a step.
        """
        if self._own is not None:
            self._own.__enter__()

    # ---- the layers --------------------------------------------------------------------------------

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store one layer's K and V, (rows, kv_heads, columns, head_dim); padding is left out.

        Raises
        ------
        ConfigError: the model did not attend through tiermem, or its K and V are not what its configuration says.
        """
        if self._waiting is not None or layer != self._next_layer:
            raise ConfigError(
                f"K and V of layer {layer} came while layer {self._next_layer} was due to "
                f"{'attend' if self._waiting else 'store'}: TieredCache needs every layer to store its "
                f"own K and V and then to attend, in order"
            )
        self._check_shape("K", key)
        self._check_shape("V", value)
        if self._step is not None:
            with self._undone_on_error():
                self._step.append(layer, self._pack(key), self._pack(value))
        self._waiting = (layer, key)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, scale: float | None, window: int | None
    ) -> torch.Tensor:
        """Attention of the layer appended last over all that is stored.

        Parameters
        ----------
        query: (rows, q_heads, columns, head_dim). key: the K of that layer, as given to `append`.
        window: what the model says it is.

        Returns
        -------
        (rows, columns, q_heads, head_dim), zeros at padding.

        Raises
        ------
        ConfigError: K was changed after it was stored, or the window is not what the configuration says.
        """
        if self._waiting is None or key is not self._waiting[1]:
            raise ConfigError(
                "TieredCache does not support models that change K after storing them"
            )
        layer = self._waiting[0]
        if window != self._attention.windows[layer]:
            raise ConfigError(
                f"layer {layer} attends with a window of {window}, its configuration says "
                f"{self._attention.windows[layer]}"
            )
        rows, heads, columns, dim = query.shape
        if self._step is None:
            out = query.new_zeros((rows, columns, heads, dim))
        else:
            with self._undone_on_error():
                packed = self._step.attend(layer, self._pack(query), scale=scale, window=window)
            out = self._unpack(packed, rows, columns)
        self._waiting = None
        self._next_layer += 1
        return _InferenceOnly.guard(out, query)

    # ---- the end -----------------------------------------------------------------------------------

    def finish(self) -> None:
        """The call ended well: a step of its own is completed.

        Raises
        ------
        ConfigError: layers did not attend. CorruptPageError, TransferError: the step could not be completed; in
        either case nothing was stored.
        """
        num_layers = len(self._attention.windows)
        if self._waiting is not None or self._next_layer != num_layers:
            raise ConfigError(
                f"the model ended after {self._next_layer} of {num_layers} layers had attended"
            )
        if self._own is not None:
            self._own.__exit__(None, None, None)
        self.is_open = False

    def abandon(self, error: BaseException) -> None:
        """The call failed with `error`, wherever it was: nothing of it was stored. Again does nothing."""
        if self.is_open and self._own is not None:
            with suppress(ClosedError):  # it was not entered, or has been left
                self._own.__exit__(type(error), error, error.__traceback__)
        self.is_open = False

    # ---- inside ------------------------------------------------------------------------------------

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """The step hears of its own errors: it sets damaged pages aside."""
        try:
            yield
        except BaseException as error:
            self.abandon(error)
            raise

    def _check_shape(self, name: str, tensor: torch.Tensor) -> None:
        layout, call = self._attention.layout, self._call
        shape = (call.rows, layout.num_kv_heads, call.columns, layout.head_dim)
        if tuple(tensor.shape) != shape:
            raise ConfigError(
                f"{name} of shape {tuple(tensor.shape)}: the configuration says {shape}"
            )

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """(rows, heads, columns, dim) as (tokens, heads, dim), without padding."""
        flat = tensor.detach().transpose(1, 2).flatten(0, 1)
        return flat if self._places is None else flat.index_select(0, self._places)

    def _unpack(self, packed: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """(tokens, heads, dim) as (rows, columns, heads, dim), zeros at padding."""
        if self._places is not None:
            flat = packed.new_zeros((rows * columns, *packed.shape[1:]))
            packed = flat.index_copy_(0, self._places, packed)
        return packed.view(rows, columns, *packed.shape[1:])


CURRENT: ContextVar[Forward | None] = ContextVar("tiermem_forward", default=None)
"""The call that this thread is in: transformers does not hand the cache to the attention function."""


def current_forward() -> Forward | None:
    """The call that this thread is in, if it is one with a TieredCache and has not ended."""
    forward = CURRENT.get()
    return forward if forward is not None and forward.is_open else None


def _places(call: Call, device: torch.device) -> torch.Tensor | None:
    """Where the real tokens are among rows x columns; None where all are real."""
    if call.real.all():
        return None
    return torch.from_numpy(np.flatnonzero(call.real)).to(device)


class _InferenceOnly(torch.autograd.Function):
    """Lets results through and refuses gradients: K and V that were stored have none."""

    @staticmethod
    def guard(out: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """`out`, through which no gradient flows to `query` in silence."""
        if not (torch.is_grad_enabled() and query.requires_grad):
            return out
        guarded: torch.Tensor = _InferenceOnly.apply(out, query)  # type: ignore[no-untyped-call]
        return guarded

    @staticmethod
    def forward(ctx: object, out: torch.Tensor, query: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return out.view_as(out)

    @staticmethod
    def backward(ctx: object, *grad_outputs: torch.Tensor) -> None:  # noqa: ARG004
        raise TierMemError("no gradients flow through a TieredCache: it is for inference")
