"""Compiled kernels: what a kernel is compiled for, and launching it at little cost to the host.

Triton looks at every argument in every launch to find the kernel compiled for it, which takes about 27
microseconds. Here the caller says what a kernel is compiled for, once; a launch then passes numbers on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
"""Triton's name of each dtype that attention reads or writes."""
ALIGNED = ":16"
"""After a type: the pointer or number is a multiple of 16, which allows wide loads."""

Argument: TypeAlias = str | int | bool
"""A type ("*fp16", "i32", with ALIGNED or without) of what a launch passes, or a constant's value."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What one kernel is compiled for.

    Parameters
    ----------
    kernel: a function under triton.jit.
    arguments: a type or a constant for each parameter, in their order.
    num_warps: warps of a program.
    early: whether the launch overlaps the end of the kernel before it (compute capability 9.0 and later).
    """

    kernel: Any
    arguments: tuple[Argument, ...]
    num_warps: int
    early: bool = False

    @classmethod
    def of(
        cls, kernel: Any, arguments: Mapping[str, Argument], num_warps: int, early: bool = False
    ) -> Variant:
        """The variant with arguments by name. KeyError: one is missing."""
        ordered = tuple(arguments[name] for name in kernel.arg_names)
        assert len(arguments) == len(ordered), "an argument that the kernel does not have"
        return cls(kernel, ordered, num_warps, early)


def compile_variant(variant: Variant, target: GPUTarget) -> Any:
    """Triton's CompiledKernel for a GPU, which need not be there. Triton keeps them in a cache on disk."""
    kernel = variant.kernel
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Argument] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, (name, argument) in enumerate(zip(kernel.arg_names, variant.arguments, strict=True)):
        if not isinstance(argument, str):
            signature[name] = "constexpr"
            constants[index,] = argument
            continue
        signature[name] = argument.removesuffix(ALIGNED)
        if argument.endswith(ALIGNED):
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options: dict[str, Any] = {"num_warps": variant.num_warps}
    if variant.early:
        options["launch_pdl"] = True
    return triton.compile(source, target=target, options=options)


def target_of(capability: tuple[int, int]) -> GPUTarget:
    """What to compile for to run on GPUs of this compute capability."""
    return GPUTarget("cuda", capability[0] * 10 + capability[1], 32)


def pointer(dtype: torch.dtype, aligned: bool) -> str:
    """The type of a pointer to elements of `dtype`."""
    return f"*{TYPE_NAMES[dtype]}{ALIGNED if aligned else ''}"


Launch: TypeAlias = Callable[..., None]
"""launch(grid_x, grid_y, *arguments): what `passed` makes of the arguments, in their order, any value for
constants."""


class CompiledKernels:
    """The kernels of one device, compiled for it and loaded at their first use.

    Parameters
    ----------
    device: index of the GPU; not looked at in the interpreter.
    """

    def __init__(self, device: int) -> None:
        self.interpreted = bool(triton.knobs.runtime.interpret)
        """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1)."""
        self._device = device
        self._launches: dict[Variant, Launch] = {}

    def passed(self, tensor: torch.Tensor) -> Any:
        """What a launch takes for a tensor: its address, in the interpreter the tensor."""
        return tensor if self.interpreted else tensor.data_ptr()

    def launch(self, variant: Variant) -> Launch:
        """A function that launches `variant` on the device's current stream."""
        launch = self._launches.get(variant)
        if launch is None:
            load = _interpreted if self.interpreted else self._load
            launch = self._launches[variant] = load(variant)
        return launch

    def _load(self, variant: Variant) -> Launch:
        device, driver = self._device, triton.runtime.driver.active
        with torch.cuda.device(device):
            compiled = compile_variant(variant, driver.get_current_target())
            run = compiled.run  # loads the code into the device's context
        function, metadata = compiled.function, compiled.packed_metadata
        current_device, stream_of = torch.cuda.current_device, driver.get_current_stream

        def launch(grid_x: int, grid_y: int, *arguments: Any) -> None:
            if current_device() != device:
                with torch.cuda.device(device):
                    launch(grid_x, grid_y, *arguments)
                return
            # No metadata and no hooks: they are for Triton's own profiler.
            run(
                grid_x, grid_y, 1, stream_of(device), function, metadata, None, None, None,
                *arguments,
            )  # fmt: skip

        return launch


def _interpreted(variant: Variant) -> Launch:
    """The same by way of the interpreter."""

    def launch(grid_x: int, grid_y: int, *arguments: Any) -> None:
        variant.kernel[grid_x, grid_y](*arguments, num_warps=variant.num_warps)

    return launch
