"""Slices of random pages in scattered memory, with the sums that the native function gives."""

from __future__ import annotations

import numpy as np
import torch

from tiermem import _core
from tiermem.attention.kernels.checksum import ChecksumKernels

NUM_PAGES, NUM_LAYERS, GAP_BYTES = 5, 3, 4096


class Case:
    """Pages of slices of one size in host memory, in another order than their rows of sums."""

    def __init__(self, random: np.random.Generator, slice_bytes: int) -> None:
        self.slice_bytes = slice_bytes
        stride = NUM_LAYERS * slice_bytes + GAP_BYTES
        stride += -stride % 16
        raw = random.integers(0, 256, NUM_PAGES * stride + 16, dtype=np.uint8)
        shift = -raw.ctypes.data % 16
        self.memory = raw[shift : shift + NUM_PAGES * stride]
        order = random.permutation(NUM_PAGES)
        self.pages = self.memory.ctypes.data + order * stride
        self.sums = np.zeros((NUM_PAGES, NUM_LAYERS), dtype=np.uint64)
        self.rows = self.sums.ctypes.data + np.arange(NUM_PAGES) * NUM_LAYERS * 8
        self.marks = np.zeros(NUM_PAGES, dtype=np.int32)

    def expected(self) -> np.ndarray:
        """(pages, layers) uint64, by the native function."""
        return _core.checksum_pages(self.pages, self.slice_bytes, NUM_LAYERS)

    def store_expected(self) -> None:
        """Into the rows, for what verifies."""
        self.sums[:] = self.expected()

    def flip(self, random: np.random.Generator) -> tuple[int, int]:
        """Flip a random bit; the page and the layer that it belongs to."""
        page, layer = int(random.integers(NUM_PAGES)), int(random.integers(NUM_LAYERS))
        place = int(self.pages[page]) - self.memory.ctypes.data + layer * self.slice_bytes
        place += int(random.integers(self.slice_bytes))
        self.memory[place] ^= np.uint8(1 << int(random.integers(8)))
        return page, layer

    def launch(
        self, kernels: ChecksumKernels, *, verify: bool, layers: range = range(NUM_LAYERS)
    ) -> None:
        """On the CPU, in Triton's interpreter."""
        pages, rows, marks = map(torch.from_numpy, (self.pages, self.rows, self.marks))
        kernels.launch(pages, rows, marks, self.slice_bytes, layers, 0, verify=verify)
