"""Packed: small integer tables in one piece of memory, so that one copy brings all of them to the device."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from numpy.typing import NDArray

from tiermem.layout import round_up

ALIGN_INTS = 32
"""Tables start at multiples of 128 bytes."""


class Packed:
    """Flat int32 tables of `sizes` elements, written on the host and copied to `device` by `upload`.

    `host` and `device` are the tables in the order of `sizes`; both keep their addresses.
    """

    def __init__(self, sizes: SequenceOf[int], device: torch.device) -> None:
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + round_up(size, ALIGN_INTS))
        self._host: NDArray[np.int32] = np.zeros(max(starts[-1], 1), dtype=np.int32)
        self._device = lasting_zeros((len(self._host),), device)
        places = list(zip(starts, sizes, strict=False))
        self.host = [self._host[start : start + size] for start, size in places]
        self.device = [self._device[start : start + size] for start, size in places]

    def upload(self) -> None:
        """Copy what the host's tables hold now, in the order of the current stream; does not wait for it."""
        copy_later(self._device, self._host)


def lasting_zeros(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32 zeros that may be written later whether torch.inference_mode is on then or not."""
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=torch.int32, device=device)


def copy_later(dst: torch.Tensor, src: NDArray[np.int32]) -> None:
    """Copy `src`, of dst's shape, in the order of the current stream; `src` may change at once.

    The pinned memory in between is torch's, which hands it out again when the copy has run.
    """
    if dst.device.type == "cpu":
        dst.copy_(torch.from_numpy(src))
        return
    staging = torch.empty(src.shape, dtype=torch.int32, pin_memory=True)
    staging.numpy()[...] = src
    dst.copy_(staging, non_blocking=True)
