"""Capture of CUDA graphs that leaves torch as it was where it fails."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


@contextmanager
def capture(
    graph: torch.cuda.CUDAGraph, *, pool: Any = None, stream: torch.cuda.Stream | None = None
) -> Iterator[None]:
    """Record into `graph` what the block gives the current device, as `torch.cuda.graph` does.

    Where the block does what a capture does not allow, torch's own context leaves its capture stream current,
    the allocator with a capture that never ends, and a generator that refuses to make random numbers. Here all
    three are put right before the error goes on.

    Parameters
    ----------
    pool: a handle of `torch.cuda.graph_pool_handle()` that graphs share, or None for one of its own.
    stream: to capture on; torch's own one if not given.

    Raises
    ------
    RuntimeError: what was done cannot be captured.
    """
    before = torch.cuda.current_stream()
    memory = torch.cuda.graph_pool_handle() if pool is None else pool
    try:
        with torch.cuda.graph(graph, pool=memory, stream=stream):
            yield
    except BaseException:
        torch.cuda.set_stream(before)
        _leave_capture(before.device, memory)
        raise


class GraphSplitter:
    """Records what a stream is given into one graph after another, which share memory; made by `capture_split`."""

    def __init__(self, pool: Any) -> None:
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self._pool = pool

    def begin(self) -> None:
        """What is given from now on goes into a graph of its own."""
        self.graphs.append(torch.cuda.CUDAGraph())
        # As in `torch.cuda.graph`: what other threads do must not end up in it.
        self.graphs[-1].capture_begin(pool=self._pool, capture_error_mode="global")

    def end(self) -> None:
        """The graph is complete; until `begin` nothing is recorded.

        Raises
        ------
        RuntimeError: what was done cannot be captured.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
            self.graphs[-1].capture_end()


@contextmanager
def capture_split(pool: Any) -> Iterator[GraphSplitter]:
    """As `capture`, into graphs that the block itself begins and ends; the last one ends with the block.

    Between two graphs the block may allocate memory, but what it gives the device runs at once.

    Raises
    ------
    RuntimeError: what was done cannot be captured.
    """
    before = torch.cuda.current_stream()
    splitter = GraphSplitter(pool)
    torch.cuda.synchronize(before.device)
    try:
        with torch.cuda.stream(torch.cuda.graph(torch.cuda.CUDAGraph()).capture_stream):
            splitter.begin()
            try:
                yield splitter
            except BaseException:
                with suppress(RuntimeError):  # on the stream where it began
                    splitter.end()
                raise
            splitter.end()
    except BaseException:
        torch.cuda.set_stream(before)
        _leave_capture(before.device, pool)
        raise


def _leave_capture(device: torch.device, memory: Any) -> None:
    with suppress(RuntimeError):  # some versions of torch end this themselves
        torch._C._cuda_endAllocateToPool(device.index, memory)
    # A capture that ends well takes the generator out of capturing.
    place = torch.zeros(1, device=device)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        place.zero_()
