"""Plan text: a forecast as short tables, with the sums behind it in words."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from tiermem.cli.human import NOTHING, count_text, duration_text, rate_text, time_text
from tiermem.cli.table import Align, Table, pairs, printable
from tiermem.forecast.answer import Forecast
from tiermem.forecast.speed import SMALL_WORK, Limit, Mode, Shared, StepTime
from tiermem.forecast.weights import BITS, bytes_read, num_parameters
from tiermem.model_shape import ModelShape

TEXT_WIDTH = 112
WEIGHT_PLACES = {"gpu": "GPU memory", "ram": "host memory"}
LIMITS = {
    Limit.HBM: "reading device memory",
    Limit.COMPUTE: "matrix products",
    Limit.LAUNCH: "launching kernels",
    Limit.LINK: "the link to the GPU",
    Limit.CPU: "attention on the CPU",
    Limit.LINK_AND_CPU: "the link and the CPU, which end at once",
    Limit.DISK: "the disk",
    Limit.CAPACITY: "capacity: it does not fit",
}


def forecast_lines(found: Forecast, width: int | None) -> list[str]:
    """The answer first, then what it is made of, as lines of at most `width` columns."""
    blocks = [
        list(_verdict(found)),
        pairs(list(_facts(found))).lines(width),
        _formats(found).lines(width),
        _tiers(found).lines(width),
        _modes(found).lines(width) if found.modes else [],
        list(_sums(found)) if found.modes else [],
    ]
    lines: list[str] = []
    for block in (block for block in blocks if block):
        lines += [""] * bool(lines)
        lines += [part for line in block for part in _wrapped(line, width)]
    return lines


def gb_text(num_bytes: float) -> str:
    """Decimal gigabytes, which rates are given in: "33.3 GB"."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"


def _verdict(found: Forecast) -> Iterator[str]:
    request, budget = found.request, found.budget
    where = found.hardware.gpu or "the host"
    what = f"{request.shape.name} in {request.weights.value}, {count_text(request.context)} tokens"
    what += f" x {request.batch}" if request.batch > 1 else ""
    if found.fits:
        best = found.modes[0]
        tiers = [tier.name.upper() for tier in budget.tiers if tier.kv_bytes]
        yield (
            f"fits: {what} on {where}: weights in {WEIGHT_PLACES[budget.weights_tier]}, "
            f"K and V in the tiers {' and '.join(tiers)}"
        )
        yield f"{best.tokens_per_s:.3g} tokens/s predicted, limited by {LIMITS[best.limit]}"
    else:
        yield f"does not fit: {what} on {where}"
        yield from budget.problems
        if not budget.weights_fit:
            yield from _what_would(found)
    yield from (f"note: {note}" for note in found.notes)


def _what_would(found: Forecast) -> Iterator[str]:
    """Which format of the weights would fit, if any does."""
    fitting = [item for item in found.formats if item.fits]
    others = ", ".join(f"{item.name} {gb_text(item.num_bytes)}" for item in found.formats[:3])
    yield (
        f"weights: {others}; beside the reserve there is room for "
        f"{gb_text(max(found.budget.room_for_weights, 0))}, which is {found.most_bits:.1f} bits a weight"
    )
    if not fitting:
        yield "no format would fit: choose a smaller model or a larger GPU, or split it over GPUs"
        return
    best = fitting[0]
    left = found.budget.room_for_weights - best.num_bytes
    words = (
        f"{best.name} would fit: {gb_text(best.num_bytes)}, with {gb_text(left)} left for K and V"
    )
    coarse = "; so few bits cost quality: a larger GPU is the better answer"
    yield words + (coarse if best.bits < BITS_OF_INT4 else "")


BITS_OF_INT4 = 4


def _facts(found: Forecast) -> Iterator[tuple[str, str]]:
    request, budget, layout = found.request, found.budget, found.layout
    yield "machine", f"{found.hardware.gpu or 'no GPU'}, profile {found.hardware.profile}"
    yield "rates from", found.hardware.origin
    yield "model", _model_text(request.shape)
    page = f"{layout.page_tokens} tokens, {gb_text(layout.page_bytes)}"
    yield "page", f"{page}; {count_text(layout.token_bytes)} bytes a token in {layout.dtype}"
    parts = (
        f"weights {gb_text(budget.weights_bytes)}",
        f"reserve {gb_text(budget.reserve_bytes)}",
        f"staging {gb_text(budget.staging_bytes)}",
        f"GPU tier {gb_text(budget.tiers[0].num_bytes)}",
    )
    yield "device memory", f"{gb_text(budget.gpu_bytes)}: {', '.join(parts)}"
    step = gb_text(found.bytes_a_step)
    yield "K and V", f"{gb_text(budget.kv_bytes)}; a step reads {step} with the weights"
    if found.fits:
        yield "first token", f"after about {duration_text(found.prefill_s)} of prefill"


def _model_text(shape: ModelShape) -> str:
    heads = f"{shape.num_heads} query and {shape.num_kv_heads} KV heads of {shape.head_dim}"
    return f"{num_parameters(shape) / 1e9:.1f} billion weights, {shape.num_layers} layers, {heads}"


def _formats(found: Forecast) -> Table:
    rows = tuple(
        (item.name, f"{item.bits:.2f}", gb_text(item.num_bytes), "yes" if item.fits else "no")
        for item in found.formats
    )
    return Table(("weights", "bits each", "size", "fits the GPU"), rows)


def _tiers(found: Forecast) -> Table:
    rows = tuple(
        (
            tier.name.upper(),
            gb_text(tier.num_bytes),
            gb_text(tier.kv_bytes),
            count_text(tier.max_batch),
            count_text(tier.max_context),
        )
        for tier in found.budget.tiers
    )
    context, batch = count_text(found.request.context), found.request.batch
    titles = (
        "tier", "size", "K and V here", f"most sequences of {context}", f"longest context x {batch}",
    )  # fmt: skip
    return Table(titles, rows)


def _modes(found: Forecast) -> Table:
    titles = ("mode", "tokens/s", "step", "GPU", "link", "CPU", "disk", "host", "limited by")
    rows = tuple(
        (
            step.mode.value,
            f"{step.tokens_per_s:.3g}",
            time_text(step.total_s),
            time_text(step.gpu_s),
            time_text(step.link_s) if step.link_s else NOTHING,
            time_text(step.cpu_s) if step.cpu_s else NOTHING,
            time_text(step.disk_s) if step.disk_s else NOTHING,
            time_text(step.step_s + step.host_s),
            LIMITS[step.limit],
        )
        for step in found.modes
    )
    return Table(titles, rows, (Align.LEFT, *[Align.RIGHT] * 7, Align.LEFT))


def _sums(found: Forecast) -> Iterator[str]:
    """The formula of the best mode, in words and numbers."""
    step, rates = found.modes[0], found.hardware.rates.to_table()
    shape = found.request.shape
    weights = bytes_read(shape, BITS[found.request.weights])
    yield f"how a step of {time_text(step.total_s)} comes about ({step.mode.value}):"
    yield (
        f"  weights: the longer of {gb_text(weights)} at {_rate(rates['linear_read'])} = "
        f"{time_text(step.weights_s)} and of the products at {rates['matmul'] / 1e12:.3g} TFLOP/s = "
        f"{time_text(step.compute_s)}"
    )
    attended = 0.0 if step.shared is None else step.shared.attended_bytes
    yield (
        f"  attention: {gb_text(step.work.kv_bytes - attended)} of K and V at {_rate(rates['decode_read'])} + "
        f"{shape.num_layers} layers x {time_text(rates['attend_s'])} = {time_text(step.attention_s)}"
    )
    program = step.work.program
    yield (
        f"  besides, in each of {shape.num_layers} layers: {program.products} products x "
        f"{time_text(rates['product_s'])} + {program.small_kernels} small kernels x "
        f"{SMALL_WORK} x {time_text(rates['kernel_s'])}{_gaps(step)} = {time_text(step.kernels_s)}"
    )
    yield f"  on the GPU together {time_text(step.gpu_s)}"
    yield from _other_sums(step, rates, shape.num_layers)


def _other_sums(step: StepTime, rates: dict[str, float], num_layers: int) -> Iterator[str]:
    meanwhile = "meanwhile" if step.beside else "besides"
    if step.shared is not None and step.shared.attended_bytes:
        yield from _split_sums(step, step.shared, num_layers)
    elif step.link_s:
        yield (
            f"  link, {meanwhile}: {gb_text(step.work.streamed_bytes)} that are not resident at "
            f"{_rate(rates['link_to_device'])} = {time_text(step.link_s)}"
        )
    if step.disk_s:
        yield (
            f"  disk, before: {gb_text(step.work.cold_bytes)} at {_rate(rates['disk_read'])} = "
            f"{time_text(step.disk_s)}"
        )
    if step.host_s:
        yield (
            f"  host, {meanwhile}: {num_layers} layers x ({time_text(rates['layer_s'])} + "
            f"{step.work.program.launches} launches x {time_text(rates['launch_s'])}) = {time_text(step.host_s)}"
        )
    yield f"  host, before: to plan and end a step, {time_text(rates['step_s'])}"


def _split_sums(step: StepTime, shared: Shared, num_layers: int) -> Iterator[str]:
    """How what is in RAM is split, and what both parts take."""
    rates, work = shared.rates, step.work
    waiting_s = shared.before_s - shared.hand_over_s
    cold = f", Y = {gb_text(work.cold_bytes)} on the SSD" if work.cold_bytes else ""
    by_link = "(X + Y)" if work.cold_bytes else "X"
    yield (
        f"  split of X = {gb_text(work.ram_bytes)} in RAM alone{cold}: both end at once where the CPU attends f = "
        f"({by_link} / B_link - T_gpu - L T_h) / (X / B_link + X / B_cpu) = {shared.share:.3f} of X, 0 to 1, "
        f"beside each other with B_link {_rate(rates.link)} and B_cpu {_rate(rates.cpu)}; "
        f"T_gpu {time_text(waiting_s)}, L T_h {num_layers} x {time_text(shared.hand_over_s / num_layers)}"
    )
    streamed = work.streamed_bytes - shared.attended_bytes
    yield f"  link, meanwhile: {gb_text(streamed)} at {_rate(rates.link)} = {time_text(step.link_s)}"
    yield (
        f"  CPU, meanwhile: {time_text(shared.before_s)} without queries + {gb_text(shared.attended_bytes)} at "
        f"{_rate(rates.cpu)} = {time_text(step.cpu_s)}"
    )


def _gaps(step: StepTime) -> str:
    return "" if step.mode is Mode.RESIDENT else ", and what every launch by itself takes longer,"


def _rate(num_bytes: float) -> str:
    return rate_text(num_bytes / 1e9)


def _wrapped(line: str, width: int | None) -> list[str]:
    """`line` in columns if it is prose; a table's line is fitted already."""
    indent = " " * (len(line) - len(line.lstrip()))
    text = printable(line) if not indent and "  " not in line else line
    limit = width or TEXT_WIDTH
    if "  " in text.strip() or len(text) <= limit:
        return [text]
    return textwrap.wrap(text, limit, subsequent_indent=indent + "  ")
