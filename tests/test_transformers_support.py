"""Which models a TieredCache takes, what it calls them, and what it says about the others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, WINDOW, random_ids, tiers, tiny_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tiermem import ConfigError, PageLayout, TierConfig
from tiermem.integrations.transformers import TieredCache
from tiermem.integrations.transformers.model_identity import (
    SAMPLES_PER_TENSOR,
    _sample_bytes,
    model_identity,
)
from tiermem.integrations.transformers.support import attention_of

SMALL = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def _t5() -> PreTrainedModel:
    sizes = {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16, "d_ff": 32}
    return T5ForConditionalGeneration(T5Config(vocab_size=32, **sizes))


def _mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1))


def _qwen3_next() -> PreTrainedModel:
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    heads = {"linear_num_value_heads": 2, "linear_num_key_heads": 2}
    return Qwen3NextForCausalLM(Qwen3NextConfig(**SMALL, **experts, **heads))


def _gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**SMALL))


def _gpt_oss() -> PreTrainedModel:
    sizes = SMALL | {"num_local_experts": 2, "num_experts_per_tok": 1}
    return GptOssForCausalLM(GptOssConfig(**sizes))


def _llava() -> PreTrainedModel:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 14, "patch_size": 14}
    text = {"model_type": "llama", **SMALL}
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config={"model_type": "clip_vision_model", **vision})
    )


def _cross_attention() -> PreTrainedModel:
    config = GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2, add_cross_attention=True)
    return GPT2LMHeadModel(config)


def _odd_head() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**(SMALL | {"head_dim": 24})))


def _double() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL)).double()


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (_t5, "encoder-decoder"),
        (_mamba, "recurrent"),
        (_qwen3_next, "recurrent"),
        (_gemma2, "soft-capped"),
        (_gpt_oss, "sinks"),
        (_llava, "several models"),
        (_cross_attention, "cross-attention"),
        (_odd_head, "head_dim=24: must be 16 to 256 in steps of 16"),
        (_double, "dtype='float64'"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused_with_the_reason(
    build: Callable[[], PreTrainedModel], why: str
) -> None:
    model = build()
    config = TierConfig(gpu="1MiB", ram=0, ssd=0, device="cpu")
    with pytest.raises(ConfigError, match=why):
        TieredCache(model, config)
    assert not model._forward_pre_hooks


def test_wrong_arguments_are_refused() -> None:
    model = tiny_model("llama")
    config = tiers(model, 4, 0)
    with pytest.raises(TypeError, match="PreTrainedModel"):
        TieredCache(torch.nn.Linear(2, 2), config)
    with pytest.raises(TypeError, match="TierConfig"):
        TieredCache(model, {"gpu": 4})
    with pytest.raises(ConfigError, match="page_tokens=17"):
        TieredCache(model, config, page_tokens=17)
    with pytest.raises(ConfigError, match="the model is on cpu"):
        TieredCache(model, TierConfig(gpu="1MiB", ram=0, ssd=0, device="cuda:0"))
    model.model.layers[1].to("meta")
    with pytest.raises(ConfigError, match="one device"):
        TieredCache(model, config)


def test_layers_that_hand_on_other_k_than_they_stored_are_refused() -> None:
    model = tiny_model("llama")
    ids = random_ids(1, 5, 0)
    with TieredCache(model, tiers(model, 4, 0)) as cache, torch.no_grad():
        update = cache.update
        cache.update = lambda k, v, layer, *_: tuple(x.clone() for x in update(k, v, layer))
        with pytest.raises(ConfigError, match="change K"):
            model(ids, past_key_values=cache)
        del cache.update
        layers, model.model.layers = model.model.layers, model.model.layers[:1]
        with pytest.raises(ValueError, match="1 of 2 layers"):
            model(ids, past_key_values=cache)
        model.model.layers = layers
        assert model(ids, past_key_values=cache).logits.shape == (1, 5, 131)


def test_what_is_read_from_configurations() -> None:
    found = {family: attention_of(tiny_model(family), 32) for family in FAMILIES}
    assert found["llama"].layout == PageLayout(2, 2, 16, "float32", 32)
    assert found["qwen3"].layout == PageLayout(2, 2, 32, "float32", 32)
    assert found["gpt2"].layout == PageLayout(2, 4, 16, "float32", 32)
    windows = {family: attention.windows for family, attention in found.items()}
    assert windows["llama"] == windows["qwen3"] == windows["gpt2"] == (None, None)
    assert windows["mistral"] == (WINDOW, WINDOW)
    assert windows["qwen2"] == (None, WINDOW)
    assert attention_of(tiny_model("llama").half(), 16).layout.dtype == "float16"
    assert all(attention.reusable for attention in found.values())


# ---- names of models ---------------------------------------------------------------------------------------


def test_an_identity_survives_saving_and_loading(tmp_path: Path) -> None:
    for family in FAMILIES:
        model = tiny_model(family, 1)
        model.save_pretrained(tmp_path / family)
        loaded = type(model).from_pretrained(tmp_path / family)
        assert model_identity(loaded) == model_identity(model), family
        loaded.set_attn_implementation("eager")
        assert model_identity(loaded) == model_identity(model), family


def test_models_with_the_same_k_and_v_share_an_identity() -> None:
    model = tiny_model("llama", 1)
    bare = LlamaModel(model.config)
    bare.load_state_dict(model.model.state_dict())
    assert model_identity(bare) == model_identity(model)


def test_an_identity_changes_with_weights_dtype_and_configuration() -> None:
    model = tiny_model("llama", 1)
    names = {model_identity(model), model_identity(tiny_model("llama", 2))}
    names |= {model_identity(copy.deepcopy(model).half())}
    for key, value in (("rms_norm_eps", 1e-3), ("hidden_act", "relu")):
        other = copy.deepcopy(model)
        setattr(other.config, key, value)
        names.add(model_identity(other))
    trained = copy.deepcopy(model)
    loss = trained(random_ids(1, 9, 0), labels=random_ids(1, 9, 0)).loss
    loss.backward()
    torch.optim.SGD(trained.parameters(), lr=1e-3).step()
    names.add(model_identity(trained))
    assert len(names) == 6


@pytest.mark.parametrize("count", [0, 1, 7, SAMPLES_PER_TENSOR, 1_000_003])
def test_an_identity_reads_few_values_of_a_large_tensor(count: int) -> None:
    values = torch.arange(count, dtype=torch.int64)
    sample = np.frombuffer(_sample_bytes(values), dtype=np.int64)
    assert len(sample) == min(count, SAMPLES_PER_TENSOR)
    assert (np.diff(sample) > 0).all()
    if count:
        assert (sample[0], sample[-1]) == (0, count - 1)
