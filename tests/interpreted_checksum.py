"""The kernel of checksums in Triton's interpreter, on the CPU, against the native function.

In a process of its own, as `interpreted_attention.py` says: test_checksum_kernel.py runs it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checksum_cases import Case

from tiermem.attention.kernels.checksum import ChecksumKernels

SIZES = [16, 1008, 1040, 3072, 4096, 5 * 1024 + 16, 10 * 1024 + 2064]


@pytest.mark.parametrize("slice_bytes", SIZES)
def test_sums_are_those_of_the_native_function(slice_bytes: int) -> None:
    case = Case(np.random.default_rng(slice_bytes), slice_bytes)
    case.launch(ChecksumKernels(torch.device("cpu")), verify=False)
    assert np.array_equal(case.sums, case.expected())
    assert not case.marks.any()


@pytest.mark.parametrize("slice_bytes", [48, 1024, 5 * 1024 + 16])
def test_a_flipped_bit_marks_its_page_and_layer(slice_bytes: int) -> None:
    random = np.random.default_rng(slice_bytes)
    case = Case(random, slice_bytes)
    case.store_expected()
    kernels = ChecksumKernels(torch.device("cpu"))
    case.launch(kernels, verify=True)
    assert not case.marks.any()
    page, layer = case.flip(random)
    before = case.sums.copy()
    case.launch(kernels, verify=True)
    assert case.marks.nonzero()[0].tolist() == [page]
    assert case.marks[page] == layer + 1
    assert np.array_equal(case.sums, before), "sums to compare with are not written"


def test_other_layers_of_the_rows_stay() -> None:
    case = Case(np.random.default_rng(5), 1024)
    case.sums[:] = 7
    case.launch(ChecksumKernels(torch.device("cpu")), verify=False, layers=range(2, 3))
    assert np.array_equal(case.sums[:, 2], case.expected()[:, 0]), "the page's first slice"
    assert (case.sums[:, :2] == 7).all()
