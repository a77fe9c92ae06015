"""CudaStream and CudaEvent: the order of work on one GPU, as handles that are always valid."""

from __future__ import annotations

import time
import weakref
from typing import TYPE_CHECKING

from tiermem.device import cuda
from tiermem.device.protocol import Event
from tiermem.errors import TransferError

if TYPE_CHECKING:
    from tiermem.device.cuda_device import CudaDevice


class CudaEvent:
    """A recorded cudaEvent_t, lent by the pool until it was seen done or this handle is dropped."""

    __slots__ = ("__weakref__", "_deadline_s", "_failure", "_raw", "device")

    def __init__(self, device: CudaDevice, raw: cuda.RawEvent) -> None:
        self.device = device
        self._raw: cuda.RawEvent | None = raw
        self._failure: str | None = None
        self._deadline_s = time.monotonic() + device.copy_timeout_s

    def pending(self) -> cuda.RawEvent | None:
        """The cudaEvent_t; None once it was seen done or failed, or the device is closed."""
        return None if self.device.closed or self._failure is not None else self._raw

    def done(self) -> bool:
        self._raise_failure()
        raw = self.pending()
        if raw is None:
            return True
        with self.device.current():
            try:
                if not cuda.event_is_done(raw):
                    return False
            except TransferError as error:
                self._failure = str(error)
                raise
        self._give_back(raw)
        return True

    def wait(self) -> None:
        cuda.wait_until(
            self.done, self._deadline_s, "what an event stands for", self.device.copy_timeout_s
        )

    def is_late(self) -> bool:
        return self.pending() is not None and time.monotonic() >= self._deadline_s

    def _give_back(self, raw: cuda.RawEvent) -> None:
        self._raw = None
        self.device.events.take_back(raw)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise TransferError(self._failure)


class EventPool:
    """cudaEvent_t's of one device, made when none is free and reused.

    An event whose handle was dropped unseen may still be pending. It may be recorded anew all the
    same: a stream that was told to wait for it waits for what it stood for then.
    """

    def __init__(self) -> None:
        self._free: list[cuda.RawEvent] = []
        self._lent: dict[cuda.RawEvent, weakref.ref[CudaEvent]] = {}

    def record(self, device: CudaDevice, stream: int) -> CudaEvent:
        """A recorded event. The device's context must be current."""
        raw = self._free.pop() if self._free else cuda.make_event()
        try:
            cuda.record_event(raw, stream)
        except TransferError:
            self._free.append(raw)
            raise
        event = CudaEvent(device, raw)
        self._lent[raw] = weakref.ref(event, lambda _: self.take_back(raw))
        return event

    def take_back(self, raw: cuda.RawEvent) -> None:
        """The handle of a lent event has seen it done, or is gone."""
        if self._lent.pop(raw, None) is not None:
            self._free.append(raw)

    def take_all(self) -> list[cuda.RawEvent]:
        """Every event, for the caller to destroy; no handle may use its event any more."""
        events = [*self._free, *self._lent]
        self._free, self._lent = [], {}
        return events


class CudaStream:
    """A cudaStream_t by its handle: one of the device's own, or torch's."""

    __slots__ = ("device", "handle")

    def __init__(self, device: CudaDevice, handle: int) -> None:
        self.device = device
        self.handle = handle

    def record(self) -> Event:
        self.device.check_open()
        with self.device.current():
            return self.device.events.record(self.device, self.handle)

    def wait_event(self, event: Event) -> None:
        self.device.check_open()
        if not isinstance(event, CudaEvent) or event.device is not self.device:
            raise TypeError(f"event={event!r}: must be an event of the same device")
        raw = event.pending()
        if raw is not None:
            with self.device.current():
                cuda.wait_event(self.handle, raw)

    def synchronize(self) -> None:
        self.device.check_open()
        with self.device.current():
            cuda.synchronize_stream(self.handle, self.device.copy_timeout_s)
