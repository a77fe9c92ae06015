"""The benchmark of predictions: decodes the same tokens wherever K and V lie, and says how far off it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from tiermem import PageLayout, TierConfig, TierManager
from tiermem.bench import prediction
from tiermem.bench.decoder import Decoder
from tiermem.bench.run import Run, Scale, open_ceilings
from tiermem.bench.step_rates import Reference
from tiermem.device.cpu import CpuDevice
from tiermem.errors import InvariantError
from tiermem.forecast import Hardware
from tiermem.forecast.speed import Mode
from tiermem.model_shape import ModelShape, TierSizes
from tiermem.units import Size, SizeKind

NO_SIZE = Size(SizeKind.EXPLICIT, 1 << 20)
TINY = ModelShape("tiny", 2, 32, 4, 2, 16, 48, 50, "float32", TierSizes(NO_SIZE, NO_SIZE, NO_SIZE))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    layout = PageLayout(1, 1, 16, "float32", 16)
    monkeypatch.setattr(prediction, "ON_CPU", Reference(layout, 2, 256, 32, 3))
    device = CpuDevice()
    with open_ceilings(device, Scale.QUICK) as ceilings:
        yield Run(device, Scale.QUICK, ceilings, tmp_path, 1 << 20, lambda _text: None)


def test_every_mode_has_its_rate_and_its_error(bench: Run) -> None:
    results = list(prediction.run(bench))
    names = [(item.subject.name, item.subject.parameters["mode"]) for item in results]
    modes = (Mode.EAGER, Mode.FIXED)  # without a GPU nothing is captured
    assert names == [(name, mode.value) for mode in modes for name in ("decode", "error")]
    for decode, error in zip(results[::2], results[1::2], strict=True):
        assert decode.figures is not None
        assert decode.ceiling is not None
        assert error.figures is not None
        assert (decode.ceiling.name, decode.subject.unit) == ("predicted", "tokens/s")
        wanted = abs(decode.ceiling.value / decode.figures.median - 1) * 100
        assert error.figures.p5 - 1 <= wanted <= error.figures.p95 + 1
        assert error.subject.unit == "%"


def test_beside_a_gpu_every_mode_is_decoded_with_the_share_that_was_predicted(bench: Run) -> None:
    cases = {case.mode: case for case in prediction._cases(40, on_gpu=True)}
    assert list(cases) == [Mode.RESIDENT, Mode.EAGER, Mode.FIXED, Mode.SHARED]
    assert cases[Mode.SHARED].hot_pages == cases[Mode.FIXED].hot_pages == 10
    on_gpu = SimpleNamespace(device=bench.device, on_gpu=True)
    layout = PageLayout(32, 32, 128, "float16", 64)
    shape = ModelShape.from_profile("7b")
    shares = {}
    for mode, case in cases.items():
        step = prediction._predict(case, shape, layout, 40 * 64, Hardware.from_profile("h200"))
        assert step.mode is mode
        config = prediction._config(cast(Run, on_gpu), case, layout, step)
        assert config.gpu.num_bytes == case.hot_pages * layout.slot_bytes
        shares[mode] = config.cpu_share
    assert shares[Mode.RESIDENT] == shares[Mode.EAGER] == shares[Mode.FIXED] == 0
    assert 0.3 < (shares[Mode.SHARED] or 0) < 0.7


def test_modes_that_decode_different_tokens_are_an_error() -> None:
    same = torch.tensor([5, 6])
    prediction._check([same, same])
    with pytest.raises(InvariantError, match=r"different tokens \[5, 7\]"):
        prediction._check([same, torch.tensor([7, 6])])


def test_the_decoder_is_a_llama() -> None:
    """Against transformers, with the same weights."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    decoder = Decoder(TINY, torch.device("cpu"))
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, rope_theta=1e4,
        tie_word_embeddings=False, rms_norm_eps=torch.finfo(torch.float32).eps,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    state = {"model.embed_tokens.weight": decoder._embedding, "lm_head.weight": decoder._head}
    ones = torch.ones(32)
    state["model.norm.weight"] = ones
    for i, layer in enumerate(decoder._layers):
        q, k, v = layer.qkv.split([64, 32, 32])
        gate, up = layer.gate_up.chunk(2)
        named = {
            "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
            "self_attn.o_proj": layer.output, "mlp.gate_proj": gate, "mlp.up_proj": up,
            "mlp.down_proj": layer.down, "input_layernorm": ones, "post_attention_layernorm": ones,
        }  # fmt: skip
        state |= {f"model.layers.{i}.{name}.weight": value for name, value in named.items()}
    model.load_state_dict(state)
    tokens = torch.tensor([3, 17, 44, 9, 21])
    with torch.no_grad():
        cache = DynamicCache()
        wanted = [
            int(model(input_ids=token.view(1, 1), past_key_values=cache).logits[0, -1].argmax())
            for token in tokens
        ]
        layout = PageLayout(2, 2, 16, "float32", 16)
        config_tiers = TierConfig(gpu="64KiB", ram=0, ssd=0, device="cpu")
        with TierManager(layout, config_tiers) as manager:
            sequence = manager.open_sequence()
            found = []
            for position, token in enumerate(tokens):
                with manager.step([sequence]) as step:
                    chosen = decoder.decode(step, token.view(1), torch.tensor([position]))
                found.append(int(chosen))
    assert found == wanted
