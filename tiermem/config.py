"""TierConfig: how large the tiers are and how they behave. Checked when made; nothing is allocated here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path

from tiermem.configfile import read_table
from tiermem.errors import ConfigError
from tiermem.fields import (
    check_device,
    check_enum,
    check_int,
    check_keys,
    check_number,
    check_path,
    check_text,
    refuse,
)
from tiermem.layout import PageLayout
from tiermem.legacy import LEGACY_KEYS, translate
from tiermem.profiles import find_profile, hardware_profiles, profile_for_device
from tiermem.units import Size, SizeKind, SizeLike, format_bytes

__all__ = [
    "AttentionMath",
    "DecodeGraphs",
    "IoEngine",
    "TierConfig",
    "VerifyRam",
    "profile_for_device",
]

AUTO_GPU_FRACTION = 0.8
AUTO_RAM_FRACTION = 0.25
AUTO_SSD_FRACTION = 0.25
"""What "auto" takes of the memory or disk that is free when the pool is made."""
AUTO_FLOOR_FRACTION = 0.05
AUTO_FLOOR_BYTES = 1 << 30
"""What "auto" leaves free on the SSD tier's file system: this share of its size, but at most so many bytes."""

RING_SHARE = 32
RING_BYTES = 256 << 20
"""Large chunks cost the host little: 62 layers of 256 KiB slices at 128K tokens are 4 or fewer a layer then."""


class IoEngine(Enum):
    """How the SSD tier's file is read and written. AUTO: io_uring where the kernel permits it, else threads."""

    AUTO = "auto"
    URING = "uring"
    THREADS = "threads"


class AttentionMath(Enum):
    """How attention multiplies. AUTO: in the pages' dtype, on tensor cores where there are any, summed in fp32.

    FLOAT32: operands are widened to fp32 first; slower, and without the rounding of fp16 products.
    """

    AUTO = "auto"
    FLOAT32 = "float32"


class DecodeGraphs(Enum):
    """Whether decode steps are replayed as CUDA graphs. AUTO: where all pages are hot and it can be done."""

    AUTO = "auto"
    OFF = "off"


class VerifyRam(Enum):
    """What is compared with its checksum of pages that the CPU attends in RAM.

    SAMPLE: one page in every layer of every step, in rotation, so that a damaged page may be used some times
    before it is found. ALWAYS: every page before its result is used, which reads what is attended a second time,
    by one thread. Pages that leave RAM or the SSD are always compared, whatever this says.
    """

    SAMPLE = "sample"
    ALWAYS = "always"


class DebugMode(Enum):
    """What is checked besides. POISON: memory that nobody owns is filled, and checked when it is taken; slow."""

    OFF = "off"
    POISON = "poison"


@dataclass(frozen=True, slots=True, init=False)
class TierConfig:
    """Sizes and behaviour of the tiers; read-only.

    Parameters
    ----------
    gpu, ram, ssd: size of the hot, warm and cold tier: bytes, "8GiB", "50%", 0.5 (of what is free when the
        pool is made) or "auto". 0 switches ram or ssd off; gpu must be above 0.
    ssd_path: directory of the cold tier. A size of ssd above 0 needs it; without it "auto" is 0.
    ssd_free_floor: size (a share is of the file system's size) that is left free on the SSD tier's file system:
        below it the tier neither grows nor writes ahead of need. "auto" is 5 %, at most 1 GiB; 0 for none.
    ssd_write_budget: bytes that may be written to the SSD in a day, against wear; None for no limit.
    ssd_key_file: private file of a key of 32 bytes with which the SSD tier is encrypted; None takes the key in the
        environment variable TIERMEM_SSD_KEY, and encrypts nothing where there is none.
    device: "auto", "cpu", "cuda" or "cuda:N".
    gpu_limit: the most bytes of device memory that the hot pool and staging may take together; None for no
        limit but the device's.
    low_watermark, high_watermark: shares (0 to 1) of a tier's pages that are free or clean and unpinned:
        below low, pages are demoted ahead of need, until it is high.
    staging_pages: 1 to 4096, pages of staging per direction; see `ring_bytes` too.
    max_sequences: 1 to 65536, the most sequences in one step; sizes the step's fixed device buffers.
    io_engine: an IoEngine or its text.
    io_timeout_s: above 0 to 3600, deadline of one read or write, seconds.
    copy_timeout_s: above 0 to 86400, deadline of a copy or a step on the device, seconds from when it was
        enqueued: longer than the longest pass of the model.
    pressure_warning, pressure_critical: shares (0 to 1) of device or host memory in use at which a warning is
        logged, once a level.
    attention_math: an AttentionMath or its text.
    cpu_threads: 1 to the CPUs of this process, threads that attend over pages in RAM; None for one each on the
        CPU device, and for one less beside a GPU.
    cpu_share: share (0 to 1) of a sequence's pages in RAM alone that the CPU attends there, while the other ones
        are streamed to the device; None for all on the CPU device, and beside a GPU for what ends both at once by
        the rates that `tiermem calibrate` measured, 0 without them.
    debug: a DebugMode or its text; the environment variable TIERMEM_DEBUG has it too.
    decode_graphs: a DecodeGraphs or its text; for `CapturedDecode` and the Hugging Face integration.
    verify_ram: a VerifyRam or its text; for pages that the CPU attends in RAM.

    Raises
    ------
    ConfigError: naming key, value and allowed range.
    """

    gpu: Size
    ram: Size
    ssd: Size
    ssd_path: Path | None
    ssd_free_floor: Size
    ssd_write_budget: Size | None
    ssd_key_file: Path | None
    device: str
    gpu_limit: Size | None
    low_watermark: float
    high_watermark: float
    staging_pages: int
    max_sequences: int
    io_engine: IoEngine
    io_timeout_s: float
    copy_timeout_s: float
    pressure_warning: float
    pressure_critical: float
    attention_math: AttentionMath
    cpu_threads: int | None
    cpu_share: float | None
    decode_graphs: DecodeGraphs
    verify_ram: VerifyRam
    debug: DebugMode

    def __init__(
        self,
        gpu: SizeLike = "auto",
        ram: SizeLike = "auto",
        ssd: SizeLike = "auto",
        ssd_path: str | Path | None = None,
        device: str = "auto",
        *,
        ssd_free_floor: SizeLike = "auto",
        ssd_write_budget: SizeLike | None = None,
        ssd_key_file: str | Path | None = None,
        gpu_limit: SizeLike | None = None,
        low_watermark: float = 0.05,
        high_watermark: float = 0.10,
        staging_pages: int = 4,
        max_sequences: int = 256,
        io_engine: IoEngine | str = IoEngine.AUTO,
        io_timeout_s: float = 30.0,
        copy_timeout_s: float = 120.0,
        pressure_warning: float = 0.90,
        pressure_critical: float = 0.97,
        attention_math: AttentionMath | str = AttentionMath.AUTO,
        cpu_threads: int | None = None,
        cpu_share: float | None = None,
        decode_graphs: DecodeGraphs | str = DecodeGraphs.AUTO,
        verify_ram: VerifyRam | str = VerifyRam.SAMPLE,
        debug: DebugMode | str = DebugMode.OFF,
    ) -> None:
        path = None if ssd_path is None else check_path("ssd_path", ssd_path)
        values: dict[str, object] = {
            "gpu": Size.parse(gpu, "gpu", AUTO_GPU_FRACTION),
            "ram": Size.parse(ram, "ram", AUTO_RAM_FRACTION),
            "ssd": _without_path(Size.parse(ssd, "ssd", AUTO_SSD_FRACTION), path),
            "ssd_path": path,
            "ssd_free_floor": Size.parse(ssd_free_floor, "ssd_free_floor", AUTO_FLOOR_FRACTION),
            "ssd_write_budget": _bytes_or_none("ssd_write_budget", ssd_write_budget),
            "ssd_key_file": None
            if ssd_key_file is None
            else check_path("ssd_key_file", ssd_key_file),
            "device": check_device("device", device),
            "gpu_limit": None if gpu_limit is None else Size.parse(gpu_limit, "gpu_limit"),
            "low_watermark": check_number("low_watermark", low_watermark, 0, 1),
            "high_watermark": check_number("high_watermark", high_watermark, 0, 1),
            "staging_pages": check_int("staging_pages", staging_pages, 1, 4096),
            "max_sequences": check_int("max_sequences", max_sequences, 1, 65536),
            "io_engine": check_enum("io_engine", io_engine, IoEngine),
            "io_timeout_s": check_number("io_timeout_s", io_timeout_s, 0.001, 3600),
            "copy_timeout_s": check_number("copy_timeout_s", copy_timeout_s, 0.001, 86400),
            "pressure_warning": check_number("pressure_warning", pressure_warning, 0, 1),
            "pressure_critical": check_number("pressure_critical", pressure_critical, 0, 1),
            "attention_math": check_enum("attention_math", attention_math, AttentionMath),
            "cpu_threads": None
            if cpu_threads is None
            else check_int("cpu_threads", cpu_threads, 1, 4096),
            "cpu_share": None if cpu_share is None else check_number("cpu_share", cpu_share, 0, 1),
            "decode_graphs": check_enum("decode_graphs", decode_graphs, DecodeGraphs),
            "verify_ram": check_enum("verify_ram", verify_ram, VerifyRam),
            "debug": check_enum("debug", debug, DebugMode),
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)
        _check_sizes(self)
        _check_order(self, "low_watermark", "high_watermark")
        _check_order(self, "pressure_warning", "pressure_critical")

    @classmethod
    def load(cls, path: str | Path, **overrides: object) -> TierConfig:
        """Read a `.json` or `.toml` file; `overrides` replace keys of the file before anything is checked.

        Older key names (tiermem/legacy.py) are translated; `description` is text for people.

        Raises
        ------
        ConfigError: naming file, key, value and allowed range.
        """
        table = read_table(path)
        try:
            return cls.from_table({**translate(table), **overrides})
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_profile(cls, name: str, **overrides: object) -> TierConfig:
        """The shipped hardware profile `name` ("t4", "a10", "a100", "h100", "h200", "cpu")."""
        return cls.load(find_profile(name, hardware_profiles()), **overrides)

    @classmethod
    def from_table(cls, table: Mapping[str, object]) -> TierConfig:
        """A configuration from keys and values of unknown types; see `load` for older names."""
        given = translate(table)
        check_keys(given, [*(field.name for field in fields(cls)), "description", *LEGACY_KEYS])
        if "description" in given:
            check_text("description", given.pop("description"), 1000)
        # Each value is checked by the constructor, whatever its type.
        return cls(**given)  # type: ignore[arg-type]

    def ring_bytes(self, layout: PageLayout, hot_bytes: int) -> int:
        """Device memory that streamed slices pass through beside a hot tier of `hot_bytes`.

        As much as `staging_pages`, or a RING_SHAREth of the hot tier if that is more, but not above RING_BYTES.
        """
        share = min(hot_bytes // RING_SHARE, RING_BYTES)
        num_slices = max(self.staging_pages * layout.num_layers, share // layout.layer_bytes)
        return max(num_slices // 2, 1) * 2 * layout.layer_bytes

    def free_floor_bytes(self, total_bytes: int) -> int:
        """What is to be left free on an SSD tier's file system of `total_bytes`."""
        floor = self.ssd_free_floor.resolve(total_bytes)
        return min(floor, AUTO_FLOOR_BYTES) if self.ssd_free_floor.kind is SizeKind.AUTO else floor

    def to_table(self) -> dict[str, object]:
        """Keys and values that JSON can hold and that `from_table` reads back as an equal configuration."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


def _without_path(ssd: Size, path: Path | None) -> Size:
    """`ssd`, which is 0 when it is "auto" and there is nowhere to put it."""
    if path is None and ssd.kind is SizeKind.AUTO:
        return Size(SizeKind.EXPLICIT)
    return ssd


def _bytes_or_none(key: str, value: SizeLike | None) -> Size | None:
    if value is None:
        return None
    size = Size.parse(value, key)
    if size.kind is not SizeKind.EXPLICIT or size.is_zero:
        raise refuse(key, str(size), "bytes above 0, or text with a unit")
    return size


def _check_sizes(config: TierConfig) -> None:
    if config.gpu.is_zero:
        raise ConfigError(
            "gpu=0: must be above 0; attention needs a hot tier, if only of a few pages"
        )
    if config.ssd_path is None and not config.ssd.is_zero:
        raise ConfigError(f"ssd={config.ssd}: needs ssd_path, the directory of the cold tier")
    limit = config.gpu_limit
    if limit is None:
        return
    if limit.kind is not SizeKind.EXPLICIT or limit.is_zero:
        raise refuse("gpu_limit", str(limit), "bytes above 0, or text with a unit")
    if config.gpu.kind is SizeKind.EXPLICIT and config.gpu.num_bytes > limit.num_bytes:
        raise ConfigError(
            f"gpu={config.gpu}: must be at most gpu_limit={format_bytes(limit.num_bytes)}"
        )


def _check_order(config: TierConfig, low_key: str, high_key: str) -> None:
    low, high = getattr(config, low_key), getattr(config, high_key)
    if low > high:
        raise ConfigError(f"{low_key}={low}: must be at most {high_key}={high}")


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, (Size, Path)) else value
