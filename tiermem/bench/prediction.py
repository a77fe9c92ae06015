"""How far from what `tiermem plan` predicts does a model decode?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from tiermem.attention.pool_view import TORCH_DTYPES
from tiermem.bench.decoder import Decoder
from tiermem.bench.result import Better, Ceiling, Parameters, Result, Subject, measured
from tiermem.bench.run import Run, Scale
from tiermem.bench.step_rates import ON_CPU, ON_GPU, measure_steps
from tiermem.config import TierConfig, profile_for_device
from tiermem.device.host import host_total_bytes
from tiermem.errors import InvariantError
from tiermem.forecast import Hardware, Request, predict
from tiermem.forecast.hardware import complete
from tiermem.forecast.speed import FUSED, Mode, StepTime
from tiermem.graphs import CapturedDecode
from tiermem.layout import PageLayout
from tiermem.manager import TierManager
from tiermem.measure.machine_rates import ceiling_rates, ram_attention_rates
from tiermem.model_shape import ModelShape, TierSizes
from tiermem.rates import Rates
from tiermem.sequence import Sequence
from tiermem.step import Step
from tiermem.units import Size, SizeKind

NAME = "prediction"
ERROR_BUDGET = 15.0
"""Percent: how far a prediction may be off."""
CONTEXT, QUICK_CONTEXT = 16384, 512
HOT_SHARE = 4
"""The hot tier of the streaming case holds one page of so many."""
TOKENS, QUICK_TOKENS = 24, 4
SKIPPED_TOKENS = 4
"""The first ones compile and capture."""
FILL_TOKENS = 2048
PAGE_TOKENS = 64
SPARE_PAGES = 8
QUICK_REDUCTION = 8
NO_CEILING = "an error has no ceiling; see the budget"

Decode = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """What is decoded: with a hot tier of `hot_pages` and, below it, `warm_pages`.

    Of these the CPU attends what is predicted to end soonest where the mode says so, else nothing beside a GPU.
    """

    mode: Mode
    hot_pages: int
    warm_pages: int


def run(bench: Run) -> Iterator[Result]:
    """Every row of the benchmark.

    A model with random weights decodes with everything resident, as a replayed CUDA graph and launched one by
    one, and with a hot tier that holds a quarter of its context: the rest is streamed, and then, beside a GPU,
    attended by the CPU too. Rates are measured in the same run.

    Raises
    ------
    ConfigError: no room for the model or its context. InvariantError: modes decode different tokens.
    """
    quick = bench.scale is Scale.QUICK
    shape = _small_shape() if quick or not bench.on_gpu else ModelShape.from_profile("7b")
    shape = shape if bench.on_gpu else replace(shape, dtype="float32")
    context = QUICK_CONTEXT if quick or not bench.on_gpu else CONTEXT
    layout = PageLayout(
        shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.dtype, PAGE_TOKENS
    )
    pages = layout.pages_for(context + TOKENS) + SPARE_PAGES
    bench.progress("prediction: rates")
    hardware = _hardware(bench)
    with torch.inference_mode():
        decoder = Decoder(shape, bench.device.torch_device)
        chosen: list[torch.Tensor] = []
        for case in _cases(pages, bench.on_gpu):
            bench.progress(f"prediction: {case.mode.value}")
            step = _predict(case, shape, layout, context, hardware)
            config = _config(bench, case, layout, step)
            seconds, ids = _measure(bench, decoder, layout, config, case.mode, context)
            chosen.append(ids)
            yield from _results(bench, shape, context, seconds, step)
    _check(chosen)


def _cases(pages: int, on_gpu: bool) -> list[Case]:
    few = pages // HOT_SHARE
    both = [Case(Mode.EAGER, pages, 0), Case(Mode.FIXED, few, pages)]
    return [Case(Mode.RESIDENT, pages, 0), *both, Case(Mode.SHARED, few, pages)] if on_gpu else both


def _hardware(bench: Run) -> Hardware:
    """This machine as it was measured now, or else as the profile that matches says."""
    quick = bench.scale is Scale.QUICK
    name = bench.device.name if bench.on_gpu else None
    total = bench.device.memory_info().total_bytes if bench.on_gpu else 0
    profile = Hardware.from_profile(profile_for_device(name, total))
    reference = ON_GPU if bench.on_gpu else ON_CPU
    if quick:
        reference = reference.reduced(QUICK_REDUCTION)
    steps = measure_steps(reference, str(bench.device.torch_device))
    rates: Rates = steps.over(ceiling_rates(bench.ceilings, bench.device))
    if bench.on_gpu:
        rates = rates.over(ram_attention_rates(bench.ceilings, bench.device))
    rates = rates.over(profile.rates)
    return Hardware(
        profile=profile.profile,
        gpu=name or "",
        capability=bench.device.compute_capability,
        gpu_bytes=total,
        ram_bytes=host_total_bytes(),
        ssd_bytes=profile.ssd_bytes,
        rates=complete(rates),
        origin="measured in the same run",
    )


def _predict(
    case: Case, shape: ModelShape, layout: PageLayout, context: int, hardware: Hardware
) -> StepTime:
    slot = layout.slot_bytes
    found = predict(
        Request(
            shape, context, program=FUSED,
            gpu=case.hot_pages * slot, ram=case.warm_pages * slot, ssd=0,
        ),
        hardware,
    )  # fmt: skip
    return next(step for step in found.modes if step.mode is case.mode)


def _config(bench: Run, case: Case, layout: PageLayout, step: StepTime) -> TierConfig:
    """The tiers of a case, and the CPU's share of what is in RAM: as predicted beside a GPU, all without one."""
    slot = layout.slot_bytes
    share = 0.0 if step.shared is None else step.shared.share
    return TierConfig(
        gpu=case.hot_pages * slot, ram=case.warm_pages * slot, ssd=0,
        device=str(bench.device.torch_device), cpu_share=share if bench.on_gpu else None,
    )  # fmt: skip


def _measure(
    bench: Run, decoder: Decoder, layout: PageLayout, config: TierConfig, mode: Mode, context: int
) -> tuple[list[float], torch.Tensor]:
    """Seconds of each token, and the ids (tokens,) that were chosen."""
    count = QUICK_TOKENS if bench.scale is Scale.QUICK else TOKENS
    with TierManager(layout, config, "bench") as manager:
        sequence = _filled(manager, context)
        decode = _decode_with(manager, sequence, decoder, mode)
        ids = torch.zeros(1, dtype=torch.int64, device=manager.torch_device)
        times, chosen = [], []
        for i in range(count + SKIPPED_TOKENS):
            positions = torch.full_like(ids, context + i)
            bench.device.compute_stream().synchronize()
            start_s = time.perf_counter()
            ids = decode(ids, positions)
            chosen.append(int(ids))  # waits for the device
            times.append(time.perf_counter() - start_s)
            ids = ids.clone()  # a captured step writes its result where the last one was
    return times[SKIPPED_TOKENS:], torch.tensor(chosen)


def _decode_with(manager: TierManager, sequence: Sequence, decoder: Decoder, mode: Mode) -> Decode:
    if mode is Mode.RESIDENT:
        captured = CapturedDecode(manager, decoder.decode)
        return lambda ids, positions: captured.run([sequence], ids, positions)

    def decode(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with manager.step([sequence]) as step:
            return decoder.decode(step, ids, positions)

    return decode


def _filled(manager: TierManager, context: int) -> Sequence:
    """A sequence of `context` tokens of random K and V, the same in every manager."""
    layout = manager.layout
    make = torch.Generator(manager.torch_device).manual_seed(0)
    sequence = manager.open_sequence()
    for start in range(0, context, FILL_TOKENS):
        count = min(FILL_TOKENS, context - start)
        with manager.step([sequence], count) as step:
            _append_random(step, layout, count, make)
    return sequence


def _append_random(step: Step, layout: PageLayout, count: int, make: torch.Generator) -> None:
    shape = (count, layout.num_kv_heads, layout.head_dim)
    for layer in range(layout.num_layers):
        k, v = (
            torch.randn(shape, generator=make, dtype=TORCH_DTYPES[layout.dtype], device=make.device)
            for _ in range(2)
        )
        step.append(layer, k, v)


def _results(
    bench: Run, shape: ModelShape, context: int, seconds: list[float], step: StepTime
) -> Iterator[Result]:
    parameters: Parameters = {"model": shape.name, "context": context, "mode": step.mode.value}
    rates = [1 / each for each in seconds]
    predicted = Ceiling("predicted", step.tokens_per_s)
    note = "" if step.shared is None else f"CPU share {step.shared.share:.3f}"
    yield measured(Subject(NAME, "decode", parameters, "tokens/s", note=note), rates, predicted)
    errors = [100 * abs(step.tokens_per_s / rate - 1) for rate in rates]
    budget = bench.aim(ERROR_BUDGET)
    subject = Subject(NAME, "error", parameters, "%", Better.LOWER, budget=budget)
    yield measured(subject, errors, NO_CEILING)


def _check(chosen: list[torch.Tensor]) -> None:
    """Where K and V lie must not change what is decoded; near ties may, so that the first token decides."""
    firsts = {int(ids[0]) for ids in chosen}
    if len(firsts) > 1:
        raise InvariantError(f"prediction: modes decoded the different tokens {sorted(firsts)}")


def _small_shape() -> ModelShape:
    sizes = TierSizes(*(Size(SizeKind.EXPLICIT, 1 << 20) for _ in range(3)))
    return ModelShape("tiny", 4, 256, 8, 4, 32, 512, 1024, "float16", sizes)
