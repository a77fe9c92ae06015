"""Upload: small arrays that go to the device together, in one copy."""

from __future__ import annotations

import numpy as np
import torch

BLOCK_BYTES = 64 << 10
ALIGN_BYTES = 16


class Upload:
    """Takes arrays and gives tensors on the device, which have the arrays' values once `send` was called.

    On the CPU device the tensors are the arrays themselves.

    Ordering: the copies run on the compute stream, which is torch's current one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._full: list[_Block] = []
        self._block: _Block | None = None

    def put(self, array: np.ndarray) -> torch.Tensor:
        """A tensor for `array`, of its shape and dtype."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._device.type == "cpu":
            return tensor
        if self._block is None or not self._block.has_room(tensor):
            if self._block is not None:
                self._full.append(self._block)
            self._block = _Block(max(BLOCK_BYTES, tensor.nbytes), self._device)
        return self._block.put(tensor)

    def send(self) -> None:
        """Start the copies of all that was put."""
        blocks = self._full if self._block is None else [*self._full, self._block]
        for block in blocks:
            block.send()
        self._full, self._block = [], None


class _Block:
    """Pinned memory, and as much on the device."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self._there = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._used = 0

    def has_room(self, tensor: torch.Tensor) -> bool:
        return self._used + tensor.nbytes <= self._host.numel()

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        place = slice(self._used, self._used + tensor.nbytes)
        self._host[place].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        self._used = min(-(-place.stop // ALIGN_BYTES) * ALIGN_BYTES, self._host.numel())
        return self._there[place].view(tensor.dtype).view(tensor.shape)

    def send(self) -> None:
        self._there[: self._used].copy_(self._host[: self._used], non_blocking=True)
