"""Tier options: the TierConfig that options, a file or profile, and the device at hand make together."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tiermem.cli.human import size_text
from tiermem.cli.notes import note
from tiermem.config import TierConfig, profile_for_device
from tiermem.configfile import read_table
from tiermem.device.report import DeviceChoice
from tiermem.errors import ConfigError
from tiermem.units import Size, SizeKind

PRIVATE_SHARE = 0.9
"""Of the free space, what a private cold tier takes at most."""

OPTIONS = ("gpu", "ram", "ssd", "ssd_path", "device")


@contextmanager
def tier_overrides(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """What the options say, checked; with a private directory, for as long as the context, where one is needed.

    Raises
    ------
    ConfigError: a value that cannot be.
    """
    given = {key: getattr(options, key) for key in OPTIONS if getattr(options, key) is not None}
    ssd = Size.parse(_ssd_wanted(options), "ssd")
    needs_place = not ssd.is_zero and ssd.kind is not SizeKind.AUTO
    if "ssd_path" in given or "ssd_path" in _table(options) or not needs_place:
        TierConfig.from_table(given)
        yield given
        return
    config = TierConfig.from_table({**given, "ssd": ssd, "ssd_path": "private"})
    with _private_directory() as directory:
        yield {**given, "ssd": _that_fits(ssd, directory, config), "ssd_path": str(directory)}


def tier_config(
    options: argparse.Namespace, overrides: dict[str, object], choice: DeviceChoice | None = None
) -> TierConfig:
    """The configuration; `choice`, once it is known, gives the profile if none is named, and the device."""
    if choice is not None:
        overrides = {**overrides, "device": device_name(choice)}
    if options.config is not None:
        return TierConfig.load(options.config, **overrides)
    if options.profile is not None:
        return TierConfig.from_profile(options.profile, **overrides)
    if choice is None:
        return TierConfig.from_table(overrides)
    gpu = choice.gpu
    name = profile_for_device(gpu.name if gpu else None, gpu.total_bytes if gpu else 0)
    return TierConfig.from_profile(name, **overrides)


def device_name(choice: DeviceChoice) -> str:
    """The device as torch names it."""
    return "cpu" if choice.gpu is None else f"cuda:{choice.gpu.index}"


def private_base() -> Path:
    """Where private directories go: TMPDIR, else /var/tmp, which is on a disk where /tmp may be memory."""
    if "TMPDIR" in os.environ:
        return Path(tempfile.gettempdir())
    var_tmp = Path("/var/tmp")
    return var_tmp if os.access(var_tmp, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def _ssd_wanted(options: argparse.Namespace) -> str | int | float | Size:
    value = options.ssd if options.ssd is not None else _table(options).get("ssd", "auto")
    if not isinstance(value, (str, int, float)):
        raise ConfigError(f"ssd={value!r}: must be a size")
    return value


def _table(options: argparse.Namespace) -> dict[str, object]:
    return {} if options.config is None else read_table(options.config)


def _that_fits(ssd: Size, directory: Path, config: TierConfig) -> Size:
    usage = shutil.disk_usage(directory)
    free_bytes = max(usage.free - config.free_floor_bytes(usage.total), 0)
    wanted = ssd.resolve(free_bytes)
    if wanted <= free_bytes * PRIVATE_SHARE:
        return ssd
    fitting = int(free_bytes * PRIVATE_SHARE)
    note(f"ssd={ssd}: only {size_text(free_bytes)} are free in {directory.parent} above ssd_free_floor; using "
         f"{size_text(fitting)}")  # fmt: skip
    return Size(SizeKind.EXPLICIT, num_bytes=fitting)


@contextmanager
def _private_directory() -> Iterator[Path]:
    try:
        directory = Path(tempfile.mkdtemp(prefix="tiermem-", dir=private_base()))
    except OSError as error:
        raise ConfigError(
            f"ssd: no private directory can be made in {private_base()} ({error.strerror}); give "
            f"--ssd-path"
        ) from error
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
