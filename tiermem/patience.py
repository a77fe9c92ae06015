"""Patience: calls of the system that have no deadline of their own, such as fdatasync, given one.

The call runs in a thread of its own, which is left behind where the call never returns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from tiermem.errors import DeadlineError


class PatientCall:
    """A call that was started; what it raised is raised by `wait`, or dropped where it came too late."""

    def __init__(self, call: Callable[[], None], what: str) -> None:
        self._call = call
        self._what = what
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"tiermem: {what}", daemon=True)
        self._thread.start()

    def poll(self) -> bool:
        """Whether the call has returned."""
        return not self._thread.is_alive()

    def join(self) -> None:
        """Wait for the call as long as it takes, whatever it raises."""
        self._thread.join()

    def wait(self, timeout_s: float) -> None:
        """Wait for the call; raises what it raised, or DeadlineError after `timeout_s` seconds: it goes on."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise DeadlineError(f"{self._what} was not over within io_timeout_s={timeout_s:g}")
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._call()
        except Exception as error:  # noqa: BLE001 - raised in the thread that waits
            self._error = error
