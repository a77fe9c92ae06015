"""What the kernels take of each GPU: registers, spilled bytes, shared memory.

`python -m tiermem.attention.kernels.report [major.minor ...]` compiles every variant below ahead of time,
which needs no GPU, and prints the table.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from tiermem.attention.kernels import tiles, variants
from tiermem.attention.kernels.compiled import Variant, compile_variant, target_of
from tiermem.attention.kernels.tiles import Capability
from tiermem.attention.kernels.variants import Operands

DECODE_ROWS, DRAFT_ROWS, PREFILL_ROWS = 1, 8, 512
"""Query rows of a sequence."""


@dataclass(frozen=True, slots=True)
class Use:
    """A way in which the backend uses the kernels, of which a GPU gets one variant."""

    rows: int = DECODE_ROWS
    group: int = 7
    kv_heads: int = 8
    head_dim: int = 128
    page_tokens: int = 64
    dtype: torch.dtype = torch.float16
    work: bool = False
    scattered: bool = False
    window: bool = False
    widen: bool = False
    mass: bool = False
    """Whether pages leave their log-sum-exp."""


USES = {
    "decode": Use(work=True),
    "decode, page 16": Use(work=True, page_tokens=16),
    "decode, 16 heads share": Use(work=True, group=16, kv_heads=4),
    "decode, MHA": Use(work=True, group=1, kv_heads=52),
    "decode, head_dim 64": Use(work=True, head_dim=64),
    "decode, bfloat16": Use(work=True, dtype=torch.bfloat16),
    "decode in a window": Use(window=True),
    "decode of scattered pages": Use(scattered=True),
    "prefill": Use(PREFILL_ROWS),
    "prefill, page 16": Use(PREFILL_ROWS, page_tokens=16),
    "prefill of scattered pages": Use(PREFILL_ROWS, scattered=True, page_tokens=16),
    "prefill in a window": Use(PREFILL_ROWS, window=True),
    "prefill, head_dim 64": Use(PREFILL_ROWS, head_dim=64),
    "prefill, head_dim 256": Use(PREFILL_ROWS, head_dim=256),
    "decode, float32": Use(work=True, dtype=torch.float32),
    "decode, float32 products": Use(work=True, widen=True),
    "decode, head_dim 256": Use(work=True, head_dim=256, page_tokens=16),
    "decode, head_dim 80": Use(work=True, head_dim=80, page_tokens=32),
    "prefill, float32": Use(PREFILL_ROWS, dtype=torch.float32),
    "prefill, float32 products": Use(PREFILL_ROWS, widen=True),
    "decode, page mass": Use(work=True, mass=True),
    "decode, page mass, page 16": Use(work=True, page_tokens=16, mass=True),
    "decode, page mass, 16 share": Use(work=True, group=16, kv_heads=4, mass=True),
    "decode, page mass, float32": Use(work=True, dtype=torch.float32, mass=True),
    "draft, page mass": Use(DRAFT_ROWS, mass=True),
    "draft, page mass, scattered": Use(DRAFT_ROWS, scattered=True, mass=True),
    "draft, page mass, page 16": Use(DRAFT_ROWS, page_tokens=16, scattered=True, mass=True),
    "decode, page mass, scattered": Use(scattered=True, mass=True),
    "decode, page mass, window": Use(window=True, page_tokens=16, mass=True),
    "prefill, page mass": Use(PREFILL_ROWS, mass=True),
    "prefill, page mass, scattered": Use(PREFILL_ROWS, scattered=True, page_tokens=16, mass=True),
}


@dataclass(frozen=True, slots=True)
class Resources:
    """What one program of a compiled kernel takes."""

    kernel: str
    num_warps: int
    registers: int
    """Of a thread."""
    spilled_bytes: int
    """Of a thread, in local memory."""
    shared_bytes: int


def variant_for(use: Use, capability: Capability) -> Variant:
    """The variant of the attention kernels that the backend picks for `use` on such a GPU."""
    operands = Operands(use.kv_heads, use.group, use.head_dim, use.page_tokens, use.dtype)
    early = capability >= tiles.FIRST_WITH_DESCRIPTORS
    item_bytes = 4 if use.widen else use.dtype.itemsize
    part_tokens = 0
    if use.mass:
        part_tokens = tiles.part_tokens(operands.head_block, item_bytes, use.page_tokens)
    if use.work and not use.widen:
        decode = tiles.decode_tile(capability, use.head_dim, item_bytes, use.group, use.page_tokens)
        if decode is not None:
            return variants.decode_variant(
                operands, decode, use.dtype, early=early, part_tokens=part_tokens
            )
    tile = tiles.attend_tile(
        capability, operands.head_block, item_bytes, use.rows * use.group, use.page_tokens,
        describable=operands.head_block == use.head_dim and not (use.scattered or use.widen),
    )  # fmt: skip
    return variants.attend_variant(
        operands, tile, use.dtype,
        has_work=use.work, has_starts=use.scattered, has_window=use.window, widen=use.widen,
        early=early, part_tokens=part_tokens,
    )  # fmt: skip


def other_variants(capability: Capability) -> dict[str, Variant]:
    """The variants of the kernels that store, merge and make mass."""
    operands = Operands(8, 7, 128, 64, torch.float16)
    early = capability >= tiles.FIRST_WITH_DESCRIPTORS
    found = {}
    for name, num_tokens in (("store, decode", 1), ("store, prefill", PREFILL_ROWS)):
        found[name] = variants.store_variant(operands, tiles.store_tile(num_tokens))
    for max_parts in (4, 33):
        found[f"merge of {max_parts}"] = variants.merge_variant(
            56, 128, tiles.merge_tile(128, max_parts), torch.float32, torch.float16,
            has_work=True, early=early,
        )  # fmt: skip
    for page_tokens in (16, 64):
        parts = page_tokens // tiles.part_tokens(128, 2, page_tokens)
        found[f"mass, page {page_tokens}"] = variants.mass_variant(56, parts, tiles.mass_tile(56))
    return found


def resources(variant: Variant, capability: Capability) -> Resources:
    """Compile and ask cuobjdump, which Triton brings along.

    Raises
    ------
    RuntimeError: cuobjdump does not say what is wanted. Whatever Triton raises when it cannot compile.
    """
    compiled = compile_variant(variant, target_of(capability))
    with tempfile.TemporaryDirectory() as directory:
        binary = Path(directory, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    usage = dict(re.findall(r"\b(REG|STACK):(\d+)", done.stdout))
    if len(usage) != 2:
        raise RuntimeError(f"{' '.join(command)}: no registers and stack in {done.stdout!r}")
    return Resources(
        variant.kernel.__name__,
        variant.num_warps,
        int(usage["REG"]),
        int(usage["STACK"]),
        compiled.metadata.shared,
    )


def table(capabilities: list[Capability]) -> list[str]:
    """The lines of the table, one for each variant and GPU."""
    lines = [
        f"{'use':28} {'sm':4}{'kernel':14} {'warps':>5} {'registers':>9} {'spilled':>7} {'shared':>7}"
    ]
    for capability in capabilities:
        found = {
            name: variant_for(use, capability)
            for name, use in USES.items()
            if use.dtype != torch.bfloat16 or capability >= tiles.FIRST_WITH_TENSOR_CORES
        }
        for name, variant in {**found, **other_variants(capability)}.items():
            took = resources(variant, capability)
            lines.append(
                f"{name:28} {capability[0]}{capability[1]:<2} {took.kernel:14} {took.num_warps:5} "
                f"{took.registers:9} {took.spilled_bytes:7} {took.shared_bytes:7}"
            )
    return lines


def main(arguments: list[str]) -> None:
    """Print the table for the compute capabilities that are named, such as 7.5, or for all."""
    named = [tuple(map(int, text.split("."))) for text in arguments]
    capabilities = [(major, minor) for major, minor in named] or list(tiles.SHARED_BYTES)
    sys.stdout.write("\n".join(table(capabilities)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
