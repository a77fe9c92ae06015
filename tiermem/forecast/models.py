"""Models: the shape of a model, by a shipped name or from the config.json of a model directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tiermem.configfile import read_table
from tiermem.errors import ConfigError
from tiermem.layout import ITEM_BYTES
from tiermem.model_shape import ModelShape
from tiermem.profiles import model_profiles
from tiermem.units import shorten

CONFIG_FILE = "config.json"
_NAMES = {
    "num_layers": ("num_hidden_layers", "n_layer"),
    "hidden_size": ("hidden_size", "n_embd"),
    "num_heads": ("num_attention_heads", "n_head"),
    "vocab_size": ("vocab_size",),
}
"""Our key -> what configurations of Hugging Face call it."""
_OTHER_ATTENTION = ("kv_lora_rank", "ssm_cfg", "mamba_d_state", "layer_types")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
GPT2_MLP = 4
"""Its MLP is so many times as wide as the model, where the configuration does not say."""


def find_model(name: str) -> ModelShape:
    """The shape called `name`, or that of the model in the directory `name`.

    Raises
    ------
    ConfigError: neither; or a model of another kind than dense attention in every layer.
    """
    shapes = model_profiles()
    if name.lower() in shapes:
        return ModelShape.from_profile(name.lower())
    path = Path(name).expanduser()
    if (path / CONFIG_FILE).is_file():
        return from_config(path.name or "model", read_table(path / CONFIG_FILE))
    raise ConfigError(
        f"model={shorten(name)}: must be one of {', '.join(shapes)}, or a directory with "
        f"{CONFIG_FILE}"
    )


def from_config(name: str, config: Mapping[str, object]) -> ModelShape:
    """The shape that a model's own configuration describes.

    Raises
    ------
    ConfigError: a size is missing or cannot be, or the model is of another kind.
    """
    nested = config.get("text_config")
    if isinstance(nested, Mapping):  # of models that also read images
        config = nested
    _check_kind(config)
    values: dict[str, object] = {key: _first(config, key, names) for key, names in _NAMES.items()}
    hidden, heads = _int(values, "hidden_size"), _int(values, "num_heads")
    mlp = config.get("intermediate_size") or config.get("n_inner") or GPT2_MLP * hidden
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float16")
    return ModelShape.from_table(
        {
            **values,
            "name": name[:100],
            "num_kv_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config.get("head_dim") or hidden // heads,
            "intermediate_size": mlp,
            "dtype": dtype if dtype in ITEM_BYTES else "float16",
            "tiers": {"gpu": "auto", "ram": "auto", "ssd": "auto"},
        }
    )


def _check_kind(config: Mapping[str, object]) -> None:
    for key in _OTHER_ATTENTION:
        value = config.get(key)
        dense = isinstance(value, list) and set(map(str, value)) == {"full_attention"}
        if value is not None and not dense:
            raise ConfigError(f"{CONFIG_FILE}: {key}: only attention over every token is planned")
    for key in _EXPERTS:
        if config.get(key):
            raise ConfigError(f"{CONFIG_FILE}: {key}: models with experts are not planned")


def _first(config: Mapping[str, object], key: str, names: tuple[str, ...]) -> object:
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise ConfigError(f"{CONFIG_FILE}: {' or '.join(names)}: missing; {key} is needed")


def _int(values: Mapping[str, object], key: str) -> int:
    value = values[key]
    if type(value) is not int or value < 1:
        raise ConfigError(f"{CONFIG_FILE}: {key}={shorten(value)}: must be an int above 0")
    return value
