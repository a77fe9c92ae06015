"""Forecasts: sizes and times against sums made by hand, and what is said when something does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forecast_cases import ROUND, ask, work

from tiermem.errors import ConfigError
from tiermem.forecast import Hardware, Request, WeightFormat, find_model, predict
from tiermem.forecast.budget import RESERVE_BYTES, reserve_bytes
from tiermem.forecast.hardware import complete, machine_profiles
from tiermem.forecast.models import from_config
from tiermem.forecast.speed import (
    FUSED,
    TRANSFORMERS,
    Device,
    Limit,
    Mode,
    Program,
    prefill_time,
    step_time,
)
from tiermem.forecast.weights import BITS, bits_that_fit, bytes_at, bytes_read, num_parameters
from tiermem.model_shape import ModelShape
from tiermem.profiles import hardware_profiles
from tiermem.rates import Rates

SHAPE_33B = ModelShape.from_profile("33b")

LLAMA = {
    "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}  # fmt: skip

# ---- sizes ---------------------------------------------------------------------------------------


def test_the_33b_shape_has_the_bytes_that_are_known_of_it() -> None:
    found = ask("h200", context=131072)
    # 2 x 62 layers x 8 heads x 128 x 2 bytes; 131,072 tokens are 2,048 pages without padding
    assert found.layout.token_bytes == 253_952
    assert found.budget.kv_bytes == 253_952 * 131_072 == 33_285_996_544
    assert found.budget.weights_bytes == SHAPE_33B.weight_bytes
    embedding = 32256 * 7168
    layer = 2 * 7168 * 128 * (56 + 8) + 3 * 7168 * 19200 + 2 * 7168
    parameters = 62 * layer + 2 * embedding + 7168
    assert num_parameters(SHAPE_33B) == parameters == 33_342_991_360
    assert found.bytes_a_step == 2 * (parameters - embedding) + 33_285_996_544


def test_formats_of_few_bits_keep_scales_and_the_embeddings() -> None:
    embeddings = 2 * 32256 * 7168
    layers = num_parameters(SHAPE_33B) - embeddings
    # 4 bits with a scale of 16 and a zero point of 4 for every 128: 4.15625
    assert BITS[WeightFormat.INT4] == 4.15625
    assert bytes_at(SHAPE_33B, BITS[WeightFormat.INT4]) == pytest.approx(
        layers * 4.15625 / 8 + 2 * embeddings, abs=1
    )
    assert 17.9e9 < bytes_at(SHAPE_33B, BITS[WeightFormat.INT4]) < 18.1e9
    assert bytes_at(SHAPE_33B, 16.0) == SHAPE_33B.weight_bytes
    assert bytes_at(SHAPE_33B, 16.0) - bytes_read(SHAPE_33B, 16.0) == embeddings
    fitting = bits_that_fit(SHAPE_33B, 20 * 10**9)
    assert bytes_at(SHAPE_33B, fitting) == pytest.approx(20e9, abs=2)
    assert bits_that_fit(SHAPE_33B, 10**9 // 2) == 0


def test_no_usual_format_of_33b_fits_a_t4_and_three_bits_would() -> None:
    for weights in WeightFormat:
        found = ask("t4", weights=weights)
        assert not found.fits
        assert found.limit is Limit.CAPACITY
        assert found.tokens_per_s == 0
        assert "do not fit NVIDIA T4" in found.budget.problems[0]
    assert {item.name: item.fits for item in found.formats} == {
        "fp16": False, "int8": False, "int4": False, "3 bits": True, "2 bits": True,
    }  # fmt: skip
    assert 3.1 < found.most_bits < 3.4


def test_where_weights_that_do_not_fit_the_gpu_would_lie() -> None:
    assert ask("t4").budget.weights_tier == "ssd"  # 66.7 GB; 64 GiB of RAM are 61.8 GB at 90 %
    assert ask("t4", weights=WeightFormat.INT8).budget.weights_tier == "ram"
    assert ask("a100", model="70b").budget.weights_tier == "ssd"
    tiny = replace(Hardware.from_profile("t4"), ram_bytes=2**33, ssd_bytes=10**10)
    request = Request(shape=SHAPE_33B, context=4096)
    assert predict(request, tiny).budget.weights_tier == "none"


def test_k_and_v_fill_the_tiers_from_the_top() -> None:
    found = ask("h200", context=131072, gpu="8GiB", ram="16GiB", ssd="20GiB")
    slot = found.layout.slot_bytes
    sizes = [8 * 2**30 // slot, 16 * 2**30 // slot, 20 * 2**30 // slot]
    held = [tier.kv_bytes // slot for tier in found.budget.tiers]
    assert held == [sizes[0], sizes[1], 2048 - sizes[0] - sizes[1]]
    assert [tier.num_bytes // slot for tier in found.budget.tiers] == sizes
    assert [tier.max_context for tier in found.budget.tiers] == [
        64 * sizes[0], 64 * (sizes[0] + sizes[1]), 64 * sum(sizes),
    ]  # fmt: skip
    assert [tier.max_batch for tier in found.budget.tiers] == [0, 0, 1]
    assert found.fits
    assert found.budget.kv_tier == "ssd"


def test_more_k_and_v_than_all_tiers_does_not_fit() -> None:
    found = ask("h200", context=131072, gpu="8GiB", ram="8GiB", ssd=0)
    assert not found.fits
    assert found.budget.weights_tier == "gpu"
    assert found.budget.kv_tier == "none"
    assert "exceed all tiers together" in found.budget.problems[0]
    assert ask("h200", context=131072, gpu="8GiB", ram="24GiB", ssd=0).fits


def test_a_gpu_tier_that_was_asked_for_must_fit_and_that_of_a_profile_shrinks() -> None:
    found = ask("t4", model="7b", context=1024, gpu="8GiB")
    assert not found.fits
    assert "gpu=8GiB: only" in found.budget.problems[0]
    shrunk = ask("t4", model="7b", context=1024)
    assert shrunk.fits
    assert "smaller here" in shrunk.notes[0]


def test_a_machine_that_is_imagined_may_have_more_than_its_profile() -> None:
    found = ask("t4", model="7b", context=131072, ram="100GiB")
    assert found.fits
    assert found.budget.tiers[1].num_bytes > 99 * 2**30
    assert any("ram=100GiB: more than profile t4 has" in note for note in found.notes)
    here = replace(Hardware.from_profile("t4"), is_here=True)
    shape = ModelShape.from_profile("7b")
    for tier in ("ram", "ssd"):
        real = predict(Request(shape=shape, context=1024, **{tier: "900GiB"}), here)
        assert not real.fits
        assert f"{tier}=900GiB: this machine has" in real.budget.problems[0]


def test_what_is_assumed_of_weights_of_few_bits_is_said() -> None:
    assert ask("h200").notes == ()
    assert "int4 weights are assumed" in ask("h200", weights=WeightFormat.INT4).notes[0]


def test_a_gpu_without_bfloat16() -> None:
    with pytest.raises(ConfigError, match=r"bfloat16.*NVIDIA T4"):
        ask("t4", model="7b", dtype="bfloat16")
    shape = replace(ModelShape.from_profile("7b"), dtype="bfloat16")
    found = predict(Request(shape=shape, context=512), Hardware.from_profile("t4"))
    assert found.layout.dtype == "float16"
    assert any("no bfloat16" in note for note in found.notes)
    assert ask("a10", model="7b", dtype="bfloat16").layout.dtype == "bfloat16"


@pytest.mark.parametrize(
    "wrong", [{"context": 0}, {"context": 2**25}, {"context": 1, "batch": 0}, {"context": 1, "batch": 2**17}]
)  # fmt: skip
def test_a_request_that_cannot_be_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be 1 to"):
        Request(shape=SHAPE_33B, **wrong)


def test_a_size_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="ram="):
        ask("h200", ram="lots")


def test_what_is_kept_for_the_driver_and_activations_grows_with_the_model() -> None:
    # 70B: 2,048 rows of 2 x (4 x 8192 + 2 x 8192 + 3 x 28672) + 8 x 8192 bytes, and logits
    activations = 2048 * (2 * (4 * 8192 + 2 * 8192 + 3 * 28672) + 8 * 8192) + 4 * 32000
    wanted = 552_402_944 + (256 << 20) + activations
    assert reserve_bytes(ModelShape.from_profile("70b")) == wanted == 1_508_832_256
    small = replace(ModelShape.from_profile("7b"), hidden_size=1024, num_heads=8, num_kv_heads=8)
    assert reserve_bytes(replace(small, intermediate_size=2816)) == RESERVE_BYTES
    assert ask("cpu", model="7b", context=64).budget.reserve_bytes == RESERVE_BYTES
    assert ask("h200", model="70b").budget.reserve_bytes == wanted


def test_70b_in_fp16_fits_an_h200_beside_little_more() -> None:
    found = ask("h200", model="70b", context=131072, gpu="100%")
    budget = found.budget
    assert found.fits
    assert budget.weights_bytes == 137_953_296_384
    left = 150_100_000_000 - budget.weights_bytes - budget.reserve_bytes - budget.staging_bytes
    assert budget.tiers[0].num_bytes == left // found.layout.slot_bytes * found.layout.slot_bytes
    assert 10.2e9 < left < 10.5e9
    assert found.modes[0].mode is Mode.SHARED
    # with a vocabulary of 128,256 tokens, as Llama 3 70B has it, too
    larger = replace(ModelShape.from_profile("70b"), vocab_size=128256)
    request = Request(shape=larger, context=131072, gpu="100%")
    again = predict(request, Hardware.from_profile("h200"))
    assert again.fits
    assert again.budget.weights_bytes == 141_107_412_992  # Llama 3 70B
    assert 7e9 < again.budget.tiers[0].num_bytes < 7.5e9


# ---- times ---------------------------------------------------------------------------------------


def test_a_resident_step_worked_out_by_hand() -> None:
    step = step_time(Mode.RESIDENT, work(), ROUND)
    # 20 GB at 1 TB/s; 10 GB at 0.5 TB/s and 10 x 10 us; 10 x (4 x 3 + 14 x 1.8) us; the host 100 us
    assert step.weights_s == pytest.approx(20e-3)
    assert step.compute_s == pytest.approx(2 * 1e10 / 1e14)
    assert step.attention_s == pytest.approx(20e-3 + 1e-4)
    assert step.kernels_s == pytest.approx(3.72e-4)
    assert step.total_s == pytest.approx(1e-4 + 20e-3 + 20.1e-3 + 0.372e-3)
    assert step.tokens_per_s == pytest.approx(1 / 40.572e-3)
    assert step.limit is Limit.HBM


def test_a_large_batch_is_bound_by_products() -> None:
    step = step_time(Mode.RESIDENT, work(batch=1000), ROUND)
    assert step.compute_s == pytest.approx(0.2)
    assert step.total_s == pytest.approx(1e-4 + 0.2 + 20.1e-3 + 0.372e-3)
    assert step.limit is Limit.COMPUTE
    assert step.tokens_per_s == pytest.approx(1000 / 0.220572)


def test_a_small_model_launched_one_by_one_is_bound_by_the_host() -> None:
    small = work(weight_bytes=10**7, parameters=10**7, kv_bytes=10**6)
    step = step_time(Mode.EAGER, small, ROUND)
    assert step.host_s == pytest.approx(10 * (5e-5 + 25 * 5e-6))
    # 4 + 3 + 14 kernels take 2 us longer by themselves
    assert step.kernels_s == pytest.approx(10 * (12e-6 + 25.2e-6 + 21 * 2e-6))
    assert step.total_s == step.step_s + step.host_s
    assert step.limit is Limit.LAUNCH
    assert step_time(Mode.RESIDENT, small, ROUND).total_s < step.total_s


def test_what_streams_is_hidden_behind_the_computing_until_it_is_longer() -> None:
    hidden = step_time(Mode.FIXED, work(streamed_bytes=10**8), ROUND)
    assert hidden.link_s == pytest.approx(0.01)
    assert hidden.total_s == hidden.step_s + hidden.gpu_s
    bound = step_time(Mode.FIXED, work(streamed_bytes=5 * 10**9), ROUND)
    assert bound.total_s == pytest.approx(0.5001)
    assert bound.limit is Limit.LINK
    cold = step_time(Mode.FIXED, work(streamed_bytes=5 * 10**9, cold_bytes=10**9), ROUND)
    assert cold.total_s == pytest.approx(0.5001 + 1.0)
    assert cold.limit is Limit.DISK


def test_without_a_gpu_everything_comes_after_everything_else() -> None:
    step = step_time(Mode.FIXED, work(streamed_bytes=10**8), ROUND, Device.HOST)
    assert step.total_s == pytest.approx(step.step_s + step.gpu_s + step.host_s + 0.01)


def test_prefill_worked_out_by_hand() -> None:
    # 2 x 10^10 x 1000 at 10^14; 2 x 10 layers x 1000 wide x 1000^2 at 5 x 10^13
    seconds = prefill_time(work(), 1000, 1000, ROUND)
    assert seconds == pytest.approx(0.2 + 2e10 / 5e13)
    slow = prefill_time(work(streamed_bytes=10**10), 1000, 1000, ROUND)
    assert slow == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("model", "context", "program", "mode", "measured"),
    [
        ("33b", 32768, TRANSFORMERS, Mode.RESIDENT, 40.99),
        ("7b", 16384, FUSED, Mode.RESIDENT, 140.2),
        ("7b", 16384, FUSED, Mode.EAGER, 125.6),
    ],
)
def test_predictions_for_an_h200_are_near_what_was_measured_on_one(
    model: str, context: int, program: Program, mode: Mode, measured: float
) -> None:
    found = ask("h200", model=model, context=context, program=program)
    step = next(step for step in found.modes if step.mode is mode)
    assert step.tokens_per_s == pytest.approx(measured, rel=0.05)


def test_streaming_predicted_for_an_h200_is_near_what_was_measured_on_one() -> None:
    # a quarter of the pages hot: 8.42 tokens/s
    pages = (16384 + 24) // 64 + 1 + 8
    hot = pages // 4 * 64 * 524_288
    found = ask("h200", model="7b", context=16384, program=FUSED, gpu=hot)
    fixed = next(step for step in found.modes if step.mode is Mode.FIXED)
    assert fixed.tokens_per_s == pytest.approx(8.42, rel=0.05)


def test_a_loop_of_transformers_costs_more_than_a_plain_one() -> None:
    plain = ask("h200", program=FUSED)
    assert ask("h200").request.program is TRANSFORMERS
    assert ask("h200").tokens_per_s < plain.tokens_per_s
    eager = [step.tokens_per_s for step in ask("h200").modes if step.mode is Mode.EAGER]
    # transformers' own cache, launched eagerly, decodes 16 tokens/s with this context
    assert 12 < eager[0] < 25


def test_modes_follow_from_where_k_and_v_lie() -> None:
    assert [step.mode for step in ask("h200").modes] == [Mode.RESIDENT, Mode.EAGER]
    streaming = ask("h200", context=131072, gpu="4GiB")
    assert [step.mode for step in streaming.modes] == [Mode.SHARED, Mode.FIXED, Mode.LRU]
    shared, fixed, lru = streaming.modes
    assert lru.work.streamed_bytes == streaming.budget.kv_bytes
    assert fixed.work.streamed_bytes == streaming.budget.kv_bytes - streaming.budget.kv_in("gpu")
    assert shared.tokens_per_s > 2 * fixed.tokens_per_s > 2 * lru.tokens_per_s
    assert (fixed.limit, lru.limit) == (Limit.LINK, Limit.LINK)
    assert streaming.limit is Limit.LINK_AND_CPU
    on_cpu = ask("cpu", model="7b", context=64, ram=0, ssd=0)
    assert [step.mode for step in on_cpu.modes] == [Mode.EAGER]
    assert on_cpu.budget.weights_tier == "ram"


def test_the_h200_answers_for_33b_near_its_bound() -> None:
    found = ask("h200", context=131072)
    # 14.7 ms of weights and 7.9 ms of K and V allow about 44 tokens/s
    assert 30 < found.tokens_per_s < 44
    assert found.limit is Limit.HBM
    assert found.budget.weights_tier == "gpu"
    assert found.fits


# ---- machines and models -------------------------------------------------------------------------


def test_every_profile_of_tiers_has_a_machine() -> None:
    assert set(machine_profiles()) == set(hardware_profiles())
    for name in machine_profiles():
        hardware = Hardware.from_profile(name)
        assert (hardware.gpu_bytes > 0) == (name != "cpu")
        assert None not in {
            getattr(hardware.rates, key) for key in ("linear_read", "prefill", "step_s")
        }


def test_rates_that_are_missing_are_named() -> None:
    with pytest.raises(ConfigError, match=r"rates\.link_to_device: missing"):
        complete(Rates(hbm_read=1e12, matmul=1e14))
    with pytest.raises(ConfigError, match=r"profile='h20'.*h200"):
        Hardware.from_profile("h20")


def test_a_models_own_configuration_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    shape = find_model(str(tmp_path))
    assert (shape.num_layers, shape.num_kv_heads, shape.head_dim) == (32, 8, 128)
    assert (shape.intermediate_size, shape.vocab_size, shape.dtype) == (14336, 128256, "bfloat16")
    assert num_parameters(shape) == 8_030_261_248  # Llama 3 8B
    assert shape.token_bytes == 131072


def test_a_configuration_in_the_words_of_gpt2() -> None:
    shape = from_config("gpt2", {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257})
    assert (shape.num_kv_heads, shape.head_dim, shape.intermediate_size) == (12, 64, 3072)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers or n_layer: missing"),
        ({"num_hidden_layers": 0}, "num_layers=0"),
        ({"num_attention_heads": 0}, "num_heads=0"),
        ({"hidden_size": "wide"}, "hidden_size='wide'"),
        ({"num_key_value_heads": 5}, "num_heads=32"),
        ({"kv_lora_rank": 512}, "kv_lora_rank"),
        ({"num_local_experts": 8}, "experts"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"vocab_size": 10**9}, "vocab_size"),
    ],
)
def test_models_of_another_kind_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_config("m", {**LLAMA, **change})
    dense = {**LLAMA, "layer_types": ["full_attention"] * 32}
    assert from_config("m", dense).num_layers == 32


def test_an_unknown_model_is_told_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"33b-mha.*config\.json"):
        find_model("34b")
    with pytest.raises(ConfigError, match=r"config\.json"):
        find_model(str(tmp_path))
