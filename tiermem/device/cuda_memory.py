"""CudaMemory: device memory that CUDA allocated, as a tensor of torch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tiermem.errors import ClosedError, InvariantError


class CudaMemory:
    """Device memory from cudaMalloc, which torch sees without a copy."""

    __slots__ = ("_address", "_num_bytes", "_on_free", "_tensor")

    def __init__(
        self,
        address: int,
        num_bytes: int,
        device: torch.device,
        on_free: Callable[[CudaMemory], None],
    ) -> None:
        self._address = address
        self._num_bytes = num_bytes
        self._on_free = on_free
        self._tensor: torch.Tensor | None = as_tensor(address, num_bytes, device)

    @property
    def address(self) -> int:
        return self._address

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    @property
    def tensor(self) -> torch.Tensor:
        if self._tensor is None:
            raise ClosedError(f"hot memory of {self._num_bytes} bytes was freed")
        return self._tensor

    def free(self) -> None:
        if self._tensor is None:
            return
        self._tensor = None
        self._on_free(self)

    def abandon(self) -> None:
        self._tensor = None  # cudaMalloc's memory stays until it is freed


class _CudaBytes:
    """Names device memory in the way torch reads; holds nothing."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "stream": None,
            "version": 3,
        }


def as_tensor(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """Device memory as a flat uint8 tensor, without a copy and without owning it."""
    tensor = torch.as_tensor(_CudaBytes(address, num_bytes), device=device)
    if tensor.data_ptr() != address or tensor.device != device:
        raise InvariantError(f"torch copied device memory at {address:#x} instead of wrapping it")
    return tensor
