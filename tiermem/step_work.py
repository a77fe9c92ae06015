"""StepWork: a step that was left and that the device may not have ended yet."""

from __future__ import annotations

from tiermem.core import Core
from tiermem.device.protocol import Event
from tiermem.errors import TransferError
from tiermem.plan import Plan


class StepWork:
    """A step in the list of work in flight: it ends when the device has run it, and then lets go of its pins."""

    def __init__(self, core: Core, plan: Plan, event: Event) -> None:
        self._core = core
        self._plan = plan
        self._event = event

    def poll(self) -> bool:
        """Whether the device has ended the step."""
        return self._event.done()

    def wait(self) -> None:
        """Block until it has."""
        self._event.wait()

    def finish(self) -> None:
        """Release the pins (R1)."""
        self._plan.release_pins(self._core)

    def fail(self, error: TransferError) -> None:  # noqa: ARG002 - logged by the list
        """The device failed; the bookkeeping goes on."""
        self.finish()
