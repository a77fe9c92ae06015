"""Hooks: how a TieredCache learns of every call of its model, and may carry it out in its own way."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel


class Listener(Protocol):
    """Who wants to know of calls of the model."""

    def call_begins(self, arguments: Mapping[str, object]) -> None: ...

    def call_runs(self) -> object:
        """What the call that has begun returns; None where the model is to compute it."""
        ...

    def call_ends(self) -> None: ...

    def call_fails(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Replaced:
    """The forward that stands in a model's place now, and what the instance had `before`, if anything."""

    forward: Callable[..., Any]
    before: Callable[..., Any] | None


class Hooks:
    """Hooks on a model that tell a listener of its calls, until `remove`; they do not keep the listener alive.

    `original` is the model's own forward.
    """

    def __init__(self, model: PreTrainedModel, listener: Listener) -> None:
        self._listener = weakref.ref(listener)
        self._model = weakref.ref(model)
        self._newest_seen = -1
        self._others = False
        self.original = model.forward
        self._signature = inspect.signature(model.forward)
        self._rest = _name_of_rest(self._signature)
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        self._undo = weakref.finalize(
            listener, _undo, weakref.ref(model), self._replace_forward(model), self._handles
        )

    def remove(self) -> None:
        """Leave the model as it was; again does nothing."""
        self._undo()

    def others_listen(self) -> bool:
        """Whether modules within the model have hooks: a replay would not call them."""
        newest = torch.utils.hooks.RemovableHandle.next_id
        model = self._model()
        if newest != self._newest_seen and model is not None:
            self._newest_seen = newest
            self._others = any(
                module._forward_hooks or module._forward_pre_hooks
                for module in model.modules()
                if module is not model
            )
        return self._others

    def _replace_forward(self, model: PreTrainedModel) -> Replaced:
        """Put a forward that asks the listener first in the place of the model's own."""
        listener_of, original = self._listener, self.original
        before = model.__dict__.get("forward")

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            listener = listener_of()
            result = None if listener is None else listener.call_runs()
            return original(*args, **kwargs) if result is None else result

        model.forward = forward
        return Replaced(forward, before)

    def _before(
        self,
        _module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        listener = self._listener()
        if listener is None:
            return
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        rest = bound.pop(self._rest, {})
        listener.call_begins({**bound, **rest})

    def _after(
        self,
        _module: torch.nn.Module,
        _args: tuple[Any, ...],
        _kwargs: dict[str, Any],
        result: object,
    ) -> None:
        listener = self._listener()
        if listener is None:
            return
        # torch calls this hook without a result when the forward, or an earlier hook, has raised
        if result is None:
            listener.call_fails()
        else:
            listener.call_ends()


def _name_of_rest(signature: inspect.Signature) -> str:
    """What the forward calls its arguments of other names; empty where it takes none."""
    kinds = {parameter.kind: name for name, parameter in signature.parameters.items()}
    return kinds.get(inspect.Parameter.VAR_KEYWORD, "")


def _undo(
    model_of: Callable[[], PreTrainedModel | None],
    replaced: Replaced,
    handles: list[torch.utils.hooks.RemovableHandle],
) -> None:
    for handle in handles:
        handle.remove()
    model = model_of()
    if model is None or model.__dict__.get("forward") is not replaced.forward:
        return  # someone has wrapped ours, which lets every call through from now on
    if replaced.before is None:
        del model.forward
    else:
        model.forward = replaced.before
