"""The reference model as it is shipped: loads offline, counts bytes, and uses its context."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "reference"
MEBIBYTE = 1 << 20
# Held-out text: the model has never seen it.
PROMPT = (ROOT / "examples" / "long_prompt.txt").read_bytes()
TARGET_BYTES = 2048
SHORT_CONTEXT = 128
LONG_CONTEXT = 4096


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, local_files_only=True
    )
    assert isinstance(loaded, transformers.LlamaForCausalLM)
    return loaded


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded = transformers.AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    assert isinstance(loaded, transformers.PreTrainedTokenizerFast)
    return loaded


@torch.inference_mode()
def mean_bits(model: LlamaForCausalLM, rows: torch.Tensor, targets: int) -> float:
    """Mean cost in bits of the last `targets` tokens of each row of `rows` (int64)."""
    hidden = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, -targets:])
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, -targets:].flatten())
    return nats.item() / math.log(2)


def random_text(rng: random.Random, characters: int) -> str:
    """Characters from all of Unicode but the surrogates, ASCII as often as the rest."""
    ranges = ((0x01, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x110000))
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(characters))


def test_size_stays_small(model: LlamaForCausalLM) -> None:
    assert 5_000_000 <= sum(p.numel() for p in model.parameters()) <= 7_000_000
    weights = sorted(MODEL.glob("*.safetensors"))
    assert [path.name for path in weights] == ["model.safetensors"]
    assert weights[0].stat().st_size < 15 * MEBIBYTE


def test_shape_suits_the_kernels() -> None:
    config = transformers.AutoConfig.from_pretrained(MODEL, local_files_only=True)
    assert config.max_position_embeddings >= 8192
    assert config.head_dim % 16 == 0
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.num_attention_heads > config.num_key_value_heads
    assert len(PROMPT) + 512 <= config.max_position_embeddings


def test_weights_are_finite_fp16() -> None:
    with safetensors.safe_open(MODEL / "model.safetensors", framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - not a mapping
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.float16, name
            assert torch.isfinite(tensor).all(), name


def test_a_token_is_a_byte(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(random.SystemRandom().getrandbits(32))
    texts = [random_text(rng, rng.randrange(80)) for _ in range(200)]
    texts += ["", "\0", " a\r\n\tb  ", "e\u0301 is not \u00e9", "<|bos|><|eos|><|pad|>"]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids == list(text.encode()), ascii(text)
        assert tokenizer.decode(ids) == text, ascii(text)


def test_special_tokens_are_not_bytes(
    tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM
) -> None:
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(special) == 3
    assert min(special) >= 256
    assert len(tokenizer) <= model.config.vocab_size
    assert model.generation_config is not None
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode([97, *special, 98], skip_special_tokens=True) == "ab"


def test_prompt_is_plain_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = PROMPT.decode()
    assert 6000 <= len(PROMPT) <= 8000
    assert len(tokenizer(text)["input_ids"]) == len(PROMPT)


def test_predicts_held_out_text_and_uses_context(model: LlamaForCausalLM) -> None:
    tokens = torch.tensor(list(PROMPT))
    with_much_before = mean_bits(
        model, tokens[None, -(TARGET_BYTES + LONG_CONTEXT) :], TARGET_BYTES
    )
    # The same target bytes in rows that start 128 bytes before their first target.
    rows = tokens[-(TARGET_BYTES + SHORT_CONTEXT) :].unfold(0, 2 * SHORT_CONTEXT, SHORT_CONTEXT)
    with_little_before = mean_bits(model, rows, SHORT_CONTEXT)
    # Measured: 1.148 and 1.240.
    assert with_much_before < 1.18
    assert with_much_before < with_little_before - 0.07


@torch.inference_mode()
def test_greedy_text_is_not_degenerate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = torch.tensor([list(PROMPT[-1024:])])
    out = model.generate(ids, max_new_tokens=48, do_sample=False)
    text = tokenizer.decode(out[0, ids.shape[1] :])
    assert len(set(text)) >= 10
    assert all(character.isprintable() or character in "\n\t" for character in text)
