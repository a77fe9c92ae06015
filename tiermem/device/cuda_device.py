"""CudaDevice: the device protocol on one NVIDIA GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import TYPE_CHECKING

import torch

from tiermem._core import StreamOwner
from tiermem.device import copy_measure, cuda, cuda_memory
from tiermem.device.copies import CopyBatch, check_num_bytes
from tiermem.device.copy_rates import CopyMethod, CopyRates
from tiermem.device.cuda_copies import CopyResources, CudaCopies, staging_bytes
from tiermem.device.cuda_events import CudaStream, EventPool
from tiermem.device.cuda_memory import CudaMemory
from tiermem.device.host import HostMemory, host_free_bytes, locked_limit_text, reporting
from tiermem.device.protocol import (
    COPY_TIMEOUT_S,
    MEMORY_ALIGN_BYTES,
    Addresses,
    DeviceKind,
    Direction,
    Memory,
    MemoryInfo,
    Progress,
    Slices,
    Stream,
)
from tiermem.device.sums import make_slices
from tiermem.errors import ClosedError, ConfigError, DeadlineError, TransferError

if TYPE_CHECKING:
    from tiermem.attention.kernels.checksum import ChecksumKernels


class CudaDevice:
    """One GPU, in the context that torch uses; the thread's current GPU stays as it is.

    Parameters
    ----------
    index: of the GPU as CUDA counts the visible ones, from 0.
    copy_rates: measured before, by which the ways of copying are chosen. Without them the first
        stream that is made measures them coarsely, in less than half a second; once for every GPU
        in a process.

    Raises
    ------
    ConfigError: the GPU cannot be opened; gives CUDA's reason.
    """

    def __init__(self, index: int, copy_rates: CopyRates | None = None) -> None:
        try:
            self._context = cuda.open_context(index)
            self._info = cuda.describe_gpu(index)
        except TransferError as error:
            raise ConfigError(f"device='cuda:{index}': cannot be opened: {error}") from error
        self._base: dict[CudaMemory, int] = {}  # what cudaMalloc returned
        self._pinned: set[HostMemory] = set()
        self._streams: list[int] = []
        self._copies: CudaCopies | None = None
        self._copy_rates = copy_rates
        self._copy_method: CopyMethod | None = None
        self._copy_resources = CopyResources()
        self._staging: Memory | None = None  # of the copies
        self._checksums: ChecksumKernels | None = None
        self.events = EventPool()
        self.closed = False
        self.copy_timeout_s = COPY_TIMEOUT_S

    @property
    def kind(self) -> DeviceKind:
        return DeviceKind.CUDA

    @property
    def name(self) -> str:
        return self._info.name

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda", self._info.index)

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        return self._info.compute_capability

    @property
    def staging_bytes(self) -> int:
        return 0 if self._staging is None else self._staging.num_bytes

    @property
    def copy_rates(self) -> CopyRates | None:
        """What ways of copying are chosen by; None until they are given or measured."""
        return self._copy_rates

    @copy_rates.setter
    def copy_rates(self, rates: CopyRates | None) -> None:
        self._copy_rates = rates
        if self._copies is not None:
            self._copies.rates = rates

    @property
    def copy_method(self) -> CopyMethod | None:
        """The way of every copy where it can be used, for tests and benchmarks; None: as the rates say."""
        return self._copy_method

    @copy_method.setter
    def copy_method(self, method: CopyMethod | None) -> None:
        self._copy_method = method
        if self._copies is not None:
            self._copies.forced = method

    def allocate(self, num_bytes: int) -> Memory:
        self.check_open()
        check_num_bytes(num_bytes)
        with self.current(), ExitStack() as undo:
            base, address = self._malloc_aligned(num_bytes)
            undo.callback(cuda.free, base)
            memory = CudaMemory(address, num_bytes, self.torch_device, self._free)
            undo.pop_all()
        self._base[memory] = base
        self._update_borders()
        return memory

    def allocate_host(self, num_bytes: int, *, progress: Progress | None = None) -> Memory:
        self.check_open()
        # Touching the memory takes about as long as pinning it. One registration for all of it,
        # because CUDA refuses copies from one into the next, torch's too.
        memory = HostMemory(
            num_bytes,
            on_free=self._unpin,
            on_abandon=self._forget_pinned,
            on_piece=reporting(num_bytes, progress, share=0.5),
        )
        try:
            with self.current():
                cuda.pin(memory.address, num_bytes + -num_bytes % MEMORY_ALIGN_BYTES)
        except TransferError as error:
            memory.free()
            raise ConfigError(
                f"cannot pin {num_bytes} bytes of host memory: {error}; {host_free_bytes()} bytes "
                f"are free, {locked_limit_text()} may be locked (ulimit -l)"
            ) from error
        self._pinned.add(memory)
        self._update_borders()
        if progress is not None:
            progress(num_bytes, num_bytes)
        return memory

    def new_stream(self) -> Stream:
        self.check_open()
        with self.current():
            handle = cuda.make_stream()
            self._streams.append(handle)
            # Now, because `copy` must not wait for anything.
            self._engine().warm_up(handle)
        if self._copy_rates is None and self._copy_method is None:
            copy_measure.measure_once(self)
        return CudaStream(self, handle)

    def compute_stream(self) -> Stream:
        self.check_open()
        return CudaStream(self, self._compute_handle() or cuda.LEGACY_STREAM)

    def copy(
        self,
        direction: Direction,
        dst: Addresses,
        src: Addresses,
        num_bytes: Addresses | int,
        stream: Stream,
    ) -> None:
        handle = self._handle_of(stream)
        batch = CopyBatch.checked(direction, dst, src, num_bytes)
        owner = StreamOwner.DEVICE if handle in self._streams else StreamOwner.OTHER
        with self.current():
            self._engine().submit(batch, handle, owner)

    def slices(self, pages: Addresses, rows: Addresses, slice_bytes: int) -> Slices:
        """As the protocol says. The first one of a size compiles and loads kernels."""
        self.check_open()
        slices = make_slices(pages, rows, slice_bytes, pinned=True)
        self._checksum_kernels().warm_up(slice_bytes)
        return slices

    def sum_slices(self, slices: Slices, layers: range, stream: Stream) -> None:
        self._launch_sums(slices, layers, stream, verify=False)

    def verify_slices(self, slices: Slices, layers: range, stream: Stream) -> None:
        self._launch_sums(slices, layers, stream, verify=True)

    def write_word(self, address: int, value: int) -> None:
        self.check_open()
        with self.current():
            cuda.write_word(self._compute_handle(), address, value)

    def wait_word(self, address: int, value: int) -> None:
        self.check_open()
        with self.current():
            cuda.wait_word(self._compute_handle(), address, value)

    def view(self, memory: Memory) -> torch.Tensor:
        self.check_open()
        return cuda_memory.as_tensor(memory.address, memory.num_bytes, self.torch_device)

    def memory_info(self) -> MemoryInfo:
        self.check_open()
        with self.current():
            return cuda.memory_info()

    def drain(self) -> None:
        self.check_open()
        deadline_s = time.monotonic() + self.copy_timeout_s
        handles = {
            *self._streams,
            *self._copy_resources.streams,
            self._compute_handle() or cuda.LEGACY_STREAM,
        }
        with self.current():
            for handle in handles:
                is_done = partial(_has_ended, handle)
                cuda.wait_until(is_done, deadline_s, "its work", self.copy_timeout_s)

    def close(self) -> None:
        """As the protocol says.

        Raises
        ------
        TransferError: CUDA reported failures; everything that could be given back was.
        """
        if self.closed:
            return
        try:
            self.drain()
        except DeadlineError:
            # Freeing would wait for the work, and for ever.
            self.closed = True
            memories: list[Memory] = [*self._base, *self._pinned]
            for memory in memories:
                memory.abandon()
            raise
        with self.current():
            failures = _failures(self._endings())
        if failures:
            raise TransferError(f"closing {self.torch_device}: {failures[0]}")

    def check_open(self) -> None:
        """Raise ClosedError once the device is closed."""
        if self.closed:
            raise ClosedError(f"the device {self.torch_device} is closed")

    def current(self) -> AbstractContextManager[None]:
        """Make this GPU the thread's current one for a while."""
        return cuda.current(self._context)

    def _endings(self) -> list[Callable[[], None]]:
        """Ends the device: the calls still to make, in this order."""
        self.closed = True
        streams, self._streams = self._streams, []
        memories: list[Memory] = [*self._base, *self._pinned]
        copies, self._copies, self._staging = self._copy_resources, None, None
        return [
            cuda.synchronize,
            *(memory.free for memory in memories),
            *(partial(cuda.destroy_stream, stream) for stream in streams + copies.streams),
            *(
                partial(cuda.destroy_event, event)
                for event in self.events.take_all() + copies.events
            ),
            *(partial(cuda.unload_module, module) for module in copies.modules),
        ]

    def _handle_of(self, stream: Stream) -> int:
        """The handle of one of this device's streams, while it is open."""
        self.check_open()
        if not isinstance(stream, CudaStream) or stream.device is not self:
            raise TypeError(f"stream={stream!r}: must be a stream of the same device")
        return stream.handle

    def _checksum_kernels(self) -> ChecksumKernels:
        """The kernels, made at their first use: they need Triton, which takes a second to import."""
        if self._checksums is None:
            from tiermem.attention.kernels.checksum import ChecksumKernels

            self._checksums = ChecksumKernels(self.torch_device)
        return self._checksums

    def _launch_sums(self, slices: Slices, layers: range, stream: Stream, *, verify: bool) -> None:
        handle = self._handle_of(stream)
        if len(slices.pages) == 0:
            return
        try:
            self._checksum_kernels().launch(
                slices.pages, slices.rows, slices.marks, slices.slice_bytes, layers, handle,
                verify=verify,
            )  # fmt: skip
        except RuntimeError as error:
            raise TransferError(f"checksums: {error}") from error

    def _engine(self) -> CudaCopies:
        """The copy engine, made at its first use."""
        if self._copies is None:
            self._staging = self._staging or self._allocate_staging()
            staging = None if self._staging is None else self._staging.address
            self._copies = CudaCopies(self._info.compute_capability, staging, self._copy_resources)
            self._copies.rates, self._copies.forced = self._copy_rates, self._copy_method
            self._update_borders()
        return self._copies

    def _allocate_staging(self) -> Memory | None:
        """Device memory for the engine's staging; None where the GPU has no room for it."""
        try:
            return self.allocate(staging_bytes())
        except ConfigError:
            return None

    def _update_borders(self) -> None:
        if self._copies is not None:
            memories: list[Memory] = [*self._base, *self._pinned]
            self._copies.set_borders(memory.address for memory in memories)

    def _malloc_aligned(self, num_bytes: int) -> tuple[int, int]:
        """What cudaMalloc returned, and the first aligned address in it."""
        base = self._malloc(num_bytes)
        if base % MEMORY_ALIGN_BYTES == 0:
            return base, base
        # cudaMalloc aligns small allocations to 512 bytes only.
        cuda.free(base)
        base = self._malloc(num_bytes + MEMORY_ALIGN_BYTES)
        return base, base + -base % MEMORY_ALIGN_BYTES

    def _malloc(self, num_bytes: int) -> int:
        try:
            return cuda.malloc(num_bytes)
        except TransferError:
            # torch keeps what its tensors gave back; ask it to return that, and try again.
            torch.cuda.empty_cache()
        try:
            return cuda.malloc(num_bytes)
        except TransferError as error:
            info = cuda.memory_info()
            raise ConfigError(
                f"cannot allocate {num_bytes} bytes of hot memory on {self.torch_device}: "
                f"{info.free_bytes} of {info.total_bytes} bytes are free ({error})"
            ) from error

    def _compute_handle(self) -> int:
        """The stream that is torch's current one: by what its public call takes 4 µs to wrap."""
        return int(torch._C._cuda_getCurrentRawStream(self._info.index))

    def _free(self, memory: CudaMemory) -> None:
        with self.current():
            cuda.free(self._base.pop(memory))
        self._update_borders()

    def _forget_pinned(self, memory: HostMemory) -> None:
        """It stays pinned and mapped for the life of the process."""
        self._pinned.discard(memory)
        self._update_borders()

    def _unpin(self, memory: HostMemory) -> None:
        if memory in self._pinned:
            self._pinned.discard(memory)
            with self.current():
                cuda.unpin(memory.address)
            self._update_borders()


def _has_ended(stream: int) -> bool:
    """Whether a stream has no work left: what failed has ended too."""
    try:
        return cuda.stream_is_done(stream)
    except TransferError:
        return True


def _failures(calls: list[Callable[[], None]]) -> list[str]:
    """Make every call; what those that failed said."""
    return [text for call in calls if (text := _failure(call)) is not None]


def _failure(call: Callable[[], None]) -> str | None:
    try:
        call()
    except TransferError as error:
        return str(error)
    return None
