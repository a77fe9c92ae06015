"""Tiles: how much one program of the attention kernel takes at a time, and how many there are."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tiermem.attention.split_rule import TILE_TOKENS

Capability = tuple[int, int]

KIB = 1024
SHARED_BYTES: dict[Capability, int] = {
    (7, 5): 64 * KIB,
    (8, 0): 163 * KIB,
    (8, 6): 99 * KIB,
    (8, 9): 99 * KIB,
    (9, 0): 227 * KIB,
}
"""Shared memory that one block of threads may have (CUDA C++ Programming Guide, compute
capabilities)."""
FALLBACK_SHARED_BYTES = 99 * KIB
"""What every GPU after the T4 has at least."""
FIRST_WITH_DESCRIPTORS: Capability = (9, 0)
"""Newer GPUs have a tensor memory accelerator, and launch a kernel before the one before it ends."""
FIRST_WITH_TENSOR_CORES: Capability = (8, 0)
"""On older GPUs Triton's matrix products become plain multiply-adds, and there are no asynchronous
copies to shared memory to overlap with."""

DESCRIBED_HEAD_DIMS = (64, 128)
"""Head sizes of the decode kernel that reads through a descriptor."""
DECODE_ITEMS = 64
"""Up to this many items (query rows times the heads of a group) a sequence decodes."""
MIN_BLOCK_M = 16
DECODE_PROGRAMS = 4
"""Decoding programs that should fit into an SM's shared memory: bytes in flight hide latency. On an
H200 (fp16, head_dim 128, 8 heads, 131,072 tokens) four programs with three tiles each read 4.26 TB/s in a
run where copies moved 4.27."""
FEW_WAVES, MANY_WAVES = 2, 12
"""Programs an SM: at most the first, or at least the second where the work is long. On an H200 2 read
93 % of what a plain read does and 2.4 read 89 %, since the SMs with three finish last. With a dozen that
no longer matters: 9 still read 89 % (8 sequences of 16,384 tokens, 52 heads)."""
MANY_WAVES_TOKENS = 2048
"""Tokens of one head that each of MANY_WAVES programs should have at least."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Sizes of one program of the attention kernel."""

    block_m: int
    """Items: query rows times query heads of a group."""
    block_n: int
    """Tokens of K and V a turn of the loop."""
    num_warps: int
    num_stages: int
    """Turns of the loop whose K and V are in flight or in use."""
    described: bool = False
    """Whether whole tiles come through a descriptor of the pool."""


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """Sizes of one program of the decode kernel that reads through a descriptor."""

    group_block: int
    """Columns of the products: query heads of a group, and padding."""
    block_n: int
    """Tokens of a tile; a turn of the loop takes one tile of 32 or two of 16."""
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class MergeTile:
    """Sizes of one program of the merge kernel."""

    block_dim: int
    block_parts: int
    """Parts a turn of the loop."""
    num_warps: int


@dataclass(frozen=True, slots=True)
class MassTile:
    """Sizes of one program of the kernel that makes mass of log-sum-exp."""

    block_heads: int
    """Query heads a turn of the loop."""
    block_pages: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class StoreTile:
    """Sizes of one program of the store kernel."""

    block_tokens: int
    num_warps: int


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is not below `value`, at least 1."""
    return 1 << max(0, value - 1).bit_length()


def shared_bytes(capability: Capability) -> int:
    """Shared memory that one program may have."""
    return SHARED_BYTES.get(capability, FALLBACK_SHARED_BYTES)


def attend_tile(
    capability: Capability,
    head_block: int,
    item_bytes: int,
    items: int,
    page_tokens: int,
    *,
    describable: bool,
) -> Tile:
    """The attention kernel's tile.

    Sizes were chosen so that the compiled kernel keeps its sums in registers: at most a few hundred
    bytes of spilling, and none for decode in half precision.

    Parameters
    ----------
    head_block: head_dim rounded up to a power of two.
    item_bytes: bytes of an element of K, V and q.
    items: query rows times heads of a group, of the longest sequence.
    describable: whether a descriptor can be made of the pool, and pages are in order.
    """
    row_bytes = head_block * item_bytes
    if capability < FIRST_WITH_TENSOR_CORES or item_bytes == 4:
        return _multiply_add_tile(capability, row_bytes, items)
    if items <= DECODE_ITEMS:
        return _decode_tile(capability, row_bytes, items)
    tile = _prefill_tile(capability, row_bytes, page_tokens)
    described = describable and capability >= FIRST_WITH_DESCRIPTORS and page_tokens >= tile.block_n
    return replace(tile, described=described)


def decode_tile(
    capability: Capability, head_dim: int, item_bytes: int, group: int, page_tokens: int
) -> DecodeTile | None:
    """The tile of the decode kernel that reads through a descriptor; None where it cannot be used."""
    if capability < FIRST_WITH_DESCRIPTORS or item_bytes != 2:
        return None
    if head_dim not in DESCRIBED_HEAD_DIMS or group > 16:
        return None
    return DecodeTile(8 if group <= 8 else 16, min(page_tokens, TILE_TOKENS), 1, 3)


def merge_tile(head_dim: int, max_parts: int) -> MergeTile:
    """The merge kernel's tile: few parts in one turn, many with more programs to a row."""
    if max_parts <= 4:
        return MergeTile(min(128, next_power_of_2(head_dim)), 4, 1)
    return MergeTile(32, 32, 1)


def part_tokens(head_block: int, item_bytes: int, page_tokens: int) -> int:
    """Tokens of a page whose log-sum-exp is in one place: no tile of operands of this size has fewer."""
    return min(page_tokens, 32 if head_block * item_bytes <= 256 else 16)


def mass_tile(num_heads: int) -> MassTile:
    """The mass kernel's tile."""
    return MassTile(min(64, next_power_of_2(num_heads)), 32, 4)


def store_tile(num_tokens: int) -> StoreTile:
    """The store kernel's tile."""
    return StoreTile(16 if num_tokens > 4 else 4, 4 if num_tokens > 4 else 1)


def _multiply_add_tile(capability: Capability, row_bytes: int, items: int) -> Tile:
    """Products without tensor cores, also exact float32: operands are in registers, so tiles are small."""
    has_async_copies = capability >= FIRST_WITH_TENSOR_CORES
    wide = items > MIN_BLOCK_M and row_bytes <= (256 if has_async_copies else 512)
    block_m = 32 if wide else MIN_BLOCK_M
    block_n = 32 if row_bytes <= 256 else 16
    return Tile(block_m, block_n, 8, 2 if has_async_copies else 1)


def _decode_tile(capability: Capability, row_bytes: int, items: int) -> Tile:
    """Few items: small programs, many of them, each with as much in flight as fits."""
    block_m = max(MIN_BLOCK_M, next_power_of_2(items))
    block_n = 32 if row_bytes <= 256 else 16
    num_warps = max(1, row_bytes // 128, block_m * row_bytes // 4096)
    budget = shared_bytes(capability) // DECODE_PROGRAMS
    in_flight = budget // (2 * block_n * row_bytes)
    return Tile(block_m, block_n, num_warps, 1 + min(max(in_flight, 1), 3))


def _prefill_tile(capability: Capability, row_bytes: int, page_tokens: int) -> Tile:
    """Many items: large tiles, so that each element of K and V is used often.

    On an H200 (fp16, head_dim 128, 2,048 new tokens over 32,768) two programs of 64 items an SM, whose
    softmax and products overlap, reach 500 to 523 TFLOP/s, one of 128 items 476 to 494; with a fourth stage
    only one fits, and it is 397. Pages of 16 tokens are gathered through pointers: 382, with 64 tokens a
    turn 360.
    """
    small_shared = shared_bytes(capability) < 128 * KIB
    if row_bytes > 256:
        return Tile(64, 16 if small_shared else 32, 8, 2)
    if small_shared:
        return Tile(64, 32, 4, 2)
    if row_bytes <= 128:
        return Tile(128, 64, 8, 3)
    if capability < (9, 0):
        return Tile(64, 32, 4, 3)
    return Tile(64, 64, 4, 3) if page_tokens > 16 else Tile(64, 32, 4, 4)


def split_count(num_programs: int, tokens: int, block_n: int, num_sms: int) -> int:
    """Into how many parts each sequence's K and V go; from host numbers, so that graphs can capture it.

    Parameters
    ----------
    num_programs: programs without splitting.
    tokens: what the longest sequence's rows see.
    block_n: tokens of a tile; a part has at least two tiles.
    num_sms: the GPU's multiprocessors.
    """
    num_programs = max(1, num_programs)
    many = MANY_WAVES * num_sms
    if num_programs * tokens >= many * MANY_WAVES_TOKENS:
        parts = -(-many // num_programs)
    else:
        parts = FEW_WAVES * num_sms // num_programs
    return max(1, min(parts, tokens // (2 * block_n)))
