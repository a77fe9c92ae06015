"""Calibration text: measured rates as a short table, and as a share of what the hardware is made for."""

from __future__ import annotations

from tiermem.calibration import Calibration
from tiermem.cli.human import (
    NOTHING,
    duration_text,
    flops_text,
    rate_text,
    share_text,
    time_text,
)
from tiermem.cli.table import Align, Table
from tiermem.rates import RELATIVES, Rates

_BYTES = (
    ("link_to_device", "RAM to device"),
    ("link_to_host", "device to RAM"),
    ("link_both", "both at once"),
    ("hbm_read", "device memory, read"),
    ("hbm_copy", "device memory, copy"),
    ("ram_read_one", "RAM, read by 1 thread"),
    ("ram_read", "RAM, read by all"),
    ("ram_copy", "RAM, copied by all"),
    ("disk_read", "SSD, read"),
    ("disk_write", "SSD, write"),
    ("linear_read", "weights, 1 row"),
    ("decode_read", "decode attention"),
    ("cpu_attend_fp16", "CPU attention, fp16"),
    ("cpu_attend_fp16_beside", "... beside the link"),
    ("link_beside_fp16", "the link meanwhile"),
    ("cpu_attend_bf16", "CPU attention, bf16"),
    ("cpu_attend_bf16_beside", "... beside the link"),
    ("link_beside_bf16", "the link meanwhile"),
)
_WHOLES = {"ram_read": "of RAM reads", "link_to_device": "of the link alone"}
_FLOPS = (("matmul", "matrix products"), ("prefill", "prefill attention"))
_TIMES = (
    ("attend_s", "shortest attention"),
    ("product_s", "product, besides reading"),
    ("kernel_s", "kernel in a graph"),
    ("queued_kernel_s", "kernel by itself"),
    ("launch_s", "launch of a kernel"),
    ("step_s", "step, enter and leave"),
    ("layer_s", "append and attend"),
)


def calibration_lines(
    made: Calibration, now_s: float, width: int | None, bounds: Rates | None = None
) -> list[str]:
    """What was measured, when, and until when it is used; with shares, of `bounds` too where they are known."""
    age, left = duration_text(now_s - made.made_s), duration_text(made.expires_s - now_s)
    how = "in haste" if made.quick else "with care"
    return [
        *rate_table(made.rates, bounds).lines(width),
        *disk_lines(made, width),
        "",
        *thread_lines(made.rates),
        f"measured {how} {age} ago, used for another {left}",
    ]


def thread_lines(rates: Rates) -> list[str]:
    """How many threads attended."""
    threads = rates.cpu_attend_threads
    return [] if threads is None else [f"CPU attention: {threads:.0f} threads, one new token"]


def disk_lines(made: Calibration, width: int | None) -> list[str]:
    """Every disk that was measured."""
    rows = tuple(
        (place.path, rate_text(place.read / 1e9), rate_text(place.write / 1e9))
        for place in made.disks
    )
    return ["", *Table(("SSD tier at", "read", "write"), rows).lines(width)] if rows else []


def rate_table(rates: Rates, bounds: Rates | None = None) -> Table:
    """What is known of `rates`, and what share of `bounds`, or of another rate, that is."""
    known, most = rates.to_table(), {} if bounds is None else bounds.to_table()
    rows = [(text, rate_text(known[name] / 1e9), name) for name, text in _BYTES if name in known]
    rows += [(text, flops_text(known[name]), name) for name, text in _FLOPS if name in known]
    rows += [(text, time_text(known[name]), name) for name, text in _TIMES if name in known]
    shares = {
        name: f"{share_text(known[name] / bound)} of the hardware's"
        for name, bound in most.items()
        if name in known
    }
    for name, share in rates.shares.items():
        shares[name] = f"{share_text(share)} {_WHOLES[RELATIVES[name]]}"
    if not shares:
        return Table(("", ""), tuple(row[:2] for row in rows), (Align.LEFT, Align.RIGHT))
    body = tuple((text, value, shares.get(name, NOTHING)) for text, value, name in rows)
    return Table(("measured", "rate", "share"), body, (Align.LEFT, Align.RIGHT, Align.LEFT))
