"""tiermem: a KV cache larger than the GPU, exact, over GPU memory, pinned RAM and SSD.

The public names are imported on first use, so that the command line starts without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from tiermem.version import VERSION

if TYPE_CHECKING:
    from tiermem.config import TierConfig
    from tiermem.errors import (
        ClosedError,
        ConfigError,
        CorruptPageError,
        DeadlineError,
        InvariantError,
        NotDurableError,
        OutOfPagesError,
        TierMemError,
        TransferError,
    )
    from tiermem.graphs import CapturedDecode
    from tiermem.layout import PageLayout
    from tiermem.manager import TierManager
    from tiermem.sequence import Sequence
    from tiermem.stats import Stats
    from tiermem.step import Step

_HOMES = {
    "CapturedDecode": "graphs",
    "ClosedError": "errors",
    "ConfigError": "errors",
    "CorruptPageError": "errors",
    "DeadlineError": "errors",
    "InvariantError": "errors",
    "NotDurableError": "errors",
    "OutOfPagesError": "errors",
    "PageLayout": "layout",
    "Sequence": "sequence",
    "Stats": "stats",
    "Step": "step",
    "TierConfig": "config",
    "TierManager": "manager",
    "TierMemError": "errors",
    "TransferError": "errors",
}

__version__ = VERSION
__all__ = [
    "CapturedDecode",
    "ClosedError",
    "ConfigError",
    "CorruptPageError",
    "DeadlineError",
    "InvariantError",
    "NotDurableError",
    "OutOfPagesError",
    "PageLayout",
    "Sequence",
    "Stats",
    "Step",
    "TierConfig",
    "TierManager",
    "TierMemError",
    "TransferError",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'tiermem' has no attribute {name!r}")
    return getattr(import_module(f"tiermem.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
