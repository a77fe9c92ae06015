"""Step rates: what attention and the steps of a manager cost here, on the attention shape of a 33B model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tiermem.attention.pool_view import TORCH_DTYPES
from tiermem.config import TierConfig
from tiermem.device.capture import capture
from tiermem.layout import PageLayout
from tiermem.manager import TierManager
from tiermem.rates import Rates
from tiermem.sequence import Sequence
from tiermem.step import Step

SHORT_TOKENS = 16
"""A context that costs nothing to read: what is left is what one attention costs at least."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What is measured: a context of `tokens`, then `new_tokens` more at once; `replays` for each median."""

    layout: PageLayout
    q_heads: int
    tokens: int
    new_tokens: int
    replays: int

    def reduced(self, factor: int) -> Reference:
        """The same with a `factor` times shorter context and fewer repeats."""
        return Reference(
            self.layout,
            self.q_heads,
            self.tokens // factor,
            self.new_tokens,
            max(self.replays // 2, 3),
        )


ON_GPU = Reference(PageLayout(4, 8, 128, "float16", 64), 56, 1 << 17, 2048, 20)
ON_CPU = Reference(PageLayout(2, 2, 64, "float32", 64), 8, 1 << 13, 64, 5)


def measure_steps(reference: Reference, device: str) -> Rates:
    """Attention and host costs, through a manager whose pages all fit its hot tier.

    Parameters
    ----------
    device: as in TierConfig; a CUDA device is timed by replaying the captured work.

    Raises
    ------
    ConfigError: there is no room for the context.
    """
    pages = reference.layout.pages_for(reference.tokens + reference.new_tokens) + 64
    config = TierConfig(gpu=pages * reference.layout.slot_bytes, ram=0, ssd=0, device=device)
    with TierManager(reference.layout, config) as tm, torch.inference_mode():
        bench = _Bench(tm, reference)
        short, long = bench.sequence(SHORT_TOKENS), bench.sequence(reference.tokens)
        step_s = bench.host_times(long)[0]
        layer_s = bench.host_times(short)[
            1
        ]  # without a GPU the host computes: over next to nothing
        attend_s = bench.attend_time(short)
        return Rates(
            decode_read=bench.kv_bytes(long) / bench.attend_time(long),
            prefill=bench.prefill_flops(long) / bench.prefill_time(long),
            attend_s=attend_s if bench.on_gpu else None,
            step_s=step_s,
            layer_s=layer_s,
        )


class _Bench:
    """A manager, and random rows to append and attend with."""

    def __init__(self, tm: TierManager, reference: Reference) -> None:
        self.tm = tm
        self.reference = reference
        self.on_gpu = tm.torch_device.type == "cuda"
        self._random = torch.Generator(tm.torch_device).manual_seed(0)

    def sequence(self, tokens: int) -> Sequence:
        """A sequence of `tokens` random tokens."""
        sequence = self.tm.open_sequence()
        for start in range(0, tokens, self.reference.new_tokens):
            count = min(self.reference.new_tokens, tokens - start)
            kv = self._rows(count, self.reference.layout.num_kv_heads)
            with self.tm.step([sequence], count) as step:
                for layer in range(self.reference.layout.num_layers):
                    step.append(layer, kv, kv)
        return sequence

    def kv_bytes(self, sequence: Sequence) -> int:
        """What attention of one layer reads."""
        layout = self.reference.layout
        return sequence.num_tokens * layout.token_bytes // layout.num_layers

    def attend_time(self, sequence: Sequence) -> float:
        """Seconds of one layer's append and attend of one token."""
        kv, q = self._step_rows(1)
        with self.tm.step([sequence]) as step:
            run = self._body(step, kv, q)
            return self._time(run) / self.reference.layout.num_layers

    def prefill_time(self, sequence: Sequence) -> float:
        """Seconds of one layer's append and attend of the reference's new tokens."""
        kv, q = self._step_rows(self.reference.new_tokens)
        with self.tm.step([sequence], self.reference.new_tokens) as step:
            run = self._body(step, kv, q)
            return self._time(run) / self.reference.layout.num_layers

    def prefill_flops(self, sequence: Sequence) -> float:
        """Operations of one layer's attention: 2 products, 2 operations an element, causal."""
        rows = self.reference.new_tokens
        seen = rows * sequence.num_tokens + rows * (rows + 1) / 2
        return 4 * self.reference.q_heads * self.reference.layout.head_dim * seen

    def host_times(self, sequence: Sequence) -> tuple[float, float]:
        """Seconds of the host: to enter and leave a step; of one append and attend. Medians."""
        kv, q = self._step_rows(1)
        bodies, wholes = [], []
        for _ in range(self.reference.replays + 3):
            self._synchronize()
            start_s = time.perf_counter()
            with self.tm.step([sequence]) as step:
                entered_s = time.perf_counter()
                self._body(step, kv, q)()
                bodies.append(time.perf_counter() - entered_s)
            wholes.append(time.perf_counter() - start_s)
        edges = [whole - body for whole, body in zip(wholes, bodies, strict=True)]
        layers = self.reference.layout.num_layers
        return statistics.median(edges[3:]), statistics.median(bodies[3:]) / layers

    def _body(self, step: Step, kv: torch.Tensor, q: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            for layer in range(self.reference.layout.num_layers):
                step.append(layer, kv, kv)
                step.attend(layer, q)

        return run

    def _time(self, run: Callable[[], None]) -> float:
        """Seconds of `run`, which may be called once; on a GPU the median of replays of what it launched."""
        if not self.on_gpu:
            start_s = time.perf_counter()
            run()
            return time.perf_counter() - start_s
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.tm.torch_device), capture(graph):
            run()
        times = []
        for _ in range(self.reference.replays + 3):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            self._synchronize()
            times.append(start.elapsed_time(end) / 1000)
        return float(statistics.median(times[3:]))

    def _step_rows(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K (and V) and q of `count` tokens; every kernel for them is compiled."""
        kv = self._rows(count, self.reference.layout.num_kv_heads)
        q = self._rows(count, self.reference.q_heads)
        warm = self.tm.open_sequence()
        with self.tm.step([warm], count) as step:
            self._body(step, kv, q)()
        warm.close()
        self._synchronize()
        return kv, q

    def _rows(self, count: int, heads: int) -> torch.Tensor:
        shape = (count, heads, self.reference.layout.head_dim)
        dtype = TORCH_DTYPES[self.reference.layout.dtype]
        device = self.tm.torch_device
        return torch.randn(shape, generator=self._random, dtype=dtype, device=device)

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.tm.torch_device)
