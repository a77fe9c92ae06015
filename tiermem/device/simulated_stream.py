"""SimulatedStream and SimulatedEvent: a queue of work that a scheduler works off step by step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiermem.device.protocol import Event
from tiermem.errors import DeadlineError, TransferError

if TYPE_CHECKING:
    from tiermem.device.simulated import SimulatedDevice


class SimulatedEvent:
    """A point in a simulated stream; done once the scheduler has passed it."""

    __slots__ = ("device", "failure", "passed", "stream")

    def __init__(self, device: SimulatedDevice, stream: SimulatedStream) -> None:
        self.device = device
        self.stream = stream
        self.passed = False
        self.failure: str | None = None

    def done(self) -> bool:
        """Run a random bit of any stream's work, then answer truthfully."""
        self.device.run_some()
        self._raise_failure()
        return self.passed

    def wait(self) -> None:
        """Run what this event needs, and a random bit of other work before and after."""
        self.device.run_some()
        self.device.run_until(self)
        self.device.run_some()
        self._raise_failure()
        if not self.passed:
            raise late_error("an event", self.device.copy_timeout_s)

    def is_late(self) -> bool:
        """Every deadline is over where the device hangs."""
        return self.device.is_hung and not self.passed

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise TransferError(self.failure)


@dataclass(frozen=True, slots=True)
class Piece:
    """One copy of a batch; `number` counts the device's copies from 0, as submitted."""

    number: int
    dst: int
    src: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Pieces:
    """What is left of a batch, the next piece last."""

    left: list[Piece]


@dataclass(frozen=True, slots=True)
class _Task:
    """Something else to do in the order of the stream."""

    run: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Wait:
    """The stream goes on when `event` has passed."""

    event: SimulatedEvent


class SimulatedStream:
    """A queue of batches, waits and events that the scheduler works off from the front."""

    __slots__ = ("device", "event_failure", "is_compute", "queue", "stream_failure")

    def __init__(self, device: SimulatedDevice, *, is_compute: bool) -> None:
        self.device = device
        self.is_compute = is_compute
        self.queue: deque[_Pieces | _Task | _Wait | SimulatedEvent] = deque()
        self.event_failure: str | None = None  # for the next event to pass
        self.stream_failure: str | None = None  # for the next synchronize()

    def record(self) -> Event:
        self.device.check_open()
        event = SimulatedEvent(self.device, self)
        self.queue.append(event)
        return event

    def wait_event(self, event: Event) -> None:
        self.device.check_open()
        if not isinstance(event, SimulatedEvent) or event.device is not self.device:
            raise TypeError(f"event={event!r}: must be an event of the same device")
        if event.stream is self:
            return
        if self.is_compute:
            self.device.run_some()
            self.device.run_until(event)
            if not event.passed:
                self.queue.append(_Wait(event))
        else:
            self.queue.append(_Wait(event))

    def synchronize(self) -> None:
        self.device.check_open()
        self.device.run_some()
        self.device.run_stream(self)
        failure, self.stream_failure = self.stream_failure, None
        if failure is not None:
            raise TransferError(failure)
        if self.queue:
            raise late_error("a stream", self.device.copy_timeout_s)

    def give(self, pieces: list[Piece]) -> None:
        """Queue the pieces of one batch, to be run from the last to the first."""
        self.queue.append(_Pieces(pieces))

    def give_task(self, run: Callable[[], None]) -> None:
        """Queue something else to be done."""
        self.queue.append(_Task(run))

    def blocking_event(self) -> SimulatedEvent | None:
        """The event that the front of the queue waits for, if it has not passed."""
        front = self.queue[0] if self.queue else None
        return front.event if isinstance(front, _Wait) and not front.event.passed else None

    def can_step(self) -> bool:
        """Whether the front of the queue may run now."""
        return bool(self.queue) and self.blocking_event() is None

    def step(self) -> None:
        """Run the front of the queue: one piece of a batch, one task, or one event or wait that is passed.

        REQUIRES: can_step().
        """
        front = self.queue[0]
        if isinstance(front, _Pieces):
            piece = front.left.pop()
            if not front.left:
                self.queue.popleft()
            self.run(piece)
            return
        if isinstance(front, _Task):
            front.run()
        if isinstance(front, SimulatedEvent):
            front.failure, self.event_failure = self.event_failure, None
            front.passed = True
        self.queue.popleft()

    def run(self, piece: Piece) -> None:
        """Carry out one copy, or fail it."""
        failure = self.device.execute(piece)
        if failure is not None:
            self.event_failure = self.event_failure or failure
            self.stream_failure = self.stream_failure or failure

    def pending_pieces(self) -> Iterator[Piece]:
        """The copies not yet carried out."""
        for item in self.queue:
            if isinstance(item, _Pieces):
                yield from item.left


def late_error(what: str, timeout_s: float) -> DeadlineError:
    """What is raised where the device hangs."""
    return DeadlineError(
        f"simulated device: {what} was not done within copy_timeout_s={timeout_s:g}"
    )
