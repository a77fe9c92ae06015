"""Devices: memory, streams, events and copies behind one protocol."""

from __future__ import annotations

from tiermem.device.protocol import (
    MEMORY_ALIGN_BYTES,
    Addresses,
    Device,
    DeviceKind,
    Direction,
    Event,
    Memory,
    MemoryInfo,
    Progress,
    Stream,
)

__all__ = [
    "MEMORY_ALIGN_BYTES",
    "Addresses",
    "Device",
    "DeviceKind",
    "Direction",
    "Event",
    "Memory",
    "MemoryInfo",
    "Progress",
    "Stream",
]
