"""Rates: how fast a machine is, as measured or as its makers say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from tiermem.fields import check_keys, check_number
from tiermem.ram_split import SplitRates

RATE_RANGE = (1e4, 1e17)
"""Bytes or floating-point operations a second: from far below any hardware to far above."""
TIME_RANGE = (1e-9, 10.0)
"""Seconds."""
COUNT_RANGE = (1, 65536)
ATTENDED_AS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp16"}
"""Pages of a dtype -> the rates that hold for them; float32 has half of the arithmetic a byte, and no rates of its
own."""


RELATIVES = {
    "cpu_attend_fp16": "ram_read",
    "cpu_attend_fp16_beside": "ram_read",
    "link_beside_fp16": "link_to_device",
    "cpu_attend_bf16": "ram_read",
    "cpu_attend_bf16_beside": "ram_read",
    "link_beside_bf16": "link_to_device",
}
"""Rates that are a share of another one: attention of reading RAM, the link beside it of the link alone."""


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
    cpu_attend_fp16, cpu_attend_bf16: K and V attended by the CPU where they lie in RAM, for one new token and 8
        query heads a KV head; cpu_attend_fp16_beside, cpu_attend_bf16_beside: the same while the link streams
        other pages to the device; link_beside_fp16, link_beside_bf16: what crosses the link then.
    cpu_attend_threads: a count, the threads that attended.
    hand_over_s: what it takes, in each layer, until the CPU has the queries and the GPU the result.
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
    cpu_attend_fp16: float | None = None
    cpu_attend_fp16_beside: float | None = None
    link_beside_fp16: float | None = None
    cpu_attend_bf16: float | None = None
    cpu_attend_bf16_beside: float | None = None
    link_beside_bf16: float | None = None
    cpu_attend_threads: float | None = None
    hand_over_s: float | None = None

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

    @property
    def shares(self) -> dict[str, float]:
        """Of the rates in RELATIVES, about 0 to 1, as far as both are known."""
        known = self.to_table()
        pairs = ((name, of) for name, of in RELATIVES.items() if name in known and of in known)
        return {name: known[name] / known[of] for name, of in pairs}

    def split(self, dtype: str) -> SplitRates | None:
        """How link and CPU share what is in RAM, in pages of `dtype`; None where it is not known."""
        known, kind = self.to_table(), ATTENDED_AS[dtype]
        cpu, link = known.get(f"cpu_attend_{kind}_beside"), known.get(f"link_beside_{kind}")
        if cpu is None or link is None:
            return None
        return SplitRates(link, cpu, self.link_to_device, known.get(f"cpu_attend_{kind}"))


def _number(name: str, value: object) -> float:
    low, high = TIME_RANGE if name.endswith("_s") else RATE_RANGE
    if name.endswith("_threads"):
        low, high = COUNT_RANGE
    return check_number(name, value, low, high)
