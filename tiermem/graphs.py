"""Captured decode: a model's decode step recorded as a CUDA graph and replayed while its sequences grow.

Launching a decode step's kernels one by one costs the host more than the device needs to run them. A graph is
launched at once; the tables that change from step to step are written in place before it (`resident`). Where pages
are not all hot, there is a graph for what lies between two layers' attention (`pieces`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from tiermem import trace
from tiermem.config import DecodeGraphs
from tiermem.device.capture import capture
from tiermem.manager import TierManager
from tiermem.pieces import Pieces, record
from tiermem.sequence import Sequence
from tiermem.step import Step

log = logging.getLogger("tiermem")

Result = TypeVar("Result")
MOST_GRAPHS = 8
"""Graphs that are kept, for batches of different sizes; the ones used longest ago go first."""


@dataclass(frozen=True, slots=True, eq=False)
class Captured(Generic[Result]):
    """One graph, the tensors that it reads its inputs from, and what it leaves its results in."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]
    result: Result


class CapturedDecode(Generic[Result]):
    """One new token for each of some sequences: `body` run by graph replay where that can be, else as it is.

    A graph is captured at the second step of a batch of one size, and again when its tables outgrow their memory.
    Where pages are not hot, all but attention is. Steps run as they are on a device without graphs, with
    `decode_graphs="off"`, and where `body` cannot be captured (it waits for the device or reads something back): a
    warning says so once.

    Parameters
    ----------
    manager: whose sequences are decoded.
    body: called with a step and the inputs; appends and attends every layer and returns tensors. It must do the
        same work for inputs of the same shapes, whatever their values, keep what it reads besides them at its
        address, and leave K and V as they are from `append` to `attend`.
    """

    def __init__(self, manager: TierManager, body: Callable[..., Result]) -> None:
        self._manager = manager
        self._body = body
        self._graphs: dict[tuple[object, ...], Captured[Result]] = {}
        self._pieces: dict[tuple[object, ...], Pieces[Result]] = {}
        self._warm: set[tuple[object, ...]] = set()
        self._can_capture = (
            manager.torch_device.type == "cuda"
            and manager.config.decode_graphs is DecodeGraphs.AUTO
        )
        self._can_split = self._can_capture
        self._memory: Any = None

    @property
    def num_graphs(self) -> int:
        """Graphs of whole steps that can be replayed now."""
        return len(self._graphs)

    @property
    def num_pieces(self) -> int:
        """Steps that can be replayed in pieces now."""
        return len(self._pieces)

    def forget_graphs(self) -> None:
        """Give the graphs' memory back; steps are captured again when they come. Waits for the device."""
        if self._graphs or self._pieces:
            torch.cuda.synchronize(self._manager.torch_device)  # one may still run
            self._graphs.clear()
            self._pieces.clear()
            self._memory = None  # torch frees a pool with the last of its graphs

    def run(self, sequences: SequenceOf[Sequence], *inputs: torch.Tensor) -> Result:
        """Decode one token of each of `sequences`; what `body` returned.

        Parameters
        ----------
        inputs: tensors on the manager's device; `body` gets them, or copies that lie at fixed addresses.

        Returns
        -------
        The result of `body`. Tensors in it may be written by the next call with as many sequences.

        Raises
        ------
        As `TierManager.step` and `body`.
        """
        with self._manager.step(sequences, 1) as step:
            shapes = tuple((value.shape, value.dtype) for value in inputs)
            tables = step.resident_tables
            kind = (tables is None, *shapes)
            if not self._can_capture:
                return self._body(step, *inputs)
            if kind not in self._warm:
                # As it is, so that every kernel is compiled and loaded before the capture.
                self._warm.add(kind)
                return self._body(step, *inputs)
            if tables is None:
                return self._run_in_pieces(step, shapes, inputs)
            return self._run_graph(step, (tables, *shapes), inputs)

    def _run_graph(
        self, step: Step, key: tuple[object, ...], inputs: tuple[torch.Tensor, ...]
    ) -> Result:
        captured = self._graphs.pop(key, None)
        if captured is None:
            captured = self._capture(step, inputs)
        if captured is None:
            return self._body(step, *inputs)
        self._graphs[key] = captured
        _write(captured.inputs, inputs)
        trace.begin("replay")
        captured.graph.replay()
        trace.end()
        step.note_replay()
        self._drop_oldest(self._graphs)
        return captured.result

    def _run_in_pieces(
        self, step: Step, key: tuple[object, ...], inputs: tuple[torch.Tensor, ...]
    ) -> Result:
        pieces = self._pieces.pop(key, None)
        if pieces is None and self._can_split:
            try:
                pieces = record(self._body, inputs, self._pool())
            except RuntimeError as error:  # what a capture does not allow
                self._can_split = False
                log.warning("decode steps are not captured in pieces: %s", error)
        if pieces is None:
            return self._body(step, *inputs)
        self._pieces[key] = pieces
        _write(pieces.inputs, inputs)
        result = pieces.replay(step)
        self._drop_oldest(self._pieces)
        return result

    def _capture(self, step: Step, inputs: tuple[torch.Tensor, ...]) -> Captured[Result] | None:
        """Record `body`, which runs nothing yet; None where it cannot be."""
        with torch.inference_mode(False):  # they are written later, whatever the mode is then
            places = tuple(torch.empty_like(value).copy_(value) for value in inputs)
        graph = torch.cuda.CUDAGraph()
        try:
            with capture(graph, pool=self._pool()):
                result = self._body(step, *places)
        except RuntimeError as error:  # what torch raises for work that a capture does not allow
            self._can_capture = False
            log.warning("decode steps are not captured as CUDA graphs: %s", error)
            step.begin_again()
            return None
        return Captured(graph, places, result)

    def _pool(self) -> Any:
        """Memory that all graphs share."""
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        return self._memory

    def _drop_oldest(self, kept: dict[tuple[object, ...], Any]) -> None:
        if len(kept) > MOST_GRAPHS:
            torch.cuda.synchronize(self._manager.torch_device)  # it may still run
            del kept[next(iter(kept))]


def _write(places: tuple[torch.Tensor, ...], values: tuple[torch.Tensor, ...]) -> None:
    for place, value in zip(places, values, strict=True):
        place.copy_(value)
