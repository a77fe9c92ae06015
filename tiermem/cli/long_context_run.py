"""Long-context run: from options to results; what can be refused is refused before anything is built."""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from tiermem.bench.environment import commit, describe
from tiermem.bench.long_context import NAME
from tiermem.bench.long_context.case import (
    Baseline,
    CpuShare,
    Fill,
    Settings,
    check_host,
    check_room,
    layout_of,
    staging_bytes,
)
from tiermem.bench.long_context.derived import derived_results, is_derived
from tiermem.bench.long_context.measurement import Measurement, Place, all_tokens, keys_of
from tiermem.bench.long_context.predicted import predicted_results
from tiermem.bench.long_context.rates import MachineRates
from tiermem.bench.long_context.rows import DECODE, case_parameters, request_parameters
from tiermem.bench.result import Result, Subject, not_measured
from tiermem.bench.result_file import SavedResult, read_results, write_results
from tiermem.bench.run import Run, Scale, open_ceilings
from tiermem.cli.bench_view import report
from tiermem.cli.human import duration_text
from tiermem.cli.long_context import BASELINES, NONE
from tiermem.cli.long_context_text import long_context_lines
from tiermem.cli.model_files import go_offline
from tiermem.cli.notes import Progress, note
from tiermem.cli.plan import tokens
from tiermem.device.discovery import open_device
from tiermem.device.host import host_free_bytes
from tiermem.device.protocol import Device, DeviceKind
from tiermem.errors import ConfigError, TierMemError
from tiermem.forecast.budget import RESERVE_BYTES
from tiermem.model_shape import ModelShape, TierSizes
from tiermem.ram_attention import MOST_ROWS
from tiermem.units import Size, SizeKind

FULL = {"context": "128k", "gpu": "8GiB", "new_tokens": "32", "page_tokens": "128"}
QUICK = {"context": "256,512", "gpu": "96KiB,128KiB", "new_tokens": "4", "page_tokens": "16"}
QUICK_MODEL = "tiny"
MOST_WEIGHTS = 0.9
"""Of free memory: making and running a model needs more than it has weights."""


def run(options: argparse.Namespace) -> int:
    """Carry out the command; 1 if it compares worse, else 0."""
    if options.join is not None:
        return report(options, _joined(options.join), long_context_lines)
    if options.resume and options.save is None:
        raise ConfigError("--resume: needs --save FILE, which has the results so far")
    settings, names = _settings(options), _names(options)
    go_offline()
    kept = _kept(options)
    results = _measured(options, settings, names, kept)
    return report(options, _saving(options.save, kept, results), long_context_lines)


# ---- what is asked --------------------------------------------------------------------------------


def _settings(options: argparse.Namespace) -> Settings:
    """The options, checked.

    Raises
    ------
    ConfigError: a value that cannot be.
    """
    usual = QUICK if options.quick else FULL
    given = {key: str(getattr(options, key) or value) for key, value in usual.items()}
    if options.ssd_path is None and _size("ssd", options.ssd) > 0:
        raise ConfigError(f"--ssd {options.ssd}: needs --ssd-path")
    if options.ssd_path is not None and not options.ssd_path.is_dir():
        raise ConfigError(f"--ssd-path {options.ssd_path}: there is no such directory")
    return Settings(
        fill=Fill.SYNTHETIC if options.synthetic_kv else Fill.PREFILL,
        contexts=tuple(_tokens(text) for text in _parts("context", given["context"])),
        gpu_bytes=tuple(_size("gpu", text) for text in _parts("gpu", given["gpu"])),
        cpu_shares=tuple(CpuShare.parse(text) for text in _parts("cpu-share", options.cpu_share)),
        baselines=_baselines(options.baselines),
        ram_bytes=None if options.ram is None else _size("ram", options.ram),
        ssd_bytes=_size("ssd", options.ssd),
        ssd_path=options.ssd_path,
        cpu_threads=options.cpu_threads,
        new_tokens=int(given["new_tokens"]),
        offloaded_tokens=options.offloaded_tokens,
        chunk_tokens=options.prefill_chunk,
        page_tokens=int(given["page_tokens"]),
        pass_sizes=_pass_sizes(options.pass_tokens),
    )


def _pass_sizes(text: str | None) -> tuple[int, ...]:
    parts = [] if text is None else _parts("pass-tokens", text)
    for part in parts:
        if not part.isdecimal() or not 2 <= int(part) <= MOST_ROWS:
            raise ConfigError(f"--pass-tokens {part[:40]}: must be 2 to {MOST_ROWS}")
    return tuple(int(part) for part in parts)


def _names(options: argparse.Namespace) -> list[str]:
    if options.model is None and not options.quick:
        raise ConfigError("--model: missing; a shape such as 33b, or a model directory")
    return [QUICK_MODEL] if options.model is None else _parts("model", options.model)


def _parts(key: str, text: str) -> list[str]:
    """Values between commas, each once."""
    parts = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(parts):
        raise ConfigError(f"--{key} {text}: must be one value, or several with commas")
    return parts


def _tokens(text: str) -> int:
    try:
        return tokens(text)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"--context {error}") from error


def _size(key: str, text: str) -> int:
    size = Size.parse(text, key)
    if size.kind is not SizeKind.EXPLICIT:
        raise ConfigError(f"{key}={text!r}: must be a size in bytes such as 8GiB")
    return size.num_bytes


def _baselines(text: str) -> frozenset[Baseline]:
    names = [] if text == NONE else _parts("baselines", text)
    for name in names:
        if name not in BASELINES:
            raise ConfigError(
                f"--baselines {name[:40]}: must be of {', '.join(BASELINES)}, or {NONE}"
            )
    return frozenset(Baseline(name) for name in names)


def _shape(name: str) -> ModelShape:
    from tiermem.cli.long_context_model import shape_of

    if name != QUICK_MODEL:
        return shape_of(name)
    sizes = TierSizes(*(Size(SizeKind.EXPLICIT, 1 << 20) for _ in range(3)))
    return ModelShape(QUICK_MODEL, 2, 128, 4, 2, 32, 256, 264, "float16", sizes)


# ---- running --------------------------------------------------------------------------------------


def _measured(
    options: argparse.Namespace,
    settings: Settings,
    names: Sequence[str],
    kept: Sequence[SavedResult],
) -> Iterator[SavedResult]:
    """Results of every model as they come, those that were there, and what follows from all of them."""
    scale = Scale.QUICK if options.quick else Scale.FULL
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said below, for people
        device, choice = open_device(options.device)
    if choice.is_fallback:
        note(f"measuring the CPU: {choice.reason}")
    with closing(device):
        shapes = {name: _on(device, _shape(name), options.dtype) for name in names}
        reasons = {name: _why_not(shape, settings, device) for name, shape in shapes.items()}
        if all(reasons.values()) and not options.predict:
            raise ConfigError(f"--model {options.model}: {next(iter(reasons.values()))}")
        environment, made_by = describe(device), commit()
        known = frozenset(saved.result.subject.key for saved in kept)
        found = []
        for result in _of_models(options, settings, shapes, reasons, device, scale, known):
            found.append(result)
            yield SavedResult(result, environment, made_by)
        older = _without(kept, found)
        yield from older
        for result in derived_results([*(saved.result for saved in older), *found]):
            yield SavedResult(result, environment, made_by)


def _on(device: Device, shape: ModelShape, dtype: str | None) -> ModelShape:
    """`shape` in the dtype that it has on the device: the one asked for, or its own; float32 on the CPU."""
    if device.kind is not DeviceKind.CUDA:
        if dtype is not None:
            raise ConfigError(f"--dtype {dtype}: needs a GPU; on the CPU models are in float32")
        return replace(shape, dtype="float32")
    return shape if dtype is None else replace(shape, dtype=dtype)


def _of_models(
    options: argparse.Namespace,
    settings: Settings,
    shapes: dict[str, ModelShape],
    reasons: dict[str, str | None],
    device: Device,
    scale: Scale,
    known: frozenset[str],
) -> Iterator[Result]:
    if options.predict:
        for shape in shapes.values():
            for context in settings.contexts:
                yield from predicted_results(shape, context, settings.gpu_bytes[0])
    fitting = {
        name: shape
        for name, shape in shapes.items()
        if reasons[name] is None and not keys_of(settings, shape) <= known
    }
    if fitting:
        yield from _of_fitting(settings, fitting, device, scale, known)
    for name, reason in reasons.items():
        if reason is not None:
            rows = _only_predicted(shapes[name], settings, reason)
            yield from (row for row in rows if row.subject.key not in known)


def _of_fitting(
    settings: Settings,
    shapes: dict[str, ModelShape],
    device: Device,
    scale: Scale,
    known: frozenset[str],
) -> Iterator[Result]:
    """The machine's rates, then every model."""
    Progress.show("measuring the machine")
    with open_ceilings(device, scale) as ceilings:
        rates = MachineRates.measure(ceilings, device, settings.cpu_threads)
    yield from rates.results()
    # the buffers are given back, the rates stay known
    bench = Run(device, scale, ceilings, Path(), 0, Progress.show)
    pace = _Pace(settings, list(shapes.values()))
    place = Place(bench, settings, rates, pace.begins, Progress.pinning, known)
    for name, shape in shapes.items():
        yield from _of_model(name, shape, place)


def _of_model(name: str, shape: ModelShape, place: Place) -> Iterator[Result]:
    from tiermem.cli.long_context_model import LongContextModel

    Progress.show(f"{shape.name}: making the model")
    model = LongContextModel(name, shape, place.bench.device.torch_device)
    try:
        yield from Measurement(place, model).results()
    except torch.OutOfMemoryError as error:
        first_line = str(error).partition("\n")[0]
        raise TierMemError(f"{shape.name}: the GPU has no room: {first_line}") from error
    del model
    gc.collect()
    if place.bench.on_gpu:
        torch.cuda.empty_cache()


def _why_not(shape: ModelShape, settings: Settings, device: Device) -> str | None:
    """Why a model's weights cannot be here; None where they can.

    Raises
    ------
    ConfigError: its K and V cannot be, wherever its weights are, or not beside them.
    """
    layout = layout_of(shape, shape.dtype, settings.page_tokens)
    check_room(settings, layout, all_tokens(settings))
    on_gpu = device.kind is DeviceKind.CUDA
    hot = max(settings.gpu_bytes)
    hot += staging_bytes(settings, layout, hot)
    free = device.memory_info().free_bytes if on_gpu else host_free_bytes()
    needed = shape.weight_bytes + hot + (RESERVE_BYTES if on_gpu else 0)
    if needed > free or shape.weight_bytes > MOST_WEIGHTS * free:
        return (
            f"predicted only: weights take {shape.weight_bytes / 1e9:.1f} GB in {shape.dtype}, with "
            f"the hot tier and work space {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free"
        )
    check_host(settings, layout, all_tokens(settings), host_free_bytes())
    return None


def _only_predicted(shape: ModelShape, settings: Settings, reason: str) -> Iterator[Result]:
    for case in settings.cases():
        request = request_parameters(shape.name, case.context, settings.fill, shape.dtype)
        parameters = case_parameters(request, case)
        yield not_measured(Subject(NAME, DECODE, parameters, "tokens/s"), reason)


class _Pace:
    """Says what begins, and about how long the rest takes: as long as what was done, a byte of K and V."""

    def __init__(self, settings: Settings, shapes: Sequence[ModelShape]) -> None:
        runs = len(settings.gpu_bytes) * len(settings.cpu_shares) + len(settings.baselines)
        of_shapes = sum(shape.token_bytes for shape in shapes)
        self._total = runs * sum(settings.contexts) * of_shapes
        self._done = 0
        self._start_s: float | None = None

    def begins(self, text: str, kv_bytes: int) -> None:
        """A part with `kv_bytes` of K and V begins."""
        now_s = time.monotonic()
        if self._start_s is None:
            self._start_s = now_s
        past_s = now_s - self._start_s
        when = ""
        if self._done:
            left_s = past_s * (self._total - self._done) / self._done
            when = f"; {duration_text(past_s)} so far, about {duration_text(left_s)} left"
        note(f"{text}{when}")
        self._done += kv_bytes


# ---- files ----------------------------------------------------------------------------------------


def _kept(options: argparse.Namespace) -> list[SavedResult]:
    """What --save holds already, without what is derived."""
    if not options.resume or not options.save.exists():
        return []
    return [saved for saved in read_results(options.save) if not is_derived(saved.result)]


def _without(kept: Sequence[SavedResult], made: Sequence[Result]) -> list[SavedResult]:
    """Those of `kept` that were not made anew."""
    keys = {result.subject.key for result in made}
    return [saved for saved in kept if saved.result.subject.key not in keys]


def _saving(
    path: Path | None, kept: Sequence[SavedResult], results: Iterator[SavedResult]
) -> Iterator[SavedResult]:
    """`results`, each in the file as soon as it is there, beside what was kept: a run cut off can be resumed."""
    found: list[SavedResult] = []
    for saved in results:
        found.append(saved)
        if path is not None:
            older = _without(kept, [each.result for each in found])
            write_results(path, [*older, *found])
        yield saved


def _joined(paths: Sequence[Path]) -> Iterator[SavedResult]:
    """Results of all files, the last of each figure, and what follows from all of them."""
    latest: dict[str, SavedResult] = {}
    for path in paths:
        for saved in read_results(path):
            if saved.result.subject.benchmark == NAME and not is_derived(saved.result):
                latest[saved.result.subject.key] = saved
    if not latest:
        raise ConfigError(f"--join: {', '.join(map(str, paths))}: have no results of long-context")
    yield from latest.values()
    first = next(iter(latest.values()))
    for result in derived_results([saved.result for saved in latest.values()]):
        yield SavedResult(result, first.environment, first.commit)
