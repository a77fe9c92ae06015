"""Measurement: every case and baseline of one model, checked; rows as they come."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory

import torch

from tiermem.bench.long_context import NAME
from tiermem.bench.long_context.case import (
    SPARE_PAGES,
    Baseline,
    Case,
    Fill,
    Settings,
    Sizes,
    layout_of,
    staging_bytes,
)
from tiermem.bench.long_context.checks import (
    LOGITS_TOLERANCE,
    OUTPUT_TOLERANCE,
    check_attention,
    check_logits,
)
from tiermem.bench.long_context.decoding import (
    FIRST_TOKENS,
    PASSES,
    Decoded,
    Traffic,
    decode,
    passes,
    traffic,
)
from tiermem.bench.long_context.derived import BASELINE_NAMES
from tiermem.bench.long_context.model import Model
from tiermem.bench.long_context.rates import HBM, MachineRates
from tiermem.bench.long_context.rows import (
    DECODE,
    LOGITS,
    OUTPUT,
    Aims,
    case_parameters,
    case_results,
    error_result,
    pass_result,
    plain_result,
    request_parameters,
)
from tiermem.bench.long_context.synthetic import SyntheticKv, check_stored, fill_plain, fill_tiered
from tiermem.bench.result import Ceiling, Parameters, Result, Subject, not_measured
from tiermem.bench.run import Run, Scale
from tiermem.config import TierConfig
from tiermem.device.host import host_free_bytes
from tiermem.device.protocol import Progress
from tiermem.errors import InvariantError
from tiermem.forecast.budget import RESERVE_BYTES
from tiermem.model_shape import ModelShape
from tiermem.stats import Stats
from tiermem.units import format_bytes

SHORT_TOKENS, SHORT_STEPS = 16, 8
"""Of the request whose steps show what all work beside K and V takes."""
REFERENCE = ("33b", 131_072, 8 << 30)
"""Shape, context and hot budget that aims are set for."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where it runs, what is measured there, and who is told that the next part begins, of so many bytes of K
    and V. known: keys of rows that are there already."""

    bench: Run
    settings: Settings
    rates: MachineRates
    begins: Callable[[str, int], None]
    pinning: Progress
    known: frozenset[str] = frozenset()

    def sync(self) -> None:
        """Wait for the device."""
        self.bench.device.compute_stream().synchronize()


@dataclass(slots=True, eq=False)
class Request:
    """One context: token ids (context + 1,), the tokens fed behind them, and the first run's logits."""

    sizes: Sizes
    ids: torch.Tensor
    tokens: list[int]
    kv: SyntheticKv
    first: str = ""
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True, slots=True, eq=False)
class TieredRun:
    """What one cache did. worst: the difference of attention from float64 at the end. passes: seconds of each,
    by their new tokens."""

    done: Decoded
    moved: Traffic
    worst: float
    passes: dict[int, list[float]]


def keys_of(settings: Settings, shape: ModelShape) -> set[str]:
    """Keys of the rows of every case and baseline of a model: where all are there, nothing is left to measure."""
    keys = set()
    for case in settings.cases():
        request = request_parameters(shape.name, case.context, settings.fill, shape.dtype)
        keys.add(Subject(NAME, DECODE, case_parameters(request, case), "tokens/s").key)
        names = (BASELINE_NAMES[kind] for kind in settings.baselines)
        keys |= {Subject(NAME, name, request, "tokens/s").key for name in names}
    return keys


def all_tokens(settings: Settings) -> int:
    """New tokens of a case: those that are not timed, the timed ones, the one of the check, and of passes."""
    return FIRST_TOKENS + settings.new_tokens + 1 + PASSES * sum(settings.pass_sizes)


class Measurement:
    """All of one model's results; the model is the caller's."""

    def __init__(self, place: Place, model: Model) -> None:
        self._place = place
        self._model = model
        self._settings = place.settings
        self._dtype = str(model.dtype).removeprefix("torch.")
        self._layout = layout_of(model.shape, self._dtype, place.settings.page_tokens)

    def results(self) -> Iterator[Result]:
        """Rows of every context.

        Raises
        ------
        ConfigError: memory that was refused after all. InvariantError: a result is wrong.
        """
        other_s = self._other_work()
        for context in self._settings.contexts:
            request = self._request(context)
            yield from self._resident(request)
            yield from self._streaming(request)
            for case in self._settings.cases():
                if case.context == context:
                    yield from self._case(case, request, other_s)
            yield from self._offloaded(request)

    # ---- the cases ---------------------------------------------------------------------------------

    def _case(self, case: Case, request: Request, other_s: float) -> Iterator[Result]:
        parameters = case_parameters(self._parameters(request), case)
        share = case.share.value(self._place.rates.beside)
        threads = self._settings.cpu_threads
        notes = ["" if share is None else f"CPU share {share:g}"]
        notes += ["" if threads is None else f"{threads} threads"]
        note = ", ".join(filter(None, notes))
        if self._is_known(DECODE, parameters):
            return
        text = f"gpu {format_bytes(case.gpu_bytes)}, CPU share {case.share.text}"
        self._begin(text, request)
        warm = request.sizes.warm_bytes(self._settings)
        run = self._run_tiered(request, case.gpu_bytes, warm, share, self._settings.pass_sizes)
        done, moved = run.done, run.moved
        aims = Aims(self._is_reference(case))
        yield from case_results(parameters, done, moved, self._place.rates, other_s, aims, note)
        yield from self._check(text, parameters, request, done)
        tolerance = OUTPUT_TOLERANCE[self._model.dtype]
        yield error_result(OUTPUT, parameters, run.worst, tolerance)
        for size, seconds in run.passes.items():
            yield pass_result(parameters, size, seconds, done)

    def _resident(self, request: Request) -> Iterator[Result]:
        if not self._is_wanted(Baseline.RESIDENT, request):
            return
        needed, free = request.sizes.num_bytes + self._reserve(), self._free()
        if needed > free:
            yield self._skipped(
                Baseline.RESIDENT,
                request,
                f"K and V and work space take {needed} bytes, {free} are free",
            )
            return
        self._begin(BASELINE_NAMES[Baseline.RESIDENT], request)
        done = self._run_tiered(request, request.sizes.num_bytes, 0, 0.0).done
        read_bytes = self._model.read_bytes + request.sizes.kv_bytes
        ceiling = Ceiling(HBM, self._place.rates.hbm / read_bytes)
        yield from self._baseline(Baseline.RESIDENT, request, done, ceiling)

    def _streaming(self, request: Request) -> Iterator[Result]:
        if not self._is_wanted(Baseline.STREAMING, request):
            return
        slot = self._layout.slot_bytes
        hot = staging_bytes(self._settings, self._layout, slot) + slot
        warm = request.sizes.warm_bytes(self._settings)
        if hot + warm + self._settings.ssd_bytes < request.sizes.num_bytes:
            reason = f"ram holds {warm} of {request.sizes.num_bytes} bytes of K and V"
            yield self._skipped(Baseline.STREAMING, request, reason)
            return
        self._begin(BASELINE_NAMES[Baseline.STREAMING], request)
        run = self._run_tiered(request, hot, warm, 0.0)
        done, ceiling = run.done, self._place.rates.ceiling(run.moved)
        note = "what LRU comes to: a cyclic scan finds nothing"
        yield from self._baseline(Baseline.STREAMING, request, done, ceiling, note)

    def _offloaded(self, request: Request) -> Iterator[Result]:
        if not self._is_wanted(Baseline.OFFLOADED, request):
            return
        needed, free = request.sizes.kv_bytes, host_free_bytes()
        reason = None if self._place.bench.on_gpu else "needs a GPU"
        if needed > free:
            reason = f"K and V take {needed} bytes of host memory, {free} are free"
        if reason is not None:
            yield self._skipped(Baseline.OFFLOADED, request, reason)
            return
        self._begin(BASELINE_NAMES[Baseline.OFFLOADED], request)
        cache = self._model.open_offloaded()
        told = self._told(request)
        if self._settings.fill is Fill.SYNTHETIC:
            fill_plain(cache, request.kv, request.sizes.context, told)
        else:
            self._prefill(cache, request)
        count = FIRST_TOKENS + self._settings.offloaded_tokens
        done = decode(self._model, cache, request.tokens[:count], self._place.sync)
        del cache
        self._give_back()
        link = self._place.rates.link
        ceiling = Ceiling("all K and V at the link's rate", link / request.sizes.kv_bytes)
        yield from self._baseline(Baseline.OFFLOADED, request, done, ceiling)

    def _baseline(
        self,
        kind: Baseline,
        request: Request,
        done: Decoded,
        ceiling: Ceiling | str,
        note: str = "",
    ) -> Iterator[Result]:
        parameters = self._parameters(request)
        name = BASELINE_NAMES[kind]
        yield plain_result(name, parameters, done, ceiling, note)
        yield from self._check(name, {**parameters, "of": name}, request, done)

    def _check(
        self, name: str, parameters: Parameters, request: Request, done: Decoded
    ) -> Iterator[Result]:
        """Logits against those of the first run of the same request."""
        if not request.first:
            request.first, request.logits = name, done.logits
            return
        both = f"{name} against {request.first}"
        worst = check_logits(both, done.logits, request.logits, self._model.dtype)
        yield error_result(LOGITS, parameters, worst, LOGITS_TOLERANCE[self._model.dtype])

    # ---- one run -----------------------------------------------------------------------------------

    def _run_tiered(
        self,
        request: Request,
        gpu: int,
        ram: int,
        share: float | None,
        pass_sizes: tuple[int, ...] = (),
    ) -> TieredRun:
        """Fill, decode, look at everything."""
        model, context = self._model, request.sizes.context
        before: list[Stats] = []
        with ExitStack() as run:
            config = self._config(gpu, ram, share, run)
            cache = run.enter_context(
                model.open_tiered(config, self._settings.page_tokens, self._place.pinning)
            )
            manager = cache.manager
            if self._settings.fill is Fill.SYNTHETIC:
                told = self._told(request)
                with closing(fill_tiered(manager, request.kv, request.ids[:-1], told)):
                    attached = cache.attach(request.ids)
                if attached != context:
                    raise InvariantError(f"{attached} of {context} tokens were found again")
            else:
                self._prefill(cache, request)
            self._place.bench.settle()
            done = decode(
                model, cache, request.tokens, self._place.sync,
                begins=lambda: before.append(cache.stats()),
            )  # fmt: skip
            moved = traffic(before[0], cache.stats())
            sync, tokens = self._place.sync, request.tokens
            timed = {
                size: passes(model, cache, (tokens * PASSES * size)[: PASSES * size], size, sync)
                for size in pass_sizes
            }
            worst = check_attention(manager, request.ids[:-1], model.shape.num_heads)
            if self._settings.fill is Fill.SYNTHETIC:
                check_stored(manager, request.kv, request.ids[:-1])
        self._give_back()
        return TieredRun(done, moved, worst, timed)

    def _prefill(self, cache: object, request: Request) -> None:
        told, chunk = self._told(request), self._settings.chunk_tokens
        ids = request.ids[:-1]
        for start in range(0, len(ids), chunk):
            self._model.feed(cache, ids[start : start + chunk])
            told(min(start + chunk, len(ids)))

    def _other_work(self) -> float:
        """Seconds of a step over a few resident tokens: weights, launches, and next to no K and V."""
        ids = self._random_ids(SHORT_TOKENS + SHORT_STEPS)
        config = self._config(SPARE_PAGES * self._layout.slot_bytes, 0, 0.0, ExitStack())
        with self._model.open_tiered(config, self._settings.page_tokens, None) as cache:
            self._model.feed(cache, ids[:SHORT_TOKENS])
            done = decode(self._model, cache, ids[SHORT_TOKENS:].tolist(), self._place.sync)
        self._give_back()
        return done.step_s

    # ---- inside ------------------------------------------------------------------------------------

    def _request(self, context: int) -> Request:
        count = FIRST_TOKENS + self._settings.new_tokens
        ids = self._random_ids(context + 1 + count)
        return Request(
            Sizes.of(self._layout, context, all_tokens(self._settings)),
            ids[: context + 1],
            ids[context + 1 :].tolist(),
            SyntheticKv(self._layout, self._model.device),
        )

    def _random_ids(self, count: int) -> torch.Tensor:
        make = torch.Generator().manual_seed(1)
        ids = torch.randint(self._model.shape.vocab_size, (count,), generator=make)
        return ids.to(self._model.device)

    def _config(self, gpu: int, ram: int, share: float | None, run: ExitStack) -> TierConfig:
        """The tiers of one run; the cold one, for what finds no room in RAM, is removed with it."""
        settings = self._settings
        ssd, path = 0, None
        if ram > 0 and settings.ssd_bytes > 0:
            ssd, path = (
                settings.ssd_bytes,
                run.enter_context(
                    TemporaryDirectory(prefix="tiermem-bench-", dir=settings.ssd_path)
                ),
            )
        return TierConfig(
            gpu=gpu, ram=ram, ssd=ssd, ssd_path=path, device=str(self._model.device),
            cpu_share=share, cpu_threads=settings.cpu_threads,
        )  # fmt: skip

    def _parameters(self, request: Request) -> dict[str, str | int]:
        name, fill = self._model.shape.name, self._settings.fill
        return request_parameters(name, request.sizes.context, fill, self._dtype)

    def _told(self, request: Request) -> Callable[[int], None]:
        progress, total = self._place.bench.progress, request.sizes.context
        start_s = time.monotonic()

        def told(stored: int) -> None:
            left_s = (time.monotonic() - start_s) * (total - stored) / max(stored, 1)
            progress(f"filling: {stored:,} of {total:,} tokens, about {left_s:.0f} s left")

        return told

    def _begin(self, text: str, request: Request) -> None:
        name, context = self._model.shape.name, request.sizes.context
        self._place.begins(f"{name}, {context:,} tokens: {text}", request.sizes.kv_bytes)

    def _is_wanted(self, kind: Baseline, request: Request) -> bool:
        if kind not in self._settings.baselines:
            return False
        return not self._is_known(BASELINE_NAMES[kind], self._parameters(request))

    def _is_known(self, name: str, parameters: Parameters) -> bool:
        return Subject(NAME, name, parameters, "tokens/s").key in self._place.known

    def _is_reference(self, case: Case) -> bool:
        this = (self._model.shape.name, case.context, case.gpu_bytes)
        bench = self._place.bench
        return bench.on_gpu and bench.scale is Scale.FULL and this == REFERENCE

    def _skipped(self, kind: Baseline, request: Request, reason: str) -> Result:
        subject = Subject(NAME, BASELINE_NAMES[kind], self._parameters(request), "tokens/s")
        return not_measured(subject, reason)

    def _reserve(self) -> int:
        return RESERVE_BYTES if self._place.bench.on_gpu else 0

    def _free(self) -> int:
        if self._place.bench.on_gpu:
            return self._place.bench.device.memory_info().free_bytes
        return host_free_bytes()

    def _give_back(self) -> None:
        """Memory that a closed cache held goes back to the device."""
        gc.collect()
        if self._place.bench.on_gpu:
            torch.cuda.empty_cache()
