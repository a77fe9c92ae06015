"""Compiled kernels: what a kernel is compiled for, and how one is launched at little cost to the host.

Triton looks at every argument in every launch to find the kernel compiled for it, which takes about 27
microseconds. Here the caller says once what a kernel is compiled for, and binds a launch to all that stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tiermem.attention.kernels.driver import BoundLaunch, bind, current_context, takes_parameters

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


class Kernel(Protocol):
    """One variant, ready to be launched on one device."""

    def bind(
        self, grid: tuple[int, int], num_changing: int, values: Mapping[str, Any]
    ) -> BoundLaunch:
        """A launch that takes a stream and the first `num_changing` parameters: what `passed` makes of
        tensors, and numbers of 64 bits. `values` has the other ones that are not constants, by name."""


class CompiledKernels:
    """The kernels of one device, compiled for it and loaded at their first use.

    Parameters
    ----------
    device: index of the GPU, -1 for the CPU, which the interpreter works on.
    """

    def __init__(self, device: int) -> None:
        self.interpreted = bool(triton.knobs.runtime.interpret)
        """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1)."""
        self.passed: Callable[[torch.Tensor], Any] = torch.Tensor.data_ptr
        """What a launch takes for a tensor: its address, in the interpreter the tensor."""
        if self.interpreted:
            self.passed = _itself
        self.current_stream: Callable[[], int] = lambda: 0
        """The handle of the device's current stream."""
        if device >= 0:
            self.current_stream = partial(triton.runtime.driver.active.get_current_stream, device)
        self._device = device
        self._kernels: dict[Variant, Kernel] = {}

    def kernel(self, variant: Variant) -> Kernel:
        """The kernel for `variant`."""
        kernel = self._kernels.get(variant)
        if kernel is None:
            load = InterpretedKernel if self.interpreted else self._load
            kernel = self._kernels[variant] = load(variant)
        return kernel

    def _load(self, variant: Variant) -> Kernel:
        return LoadedKernel(variant, self._device)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class LoadedKernel:
    """A variant whose code is in the GPU's memory."""

    def __init__(self, variant: Variant, device: int) -> None:
        self._variant = variant
        self._device = device
        with torch.cuda.device(device):
            target = triton.runtime.driver.active.get_current_target()
            self._compiled = compile_variant(variant, target)
            self._run = self._compiled.run  # loads the code into the device's context
            self._context = current_context()
        passed = [
            (name, argument.removesuffix(ALIGNED))
            for name, argument in zip(variant.kernel.arg_names, variant.arguments, strict=True)
            if isinstance(argument, str)
        ]
        self._names = [name for name, _ in passed]
        self._types = [argument for _, argument in passed]
        self._through_driver = takes_parameters(self._compiled, self._types)

    def bind(
        self, grid: tuple[int, int], num_changing: int, values: Mapping[str, Any]
    ) -> BoundLaunch:
        """A launch through the driver, or Triton's launcher if it passes parameters unknown here."""
        if not self._through_driver:
            return self._bind_to_triton(grid, num_changing, values)
        kept = [values[name] for name in self._names[num_changing:]]
        return bind(self._compiled, self._context, grid, self._types, kept, num_changing)

    def _bind_to_triton(
        self, grid: tuple[int, int], num_changing: int, values: Mapping[str, Any]
    ) -> BoundLaunch:
        run, function, device = self._run, self._compiled.function, self._device
        metadata = self._compiled.packed_metadata
        rest = rest_of(self._variant, num_changing, values)

        def launch(stream: int, *numbers: Any) -> None:
            with torch.cuda.device(device):
                # No metadata and no hooks: they are for Triton's own profiler.
                run(
                    *grid, 1, stream, function, metadata, None, None, None,
                    *numbers, *rest,
                )  # fmt: skip

        return launch


class InterpretedKernel:
    """A variant in Triton's interpreter."""

    def __init__(self, variant: Variant) -> None:
        self._variant = variant

    def bind(
        self, grid: tuple[int, int], num_changing: int, values: Mapping[str, Any]
    ) -> BoundLaunch:
        """A launch that runs at once."""
        kernel, num_warps = self._variant.kernel, self._variant.num_warps
        rest = rest_of(self._variant, num_changing, values)

        def launch(_stream: int, *tensors: Any) -> None:
            kernel[grid](*tensors, *rest, num_warps=num_warps)

        return launch


def rest_of(variant: Variant, first: int, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """What Triton takes for the parameters from number `first` on, the constants included."""
    names = variant.kernel.arg_names[first:]
    arguments = variant.arguments[first:]
    return tuple(
        values[name] if isinstance(argument, str) else argument
        for name, argument in zip(names, arguments, strict=True)
    )
