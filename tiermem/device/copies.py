"""CopyBatch: the checked arguments of one `Device.copy`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tiermem.device.protocol import Addresses, Direction


@dataclass(frozen=True, slots=True)
class CopyBatch:
    """Contiguous int64 arrays of one length: dst[i] receives num_bytes[i] bytes of src[i]."""

    direction: Direction
    dst: Addresses
    src: Addresses
    num_bytes: Addresses

    @classmethod
    def checked(
        cls, direction: Direction, dst: Addresses, src: Addresses, num_bytes: Addresses | int
    ) -> CopyBatch:
        """The batch, or TypeError / ValueError as `Device.copy` promises."""
        if not isinstance(direction, Direction):
            raise TypeError(f"direction={direction!r}: must be a Direction")
        dst, src = _addresses("dst", dst), _addresses("src", src)
        if isinstance(num_bytes, (int, np.integer)):
            num_bytes = np.full(len(dst), num_bytes, dtype=np.int64)
        sizes = _addresses("num_bytes", num_bytes)
        if not len(dst) == len(src) == len(sizes):
            raise ValueError(
                f"dst, src and num_bytes have {len(dst)}, {len(src)} and {len(sizes)} pieces: "
                "must be as many"
            )
        if len(sizes) and int(sizes.min()) < 1:
            raise ValueError(f"num_bytes={int(sizes.min())}: a piece must be at least 1 byte")
        return cls(direction, dst, src, sizes)

    def __len__(self) -> int:
        return len(self.dst)


def check_num_bytes(num_bytes: int) -> None:
    """Refuse a size that no allocation can have."""
    if isinstance(num_bytes, bool) or not isinstance(num_bytes, (int, np.integer)):
        raise TypeError(f"num_bytes={num_bytes!r}: must be an int")
    if num_bytes < 1:
        raise ValueError(f"num_bytes={num_bytes}: must be at least 1")


def _addresses(name: str, value: Addresses) -> Addresses:
    if not isinstance(value, np.ndarray) or value.dtype != np.int64 or value.ndim != 1:
        raise TypeError(f"{name}={value!r}: must be a one-dimensional int64 array")
    return np.ascontiguousarray(value)
