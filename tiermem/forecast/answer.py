"""Answer: everything that can be said in advance about a model with its contexts on a machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tiermem.config import TierConfig
from tiermem.errors import ConfigError
from tiermem.forecast.budget import (
    COLD,
    HOT,
    NOWHERE,
    RESERVE_BYTES,
    Budget,
    make_budget,
    reserve_bytes,
)
from tiermem.forecast.hardware import Hardware
from tiermem.forecast.speed import (
    TRANSFORMERS,
    Device,
    Limit,
    Mode,
    Program,
    StepTime,
    Work,
    prefill_time,
    shared_time,
    step_time,
)
from tiermem.forecast.weights import (
    BITS,
    FEW_BITS,
    WeightFormat,
    bits_that_fit,
    bits_with_scales,
    bytes_at,
    bytes_read,
    num_parameters,
)
from tiermem.layout import PageLayout
from tiermem.model_shape import ModelShape
from tiermem.units import SizeLike

MAX_CONTEXT = 1 << 24
MAX_BATCH = 1 << 16


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked. context: tokens of each of `batch` sequences. dtype: of K and V; None for the model's.

    gpu, ram, ssd: sizes of the tiers as TierConfig takes them; None for the profile's. program: what decodes.

    Raises
    ------
    ConfigError: a batch or context that cannot be.
    """

    shape: ModelShape
    context: int
    batch: int = 1
    dtype: str | None = None
    weights: WeightFormat = WeightFormat.FP16
    page_tokens: int = 64
    gpu: SizeLike | None = None
    ram: SizeLike | None = None
    ssd: SizeLike | None = None
    program: Program = TRANSFORMERS

    def __post_init__(self) -> None:
        for key, value, most in (
            ("context", self.context, MAX_CONTEXT),
            ("batch", self.batch, MAX_BATCH),
        ):
            if not 1 <= value <= most:
                raise ConfigError(f"{key}={value}: must be 1 to {most}")

    @property
    def sizes(self) -> dict[str, SizeLike]:
        """The tiers whose sizes were asked for."""
        given = {"gpu": self.gpu, "ram": self.ram, "ssd": self.ssd}
        return {key: value for key, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True)
class FormatFit:
    """The weights in one format. bits: a weight of the layers, scales included."""

    name: str
    bits: float
    num_bytes: int
    fits: bool


@dataclass(frozen=True, slots=True)
class Forecast:
    """The answer. formats: the weights in each format. most_bits: what a weight could have to fit.

    modes: decode steps, the best one that tiermem has first; empty where nothing fits. prefill_s: seconds.
    """

    request: Request
    hardware: Hardware
    layout: PageLayout
    budget: Budget
    formats: tuple[FormatFit, ...]
    most_bits: float
    modes: tuple[StepTime, ...]
    prefill_s: float
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the model runs there with this context."""
        return self.budget.fits

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens a second in the best mode; 0 where it does not fit."""
        return self.modes[0].tokens_per_s if self.modes else 0.0

    @property
    def limit(self) -> Limit:
        """What a step waits for, or that it does not fit."""
        return self.modes[0].limit if self.modes else Limit.CAPACITY

    @property
    def bytes_a_step(self) -> int:
        """What a step reads: weights, and K and V of all sequences."""
        shape, bits = self.request.shape, BITS[self.request.weights]
        return bytes_read(shape, bits) + self.budget.kv_bytes

    def to_table(self) -> dict[str, object]:
        """Names and plain values, for `json.dumps`."""
        budget, request = self.budget, self.request
        return {
            "fits": self.fits,
            "weights_tier": budget.weights_tier,
            "kv_tier": budget.kv_tier,
            "tokens_per_s": self.tokens_per_s,
            "limit": self.limit.value,
            "problems": list(budget.problems),
            "notes": list(self.notes),
            "model": request.shape.name,
            "parameters": num_parameters(request.shape),
            "context": request.context,
            "batch": request.batch,
            "dtype": self.layout.dtype,
            "weights": request.weights.value,
            "weights_bytes": budget.weights_bytes,
            "weight_formats": [asdict(item) for item in self.formats],
            "most_bits_a_weight": self.most_bits,
            "page_tokens": self.layout.page_tokens,
            "page_bytes": self.layout.page_bytes,
            "kv_bytes_per_token": self.layout.token_bytes,
            "kv_bytes": budget.kv_bytes,
            "bytes_a_step": self.bytes_a_step,
            "prefill_s": self.prefill_s,
            "budget": {
                "gpu_bytes": budget.gpu_bytes,
                "reserve_bytes": budget.reserve_bytes,
                "staging_bytes": budget.staging_bytes,
                "free_gpu_bytes": budget.free_gpu_bytes,
            },
            "tiers": [asdict(tier) for tier in budget.tiers],
            "modes": [_mode_table(step) for step in self.modes],
            "machine": {
                "profile": self.hardware.profile,
                "gpu": self.hardware.gpu,
                "ram_bytes": self.hardware.ram_bytes,
                "ssd_bytes": self.hardware.ssd_bytes,
                "rates_from": self.hardware.origin,
                "rates": self.hardware.rates.to_table(),
                "estimated_rates": sorted(self.hardware.estimated),
            },
        }


def predict(request: Request, hardware: Hardware) -> Forecast:
    """What to expect of `request` on `hardware`.

    Raises
    ------
    ConfigError: a size or dtype that cannot be there.
    """
    notes: list[str] = []
    if request.weights is not WeightFormat.FP16:
        notes.append(f"{request.weights.value} weights are assumed to be read as fast as fp16 ones")
    layout = _layout(request, hardware, notes)
    # A cold tier needs a path only to be opened.
    config = TierConfig.from_profile(hardware.profile, ssd_path="cold", **request.sizes)
    shape, bits = request.shape, BITS[request.weights]
    budget = make_budget(
        hardware, config, layout, bytes_at(shape, bits), request.batch, request.context,
        frozenset(request.sizes), reserve_bytes(shape) if hardware.gpu_bytes else RESERVE_BYTES,
    )  # fmt: skip
    steps = _steps(request, hardware, budget, layout.dtype) if budget.fits else ()
    if any(step.mode is Mode.SHARED for step in steps) and hardware.estimated:
        notes.append("the CPU's attention, alone and beside the link, is an estimate there")
    work = _work(request, budget)
    q_width = shape.num_heads * shape.head_dim
    return Forecast(
        request=request,
        hardware=hardware,
        layout=layout,
        budget=budget,
        formats=tuple(_formats(shape, budget)),
        most_bits=bits_that_fit(shape, _weight_room(budget, layout, request.batch)),
        modes=steps,
        prefill_s=prefill_time(work, request.context, q_width, hardware.rates),
        notes=(*notes, *budget.notes),
    )


def _layout(request: Request, hardware: Hardware, notes: list[str]) -> PageLayout:
    shape, dtype = request.shape, request.dtype or request.shape.dtype
    if dtype == "bfloat16" and not hardware.has_bfloat16:
        if request.dtype is not None:
            raise ConfigError(f"dtype='bfloat16': {hardware.gpu} has none; must be 'float16'")
        notes.append(f"{hardware.gpu} has no bfloat16: K and V in float16")
        dtype = "float16"
    return PageLayout(
        shape.num_layers, shape.num_kv_heads, shape.head_dim, dtype, request.page_tokens
    )


def _formats(shape: ModelShape, budget: Budget) -> list[FormatFit]:
    room = budget.room_for_weights
    every = [(kind.value, BITS[kind]) for kind in WeightFormat]
    every += [(f"{bits} bits", bits_with_scales(bits)) for bits in FEW_BITS]
    return [
        FormatFit(name, bits, num_bytes, num_bytes <= room)
        for name, bits in every
        for num_bytes in (bytes_at(shape, bits),)
    ]


def _weight_room(budget: Budget, layout: PageLayout, batch: int) -> int:
    return budget.room_for_weights - batch * layout.slot_bytes


def _work(request: Request, budget: Budget, streamed: int = 0, cold: int = 0) -> Work:
    shape = request.shape
    return Work(
        program=request.program,
        batch=request.batch,
        num_layers=shape.num_layers,
        weight_bytes=bytes_read(shape, BITS[request.weights]),
        parameters=num_parameters(shape) - shape.vocab_size * shape.hidden_size,
        kv_bytes=budget.kv_bytes,
        streamed_bytes=streamed,
        cold_bytes=cold,
    )


def _steps(
    request: Request, hardware: Hardware, budget: Budget, dtype: str
) -> tuple[StepTime, ...]:
    assert budget.kv_tier != NOWHERE
    rates = hardware.rates
    device = Device.GPU if hardware.gpu_bytes else Device.HOST
    streamed = budget.kv_bytes - budget.kv_in(HOT)
    cold = budget.kv_in(COLD)
    if not streamed:
        work = _work(request, budget)
        modes = [Mode.RESIDENT, Mode.EAGER] if device is Device.GPU else [Mode.EAGER]
        return tuple(step_time(mode, work, rates, device) for mode in modes)
    work = _work(request, budget, streamed, cold)
    ours = [step_time(Mode.FIXED, work, rates, device)]
    split = rates.split(dtype)
    if device is Device.GPU and split is not None and work.ram_bytes:
        ours.append(shared_time(work, rates, split))
    lru = step_time(Mode.LRU, _work(request, budget, budget.kv_bytes, cold), rates, device)
    return (*sorted(ours, key=lambda step: step.total_s), lru)


def _mode_table(step: StepTime) -> dict[str, object]:
    shared = step.shared
    return {
        "mode": step.mode.value,
        "tokens_per_s": step.tokens_per_s,
        "limit": step.limit.value,
        "total_s": step.total_s,
        "gpu_s": step.gpu_s,
        "weights_s": step.weights_s,
        "compute_s": step.compute_s,
        "attention_s": step.attention_s,
        "kernels_s": step.kernels_s,
        "step_s": step.step_s,
        "host_s": step.host_s,
        "link_s": step.link_s,
        "disk_s": step.disk_s,
        "cpu_s": step.cpu_s,
        "hand_over_s": 0.0 if shared is None else shared.hand_over_s,
        "cpu_share": 0.0 if shared is None else shared.share,
        "attended_bytes": 0 if shared is None else round(shared.attended_bytes),
        "streamed_bytes": step.work.streamed_bytes,
        "cold_bytes": step.work.cold_bytes,
    }
