"""Case: one request to measure: its context, its tiers and the CPU's share; and whether it can be at all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tiermem.config import TierConfig
from tiermem.errors import ConfigError
from tiermem.layout import PageLayout
from tiermem.measure.beside_link import BesideLink
from tiermem.model_shape import ModelShape
from tiermem.units import format_bytes

SPARE_PAGES = 8
"""Beyond those of the request: for short steps before and after it."""
AUTO, MEASURED = "auto", "measured"


class Fill(Enum):
    """How the cache gets its K and V."""

    PREFILL = "prefill"
    """The model computes them."""
    SYNTHETIC = "synthetic"
    """Random ones of realistic scale, through the steps that a model would take, without running it."""


class Baseline(Enum):
    """What else the same tokens are decoded with, in the same run."""

    RESIDENT = "resident"
    """tiermem with everything in device memory."""
    STREAMING = "streaming"
    """Everything over the link: what a cache under LRU comes to, which finds nothing of a cyclic scan."""
    OFFLOADED = "offloaded"
    """transformers' offloaded cache."""


@dataclass(frozen=True, slots=True)
class CpuShare:
    """The share of what is in RAM that the CPU attends: a number, "auto" (the configuration's), or "measured".

    "measured" is the CPU's part of what both read beside each other in this run.
    """

    text: str

    @classmethod
    def parse(cls, text: str) -> CpuShare:
        """Read an option.

        Raises
        ------
        ConfigError: neither a number from 0 to 1 nor one of the words.
        """
        if text in (AUTO, MEASURED):
            return cls(text)
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise ConfigError(f"cpu_share={text[:40]!r}: must be 0 to 1, {AUTO} or {MEASURED}")
        return cls(f"{value:g}")

    def value(self, beside: BesideLink | None) -> float | None:
        """For TierConfig; `beside` is None where the device is the CPU, which then attends all."""
        if self.text == AUTO:
            return None
        if self.text == MEASURED:
            return 1.0 if beside is None else round(beside.ram_share, 3)
        return float(self.text)


@dataclass(frozen=True, slots=True)
class Settings:
    """What all cases of a run share. Sizes are bytes; `ram_bytes` None: as much as a case needs.

    new_tokens: timed ones of a case; offloaded_tokens: of transformers' offloaded cache, which is slow.
    chunk_tokens: of one call of a prefill. pass_sizes: new tokens of passes that are timed besides.
    """

    fill: Fill
    contexts: tuple[int, ...]
    gpu_bytes: tuple[int, ...]
    cpu_shares: tuple[CpuShare, ...]
    baselines: frozenset[Baseline]
    ram_bytes: int | None
    ssd_bytes: int
    ssd_path: Path | None
    cpu_threads: int | None
    new_tokens: int
    offloaded_tokens: int
    chunk_tokens: int
    page_tokens: int
    pass_sizes: tuple[int, ...] = ()

    def cases(self) -> Iterator[Case]:
        """Every context with every hot budget and every share."""
        for context in self.contexts:
            for gpu_bytes in self.gpu_bytes:
                for share in self.cpu_shares:
                    yield Case(context, gpu_bytes, share)


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration of the sweep."""

    context: int
    gpu_bytes: int
    share: CpuShare


@dataclass(frozen=True, slots=True)
class Sizes:
    """The pages of a request of `context` tokens and some new ones, and where they could lie."""

    layout: PageLayout
    context: int
    num_pages: int

    @classmethod
    def of(cls, layout: PageLayout, context: int, new_tokens: int) -> Sizes:
        """Of a request that is decoded for `new_tokens` tokens."""
        return cls(layout, context, layout.pages_for(context + new_tokens) + SPARE_PAGES)

    @property
    def num_bytes(self) -> int:
        """All pages."""
        return self.num_pages * self.layout.slot_bytes

    @property
    def kv_bytes(self) -> int:
        """K and V of the context itself."""
        return self.context * self.layout.token_bytes

    def warm_bytes(self, settings: Settings) -> int:
        """The RAM tier: as was asked for, or a copy of every page."""
        return self.num_bytes if settings.ram_bytes is None else settings.ram_bytes


def layout_of(shape: ModelShape, dtype: str, page_tokens: int) -> PageLayout:
    """Pages of a model of `shape` whose K and V are of `dtype`."""
    return PageLayout(shape.num_layers, shape.num_kv_heads, shape.head_dim, dtype, page_tokens)


def check_room(settings: Settings, layout: PageLayout, new_tokens: int) -> None:
    """Refuse what cannot be, before anything is built.

    Raises
    ------
    ConfigError: a hot budget that is smaller than the staging of streamed layers, or a context that all tiers
        together do not hold; each with the sizes that are needed.
    """
    for context in settings.contexts:
        if settings.fill is Fill.SYNTHETIC and context % layout.page_tokens:
            raise ConfigError(
                f"context={context}: must be a multiple of page_tokens={layout.page_tokens} with "
                f"synthetic K and V"
            )
        sizes = Sizes.of(layout, context, new_tokens)
        for gpu in settings.gpu_bytes:
            _check_hot(gpu, staging_bytes(settings, layout, gpu), layout)
            _check_tiers(sizes, gpu, sizes.warm_bytes(settings), settings.ssd_bytes)


def check_host(settings: Settings, layout: PageLayout, new_tokens: int, host_free: int) -> None:
    """Refuse a RAM tier that the host has no room for.

    Raises
    ------
    ConfigError: naming both sizes.
    """
    for context in settings.contexts:
        warm = Sizes.of(layout, context, new_tokens).warm_bytes(settings)
        if warm > host_free:
            raise ConfigError(
                f"ram={_text(warm)}: context={context} is to have that much pinned memory, "
                f"{_text(host_free)} are free; a smaller ram needs ssd"
            )


def staging_bytes(settings: Settings, layout: PageLayout, gpu: int) -> int:
    """Device memory that slices of streamed layers pass through, beside a hot tier of `gpu` bytes."""
    config = TierConfig(gpu=layout.slot_bytes, ram=0, cpu_threads=settings.cpu_threads)
    return config.ring_bytes(layout, gpu)


def _check_hot(gpu: int, staging: int, layout: PageLayout) -> None:
    least = staging + layout.slot_bytes
    if gpu < least:
        raise ConfigError(
            f"gpu={_text(gpu)}: below what streamed layers are staged in ({_text(staging)}) and a "
            f"page for new tokens ({_text(layout.slot_bytes)}); must be at least {_text(least)}"
        )


def _check_tiers(sizes: Sizes, gpu: int, ram: int, ssd: int) -> None:
    slot = sizes.layout.slot_bytes
    missing = sizes.num_pages - gpu // slot - ram // slot - ssd // slot
    if missing > 0:
        raise ConfigError(
            f"context={sizes.context}: its K and V take {_text(sizes.num_bytes)} in pages, "
            f"{_text(missing * slot)} more than gpu={_text(gpu)}, ram={_text(ram)} and "
            f"ssd={_text(ssd)} hold; give ram at least {_text(ram + missing * slot)}, or an ssd"
        )


def _text(num_bytes: int) -> str:
    """Bytes as they can be given back, with their size in GB where that is easier to read."""
    exact = format_bytes(num_bytes)
    return exact if len(exact) <= 7 else f"{exact} ({num_bytes / 1e9:.3g} GB)"
