"""The Triton kernels compile, without a GPU, for every compute capability and fit its shared memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from tiermem.attention.kernels import tiles  # noqa: E402
from tiermem.attention.kernels.attend import attend_pages  # noqa: E402
from tiermem.attention.kernels.merge import merge_parts  # noqa: E402
from tiermem.attention.kernels.store import store_tokens  # noqa: E402

TRITON_NAME = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
MOST_SHARED_BYTES = {(7, 5): 65536, (8, 0): 166912, (8, 6): 101376, (8, 9): 101376, (9, 0): 232448}
"""What the driver grants a block on each."""
INTS = frozenset({"window", "num_rows", "num_splits", "num_tiles", "table_stride", "starts_stride"})
INTS |= {"num_parts", "num_items", "num_tokens"}


@dataclass(frozen=True)
class Variant:
    """What decides how the attention kernel is compiled, besides the GPU."""

    head_dim: int = 128
    page_tokens: int = 64
    items: int = 7
    dtype: torch.dtype = torch.float16
    has_starts: bool = False
    has_window: bool = False
    widen: bool = False


DECODE = Variant(page_tokens=16, has_window=True)
PREFILL = Variant(items=3584)
EVERYWHERE = [DECODE, PREFILL, Variant(items=3584, page_tokens=16, has_starts=True)]
MORE = [
    Variant(items=7, widen=True),
    Variant(items=3584, widen=True),
    Variant(head_dim=64, items=56),
    Variant(head_dim=80, page_tokens=32, items=8),
    Variant(head_dim=256, page_tokens=16, items=8),
    Variant(head_dim=256, page_tokens=16, items=56),
    Variant(head_dim=256, page_tokens=16, items=4096),
    Variant(head_dim=64, items=4096, dtype=torch.float32),
    Variant(head_dim=256, page_tokens=16, items=4096, dtype=torch.float32),
]


def _compile(
    kernel: Any, arguments: dict[str, Any], capability: tuple[int, int], warps: int
) -> Any:
    """Compile as a launch with these arguments would: strings are types, the rest constants."""
    signature = {
        name: value if isinstance(value, str) else "constexpr" for name, value in arguments.items()
    }
    constants = {
        (kernel.arg_names.index(name),): value
        for name, value in arguments.items()
        if not isinstance(value, str)
    }
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, value in arguments.items()
        if isinstance(value, str) and value != "fp32" and name not in INTS
    }
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    return triton.compile(source, target=target, options={"num_warps": warps})


def _compile_attend(variant: Variant, capability: tuple[int, int]) -> Any:
    head_block = tiles.next_power_of_2(variant.head_dim)
    item_bytes = 4 if variant.widen else variant.dtype.itemsize
    tile = tiles.attend_tile(capability, head_block, item_bytes, variant.items)
    item = "*" + TRITON_NAME[variant.dtype]
    tables = ("block_table", "page_starts", "num_pages", "kv_end", "row_starts", "q_start")
    strides = ("q_row_stride", "q_head_stride", "table_stride", "starts_stride")
    numbers = ("window", "num_rows", "num_splits", "num_tiles")
    arguments: dict[str, Any] = {
        "q_ptr": item,
        "kv_ptr": item,
        **{f"{name}_ptr": "*i32" for name in tables},
        "out_ptr": "*fp32",
        "lse_ptr": "*fp32",
        **dict.fromkeys(strides, "i32"),
        "slot_items": "i64",
        "layer_offset": "i64",
        "scale_log2": "fp32",
        **dict.fromkeys(numbers, "i32"),
        "KV_HEADS": 8,
        "GROUP": 7,
        "HEAD_DIM": variant.head_dim,
        "HEAD_BLOCK": head_block,
        "PAGE_TOKENS": variant.page_tokens,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "NUM_STAGES": tile.num_stages,
        "HAS_STARTS": variant.has_starts,
        "HAS_WINDOW": variant.has_window,
        "WIDEN": variant.widen,
    }
    assert list(arguments) == attend_pages.arg_names
    return _compile(attend_pages, arguments, capability, tile.num_warps)


@pytest.mark.parametrize("variant", EVERYWHERE, ids=["decode", "prefill", "scattered"])
@pytest.mark.parametrize("capability", tiles.SHARED_BYTES)
def test_attention_fits(capability: tuple[int, int], variant: Variant) -> None:
    compiled = _compile_attend(variant, capability)
    assert compiled.metadata.shared <= MOST_SHARED_BYTES[capability]
    assert f".target sm_{capability[0]}{capability[1]}" in compiled.asm["ptx"]


@pytest.mark.parametrize("capability", [cap for cap in tiles.SHARED_BYTES if cap >= (8, 0)])
def test_bfloat16_attention_uses_tensor_cores(capability: tuple[int, int]) -> None:
    compiled = _compile_attend(Variant(head_dim=64, dtype=torch.bfloat16), capability)
    assert "bf16.bf16" in compiled.asm["ptx"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", MORE, ids=str)
@pytest.mark.parametrize("capability", tiles.SHARED_BYTES)
def test_every_other_variant_fits(capability: tuple[int, int], variant: Variant) -> None:
    compiled = _compile_attend(variant, capability)
    assert compiled.metadata.shared <= MOST_SHARED_BYTES[capability]


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_store_compiles_to_wide_copies(capability: tuple[int, int]) -> None:
    pointers = dict.fromkeys(("k_ptr", "v_ptr"), "*fp16")
    strides = ("k_token_stride", "k_head_stride", "v_token_stride", "v_head_stride")
    arguments: dict[str, Any] = {
        **pointers,
        "token_slots_ptr": "*i64",
        "kv_ptr": "*fp16",
        **dict.fromkeys(strides, "i32"),
        "slot_items": "i64",
        "layer_offset": "i64",
        "num_tokens": "i32",
        "KV_HEADS": 8,
        "HEAD_DIM": 128,
        "HEAD_BLOCK": 128,
        "PAGE_TOKENS": 64,
        "BLOCK_TOKENS": 16,
    }
    assert list(arguments) == store_tokens.arg_names
    compiled = _compile(store_tokens, arguments, capability, 4)
    assert "st.global.v4.b32" in compiled.asm["ptx"]


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_merge_compiles(capability: tuple[int, int]) -> None:
    arguments: dict[str, Any] = {
        "part_ptr": "*fp32",
        "part_lse_ptr": "*fp32",
        "out_ptr": "*fp16",
        "lse_ptr": "*fp32",
        "num_parts": "i32",
        "num_items": "i32",
        "HEAD_DIM": 80,
        "BLOCK_DIM": 64,
        "BLOCK_PARTS": 16,
    }
    assert list(arguments) == merge_parts.arg_names
    assert _compile(merge_parts, arguments, capability, 1).asm["cubin"]


def test_a_capability_without_tiles_of_its_own_gets_the_smaller_ones() -> None:
    for items in (7, 4096):
        assert tiles.attend_tile((12, 0), 128, 2, items) == tiles.attend_tile((8, 6), 128, 2, items)


@pytest.mark.parametrize("num_sms", [1, 40, 132])
def test_splits_fill_the_multiprocessors_but_leave_no_part_without_work(num_sms: int) -> None:
    for programs in (1, 8, 64, 1000):
        for tokens in (1, 63, 64, 1000, 131072):
            parts = tiles.split_count(programs, tokens, 32, num_sms)
            assert 1 <= parts <= max(1, tokens // 64)
            assert parts == 1 or (parts - 1) * programs <= tiles.MANY_WAVES * num_sms
    assert tiles.split_count(8, 131072, 32, 132) == 33
