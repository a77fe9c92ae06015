"""The Triton kernels compile, without a GPU, for every compute capability and fit its shared memory."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from tiermem import layout  # noqa: E402
from tiermem.attention.kernels import report, tiles  # noqa: E402
from tiermem.attention.kernels.compiled import Variant, compile_variant, target_of  # noqa: E402
from tiermem.attention.kernels.report import USES, Resources, Use  # noqa: E402

Capability = tuple[int, int]
MOST_SHARED_BYTES = {(7, 5): 65536, (8, 0): 166912, (8, 6): 101376, (8, 9): 101376, (9, 0): 232448}
"""What the driver grants a block on each."""
CHIEF = (
    "decode",
    "decode, page 16",
    "prefill",
    "prefill of scattered pages",
    "decode, page mass",
    "draft, page mass, page 16",
)
"""Uses whose variants every run of the tests compiles; the others take minutes."""


@cache
def _resources(variant: Variant, capability: Capability) -> Resources:
    return report.resources(variant, capability)


def _fits(use: Use, capability: Capability) -> Resources:
    took = _resources(report.variant_for(use, capability), capability)
    assert took.shared_bytes <= MOST_SHARED_BYTES[capability]
    assert took.registers * took.num_warps * 32 <= 65536
    if use.rows == report.DECODE_ROWS and use.work and use.dtype != torch.float32:
        assert took.spilled_bytes == 0
    if use.mass:
        assert took.spilled_bytes == 0
    return took


@pytest.mark.parametrize("name", CHIEF)
@pytest.mark.parametrize("capability", tiles.SHARED_BYTES)
def test_attention_fits(capability: Capability, name: str) -> None:
    _fits(USES[name], capability)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in USES if name not in CHIEF])
@pytest.mark.parametrize("capability", tiles.SHARED_BYTES)
def test_every_other_use_fits(capability: Capability, name: str) -> None:
    if USES[name].dtype == torch.bfloat16 and capability < tiles.FIRST_WITH_TENSOR_CORES:
        pytest.skip("no bfloat16")
    took = _fits(USES[name], capability)
    assert took.spilled_bytes <= 128


def test_half_precision_decode_on_hopper_reads_through_a_descriptor_with_one_warp() -> None:
    variant = report.variant_for(USES["decode"], (9, 0))
    took = _resources(variant, (9, 0))
    assert took.kernel == "decode_chunks" and took.num_warps == 1
    ptx = compile_variant(variant, target_of((9, 0))).asm["ptx"]
    assert "cp.async.bulk.tensor" in ptx and "griddepcontrol.launch_dependents" in ptx
    # Six programs fit on a multiprocessor.
    assert 6 * took.shared_bytes <= MOST_SHARED_BYTES[9, 0]


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_page_mass_costs_nothing_where_it_is_not_asked_for(name: str) -> None:
    for capability in [(8, 0), (9, 0)]:
        plain = report.variant_for(USES[name], capability)
        asked = report.variant_for(replace(USES[name], mass=True), capability)
        passed = [isinstance(argument, str) for argument in plain.arguments]
        assert sum(isinstance(argument, str) for argument in asked.arguments) == sum(passed) + 2
        stores = [
            compile_variant(variant, target_of(capability)).asm["ptx"].count("st.global")
            for variant in (plain, asked)
        ]
        assert stores[0] < stores[1]
        most = _resources(asked, capability).shared_bytes
        assert _resources(plain, capability).shared_bytes <= most


def test_older_gpus_get_neither_descriptors_nor_early_launches() -> None:
    for capability in [(7, 5), (8, 9)]:
        variant = report.variant_for(USES["decode"], capability)
        ptx = compile_variant(variant, target_of(capability)).asm["ptx"]
        assert "bulk.tensor" not in ptx and "griddepcontrol" not in ptx
        assert f".target sm_{capability[0]}{capability[1]}" in ptx


def test_bfloat16_attention_uses_tensor_cores() -> None:
    variant = report.variant_for(USES["decode, bfloat16"], (8, 0))
    assert "bf16.bf16" in compile_variant(variant, target_of((8, 0))).asm["ptx"]


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_store_and_merge_compile_to_wide_copies(capability: Capability) -> None:
    for name, variant in report.other_variants(capability).items():
        took = _resources(variant, capability)
        assert took.spilled_bytes == 0
        assert took.shared_bytes <= (8192 if name.startswith("mass") else 1024)
        if name.startswith("store"):
            assert "st.global.v4.b32" in compile_variant(variant, target_of(capability)).asm["ptx"]


def test_the_table_names_every_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "USES", {"decode": USES["decode"]})
    monkeypatch.setattr(report, "other_variants", lambda capability: {})
    head, line = report.table([(9, 0)])
    took = _resources(report.variant_for(USES["decode"], (9, 0)), (9, 0))
    assert len(head) == len(line)
    assert line.split()[-3:] == [
        str(took.registers),
        str(took.spilled_bytes),
        str(took.shared_bytes),
    ]


def test_no_tile_has_fewer_tokens_than_a_part_of_a_page() -> None:
    """Two tiles of a page would else leave their log-sum-exp in one place."""
    for capability in [*tiles.SHARED_BYTES, (12, 0)]:
        for head_dim, item_bytes, page_tokens in product(
            range(16, 257, 16), (2, 4), layout.PAGE_TOKENS
        ):
            head_block = tiles.next_power_of_2(head_dim)
            part = tiles.part_tokens(head_block, item_bytes, page_tokens)
            assert page_tokens % part == 0
            for items, describable in product((1, 16, 33, 64, 65, 4096), (False, True)):
                tile = tiles.attend_tile(
                    capability, head_block, item_bytes, items, page_tokens, describable=describable
                )
                assert tile.block_n >= part and tile.block_n % part == 0
            for group in (1, 8, 16):
                decode = tiles.decode_tile(capability, head_dim, item_bytes, group, page_tokens)
                assert decode is None or decode.block_n == part


def test_a_capability_without_tiles_of_its_own_gets_the_smaller_ones() -> None:
    for items in (7, 4096):
        unknown, known = (
            tiles.attend_tile(capability, 128, 2, items, 64, describable=False)
            for capability in ((12, 0), (8, 6))
        )
        assert unknown == known


@pytest.mark.parametrize("num_sms", [1, 40, 132])
def test_splits_fill_the_multiprocessors_but_leave_no_part_without_work(num_sms: int) -> None:
    for programs in (1, 8, 64, 1000):
        for tokens in (1, 63, 64, 1000, 131072):
            parts = tiles.split_count(programs, tokens, 32, num_sms)
            assert 1 <= parts <= max(1, tokens // 64)
            assert parts == 1 or (parts - 1) * programs <= tiles.MANY_WAVES * num_sms
    assert tiles.split_count(8, 131072, 32, 132) == 33
