"""PinnedPieces: host memory made known to CUDA piece by piece, with everything undone on failure."""

from __future__ import annotations

import resource
from collections.abc import Callable

from tiermem.device.host import host_free_bytes
from tiermem.device.protocol import MEMORY_ALIGN_BYTES, Progress
from tiermem.errors import ConfigError, TransferError


class PinnedPieces:
    """The registered pieces of one host memory of `num_bytes` bytes.

    Pieces, so that the next one is touched while one is registered, and progress can be told: on an
    H200's host that took 51 GB/s where one registration behind the touch took 31 and cudaHostAlloc
    3. CUDA refuses a copy that reaches from one piece into the next; `starts` says where they are.
    """

    def __init__(
        self,
        pin: Callable[[int, int], None],
        unpin: Callable[[int], None],
        num_bytes: int,
        progress: Progress | None,
    ) -> None:
        self._pin = pin
        self._unpin = unpin
        self._num_bytes = num_bytes
        self._progress = progress
        self._done_bytes = 0
        self.starts: list[int] = []

    def pin(self, address: int, num_bytes: int) -> None:
        """Pin one more piece, backed already.

        Raises
        ------
        ConfigError: CUDA refuses; names the bytes wanted, what was pinned, and the limits.
        """
        whole_pages = num_bytes + -num_bytes % MEMORY_ALIGN_BYTES
        try:
            self._pin(address, whole_pages)
        except TransferError as error:
            raise ConfigError(
                f"cannot pin {self._num_bytes} bytes of host memory: CUDA refused after "
                f"{self._done_bytes} bytes ({error}); {host_free_bytes()} bytes are free, "
                f"{_locked_limit()} may be locked (ulimit -l)"
            ) from error
        self.starts.append(address)
        self._done_bytes += num_bytes
        if self._progress is not None:
            self._progress(self._done_bytes, self._num_bytes)

    def unpin(self) -> None:
        """Undo every `pin`; later calls do nothing.

        Raises
        ------
        TransferError: CUDA refused; every piece was tried.
        """
        starts, self.starts = self.starts, []
        failures = [text for start in starts if (text := self._failure(start)) is not None]
        if failures:
            raise TransferError(failures[0])

    def _failure(self, start: int) -> str | None:
        try:
            self._unpin(start)
        except TransferError as error:
            return str(error)
        return None


def _locked_limit() -> str:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return "any number of bytes" if limit == resource.RLIM_INFINITY else f"{limit} bytes"
