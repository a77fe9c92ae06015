"""Support: what a model's attention looks like to tiermem, or why tiermem cannot serve it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tiermem.errors import ConfigError
from tiermem.layout import PageLayout

FULL, SLIDING = "full_attention", "sliding_attention"
"""The kinds of layers that tiermem serves, as `config.layer_types` spells them."""

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary embeddings that change with the length of the text: the K of a prefix depend on what follows it."""


@dataclass(frozen=True, slots=True)
class ModelAttention:
    """What tiermem must know about a model's attention.

    `windows` has one entry a layer: the tokens that each token sees, itself included, or None for all.
    `reusable` says whether the K and V of a prefix depend on its tokens alone, so that another text may use them.
    """

    layout: PageLayout
    windows: tuple[int | None, ...]
    device: torch.device
    reusable: bool


def attention_of(model: PreTrainedModel, page_tokens: int) -> ModelAttention:
    """Look at `model` and say what its pages of `page_tokens` tokens are like.

    Raises
    ------
    TypeError: not a transformers model. ConfigError: tiermem cannot serve it; the message says why.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: must be a transformers PreTrainedModel, not {type(model).__name__}"
        )
    config = model.config
    for problem in _problems(model, config):
        raise ConfigError(f"TieredCache does not support {type(model).__name__}: {problem}")
    return ModelAttention(
        layout=_layout(model, config, page_tokens),
        windows=_windows(config),
        device=_device(model),
        reusable=not _rope_types(config) & set(LENGTH_DEPENDENT_ROPE),
    )


def _problems(model: PreTrainedModel, config: PreTrainedConfig) -> Iterator[str]:
    """Everything about the model that tiermem cannot honour."""
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        yield "encoder-decoder models and cross-attention have a second cache"
    if getattr(model, "_is_stateful", False):
        yield "recurrent (linear-attention, state-space) layers keep states that are not K and V of tokens"
    if config.sub_configs:
        yield f"it is made of several models ({', '.join(config.sub_configs)}); give it the text model alone"
    kinds = sorted(set(_layer_types(config)) - {FULL, SLIDING})
    if kinds:
        yield f"layers of type {', '.join(kinds)}; it serves {FULL} and {SLIDING} layers"
    if not getattr(config, "is_causal", True) or getattr(
        config, "use_bidirectional_attention", False
    ):
        yield "its attention is not causal"
    if not getattr(model, "_supports_attention_backend", False):
        yield "it does not call its attention through transformers' AttentionInterface"
    for key, what in _REFUSED_KEYS.items():
        value = getattr(config, key, None)
        if value is not None and value is not False and value != 0:
            yield f"{what} ({key}={value})"
    if any(name.rpartition(".")[2] in {"sinks", "sink"} for name, _ in model.named_parameters()):
        yield "its attention has sinks (learned scores that belong to no token)"


_REFUSED_KEYS = {
    "attn_logit_softcapping": "its attention scores are soft-capped",
    "kv_lora_rank": "multi-head latent attention stores no K and V of equal size",
    "num_kv_shared_layers": "layers share K and V",
    "kv_sharing_modes": "layers share K and V",
    "alibi": "its attention scores have position biases",
}
"""Keys of configurations whose presence means arithmetic that `Step.attend` does not do."""


def _layout(model: PreTrainedModel, config: PreTrainedConfig, page_tokens: int) -> PageLayout:
    heads = config.num_attention_heads
    try:
        return PageLayout(
            num_layers=config.num_hidden_layers,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            dtype=str(model.dtype).removeprefix("torch."),
            page_tokens=page_tokens,
        )
    except ValueError as error:
        raise ConfigError(
            f"TieredCache does not support {type(model).__name__}: {error}"
        ) from error


def _layer_types(config: PreTrainedConfig) -> list[str]:
    """The kind of every layer; where the configuration does not say, all have its window if it has one."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return list(types)
    if getattr(config, "attention_chunk_size", None) is not None:
        return ["chunked_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    return [FULL if window is None else SLIDING] * config.num_hidden_layers


def _windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    return tuple(window if kind == SLIDING else None for kind in _layer_types(config))


def _device(model: PreTrainedModel) -> torch.device:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        places = ", ".join(sorted(str(device) for device in devices)) or "nowhere"
        raise ConfigError(f"the model's parameters are on {places}: they must be on one device")
    device = devices.pop()
    if device.type not in {"cpu", "cuda"}:
        raise ConfigError(f"the model is on {device}: it must be on the CPU or a CUDA device")
    return device


def _rope_types(config: PreTrainedConfig) -> set[str]:
    """Kinds of rotary embeddings, of all kinds of layers together."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    tables = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    found = {table.get("rope_type", table.get("type")) for table in tables}
    return {kind for kind in found if isinstance(kind, str)}
