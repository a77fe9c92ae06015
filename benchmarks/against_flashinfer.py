"""Is decode attention over paged KV ahead of FlashInfer's, on the same pages in the same run?

    python benchmarks/against_flashinfer.py [--quick] [--device cuda:0]

prints lines of JSON for each batch: each library's figure as a share of the memory's read rate, and their
ratio. Both read the same pool in place, both are checked against plain torch, both are captured in CUDA
graphs that run in turns; of FlashInfer the better of its variants counts. Where there is no GPU or no
FlashInfer the lines say `skipped` with the reason. FlashInfer compiles its kernels at the first use, which
takes a minute or two.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from types import ModuleType

import torch

from tiermem.attention.backend import AttentionBackend, backend_for
from tiermem.attention.pool_view import PagedTables, PoolView
from tiermem.bench.environment import commit, describe
from tiermem.bench.kernel_cases import Decode, cases
from tiermem.bench.kernel_check import check_attention
from tiermem.bench.kernel_pool import KvField
from tiermem.bench.result import (
    GIGA,
    Ceiling,
    Result,
    Subject,
    line_of,
    measured,
    not_measured,
)
from tiermem.bench.result_file import SavedResult
from tiermem.bench.run import Run, Scale, open_ceilings
from tiermem.device.discovery import open_device
from tiermem.layout import PageLayout
from tiermem.measure.recorded import Recorded
from tiermem.measure.timing import time_device

NAME = "against_flashinfer"
HEAD_DIM = 128
WORKSPACE_BYTES = 256 << 20
REPEATS = {Scale.QUICK: 3, Scale.FULL: 15}
TURNS = 2
AHEAD = 1.0
"""Aim: FlashInfer's time over tiermem's is at least this."""

Attend = Callable[[int], torch.Tensor]
"""Attends over one layer and returns the output."""


class Comparison:
    """Both libraries over one memory of K and V."""

    def __init__(
        self, bench: Run, flashinfer: ModuleType, backend: AttentionBackend, field: KvField
    ) -> None:
        self._bench = bench
        self._flashinfer = flashinfer
        self._backend = backend
        self._field = field
        self._ceiling = Ceiling(
            "memory read, best of several reductions", bench.ceilings.hbm_read_rate() / GIGA
        )

    def results(self, case: Decode) -> Iterator[Result]:
        """Two lines for one batch: tiermem's and FlashInfer's best."""
        layout = PageLayout(case.num_layers, case.heads.kv, HEAD_DIM, "float16", case.page_tokens)
        pool = self._field.pool(layout)
        tables = self._field.tables(self._backend, pool, case.lengths, [1] * len(case.lengths))
        q = torch.randn(
            len(case.lengths), case.heads.q, HEAD_DIM,
            dtype=torch.float16, device=self._bench.device.torch_device,
        )  # fmt: skip
        attends = [
            self._tiermem(pool, q, tables),
            *self._variants(case, pool, q, tables),
        ]
        ours, *theirs = self._times(attends, case, pool, q, tables)
        kv_bytes = sum(case.lengths) * layout.token_bytes // case.num_layers
        amount = case.num_layers * case.rounds * kv_bytes / GIGA
        best = min(theirs, key=median)
        for name, seconds in (("tiermem", ours), ("flashinfer", best)):
            values = [amount / value for value in seconds]
            yield measured(_subject(name, case, "GB/s"), values, self._ceiling)
        budget = None if self._bench.scale is Scale.QUICK else AHEAD
        subject = _subject("tiermem over flashinfer", case, "x", budget)
        yield measured(subject, [median(best) / median(ours)], "a ratio has no ceiling")

    def _times(
        self,
        attends: Sequence[Attend],
        case: Decode,
        pool: PoolView,
        q: torch.Tensor,
        tables: PagedTables,
    ) -> list[list[float]]:
        """Seconds of all layers in rotation, as one CUDA graph each, in turns; the outputs are checked."""
        order = [*range(case.num_layers)] * case.rounds
        repeats = REPEATS[self._bench.scale]
        recorded, times = [], []
        for attend in attends:
            outs: dict[int, torch.Tensor] = {}

            def everything(attend: Attend = attend, outs: dict[int, torch.Tensor] = outs) -> None:
                for layer in order:
                    outs[layer] = attend(layer)

            graph = Recorded(self._bench.device, everything)
            graph.replay()
            for layer, out in outs.items():
                check_attention(pool, layer, q, tables, case.lengths, out)
            recorded.append(graph)
            times.append([])
        for _ in range(TURNS):
            for graph, seconds in zip(recorded, times, strict=True):
                samples = time_device(self._bench.device, graph.replay, repeats, warmups=2)
                seconds.extend(samples.times_s)
        return times

    def _tiermem(self, pool: PoolView, q: torch.Tensor, tables: PagedTables) -> Attend:
        def attend(layer: int) -> torch.Tensor:
            return self._backend.attend(
                pool, layer, q, tables, scale=HEAD_DIM**-0.5, window=None, out_dtype=q.dtype
            )[0]

        return attend

    def _variants(
        self, case: Decode, pool: PoolView, q: torch.Tensor, tables: PagedTables
    ) -> Iterator[Attend]:
        """FlashInfer with tensor cores, and without where each head has K and V of its own."""
        page_tokens = case.page_tokens
        counts = [pool.layout.pages_for(length) for length in case.lengths]
        ends = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()
        pages = [tables.block_table[i, :count] for i, count in enumerate(counts)]
        last = [(length - 1) % page_tokens + 1 for length in case.lengths]
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
        for tensor_cores in (True, False) if case.heads.q == case.heads.kv else (True,):
            wrapper = self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, kv_layout="HND", use_tensor_cores=tensor_cores, backend="fa2"
            )
            wrapper.plan(
                ends, torch.cat(pages), torch.tensor(last, dtype=torch.int32),
                case.heads.q, case.heads.kv, HEAD_DIM, page_tokens,
                q_data_type=q.dtype, kv_data_type=q.dtype,
            )  # fmt: skip

            def attend(layer: int, wrapper: object = wrapper) -> torch.Tensor:
                k, v = pool.layer_pages(layer).unbind(1)
                out: torch.Tensor = wrapper.run(q, (k, v))  # type: ignore[attr-defined]
                return out

            yield attend


def _subject(name: str, case: Decode, unit: str, budget: float | None = None) -> Subject:
    return Subject(
        NAME,
        name,
        {
            "q_heads": case.heads.q, "kv_heads": case.heads.kv, "head_dim": HEAD_DIM,
            "dtype": "float16", "page_tokens": case.page_tokens, "batch": case.text,
        },
        unit,
        budget=budget,
    )  # fmt: skip


def _results(bench: Run) -> Iterator[Result]:
    chosen = cases(bench)
    reason = None if bench.on_gpu else "FlashInfer needs a GPU"
    if reason is None:
        try:
            flashinfer = importlib.import_module("flashinfer")
        except ImportError as error:
            reason = f"FlashInfer cannot be imported: {error}"
    if reason is not None:
        for case in chosen:
            yield not_measured(_subject("flashinfer", case, "GB/s"), reason)
        return
    capability = bench.device.compute_capability
    backend = backend_for(bench.device.torch_device, capability, "float16")
    num_bytes = bench.pick(gpu=8 << 30, cpu=0, quick_gpu=2 << 30, quick_cpu=0)
    with KvField(bench.device, num_bytes) as field:
        comparison = Comparison(bench, flashinfer, backend, field)
        bench.settle()
        for case in chosen:
            yield from comparison.results(case)


def main(arguments: list[str]) -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes: a preview, not figures")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    options = parser.parse_args(arguments)
    scale = Scale.QUICK if options.quick else Scale.FULL
    device, _ = open_device(options.device)
    with closing(device), open_ceilings(device, scale) as ceilings:
        environment, name = describe(device), commit()
        bench = Run(device, scale, ceilings, Path(), 0, lambda _: None)
        for result in _results(bench):
            print(line_of(SavedResult(result, environment, name).to_json()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
