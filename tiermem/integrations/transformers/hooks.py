"""Hooks: how a TieredCache learns of every call of its model, and takes its attention over for that call alone."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel


class Listener(Protocol):
    """Who wants to know of calls of the model."""

    def call_begins(self, arguments: Mapping[str, object]) -> None: ...

    def call_ends(self) -> None: ...

    def call_fails(self) -> None: ...


class Hooks:
    """Hooks on a model that tell a listener of its calls, until `remove`; they do not keep the listener alive."""

    def __init__(self, model: PreTrainedModel, listener: Listener) -> None:
        self._listener = weakref.ref(listener)
        self._signature = inspect.signature(model.forward)
        self._rest = _name_of_rest(self._signature)
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        weakref.finalize(listener, _remove, self._handles)

    def remove(self) -> None:
        """Leave the model as it was; again does nothing."""
        _remove(self._handles)

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


def _remove(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
