"""CudaCopies: the native copy engine, with what it needs of one GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from tiermem import _core
from tiermem.device import cuda
from tiermem.device.copies import CopyBatch
from tiermem.device.copy_rates import DIRECTIONS, CopyMethod, CopyRates, always
from tiermem.device.protocol import COPY_TIMEOUT_S
from tiermem.errors import TransferError

SOURCE = Path(__file__).with_name("copy_kernels.cu")
"""Compiled by NVRTC, which torch's CUDA builds bring: the first run of a machine takes 0.2 s, later
ones 0.02 s from its cache. Triton would need a C compiler there, and 27 µs of Python a launch; these
kernels are launched by the native core, through the driver, in 3 µs."""
PIECES_PER_CALL = 256
"""Of cuMemcpyBatchAsync. H200, 64 KiB: 52.9 GB/s with 64, 54.2 with 256, 54.2 with 1,024."""
STAGE_BYTES = 32 << 20
NUM_STAGES = 3
"""H200, runs of 16 × 16 KiB: 53.2 GB/s with stages of 8 MiB, 53.8 with 16, 54.0 with 32."""

LINK = (64, 256, 0)
"""Blocks, threads and shared bytes of copy_any over the link."""
LINK_ALIGNED = (4, 32, 128 << 10)
"""The same of copy_aligned: 16 stages of 8 KiB."""
SPREAD = (32, 512, 0)
"""The same of copy_any within device memory."""
SPREAD_ALIGNED = (16, 32, 128 << 10)
"""H200, runs of 16 × 16 KiB: 53.7 GB/s with 4 blocks, 54.0 with 8, 16 or 32."""
LEAST_ALIGNED_CAPABILITY = (9, 0)
"""Bulk copies through shared memory came with Hopper."""


@dataclass(slots=True)
class CopyResources:
    """What an engine uses and the device gives back: handles, in no order."""

    modules: list[cuda.Module] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    events: list[cuda.RawEvent] = field(default_factory=list)


class CudaCopies:
    """Gives batches of copies to streams of one GPU, by the method chosen for each part.

    The GPU's context must be current for every call.

    Parameters
    ----------
    capability: of the GPU.
    staging: address of `staging_bytes()` bytes of device memory, or None to do without.
    resources: takes up the handles made, also when this raises.
    """

    def __init__(
        self, capability: tuple[int, int], staging: int | None, resources: CopyResources
    ) -> None:
        link, spread = _kernels(capability, resources)
        has_kernels = link is not None and spread is not None
        nothing = _core.CopyKernels(any=_core.CopyKernel(), aligned=_core.CopyKernel())
        self._engine = _core.CopyEngine(
            _calls(),
            link=link or nothing,
            spread=spread or nothing,
            staging=_staging(staging if has_kernels else None, resources),
            last=(_event(resources), _event(resources)),
            pieces_per_call=PIECES_PER_CALL,
        )
        self._resources = resources
        self._rates: CopyRates | None = None
        self._forced: CopyMethod | None = None

    @property
    def rates(self) -> CopyRates | None:
        """What methods are chosen by; None: nothing was measured, and BATCH is taken."""
        return self._rates

    @rates.setter
    def rates(self, rates: CopyRates | None) -> None:
        self._rates = rates
        self._choose()

    @property
    def forced(self) -> CopyMethod | None:
        """The method for everything, or None: as the rates say."""
        return self._forced

    @forced.setter
    def forced(self, method: CopyMethod | None) -> None:
        self._forced = method
        self._choose()

    def set_borders(self, addresses: Iterable[int]) -> None:
        """Where memory starts that CUDA knows by itself; it refuses a copy from one into the next."""
        self._engine.set_borders(np.array(sorted(addresses), dtype=np.int64))

    def warm_up(self, stream: int) -> None:
        """Load every kernel, which waits for the whole GPU, so that `submit` waits for nothing.

        Raises
        ------
        TransferError: CUDA refused.
        """
        refused = self._engine.warm_up(stream)
        if refused is not None:
            raise cuda.refusal(*refused)
        cuda.synchronize_stream(stream, COPY_TIMEOUT_S)

    def submit(self, batch: CopyBatch, stream: int, owner: _core.StreamOwner) -> None:
        """Give `stream` the batch.

        Raises
        ------
        TransferError: CUDA refused; pieces given before have ended.
        """
        refused = self._engine.submit(
            DIRECTIONS[batch.direction], batch.dst, batch.src, batch.num_bytes, stream, owner
        )
        if refused is None:
            return
        # Pieces before the refused one may run: let them end, so that nothing reads or writes
        # memory that the caller takes back.
        error = cuda.refusal(*refused)
        for busy in (stream, *self._resources.streams):
            cuda.synchronize_stream(busy, COPY_TIMEOUT_S)
        raise error

    def _choose(self) -> None:
        for direction, number in DIRECTIONS.items():
            for busy in (False, True):
                if self._forced is not None:
                    methods = always(self._forced)
                else:
                    methods = (self._rates or CopyRates()).methods(direction, busy=busy)
                self._engine.choose(number, busy, methods)


def staging_bytes() -> int:
    """Device memory for the staging of both directions."""
    return 2 * NUM_STAGES * STAGE_BYTES


def _calls() -> _core.CopyCalls:
    return _core.CopyCalls(
        copy=_needed("cuMemcpyAsync"),
        copy_batch=cuda.driver_function("cuMemcpyBatchAsync"),
        launch=_needed("cuLaunchKernel"),
        record=_needed("cuEventRecord"),
        query=_needed("cuEventQuery"),
        wait=_needed("cuStreamWaitEvent"),
    )


def _needed(name: str) -> int:
    address = cuda.driver_function(name)
    if not address:
        raise TransferError(f"{name}: the NVIDIA driver has no such function")
    return address


def _kernels(
    capability: tuple[int, int], resources: CopyResources
) -> tuple[_core.CopyKernels, _core.CopyKernels] | tuple[None, None]:
    """The kernels over the link and within device memory, or nothing where they cannot be compiled."""
    code = _machine_code(capability)
    if code is None:
        return None, None
    module = cuda.load_module(code)
    resources.modules.append(module)
    return (
        _launches(module, capability, LINK, LINK_ALIGNED),
        _launches(module, capability, SPREAD, SPREAD_ALIGNED),
    )


def _launches(
    module: cuda.Module,
    capability: tuple[int, int],
    general: tuple[int, int, int],
    aligned: tuple[int, int, int],
) -> _core.CopyKernels:
    for_aligned = _core.CopyKernel()
    if capability >= LEAST_ALIGNED_CAPABILITY:
        for_aligned = _launch(module, "copy_aligned", *aligned)
    return _core.CopyKernels(any=_launch(module, "copy_any", *general), aligned=for_aligned)


def _launch(
    module: cuda.Module, name: str, blocks: int, threads: int, shared_bytes: int
) -> _core.CopyKernel:
    return _core.CopyKernel(
        function=cuda.find_kernel(module, name, shared_bytes),
        blocks=blocks,
        threads=threads,
        shared_bytes=shared_bytes,
    )


@cache
def _machine_code(capability: tuple[int, int]) -> bytes | None:
    """The kernels for one kind of GPU; None where NVRTC is missing or does not know the GPU."""
    try:
        return cuda.compile_kernels(SOURCE.read_bytes(), capability)
    except (RuntimeError, TransferError):
        return None


def _staging(
    address: int | None, resources: CopyResources
) -> tuple[_core.CopyStaging, _core.CopyStaging]:
    """A ring of stages for each direction, or none."""
    if address is None:
        return _core.CopyStaging(), _core.CopyStaging()
    half = NUM_STAGES * STAGE_BYTES
    return _ring(address, resources), _ring(address + half, resources)


def _ring(address: int, resources: CopyResources) -> _core.CopyStaging:
    stream = cuda.make_stream()
    resources.streams.append(stream)
    return _core.CopyStaging(
        address=address,
        stage_bytes=STAGE_BYTES,
        stream=stream,
        events=[_event(resources) for _ in range(2 * NUM_STAGES + 1)],
    )


def _event(resources: CopyResources) -> cuda.RawEvent:
    event = cuda.make_event()
    resources.events.append(event)
    return event
