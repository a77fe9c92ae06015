"""Rates: how fast a machine is, as measured or as its makers say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from tiermem.fields import check_keys, check_number

RATE_RANGE = (1e4, 1e17)
"""Bytes or floating-point operations a second: from far below any hardware to far above."""
TIME_RANGE = (1e-9, 10.0)
"""Seconds."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes/s, unless it says otherwise; None for what was not measured.

    Parameters
    ----------
    link_to_device, link_to_host: one large copy between pinned memory and the GPU. link_both: the two at once,
        together.
    hbm_read, hbm_copy: the device's own memory; a copy counts bytes read and written.
    ram_read_one, ram_read, ram_copy: host memory, read by one thread, by all; copied by all, read and written.
    disk_read, disk_write: direct I/O of large blocks where the cold tier would be.
    matmul: FLOP/s of large products in half precision (in float32 without a GPU).
    linear_read: weights read by products with one row, as in decoding. product_s: GPU time of one such product
        besides reading.
    decode_read: K and V read by decode attention. prefill: FLOP/s of prefill attention.
    attend_s: GPU time of one layer's decode attention over next to nothing.
    kernel_s, queued_kernel_s: GPU time of a kernel that does next to nothing, in a CUDA graph and launched by
        itself. launch_s: host time to launch it by itself.
    step_s: host time to enter and leave a step of one sequence. layer_s: host time of one append and attend.
    """

    link_to_device: float | None = None
    link_to_host: float | None = None
    link_both: float | None = None
    hbm_read: float | None = None
    hbm_copy: float | None = None
    ram_read_one: float | None = None
    ram_read: float | None = None
    ram_copy: float | None = None
    disk_read: float | None = None
    disk_write: float | None = None
    matmul: float | None = None
    linear_read: float | None = None
    decode_read: float | None = None
    prefill: float | None = None
    attend_s: float | None = None
    product_s: float | None = None
    kernel_s: float | None = None
    queued_kernel_s: float | None = None
    launch_s: float | None = None
    step_s: float | None = None
    layer_s: float | None = None

    @classmethod
    def from_table(cls, table: Mapping[str, object]) -> Rates:
        """The rates whose `to_table` gave `table`; keys may be missing.

        Raises
        ------
        ConfigError: an unknown key, or a value that no machine has.
        """
        names = [field.name for field in fields(cls)]
        check_keys(table, names)
        return cls(**{name: _number(name, value) for name, value in table.items()})

    def to_table(self) -> dict[str, float]:
        """Names and values of what is known."""
        found = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in found if value is not None}

    def over(self, other: Rates) -> Rates:
        """These rates, and where they are unknown those of `other`."""
        return Rates(**{**other.to_table(), **self.to_table()})


def _number(name: str, value: object) -> float:
    low, high = TIME_RANGE if name.endswith("_s") else RATE_RANGE
    return check_number(name, value, low, high)
