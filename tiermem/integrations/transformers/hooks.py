"""Hooks: how a TieredCache gets hold of every call of its model, and carries it out in its own way."""

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
    """Who carries out calls of the model."""

    def run_call(self, arguments: Mapping[str, object], compute: Callable[[], Any]) -> Any:
        """What a call with `arguments`, by their names, returns; `compute` is the model's own forward with them,
        and may be called again after it has raised."""
        ...


@dataclass(slots=True)
class Ear:
    """Who listens, while it lives and until it is `removed`."""

    listener_of: Callable[[], Listener | None]
    removed: bool = False

    def listener(self) -> Listener | None:
        """None where nobody listens any more."""
        return None if self.removed else self.listener_of()


@dataclass(frozen=True, slots=True)
class Replaced:
    """The forward that stands in a model's place now, and what the instance had `before`, if anything."""

    forward: Callable[..., Any]
    before: Callable[..., Any] | None


class Hooks:
    """A forward in the place of a model's own that lets a listener carry out its calls, until `remove`.

    It does not keep the listener alive. `original` is the model's own forward. Hooks of the model, whoever
    registered them, run around it, once a call. torch's compiler stays out of it: a model that is compiled as a
    whole is computed as it is, parts that are compiled stay so.
    """

    def __init__(self, model: PreTrainedModel, listener: Listener) -> None:
        self._model = weakref.ref(model)
        self._newest_seen = -1
        self._others = False
        self.original = model.forward
        self._signature = inspect.signature(model.forward)
        ear = Ear(weakref.ref(listener))
        replaced = self._replace_forward(model, ear)
        self._undo = weakref.finalize(listener, _undo, weakref.ref(model), replaced, ear)

    def remove(self) -> None:
        """Leave the model as it was; again does nothing."""
        self._undo()

    def takes(self, argument: str) -> bool:
        """Whether the model's forward names this argument."""
        return argument in self._signature.parameters

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

    def _replace_forward(self, model: PreTrainedModel, ear: Ear) -> Replaced:
        """Put a forward that asks the listener in the place of the model's own."""
        original, signature = self.original, self._signature
        rest_name = _name_of_rest(signature)
        before = model.__dict__.get("forward")

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            listener = ear.listener()
            if listener is None:
                return original(*args, **kwargs)
            bound = signature.bind_partial(*args, **kwargs).arguments
            rest = bound.pop(rest_name, {})
            return listener.run_call({**bound, **rest}, lambda: original(*args, **kwargs))

        model.forward = forward
        return Replaced(forward, before)


def _name_of_rest(signature: inspect.Signature) -> str:
    """What the forward calls its arguments of other names; empty where it takes none."""
    kinds = {parameter.kind: name for name, parameter in signature.parameters.items()}
    return kinds.get(inspect.Parameter.VAR_KEYWORD, "")


def _undo(model_of: Callable[[], PreTrainedModel | None], replaced: Replaced, ear: Ear) -> None:
    ear.removed = True
    model = model_of()
    if model is None or model.__dict__.get("forward") is not replaced.forward:
        return  # someone has wrapped ours, which lets every call through from now on
    if replaced.before is None:
        del model.forward
    else:
        model.forward = replaced.before
