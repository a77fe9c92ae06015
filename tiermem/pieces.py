"""Pieces: a model's decode step recorded as CUDA graphs of what lies between attention.

Where pages are not all hot, attention is different in every step: other chunks, other pages for the CPU. What the
model does between two layers' attention is always the same work. Launching that kernel by kernel costs the host as
long as attention may take, and each launch waits on a link that is busy; a graph is launched at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from tiermem.device.capture import GraphSplitter, capture_split
from tiermem.step import Step

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, eq=False)
class Appended:
    """K and V of a layer, where the graph before leaves them."""

    layer: int
    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Attended:
    """A layer's queries, where the graph before leaves them, and where the graph behind reads the output."""

    layer: int
    q: torch.Tensor
    scale: float | None
    window: int | None
    out: torch.Tensor


class RecordedStep:
    """What `body` is given in a step's place while it is recorded: attention is noted, and begins a new graph."""

    def __init__(self, splitter: GraphSplitter) -> None:
        self.between: list[tuple[list[Appended], Attended | None]] = []
        self._splitter = splitter
        self._appended: list[Appended] = []

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """As Step.append, when it is replayed: with the `attend` that follows."""
        self._appended.append(Appended(layer, k, v))

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
    ) -> torch.Tensor:
        """As Step.attend, when it is replayed."""
        self._splitter.end()
        with torch.inference_mode(False):  # it is written later, whatever the mode is then
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._note(Attended(layer, q, scale, window, out))
        self._splitter.begin()
        return out

    def attend_with_mass(self, layer: int, q: torch.Tensor, **_how: Any) -> None:
        """Not in pieces: mass is as wide as the sequences are long.

        Raises
        ------
        RuntimeError: always.
        """
        raise RuntimeError(
            f"attend_with_mass of layer {layer} for {len(q)} rows: its shape differs from step to step"
        )

    def close(self) -> None:
        """All was recorded; what was appended last is never attended."""
        self._note(None)

    def _note(self, attended: Attended | None) -> None:
        self.between.append((self._appended, attended))
        self._appended = []


@dataclass(frozen=True, slots=True, eq=False)
class Pieces(Generic[Result]):
    """A recorded step: graphs, what is done behind each of them, the inputs they read and the result they leave.

    Memory of all that is kept alive here; the graphs must be replayed in their order.
    """

    graphs: list[torch.cuda.CUDAGraph]
    between: list[tuple[list[Appended], Attended | None]]
    inputs: tuple[torch.Tensor, ...]
    result: Result

    def replay(self, step: Step) -> Result:
        """Carry out the step, in the order of the compute stream.

        Raises: as `Step.append` and `Step.attend`.
        """
        for graph, (appended, attended) in zip(self.graphs, self.between, strict=True):
            graph.replay()
            for new in appended:
                step.append(new.layer, new.k, new.v)
            if attended is not None:
                attended.out.copy_(
                    step.attend(
                        attended.layer, attended.q, scale=attended.scale, window=attended.window
                    )
                )
        return self.result


def record(
    body: Callable[..., Result], inputs: tuple[torch.Tensor, ...], pool: Any
) -> Pieces[Result]:
    """Record `body`, which runs nothing yet.

    Raises
    ------
    RuntimeError: it cannot be captured.
    """
    with torch.inference_mode(False):  # they are written later, whatever the mode is then
        places = tuple(torch.empty_like(value).copy_(value) for value in inputs)
    with capture_split(pool) as splitter:
        step = RecordedStep(splitter)
        result = body(step, *places)
        step.close()
    return Pieces(splitter.graphs, step.between, places, result)
