"""Older names of configuration keys, which files may still use.

gpu_memory_budget_mb, model_gpu_mb   gpu_limit = budget - model: what is left for the hot pool and staging
kv_cache_gpu_mb                      gpu
batch_size                           max_sequences
enable_tensor_cores, fp16_matmul     attention_math = "auto" when both are true (the default), else "float32"

An MB of these is 1,048,576 bytes. A key given under both names must say the same under both.
"""

from __future__ import annotations

from collections.abc import Mapping

from tiermem.errors import ConfigError
from tiermem.fields import check_bool, check_int
from tiermem.units import Size, SizeLike, shorten

LEGACY_KEYS = frozenset(
    {
        "gpu_memory_budget_mb",
        "kv_cache_gpu_mb",
        "model_gpu_mb",
        "batch_size",
        "enable_tensor_cores",
        "fp16_matmul",
    }
)

_MAX_MB = 2**30
_MAX_BATCH = 65536


def translate(table: Mapping[str, object]) -> dict[str, object]:
    """`table` with the older keys replaced by today's.

    Raises
    ------
    ConfigError: a value of the wrong type or range, sizes that contradict each other, or a key that is given
        under both names with different values.
    """
    old = {key: value for key, value in table.items() if key in LEGACY_KEYS}
    new = {key: value for key, value in table.items() if key not in LEGACY_KEYS}
    for key, (value, origin) in _translated(old).items():
        if key in new and not _same(key, new[key], value):
            raise ConfigError(
                f"{key}={shorten(new[key])}: contradicts {origin}, which make it {value!r}"
            )
        new.setdefault(key, value)
    return new


def _translated(old: Mapping[str, object]) -> dict[str, tuple[SizeLike, str]]:
    """Today's key -> its value and the older keys it comes from."""
    new = _memory(old)
    if "batch_size" in old:
        batch_size = check_int("batch_size", old["batch_size"], 1, _MAX_BATCH)
        new["max_sequences"] = batch_size, "batch_size"
    math_keys = [key for key in ("enable_tensor_cores", "fp16_matmul") if key in old]
    if math_keys:
        switched_off = [key for key in math_keys if not check_bool(key, old[key])]
        new["attention_math"] = "float32" if switched_off else "auto", " and ".join(math_keys)
    return new


def _memory(old: Mapping[str, object]) -> dict[str, tuple[SizeLike, str]]:
    budget, kv_cache, model = (
        check_int(key, old[key], 1, _MAX_MB) if key in old else None
        for key in ("gpu_memory_budget_mb", "kv_cache_gpu_mb", "model_gpu_mb")
    )
    new: dict[str, tuple[SizeLike, str]] = {}
    if kv_cache is not None:
        new["gpu"] = f"{kv_cache}MiB", "kv_cache_gpu_mb"
    if budget is None:
        if model is not None:
            raise ConfigError(
                f"model_gpu_mb={model}: needs gpu_memory_budget_mb, of which it is a part"
            )
        return new
    left = budget - (model or 0)
    if left < max(kv_cache or 0, 1):
        raise ConfigError(
            f"gpu_memory_budget_mb={budget}: must be at least kv_cache_gpu_mb={kv_cache or 1} "
            f"plus model_gpu_mb={model or 0}"
        )
    new["gpu_limit"] = f"{left}MiB", "gpu_memory_budget_mb and model_gpu_mb"
    return new


def _same(key: str, given: object, translated: SizeLike) -> bool:
    """Whether a value given under today's name equals the one from an older name."""
    if key in ("gpu", "gpu_limit") and isinstance(given, (int, str, float, Size)):
        return Size.parse(given, key) == Size.parse(translated, key)
    return given == translated
