"""SimulatedDevice: for tests; finishes copies late, piece by piece and in random relative order.

Memory is host memory filled with 0xFF, a NaN in every float type, so that a byte read too early
shows. A copy is queued and its source is read when a seeded scheduler gets to it. What CUDA allows
may happen here: streams overtake each other, the pieces of one batch run in any order, and nothing
runs until something makes progress: a poll (at random), a wait (what is needed and some more) or
the test itself.

Attention runs on the host at once, so the compute stream differs: what it waits for has run when
`wait_event` returns and a copy given to it runs at once, but an event recorded on it becomes done
late like any other, so that a step is seen to end after its successor began.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from tiermem.device.copies import CopyBatch, check_num_bytes
from tiermem.device.host import HostMemory, set_word, wait_for_word
from tiermem.device.protocol import (
    COPY_TIMEOUT_S,
    Addresses,
    DeviceKind,
    Direction,
    Event,
    Memory,
    MemoryInfo,
    Progress,
    Slices,
    Stream,
)
from tiermem.device.simulated_stream import (
    Piece,
    SimulatedEvent,
    SimulatedStream,
    late_error,
)
from tiermem.device.sums import make_slices, sum_now, verify_now
from tiermem.errors import ClosedError, ConfigError, DeadlineError, InvariantError

POISON_BYTE = 0xFF
MAX_STEPS_AT_ONCE = 4
"""At most this many steps of any stream's work are run at random by one poll or wait."""


@dataclass(frozen=True, slots=True)
class _Guard:
    """Bytes that no copy may write before `event` has passed."""

    start: int
    end: int
    event: SimulatedEvent


class SimulatedDevice:
    """Host memory behind streams that a seeded random scheduler moves.

    Parameters
    ----------
    seed: of the scheduler; the same calls with the same seed run in the same order.
    total_bytes: hot memory there is; an allocation beyond it is a ConfigError, as on a GPU.
    eagerness: 0 to 1, the chance that a poll runs some work. At 0 polls run nothing, so that only
        waits and the test itself make progress.
    """

    def __init__(
        self, seed: int = 0, *, total_bytes: int = 1 << 30, eagerness: float = 0.5
    ) -> None:
        self._random = random.Random(seed)
        self._total_bytes = total_bytes
        self._eagerness = eagerness
        self._hot: set[HostMemory] = set()
        self._host: set[HostMemory] = set()
        self._compute = SimulatedStream(self, is_compute=True)
        self._streams = [self._compute]
        self._guards: list[_Guard] = []
        self._failing: set[int] = set()
        self._num_submitted = 0
        self._closed = False
        self.copy_timeout_s = COPY_TIMEOUT_S
        self.is_hung = False

    @property
    def kind(self) -> DeviceKind:
        return DeviceKind.SIMULATED

    @property
    def name(self) -> str:
        return "simulated device"

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        return None

    @property
    def staging_bytes(self) -> int:
        return 0

    def allocate(self, num_bytes: int) -> Memory:
        self.check_open()
        check_num_bytes(num_bytes)
        free_bytes = self.memory_info().free_bytes
        if num_bytes > free_bytes:
            raise ConfigError(
                f"cannot allocate {num_bytes} bytes of hot memory: "
                f"{free_bytes} of {self._total_bytes} bytes are free on the {self.name}"
            )
        return self._allocate(num_bytes, self._hot)

    def allocate_host(self, num_bytes: int, *, progress: Progress | None = None) -> Memory:
        self.check_open()
        memory = self._allocate(num_bytes, self._host)
        if progress is not None:
            progress(num_bytes, num_bytes)
        return memory

    def new_stream(self) -> Stream:
        self.check_open()
        stream = SimulatedStream(self, is_compute=False)
        self._streams.append(stream)
        return stream

    def compute_stream(self) -> Stream:
        self.check_open()
        return self._compute

    def copy(
        self,
        direction: Direction,
        dst: Addresses,
        src: Addresses,
        num_bytes: Addresses | int,
        stream: Stream,
    ) -> None:
        """As the protocol says; an address outside this device's live memory is a ValueError."""
        own = self._own(stream)
        batch = CopyBatch.checked(direction, dst, src, num_bytes)
        self._check_inside(batch)
        pieces = self._numbered(batch)
        self._random.shuffle(pieces)
        if own.is_compute:
            for piece in pieces:
                own.run(piece)
        elif pieces:
            own.give(pieces)

    def slices(self, pages: Addresses, rows: Addresses, slice_bytes: int) -> Slices:
        self.check_open()
        return make_slices(pages, rows, slice_bytes)

    def sum_slices(self, slices: Slices, layers: range, stream: Stream) -> None:
        self._do_in_order(stream, partial(sum_now, slices, layers))

    def verify_slices(self, slices: Slices, layers: range, stream: Stream) -> None:
        self._do_in_order(stream, partial(verify_now, slices, layers))

    def write_word(self, address: int, value: int) -> None:
        self.check_open()
        set_word(address, value)

    def wait_word(self, address: int, value: int) -> None:
        self.check_open()
        wait_for_word(address, value, self.copy_timeout_s)

    def view(self, memory: Memory) -> torch.Tensor:
        self.check_open()
        return memory.tensor

    def memory_info(self) -> MemoryInfo:
        self.check_open()
        used_bytes = sum(memory.num_bytes for memory in self._hot)
        return MemoryInfo(self._total_bytes - used_bytes, self._total_bytes)

    def drain(self) -> None:
        self.check_open()
        self.run_all()
        if any(stream.queue for stream in self._streams):
            raise late_error("all streams", self.copy_timeout_s)

    def close(self) -> None:
        if self._closed:
            return
        try:
            self.drain()
        except DeadlineError:
            for memory in [*self._hot, *self._host]:
                memory.abandon()
            self._closed = True
            raise
        for memory in [*self._hot, *self._host]:
            memory.free()
        self._closed = True

    def check_open(self) -> None:
        """Raise ClosedError once the device is closed."""
        if self._closed:
            raise ClosedError("the simulated device is closed")

    # Hooks for tests.

    @property
    def copies_submitted(self) -> int:
        """Pieces given to all streams so far; the number that the next piece gets."""
        return self._num_submitted

    @property
    def copies_pending(self) -> int:
        """Pieces given to all streams that have not run."""
        return sum(1 for stream in self._streams for _ in stream.pending_pieces())

    def fail_copy(self, ahead: int = 0) -> None:
        """Let a piece to come fail: the next one, or the one `ahead` pieces after it.

        When it gets to run its destination is poisoned, and the next event of its stream raises
        TransferError from `done()` and `wait()`; later events do not.
        """
        self._failing.add(self._num_submitted + ahead)

    def guard(self, address: int, num_bytes: int, until: Event) -> None:
        """Let every copy that writes the given bytes before `until` is done raise InvariantError.

        For what runs at once here and late on a GPU: a test guards the pages that a kernel reads
        until the event recorded behind it, and a slot that is reused too early is found.
        """
        if not isinstance(until, SimulatedEvent) or until.device is not self:
            raise TypeError(f"until={until!r}: must be an event of the same device")
        self._guards.append(_Guard(address, address + num_bytes, until))

    def hang(self) -> None:
        """Nothing runs from now on, and every deadline is over, until `resume`."""
        self.is_hung = True

    def resume(self) -> None:
        """End what `hang` began."""
        self.is_hung = False

    def progress(self) -> bool:
        """Run one step of a random stream that can go on; False if none can."""
        if self.is_hung:
            return False
        able = [stream for stream in self._streams if stream.can_step()]
        if able:
            self._random.choice(able).step()
        return bool(able)

    def run_all(self) -> None:
        """Run everything given to any stream, in random order."""
        while self.progress():
            pass

    # What events and streams need of the scheduler.

    def run_some(self) -> None:
        """Perhaps run a few steps of any stream."""
        if self._random.random() < self._eagerness:
            for _ in range(self._random.randint(1, MAX_STEPS_AT_ONCE)):
                self.progress()

    def run_until(self, event: SimulatedEvent) -> None:
        """Run what `event` needs and nothing else; it has not passed afterwards where the device hangs."""
        while not event.passed and not self.is_hung:
            self._step_with_needs(event.stream)

    def run_stream(self, stream: SimulatedStream) -> None:
        """Run what is left of `stream` and what it needs, but nothing where the device hangs."""
        while stream.queue and not self.is_hung:
            self._step_with_needs(stream)

    def execute(self, piece: Piece) -> str | None:
        """Carry out one piece; the text of its failure if it was to fail."""
        self._check_guards(piece)
        if piece.number in self._failing:
            ctypes.memset(piece.dst, POISON_BYTE, piece.num_bytes)
            return f"copy {piece.number} of {piece.num_bytes} bytes to {piece.dst:#x} failed"
        ctypes.memmove(piece.dst, piece.src, piece.num_bytes)
        return None

    def _step_with_needs(self, stream: SimulatedStream) -> None:
        needed = stream.blocking_event()
        if needed is not None:
            self.run_until(needed)
        stream.step()

    def _own(self, stream: Stream) -> SimulatedStream:
        """`stream`, which must be one of this device's, while it is open."""
        self.check_open()
        if not isinstance(stream, SimulatedStream) or stream.device is not self:
            raise TypeError(f"stream={stream!r}: must be a stream of the same device")
        return stream

    def _do_in_order(self, stream: Stream, run: Callable[[], None]) -> None:
        """What a kernel does: at once on the compute stream, as everything there, else late."""
        own = self._own(stream)
        if own.is_compute:
            run()
        else:
            own.give_task(run)

    def _allocate(self, num_bytes: int, owners: set[HostMemory]) -> Memory:
        def forget(memory: HostMemory) -> None:
            self._check_unused(memory)
            memory.tensor.fill_(POISON_BYTE)
            owners.discard(memory)

        memory = HostMemory(num_bytes, fill=POISON_BYTE, on_free=forget, on_abandon=owners.discard)
        owners.add(memory)
        return memory

    def _numbered(self, batch: CopyBatch) -> list[Piece]:
        first = self._num_submitted
        self._num_submitted += len(batch)
        pieces = zip(batch.dst.tolist(), batch.src.tolist(), batch.num_bytes.tolist(), strict=True)
        return [Piece(first + i, *piece) for i, piece in enumerate(pieces)]

    def _check_inside(self, batch: CopyBatch) -> None:
        src_hot = batch.direction is not Direction.HOST_TO_DEVICE
        dst_hot = batch.direction is not Direction.DEVICE_TO_HOST
        for name, addresses, hot in (("dst", batch.dst, dst_hot), ("src", batch.src, src_hot)):
            outside = _first_outside(addresses, batch.num_bytes, self._hot if hot else self._host)
            if outside is not None:
                place = "hot" if hot else "host"
                raise ValueError(
                    f"{name}={int(addresses[outside]):#x} of {int(batch.num_bytes[outside])} bytes"
                    f" ({batch.direction.value}): not inside one live allocation of {place} memory"
                )

    def _check_unused(self, memory: HostMemory) -> None:
        start, end = memory.address, memory.address + memory.num_bytes
        for stream in self._streams:
            for piece in stream.pending_pieces():
                for address in (piece.dst, piece.src):
                    if address < end and start < address + piece.num_bytes:
                        raise InvariantError(
                            f"memory at {start:#x} freed under copy {piece.number}"
                        )

    def _check_guards(self, piece: Piece) -> None:
        self._guards = [guard for guard in self._guards if not guard.event.passed]
        for guard in self._guards:
            if piece.dst < guard.end and guard.start < piece.dst + piece.num_bytes:
                raise InvariantError(
                    f"copy {piece.number} writes {piece.dst:#x} while work in flight uses it"
                )


def _first_outside(
    addresses: Addresses, num_bytes: Addresses, memories: set[HostMemory]
) -> int | None:
    """Index of the first piece that lies in no single memory of `memories`."""
    if not len(addresses):
        return None
    ordered = sorted((memory.address, memory.num_bytes) for memory in memories)
    if not ordered:
        return 0
    starts, sizes = np.array(ordered, dtype=np.int64).T
    owner = np.searchsorted(starts, addresses, side="right") - 1
    inside = (owner >= 0) & (addresses + num_bytes <= starts[owner] + sizes[owner])
    return None if inside.all() else int(np.argmin(inside))
