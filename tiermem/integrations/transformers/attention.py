"""The attention function and the mask function that transformers finds under the name "tiermem"."""

from __future__ import annotations

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tiermem.errors import ConfigError
from tiermem.integrations.transformers.forward import current_forward

NAME = "tiermem"
"""What `config._attn_implementation` is while a model runs with a TieredCache."""

FALLBACK = "sdpa"
"""What computes calls under this name that do not come from a model with a TieredCache."""

IGNORED_ARGUMENTS = frozenset({"position_ids", "cache_position", "position_embeddings"})
"""Tensors that models pass along and that do not change attention: K and q are rotated already."""


def register() -> None:
    """Make both functions known to transformers; again does no harm."""
    AttentionInterface.register(NAME, tiered_attention)
    AttentionMaskInterface.register(NAME, no_mask)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def tiered_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend over everything that the TieredCache of the running call holds.

    Parameters
    ----------
    query: (rows, q_heads, columns, head_dim). key, value: (rows, kv_heads, columns, head_dim), the new ones.

    Returns
    -------
    (rows, columns, q_heads, head_dim), and no weights.

    Raises
    ------
    ConfigError: an argument that tiermem cannot honour.
    """
    forward = current_forward()
    if forward is None:
        fallback = ALL_ATTENTION_FUNCTIONS[FALLBACK]
        result: tuple[torch.Tensor, torch.Tensor | None] = fallback(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return result
    if attention_mask is not None:
        raise ConfigError("attention_mask: TieredCache takes no prepared masks, padding alone")
    if dropout != 0:
        raise ConfigError(f"dropout={dropout}: TieredCache has none; call model.eval() first")
    window = kwargs.pop("sliding_window", None)
    _check_arguments(kwargs)
    assert window is None or isinstance(window, int)
    return forward.attend(query, key, scaling, window), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def no_mask(**kwargs: object) -> torch.Tensor | None:
    """No mask for calls with a TieredCache: it knows padding, causality and windows itself.

    Raises
    ------
    ConfigError: the model wants a mask that is not merely causal.
    """
    if current_forward() is None:
        mask: torch.Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[FALLBACK](**kwargs)
        return mask
    if kwargs.get("use_vmap") or kwargs.get("allow_is_causal_skip") is False:
        raise ConfigError("TieredCache supports causal masks only; this call overlays another one")
    return None


def _check_arguments(arguments: dict[str, object]) -> None:
    """Refuse what may change scores: a switch of causality, and numbers and tensors of unknown meaning."""
    if arguments.get("is_causal") is False:
        raise ConfigError("is_causal=False: TieredCache supports causal attention only")
    if arguments.get("output_attentions"):
        raise ConfigError("output_attentions=True: TieredCache never has the attention weights")
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor | float) and name not in IGNORED_ARGUMENTS:
            raise ConfigError(f"{name}: an argument of attention that TieredCache does not support")
