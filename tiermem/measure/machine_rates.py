"""Machine rates: every rate that can be measured without a manager, at once."""

from __future__ import annotations

import torch

from tiermem.attention.cpus import cpus_beside_gpu, usable_cpus
from tiermem.device.protocol import Device, DeviceKind, Direction
from tiermem.measure.ceilings import Ceilings
from tiermem.measure.launches import kernel_time_s, launch_time_s, queued_kernel_time_s
from tiermem.rates import Rates

ATTENDED = {"float16": "fp16", "bfloat16": "bf16"}
"""Dtypes that the CPU attends at rates of their own, and what the names of these end in."""
LEAST_S = 1e-9
"""The shortest time that rates hold."""


def ceiling_rates(ceilings: Ceilings, device: Device) -> Rates:
    """The rates of link, memory, products and launches of `device`, which `ceilings` are of."""
    on_gpu = device.kind is DeviceKind.CUDA
    threads = torch.get_num_threads()
    dtype = torch.float16 if on_gpu else torch.float32
    products = ceilings.product_costs(dtype)
    return Rates(
        link_to_device=ceilings.link_rate(Direction.HOST_TO_DEVICE),
        link_to_host=ceilings.link_rate(Direction.DEVICE_TO_HOST),
        link_both=ceilings.two_way_link_rate(),
        hbm_read=ceilings.hbm_read_rate(),
        hbm_copy=ceilings.hbm_copy_rate(),
        ram_read_one=ceilings.ram_read_rate(1),
        ram_read=ceilings.ram_read_rate(threads),
        ram_copy=ceilings.ram_copy_rate(threads),
        matmul=ceilings.matmul_rate(dtype),
        linear_read=products.read_rate,
        product_s=max(products.each_s, LEAST_S) if on_gpu else None,
        kernel_s=kernel_time_s(device, ceilings.repeats),
        queued_kernel_s=queued_kernel_time_s(device, ceilings.repeats),
        launch_s=launch_time_s(device, ceilings.repeats),
    )


def ram_attention_rates(ceilings: Ceilings, device: Device) -> Rates:
    """The rates of the CPU's attention over pages in RAM, and where there is a GPU, of both beside each other.

    Raises
    ------
    InvariantError: as `beside_link`.
    """
    on_gpu = device.kind is DeviceKind.CUDA
    threads = cpus_beside_gpu() if on_gpu else usable_cpus()
    known: dict[str, float] = {"cpu_attend_threads": threads}
    for dtype, kind in ATTENDED.items():
        known[f"cpu_attend_{kind}"] = ceilings.attend_rate(dtype, threads)
        if on_gpu:
            beside = ceilings.attend_beside_link(dtype, threads)
            known[f"cpu_attend_{kind}_beside"] = beside.ram
            known[f"link_beside_{kind}"] = beside.link
    return Rates(**known)
