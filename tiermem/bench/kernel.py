"""How near do the attention kernels over paged KV come to reading it once, and to torch's attention?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median

import torch

from tiermem.attention.backend import AttentionBackend, backend_for
from tiermem.bench.kernel_cases import Decode, Heads, cases, prefills
from tiermem.bench.kernel_check import check_attention, check_stored
from tiermem.bench.kernel_pool import KvField
from tiermem.bench.result import GIGA, Ceiling, Parameters, Result, Subject, measured, rates
from tiermem.bench.run import Run, Scale
from tiermem.bench.sdpa import best_sdpa
from tiermem.layout import PageLayout
from tiermem.measure.recorded import Recorded
from tiermem.measure.timing import Samples, time_device

NAME = "kernel"
TERA = 1e12
PREFILL_TARGET = 70.0
HEAD_DIM = 128

STORED_TOKENS = 8192
STORE_ROUNDS = 8


def run(bench: Run) -> Iterator[Result]:
    """Every row of the benchmark.

    Raises
    ------
    ConfigError: no room for K and V. InvariantError: a result differs from the reference.
    """
    num_bytes = bench.pick(gpu=8 << 30, cpu=512 << 20, quick_gpu=2 << 30, quick_cpu=32 << 20)
    backend = backend_for(bench.device.torch_device, bench.device.compute_capability, "float16")
    with KvField(bench.device, num_bytes) as field:
        rows = _KernelRows(bench, backend, field)
        bench.settle()
        for case in cases(bench):
            yield rows.decode(case)
        for heads, new_tokens, past_tokens in prefills(bench):
            yield rows.prefill(heads, new_tokens, past_tokens)
        yield rows.store()


class _KernelRows:
    """One row a method, all over the same memory."""

    def __init__(self, bench: Run, backend: AttentionBackend, field: KvField) -> None:
        self._bench = bench
        self._device = bench.device
        self._backend = backend
        self._field = field
        self._repeats = 3 if bench.scale is Scale.QUICK else 25
        self._random = torch.Generator(self._device.torch_device).manual_seed(1)

    def decode(self, case: Decode) -> Result:
        """One new token a sequence; K and V bytes read in a second."""
        self._bench.progress(f"kernel: decode, {case.text}")
        layout = PageLayout(case.num_layers, case.heads.kv, HEAD_DIM, "float16", case.page_tokens)
        pool = self._field.pool(layout)
        tables = self._field.tables(self._backend, pool, case.lengths, [1] * len(case.lengths))
        q = self._queries(len(case.lengths), case.heads.q)
        outs: dict[int, torch.Tensor] = {}

        def attend(layer: int) -> None:
            outs[layer], _ = self._backend.attend(
                pool, layer, q, tables, scale=HEAD_DIM**-0.5, window=None, out_dtype=q.dtype
            )

        samples = self._time_layers(attend, case.num_layers, case.rounds)
        for layer in (0, case.num_layers - 1):
            check_attention(pool, layer, q, tables, case.lengths, outs[layer])
        kv_bytes = sum(case.lengths) * layout.token_bytes // case.num_layers
        parameters: Parameters = {
            "q_heads": case.heads.q, "kv_heads": case.heads.kv, "head_dim": HEAD_DIM,
            "dtype": layout.dtype, "page_tokens": case.page_tokens, "batch": case.text,
        }  # fmt: skip
        values = rates(samples, case.num_layers * case.rounds * kv_bytes)
        torch_rate = self._bench.ceilings.torch_read_rate() / GIGA
        share = 100 * median(values) / torch_rate
        subject = Subject(
            NAME, "decode", parameters, "GB/s", target_percent=case.target,
            note=f"{share:.1f}% of the best of torch's reductions, {torch_rate:,.0f} GB/s",
        )  # fmt: skip
        return measured(subject, values, self._read_ceiling())

    def prefill(self, heads: Heads, new_tokens: int, past_tokens: int) -> Result:
        """A chunk of a prompt over what is cached, against torch's attention over contiguous KV."""
        self._bench.progress(f"kernel: prefill, {heads.q}/{heads.kv} heads")
        layout = PageLayout(2, heads.kv, HEAD_DIM, "float16", 64)
        pool = self._field.pool(layout)
        length = past_tokens + new_tokens
        tables = self._field.tables(self._backend, pool, [length], [new_tokens])
        q = self._queries(new_tokens, heads.q)
        outs: dict[int, torch.Tensor] = {}

        def attend(layer: int) -> None:
            outs[layer], _ = self._backend.attend(
                pool, layer, q, tables, scale=HEAD_DIM**-0.5, window=None, out_dtype=q.dtype
            )

        samples = self._time_layers(attend, layout.num_layers, 1, self._bench.repeats)
        check_attention(pool, 1, q, tables, [length], outs[1])
        visible = new_tokens * past_tokens + new_tokens * (new_tokens + 1) // 2
        flop = 4 * HEAD_DIM * heads.q * visible
        best = best_sdpa(self._bench, heads, new_tokens, round(visible / new_tokens))
        parameters: Parameters = {
            "q_heads": heads.q, "kv_heads": heads.kv, "head_dim": HEAD_DIM, "dtype": "float16",
            "page_tokens": 64, "new_tokens": new_tokens, "past_tokens": past_tokens,
        }  # fmt: skip
        subject = Subject(
            NAME, "prefill", parameters, "TFLOP/s", target_percent=self._bench.aim(PREFILL_TARGET)
        )
        values = [layout.num_layers * flop / seconds / TERA for seconds in samples.times_s]
        return measured(subject, values, Ceiling(best.name, best.flop_per_s / TERA))

    def store(self) -> Result:
        """K and V of new tokens to their places; bytes read and written in a second."""
        self._bench.progress("kernel: store")
        tokens = self._bench.pick(
            gpu=STORED_TOKENS, cpu=2048, quick_gpu=STORED_TOKENS, quick_cpu=256
        )
        layout = PageLayout(4, 8, HEAD_DIM, "float16", 64)
        pool = self._field.pool(layout)
        # inputs in rotation: together they exceed the L2
        inputs = [
            tuple(self._queries(tokens, layout.num_kv_heads) for _ in range(2))
            for _ in range(STORE_ROUNDS)
        ]
        places = [self._field.places(pool, tokens, part) for part in range(STORE_ROUNDS)]

        def put(i: int) -> None:
            k, v = inputs[i]
            self._backend.store(pool, i % layout.num_layers, k, v, places[i])

        samples = self._time_layers(put, STORE_ROUNDS, 1)
        for i, (k, v) in enumerate(inputs):
            check_stored(pool, i % layout.num_layers, k, v, places[i])
        moved = STORE_ROUNDS * 2 * tokens * layout.token_bytes // layout.num_layers
        parameters: Parameters = {"kv_heads": layout.num_kv_heads, "head_dim": HEAD_DIM, "dtype": "float16",
                      "page_tokens": 64, "new_tokens": tokens}  # fmt: skip
        ceiling = Ceiling("memory copy", self._bench.ceilings.hbm_copy_rate() / GIGA)
        return measured(Subject(NAME, "store", parameters, "GB/s"), rates(samples, moved), ceiling)

    # ---- inside ------------------------------------------------------------------------------------

    def _time_layers(
        self, body: Callable[[int], None], num_layers: int, rounds: int, repeats: int | None = None
    ) -> Samples:
        """All layers in rotation, `rounds` times, as one CUDA graph where there is a GPU."""
        order: Sequence[int] = [*range(num_layers)] * rounds

        def everything() -> None:
            for layer in order:
                body(layer)

        recorded = Recorded(self._device, everything)
        return time_device(self._device, recorded.replay, repeats or self._repeats, warmups=2)

    def _queries(self, rows: int, heads: int) -> torch.Tensor:
        return torch.randn(
            rows, heads, HEAD_DIM, dtype=torch.float16, generator=self._random,
            device=self._device.torch_device,
        )  # fmt: skip

    def _read_ceiling(self) -> Ceiling:
        rate = self._bench.ceilings.hbm_read_rate()
        return Ceiling("memory read, best of several reductions", rate / GIGA)
