"""Attention over pages in a pool: store K and V, attend, merge partial results."""

from __future__ import annotations

from tiermem.attention.backend import AttentionBackend, backend_for
from tiermem.attention.host import HostBackend
from tiermem.attention.pool_view import (
    TORCH_DTYPES,
    PagedTables,
    PoolView,
    ProductMath,
    SlotHolds,
)
from tiermem.attention.work_list import PlannedWork, WorkList

__all__ = [
    "TORCH_DTYPES",
    "AttentionBackend",
    "HostBackend",
    "PagedTables",
    "PlannedWork",
    "PoolView",
    "ProductMath",
    "SlotHolds",
    "WorkList",
    "backend_for",
]
