"""The whole tree of errors that tiermem raises on purpose.

Wrong types and shapes raise the built-in ``TypeError`` and ``ValueError``; everything that a caller may
want to tell apart at run time is here.
"""

from __future__ import annotations


class TierMemError(Exception):
    """Base of every error of tiermem."""


class ConfigError(TierMemError, ValueError):
    """A configuration, a size, a path or a store that cannot be used; names key, value and range."""


class OutOfPagesError(TierMemError, MemoryError):
    """No slot can be freed: nothing is in flight and nothing can be dropped. Carries the counts."""


class TransferError(TierMemError, OSError):
    """A copy, a read or a write failed; the pages it was to fill are as they were before."""


class DeadlineError(TransferError):
    """Something was not over by its deadline. What still runs keeps what it uses till it ends."""


class NotDurableError(TransferError):
    """Published pages that a flush was to make durable are not; what could be written is.

    `num_pages` of `num_published` are not durable, for `reason`. They are where they were, and the next flush
    tries them again.
    """

    def __init__(self, num_pages: int, num_published: int, reason: str) -> None:
        super().__init__(
            f"{num_pages} of {num_published} published pages are not durable on the SSD: {reason}"
        )
        self.num_pages = num_pages
        self.num_published = num_published
        self.reason = reason


class CorruptPageError(TransferError):
    """Bytes that came back are not the bytes that were stored; they were not served.

    `pages` are the ids of the pages whose copy was found damaged. `lost` are those of them that have no other
    intact copy: without any, what failed can be done again, and takes the other copies; else a sequence that has
    such a page must be rolled back to before it, or opened again.
    """

    def __init__(
        self, message: str, pages: tuple[int, ...] = (), lost: tuple[int, ...] = ()
    ) -> None:
        super().__init__(message)
        self.pages = pages
        self.lost = lost

    @property
    def can_retry(self) -> bool:
        """Whether every page has another copy, so that doing it again may succeed."""
        return not self.lost


class ClosedError(TierMemError, RuntimeError):
    """A manager, sequence or step was used after it was closed."""


class InvariantError(TierMemError, AssertionError):
    """The bookkeeping contradicts itself: a defect of tiermem, never of the caller."""
