"""A driver of CUDA that keeps what it is given to launch, every byte of it."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from typing import Any

CONTEXT = 0xC0DE
"""The one that kernels are loaded in, and the thread's current one at the start."""
WORDS = b"out of luck"
"""What the driver says of every code."""


class Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("id", ctypes.c_int), ("value", ctypes.c_int32 * 17)]


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


@dataclass(frozen=True)
class Launched:
    """One launch: what of, where, and the bytes and addresses of its parameters."""

    name: str
    context: int
    stream: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    attributes: tuple[tuple[int, ...], ...]
    parameters: tuple[bytes, ...]
    addresses: tuple[int, ...]

    @property
    def early(self) -> bool:
        """Whether it may start before the kernel before it has ended."""
        return len(self.attributes) == 1

    def number(self, index: int, ctype: Any = ctypes.c_uint64) -> Any:
        """A parameter; it must be as long as `ctype`."""
        assert len(self.parameters[index]) == ctypes.sizeof(ctype)
        return ctype.from_buffer_copy(self.parameters[index]).value


class FakeDriver:
    """What `driver.py` takes of the driver's library; launches call back from the native core."""

    def __init__(self) -> None:
        self.status = 0
        self.context = CONTEXT
        self.maps: list[tuple[Any, ...]] = []
        self.names: list[str] = []
        self.launched: list[Launched] = []
        self._sizes: list[list[int]] = []
        pointer, handle, number = ctypes.POINTER, ctypes.c_void_p, ctypes.c_int
        self.cuLaunchKernelEx = ctypes.CFUNCTYPE(
            number, pointer(Config), handle, pointer(handle), handle
        )(self._launch)
        self.cuCtxGetCurrent = ctypes.CFUNCTYPE(number, pointer(handle))(self._get_context)
        self.cuCtxSetCurrent = ctypes.CFUNCTYPE(number, handle)(self._set_context)
        self.cuGetErrorString = ctypes.CFUNCTYPE(number, number, pointer(ctypes.c_char_p))(
            self._error_string
        )

    def load(self, name: str, sizes: list[int]) -> int:
        """The handle of a kernel whose parameters have these sizes in bytes."""
        self.names.append(name)
        self._sizes.append(sizes)
        return len(self.names)

    def take(self) -> list[Launched]:
        """What was launched since the last call."""
        taken, self.launched = self.launched, []
        return taken

    def cuTensorMapEncodeTiled(self, target: Any, *arguments: Any) -> int:  # noqa: N802
        assert ctypes.addressof(target._obj) % 64 == 0
        target._obj.raw = tensor_map(len(self.maps))
        self.maps.append(arguments)
        return self.status

    def _launch(self, config: Any, function: int, parameters: Any, extra: int | None) -> int:
        assert extra is None
        sizes, given = self._sizes[function - 1], config.contents
        addresses = tuple(parameters[i] for i in range(len(sizes)))
        attributes = (given.attributes[i] for i in range(given.num_attributes))
        self.launched.append(
            Launched(
                self.names[function - 1],
                self.context,
                given.stream or 0,
                tuple(given.grid),
                tuple(given.block),
                given.shared_bytes,
                tuple((a.id, *a.value) for a in attributes),
                tuple(
                    ctypes.string_at(address, size)
                    for address, size in zip(addresses, sizes, strict=True)
                ),
                addresses,
            )
        )
        return self.status

    def _get_context(self, context: Any) -> int:
        context[0] = self.context
        return 0

    def _set_context(self, context: int | None) -> int:
        self.context = context or 0
        return 0

    def _error_string(self, _status: int, text: Any) -> int:
        text[0] = WORDS
        return 0


def tensor_map(number: int) -> bytes:
    """What the driver makes of the descriptor of that number."""
    return bytes((number + i) % 256 for i in range(128))


def parameter_sizes(compiled: Any) -> list[int]:
    """Bytes of each parameter of a kernel, from its PTX."""
    entry = compiled.asm["ptx"].partition(".visible .entry")[2].partition(")")[0]
    sizes = []
    for line in entry.split("\n"):
        if ".param" not in line:
            continue
        bits = re.search(r"\.[bfsu](\d+)\s", line)
        assert bits is not None, line
        count = re.search(r"\[(\d+)\]", line)
        sizes.append(int(bits[1]) // 8 * (int(count[1]) if count else 1))
    return sizes
