"""DeviceWork: what the device was given and holds pins, in the list of work in flight: steps that were left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence

from tiermem.device.protocol import Event, Stream
from tiermem.errors import DeadlineError, TransferError
from tiermem.inflight import InFlight


class DeviceWork:
    """It ends when the device has passed all `events`, well or not; `release` then lets go of the pins (R1).

    `is_also_over` is asked besides: of reads and writes of files that missed their deadline.
    """

    def __init__(
        self,
        what: str,
        events: Sequence[Event],
        release: Callable[[], None],
        is_also_over: Callable[[], bool] = lambda: True,
    ) -> None:
        self._what = what
        self._events = list(events)
        self._release = release
        self._is_also_over = is_also_over
        self._failure: TransferError | None = None

    def poll(self) -> bool:
        """Whether the device has ended it; raises TransferError then if it failed."""
        while self._events and self._has_passed(self._events[0]):
            self._events.pop(0)
        if self._events:
            return False
        if not self._is_also_over():
            return False
        if self._failure is not None:
            raise self._failure
        return True

    def wait(self) -> None:
        """Block until it has."""
        for event in self._events:
            _wait(event)
        if not self._is_also_over():
            raise self.expire()

    def _has_passed(self, event: Event) -> bool:
        try:
            return event.done()
        except TransferError as error:
            self._failure = self._failure or error
            return True

    def held(self) -> TransferError | None:
        """Nobody counts on it."""
        return None

    def is_late(self) -> bool:
        """Whether it should have ended by now."""
        if self._events:
            return any(event.is_late() for event in self._events)
        return not self._is_also_over()

    def expire(self) -> DeadlineError:
        """It keeps its pins until it has ended."""
        return DeadlineError(f"{self._what} did not end by its deadline")

    def finish(self) -> None:
        """Nothing reads or writes the pages any more."""
        self._release()

    def fail(self, error: TransferError) -> None:  # noqa: ARG002 - logged by the list
        """The device failed; the bookkeeping goes on."""
        self._release()


def _wait(event: Event) -> None:
    try:
        event.wait()
    except DeadlineError:
        raise
    except TransferError:
        return  # `poll` raises it again


def release_when_over(
    in_flight: InFlight,
    what: str,
    streams: Iterable[Stream],
    release: Callable[[], None],
    is_also_over: Callable[[], bool] = lambda: True,
) -> None:
    """Wait for all that `streams` were given, then call `release`: at the deadline later, when it is over."""
    events = []
    for stream in streams:
        with contextlib.suppress(
            TransferError
        ):  # a device that failed for good: nothing runs there
            events.append(stream.record())
    work = DeviceWork(what, events, release, is_also_over)
    in_flight.add(work)
    with contextlib.suppress(DeadlineError):  # the list has told, and keeps it
        in_flight.wait_for([work])
