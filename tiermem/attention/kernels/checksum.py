# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The kernel that sums slices: the checksum of `native/include/tiermem/checksum.h`, bit for bit.

One program sums one slice, a tile of whole blocks a turn. It finds the slice by the address of its page, since
slices lie in any of a manager's memories, and stores the sum or compares it with the one that was stored.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from tiermem import _core
from tiermem.attention.kernels.compiled import ALIGNED, CompiledKernels, Variant
from tiermem.attention.kernels.driver import BoundLaunch

ALIGN_BYTES = 16
BLOCK_WORDS = 128
BLOCK_BYTES = 8 * BLOCK_WORDS
ROW_WORDS = 16
TILE_BLOCKS = 4
NUM_WARPS = 1
NUM_STAGES = 1
"""H200, slices of 256 KiB in 2 GiB: 4,055 GB/s, where a kernel that only reads has 4,062 in the same run; 3,857
with 8 blocks, and at most 1,574 with more warps, which add up by shared memory."""
NUM_CHANGING = 4
"""Parameters of a launch: where the pages' addresses, their rows' and their marks are, and the first layer."""
LAUNCHES_KEPT = 256


@triton.jit
def _mix64(x):
    """The finaliser of splitmix64, on uint64."""
    x = (x ^ (x >> 30)) * tl.full((1,), 0xBF58476D1CE4E5B9, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full((1,), 0x94D049BB133111EB, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def sum_slices(
    pages_ptr,
    rows_ptr,
    marks_ptr,
    first_layer,
    tables_ptr,
    SLICE_BYTES: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    VERIFY: tl.constexpr,
):
    """Checksums of slices of SLICE_BYTES, a multiple of 16, which follow each other in each page.

    Page p's first one lies at pages_ptr[p], an int64; its sum is number first_layer of the row of int64 at
    rows_ptr[p], the next one's the next. With VERIFY sums are compared, and marks_ptr[p], an int32, becomes
    one more than the layer whose sum is another one. tables_ptr: 128 keys, then 128 multipliers. Grid:
    (pages, layers).
    """
    page, turn_layer = tl.program_id(0), tl.program_id(1)
    layer = first_layer + turn_layer
    start = tl.load(pages_ptr + page) + turn_layer.to(tl.int64) * SLICE_BYTES
    row_ptr = tl.load(rows_ptr + page).to(tl.pointer_type(tl.int64), bitcast=True)
    if VERIFY:
        expected = tl.load(row_ptr + layer)
    words_ptr = tl.multiple_of(start.to(tl.pointer_type(tl.int64), bitcast=True), 16)

    # A tile is (rows of a block, blocks, words of a row): a thread has two neighbouring words of every row, so
    # that most of a block's sum is added within the thread, and eight threads have a whole line of memory.
    rows, columns = tl.arange(0, BLOCK_WORDS // ROW_WORDS), tl.arange(0, ROW_WORDS)
    blocks = tl.arange(0, TILE_BLOCKS)
    lanes = rows[:, None, None] * ROW_WORDS + columns[None, None, :]
    keys = tl.load(tables_ptr + lanes).to(tl.uint64, bitcast=True)
    multipliers = tl.load(tables_ptr + BLOCK_WORDS + lanes).to(tl.uint32)
    low_keys, high_keys = keys.to(tl.uint32), (keys >> 32).to(tl.uint32)
    places = blocks[None, :, None] * BLOCK_WORDS + lanes
    total = tl.zeros([TILE_BLOCKS], tl.uint64)
    for first in tl.range(0, NUM_BLOCKS, TILE_BLOCKS, num_stages=NUM_STAGES):
        if IS_RAGGED:
            there = places < SLICE_BYTES // 8 - first * BLOCK_WORDS
            words = tl.load(words_ptr + first * BLOCK_WORDS + places, mask=there, other=0)
        else:
            words = tl.load(words_ptr + first * BLOCK_WORDS + places)
        words = words.to(tl.uint64, bitcast=True)
        low, high = words.to(tl.uint32), (words >> 32).to(tl.uint32)
        products = (low + low_keys).to(tl.uint64) * (high + high_keys).to(tl.uint64)
        if IS_RAGGED:
            products = tl.where(there, products, 0)
        # Of what the high halves add, only the low 32 bits stay below 2^64.
        high_sums = tl.sum(high * multipliers, 0).to(tl.uint64) << 32
        low_sums = tl.sum(low.to(tl.uint64) * multipliers.to(tl.uint64), 0)
        s1, s2 = tl.sum(tl.sum(products, 0), 1), tl.sum(low_sums + high_sums, 1)
        number = (first + blocks + 1).to(tl.uint64)
        term = _mix64(s1 + number * tl.full((1,), 0xD6E8FEB86659FD93, tl.uint64))
        term += _mix64(s2 ^ (number * tl.full((1,), 0xA0761D6478BD642F, tl.uint64)))
        if IS_RAGGED:
            term = tl.where(first + blocks < NUM_BLOCKS, term, 0)
        total += term
    length = tl.full((1,), SLICE_BYTES + 1, tl.uint64) * tl.full(
        (1,), 0xE7037ED1A0B428DB, tl.uint64
    )
    found = tl.sum(_mix64(tl.sum(total, 0) + length), 0).to(tl.int64, bitcast=True)
    if VERIFY:
        tl.store(marks_ptr + page, (layer + 1).to(tl.int32), mask=found != expected)
    else:
        tl.store(row_ptr + layer, found)


@lru_cache(64)
def checksum_variant(slice_bytes: int, *, verify: bool) -> Variant:
    """The kernel for slices of one size.

    Raises
    ------
    ValueError: slices of which not all start at multiples of 16 bytes.
    """
    if slice_bytes < ALIGN_BYTES or slice_bytes % ALIGN_BYTES:
        raise ValueError(f"slice_bytes={slice_bytes}: must be a multiple of {ALIGN_BYTES}")
    return Variant.of(
        sum_slices,
        {
            "pages_ptr": "*i64",
            "rows_ptr": "*i64",
            "marks_ptr": "*i32",
            "first_layer": "i64",
            "tables_ptr": f"*i64{ALIGNED}",
            "SLICE_BYTES": slice_bytes,
            "NUM_BLOCKS": -(-slice_bytes // BLOCK_BYTES),
            "BLOCK_WORDS": BLOCK_WORDS,
            "ROW_WORDS": ROW_WORDS,
            "IS_RAGGED": slice_bytes % (TILE_BLOCKS * BLOCK_BYTES) != 0,
            "TILE_BLOCKS": TILE_BLOCKS,
            "NUM_STAGES": NUM_STAGES,
            "VERIFY": verify,
        },
        NUM_WARPS,
    )


class ChecksumKernels:
    """Sums and verifies slices on one device.

    Parameters
    ----------
    device: where the slices are; the CPU only in Triton's interpreter.
    """

    def __init__(self, device: torch.device) -> None:
        self._kernels = CompiledKernels(-1 if device.type == "cpu" else device.index)
        tables = np.concatenate(_core.checksum_tables()).view(np.int64)
        self._tables = torch.from_numpy(tables).to(device)
        self._launches: dict[tuple[int, int, int, bool], BoundLaunch] = {}

    def warm_up(self, slice_bytes: int) -> None:
        """Compile and load what slices of this size need, so that no launch waits."""
        for verify in (False, True):
            self._kernels.kernel(checksum_variant(slice_bytes, verify=verify))

    def launch(
        self,
        pages: torch.Tensor,
        rows: torch.Tensor,
        marks: torch.Tensor,
        slice_bytes: int,
        layers: range,
        stream: int,
        *,
        verify: bool,
    ) -> None:
        """Store the sums of some layers of every page, or compare them with what is stored.

        Parameters
        ----------
        pages, rows: (pages,) int64, addresses of each page's first slice and of its row of sums.
        marks: (pages,) int32.
        layers: numbers in the rows of the slices' sums.
        stream: its handle.

        Ordering: on `stream`; the host does not wait, so that the tensors must stay until it has run.
        """
        key = (len(pages), len(layers), slice_bytes, verify)
        launch = self._launches.get(key)
        if launch is None:
            if len(self._launches) == LAUNCHES_KEPT:
                self._launches.clear()
            launch = self._launches[key] = self._bind(*key)
        passed = self._kernels.passed
        launch(stream, passed(pages), passed(rows), passed(marks), layers.start)

    def _bind(self, num_pages: int, num_layers: int, slice_bytes: int, verify: bool) -> BoundLaunch:
        kernel = self._kernels.kernel(checksum_variant(slice_bytes, verify=verify))
        values = {"tables_ptr": self._kernels.passed(self._tables)}
        return kernel.bind((num_pages, num_layers), NUM_CHANGING, values)
