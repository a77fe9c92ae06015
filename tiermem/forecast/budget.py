"""Budget: what a machine's memory is spent on, and in which tier weights and contexts lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tiermem.config import TierConfig
from tiermem.forecast.hardware import Hardware
from tiermem.layout import ITEM_BYTES, PageLayout
from tiermem.model_shape import ModelShape
from tiermem.units import Size, SizeKind

RESERVE_BYTES = 1 << 30
"""Device memory that is neither weights nor K and V: the CUDA context, work space, activations. At least."""
CONTEXT_BYTES = 552_402_944
"""What the driver takes of an H200 for a context, which a GPU that reports 150,109,880,320 bytes does not have."""
WORK_BYTES = (192 + 64) << 20
"""Staging of copies, and what libraries of matrix products work with."""
CHUNK_TOKENS = 2048
"""Tokens of a prompt that go through the model at a time."""
HOST_SHARE = 0.9
"""Of the host's memory, what is free on a machine that runs nothing else."""
HOT, WARM, COLD = "gpu", "ram", "ssd"
NOWHERE = "none"


@dataclass(frozen=True, slots=True)
class Tier:
    """One tier: what it may take, in whole pages, and what of the contexts lies in it. Bytes.

    max_batch: sequences of the wanted context that fit in this tier and those above it. max_context: tokens of
    each of the wanted sequences that fit there.
    """

    name: str
    num_bytes: int
    kv_bytes: int
    max_batch: int
    max_context: int


@dataclass(frozen=True, slots=True)
class Budget:
    """How memory is split. weights_fit: into device memory, with a page for every sequence beside them.

    weights_tier: the highest tier that holds them, "none" where nothing does.
    free_gpu_bytes: what is left of device memory beside the weights and the reserve.
    problems: why it does not fit; empty where it does. notes: what was changed to make it fit.
    """

    gpu_bytes: int
    reserve_bytes: int
    staging_bytes: int
    weights_bytes: int
    weights_fit: bool
    weights_tier: str
    free_gpu_bytes: int
    kv_bytes: int
    tiers: tuple[Tier, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Weights on the GPU, and K and V of every sequence in the tiers."""
        return not self.problems

    @property
    def room_for_weights(self) -> int:
        """Bytes that weights may have at most, with the least K and V beside them."""
        return self.gpu_bytes - self.reserve_bytes - self.staging_bytes

    def kv_in(self, name: str) -> int:
        """Bytes of the contexts in one tier."""
        return next(tier.kv_bytes for tier in self.tiers if tier.name == name)

    @property
    def kv_tier(self) -> str:
        """The lowest tier that K and V need; "none" where they do not fit."""
        if sum(tier.kv_bytes for tier in self.tiers) < self.kv_bytes:
            return NOWHERE
        return [tier.name for tier in self.tiers if tier.kv_bytes][-1]


def reserve_bytes(shape: ModelShape) -> int:
    """Device memory that a model of `shape` needs beside weights, K and V, and their staging.

    Activations are those of a chunk's rows: the residual stream and what is computed from it, q, what attention
    gives, and twice more in float32 while partial results are merged; gate, up and their product; and one row of
    logits in float32.
    """
    heads = shape.num_heads * shape.head_dim
    row = ITEM_BYTES[shape.dtype] * (
        4 * shape.hidden_size + 2 * heads + 3 * shape.intermediate_size
    )
    merged = 2 * ITEM_BYTES["float32"] * heads
    activations = CHUNK_TOKENS * (row + merged) + ITEM_BYTES["float32"] * shape.vocab_size
    return max(RESERVE_BYTES, CONTEXT_BYTES + WORK_BYTES + activations)


def make_budget(
    hardware: Hardware,
    config: TierConfig,
    layout: PageLayout,
    weights_bytes: int,
    batch: int,
    context: int,
    given: frozenset[str],
    reserve: int = RESERVE_BYTES,
) -> Budget:
    """Split the memory of `hardware` for `batch` sequences of `context` tokens each.

    Parameters
    ----------
    config: sizes of the tiers. given: those of "gpu", "ram", "ssd" that were asked for; others are made to fit.
    reserve: bytes that are kept for neither weights nor K and V.
    """
    on_gpu = hardware.gpu_bytes > 0
    device_bytes = hardware.gpu_bytes if on_gpu else int(hardware.ram_bytes * HOST_SHARE)
    free = device_bytes - reserve - weights_bytes
    staging = config.ring_bytes(layout, config.gpu.resolve(max(free, 0)))
    least = staging + batch * layout.slot_bytes
    weights_fit = free >= least
    hot, note = _hot(config, free - staging if weights_fit else 0, given)
    notes = [] if note is None else [note]
    host = int(hardware.ram_bytes * HOST_SHARE) - (0 if on_gpu else weights_bytes + hot)
    sizes = {
        HOT: hot,
        WARM: _lower(config.ram, max(host, 0), WARM, hardware, notes),
        COLD: _lower(config.ssd, hardware.ssd_bytes, COLD, hardware, notes),
    }
    kv_bytes = batch * layout.pages_for(context) * layout.slot_bytes
    tiers = tuple(_tiers(sizes, layout, batch, context))
    weights_tier = HOT if weights_fit and on_gpu else _weights_tier(hardware, weights_bytes)
    budget = Budget(
        gpu_bytes=device_bytes,
        reserve_bytes=reserve,
        staging_bytes=staging,
        weights_bytes=weights_bytes,
        weights_fit=weights_fit,
        weights_tier=weights_tier,
        free_gpu_bytes=max(free, 0),
        kv_bytes=kv_bytes,
        tiers=tiers,
        problems=(),
        notes=tuple(notes),
    )
    problems = _problems(budget, hardware, config, given, layout)
    return replace(budget, problems=tuple(problems))


def _lower(size: Size, free: int, name: str, hardware: Hardware, notes: list[str]) -> int:
    """A lower tier's bytes; a machine that is only imagined may have more than its profile, and is noted."""
    wanted = size.resolve(free)
    if wanted <= free or hardware.is_here:
        return min(wanted, free)
    notes.append(f"{name}={size}: more than profile {hardware.profile} has; as if it had it")
    return wanted


def _hot(config: TierConfig, free: int, given: frozenset[str]) -> tuple[int, str | None]:
    """The hot tier's bytes, and what was changed of the profile's."""
    wanted = config.gpu.resolve(free)
    if config.gpu_limit is not None and HOT not in given:
        wanted = min(wanted, config.gpu_limit.num_bytes)
    if wanted <= free:
        return wanted, None
    if free <= 0 or HOT in given:
        return max(free, 0), None
    return free, f"the profile's gpu={config.gpu} does not fit beside the weights: smaller here"


def _tiers(sizes: dict[str, int], layout: PageLayout, batch: int, context: int) -> Iterator[Tier]:
    pages_each = layout.pages_for(context)
    left = batch * pages_each
    slots = 0
    for name, num_bytes in sizes.items():
        count = num_bytes // layout.slot_bytes
        slots += count
        here = min(left, count)
        left -= here
        yield Tier(
            name=name,
            num_bytes=count * layout.slot_bytes,
            kv_bytes=here * layout.slot_bytes,
            max_batch=slots // pages_each,
            max_context=slots // batch * layout.page_tokens,
        )


def _weights_tier(hardware: Hardware, weights_bytes: int) -> str:
    if weights_bytes <= hardware.ram_bytes * HOST_SHARE:
        return WARM
    return COLD if weights_bytes <= hardware.ssd_bytes else NOWHERE


def _problems(
    budget: Budget,
    hardware: Hardware,
    config: TierConfig,
    given: frozenset[str],
    layout: PageLayout,
) -> Iterator[str]:
    where = hardware.gpu or "host memory"
    if not budget.weights_fit:
        yield (
            f"the weights, {_gb(budget.weights_bytes)}, do not fit {where}: "
            f"{_gb(budget.gpu_bytes)} less {_gb(budget.reserve_bytes)} for context and activations"
        )
        return
    hot = config.gpu
    if HOT in given and hot.kind is SizeKind.EXPLICIT:
        room = budget.free_gpu_bytes - budget.staging_bytes
        if hot.num_bytes > room:
            yield f"gpu={hot}: only {_gb(room)} of {where} are left beside the weights"
    if hardware.is_here:
        yield from _more_than_there_is(config, hardware)
    stored = sum(tier.kv_bytes for tier in budget.tiers)
    if stored < budget.kv_bytes:
        total = sum(tier.num_bytes for tier in budget.tiers)
        yield f"K and V, {_gb(budget.kv_bytes)}, exceed all tiers together, {_gb(total)}: more ram or ssd"
    if budget.tiers[0].num_bytes < layout.slot_bytes:
        yield f"no page of {layout.slot_bytes} bytes fits the GPU tier"


def _more_than_there_is(config: TierConfig, hardware: Hardware) -> Iterator[str]:
    """What was asked for of this machine that it has not."""
    free = {WARM: int(hardware.ram_bytes * HOST_SHARE), COLD: hardware.ssd_bytes}
    for name, size in ((WARM, config.ram), (COLD, config.ssd)):
        if size.kind is SizeKind.EXPLICIT and size.num_bytes > free[name]:
            yield f"{name}={size}: this machine has {_gb(free[name])} for it"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
