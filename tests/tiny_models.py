"""Tiny language models with random weights, built from configurations: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tiermem import TierConfig
from tiermem.integrations.transformers.support import attention_of

torch.set_num_threads(1)  # for models this small, handing work to threads costs more than the work

VOCAB = 131
PAGE_TOKENS = 16
WINDOW = 48
"""Tokens that Mistral's layers see, and Qwen2's second one."""

# Weights far larger than usual: what a token attends to must decide what comes next.
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_SHAPE))


def _dynamic_llama() -> PreTrainedModel:
    """With weights too small for rotations to count: the model keeps those of the longest text it saw."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    shape = {**_SHAPE, "max_position_embeddings": 64, "initializer_range": 0.02}
    return LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope))


def _mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**_SHAPE, sliding_window=WINDOW))


def _qwen2() -> PreTrainedModel:
    """Full attention in the first layer, a window in the second."""
    window = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    return Qwen2ForCausalLM(Qwen2Config(**_SHAPE, **window))


def _qwen3() -> PreTrainedModel:
    """Heads wider than hidden_size / num_attention_heads, norms of q and K."""
    return Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=32))


def _gpt2() -> PreTrainedModel:
    """Learned positions, no groups of heads."""
    names = {
        "vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 2048,
        "initializer_range": 0.25, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(**names))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gpt2": _gpt2,
}
DYNAMIC = "llama with dynamic rotations"
"""Whose rotations depend on the length of the text."""


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A model of `family`, or DYNAMIC, whose weights `seed` decides, ready for inference."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return {**FAMILIES, DYNAMIC: _dynamic_llama}[family]().eval()


def random_ids(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Token ids (rows, columns) that are no padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (rows, columns), generator=generator)


def left_padded(texts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts (tokens,) as one batch with padding on the left: ids and mask, both (rows, columns)."""
    columns = max(len(text) for text in texts)
    ids = torch.zeros((len(texts), columns), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, columns - len(text) :] = text
        mask[row, columns - len(text) :] = 1
    return ids, mask


def tiers(
    model: PreTrainedModel,
    gpu_pages: int,
    ram_pages: int,
    ssd_path: Path | None = None,
    **settings: object,
) -> TierConfig:
    """Tiers of so many pages of `model`, of PAGE_TOKENS tokens; 8 MiB of SSD where there is a path."""
    slot_bytes = attention_of(model, PAGE_TOKENS).layout.slot_bytes
    return TierConfig(
        gpu=gpu_pages * slot_bytes,
        ram=ram_pages * slot_bytes,
        ssd="8MiB" if ssd_path else 0,
        ssd_path=ssd_path,
        device=str(model.device),
        **settings,  # type: ignore[arg-type]
    )


def reference(model: PreTrainedModel, ids: torch.Tensor, **options: object) -> torch.Tensor:
    """What `model` generates with transformers' own cache."""
    tokens: torch.Tensor = model.generate(
        ids, past_key_values=DynamicCache(config=model.config), **options
    )
    return tokens
