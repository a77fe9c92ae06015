"""Speed: how long a decode step takes, from what it reads and how fast this is read.

t_gpu = max(W / B_linear, 2 P b / F) + S / B_attend + L (p t_product + n u t_kernel + t_attend): weights, K and V,
and what every product, small kernel and attention costs besides; more where each is launched by itself.
With everything resident and replayed as a CUDA graph, t = t_step + t_gpu: the host plans a step, then starts it.
Launched one by one, t = t_step + max(t_gpu, t_host), t_host = L (t_layer + m t_launch).
X bytes of K and V that are not on the GPU stream meanwhile, t = t_step + max(t_gpu, X / B_link, t_host);
and Y bytes of them that lie on the SSD are read before they are sent, while nothing else goes on: t + Y / B_disk.
A hot tier under LRU finds nothing of a scan that is larger than it: X = S. With a fixed resident set of C bytes,
X = S - C. Where the CPU attends a part f of the X - Y bytes that are in RAM, it ends when the link does:
t = t_step + max(t_gpu, (X - f (X - Y)) / B_link, T_gpu + L T_h + f (X - Y) / B_cpu, t_host) + Y / B_disk, by the
rates that both have beside each other (ram_split.py); T_gpu is what the GPU needs for weights and resident K and
V, T_h a hand-over. Without a GPU nothing runs beside anything else: t is the sum of all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum

from tiermem.ram_split import SplitRates, SplitWork, best_split
from tiermem.rates import Rates

SMALL_WORK = 1.8
"""A small kernel of a model takes so many times what the smallest one takes (u): 2.15 and 1.19 µs on an H200."""
ATTENTION_KERNELS = 3
"""Storing the new token, attention, merging."""


@dataclass(frozen=True, slots=True)
class Program:
    """What a decode step launches in each layer.

    products: matrix products. small_kernels: norms, rotation, activation, additions. launches: what all of this
    costs the host where nothing is captured, in launches of one kernel, without `append` and `attend`.
    """

    products: int
    small_kernels: int
    launches: int


TRANSFORMERS = Program(products=7, small_kernels=30, launches=140)
"""A Llama of transformers; its modules cost the host 45 ms for 62 layers, where a launch takes 5.2 µs."""
FUSED = Program(products=4, small_kernels=14, launches=25)
"""A plain loop with q, k and v in one product, gate and up in another, and norms in one kernel each."""


class Mode(Enum):
    """How K and V reach attention."""

    RESIDENT = "resident"
    """All on the GPU; the step is replayed as a CUDA graph."""
    EAGER = "resident, launched one by one"
    FIXED = "fixed set and streaming"
    """What fits stays on the GPU, the rest streams over the link."""
    SHARED = "streamed + CPU"
    """The same, but the CPU attends a part of the rest where it lies in RAM."""
    LRU = "LRU and streaming"
    """For comparison: a cyclic scan through an LRU cache that is too small; everything streams."""


class Device(Enum):
    """What computes: a GPU beside the host, or the host itself."""

    GPU = "gpu"
    HOST = "host"


class Limit(Enum):
    """What a step waits for."""

    HBM = "hbm"
    COMPUTE = "compute"
    LAUNCH = "launch"
    LINK = "link"
    CPU = "cpu"
    LINK_AND_CPU = "link and cpu"
    DISK = "disk"
    CAPACITY = "capacity"


@dataclass(frozen=True, slots=True)
class Work:
    """What a decode step of `batch` sequences does.

    program: what it launches. weight_bytes: read of the weights. parameters: multiplied. kv_bytes: all K and V
    of the sequences; of them streamed_bytes are not on the GPU and cold_bytes of these on the SSD.
    """

    program: Program
    batch: int
    num_layers: int
    weight_bytes: int
    parameters: int
    kv_bytes: int
    streamed_bytes: int = 0
    cold_bytes: int = 0

    @property
    def ram_bytes(self) -> int:
        """K and V that are in RAM alone."""
        return self.streamed_bytes - self.cold_bytes


@dataclass(frozen=True, slots=True)
class Shared:
    """The CPU's part of a step. share: of what is in RAM alone, 0 to 1. attended_bytes: that is, of K and V.

    before_s: what goes before and between, in which it has no queries: T_gpu + L T_h. attend_s: what it takes.
    hand_over_s: L T_h alone. rates: by which that was chosen.
    """

    share: float
    attended_bytes: float
    before_s: float
    hand_over_s: float
    attend_s: float
    rates: SplitRates

    @property
    def total_s(self) -> float:
        """From the step's beginning to the CPU's last result; 0 where it has nothing to do."""
        return self.before_s + self.attend_s if self.attended_bytes else 0.0


@dataclass(frozen=True, slots=True)
class StepTime:
    """A decode step in one mode: its parts, which overlap as the module says, and their sum. Seconds.

    beside: whether computing, launching and the link overlap. step_s: the host's, to enter and leave a step.
    host_s: the host's, to launch what the GPU does. shared: the CPU's part, where it attends too.
    """

    mode: Mode
    batch: int
    work: Work
    beside: bool
    weights_s: float
    compute_s: float
    attention_s: float
    kernels_s: float
    step_s: float
    host_s: float
    link_s: float
    disk_s: float
    shared: Shared | None = None

    @property
    def cpu_s(self) -> float:
        """From the step's beginning to the CPU's last result; 0 where it does not attend."""
        return 0.0 if self.shared is None else self.shared.total_s

    @property
    def gpu_s(self) -> float:
        """What the GPU computes, or reads to compute."""
        return max(self.weights_s, self.compute_s) + self.attention_s + self.kernels_s

    @property
    def total_s(self) -> float:
        """The step."""
        parts = (self.gpu_s, self.link_s, self.cpu_s, self.host_s)
        return self.step_s + (max(parts) if self.beside else sum(parts)) + self.disk_s

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences together."""
        return self.batch / self.total_s

    @property
    def limit(self) -> Limit:
        """What takes longest."""
        memory_s = self.attention_s + (self.weights_s if self.weights_s >= self.compute_s else 0.0)
        product_s = self.compute_s if self.compute_s > self.weights_s else 0.0
        host_s = self.step_s + self.host_s
        if max(self.link_s, self.cpu_s, self.disk_s, host_s) > self.gpu_s:
            both = math.isclose(self.link_s, self.cpu_s)
            link, cpu = (Limit.LINK_AND_CPU,) * 2 if both else (Limit.LINK, Limit.CPU)
            by_time = {
                self.disk_s: Limit.DISK,
                self.cpu_s: cpu,
                self.link_s: link,
                host_s: Limit.LAUNCH,
            }
        else:
            by_time = {memory_s: Limit.HBM, product_s: Limit.COMPUTE, self.kernels_s: Limit.LAUNCH}
        return by_time[max(by_time)]


def step_time(mode: Mode, work: Work, rates: Rates, device: Device = Device.GPU) -> StepTime:
    """The time of one decode step; `rates` must be complete."""
    known = rates.to_table()
    layers, program = work.num_layers, work.program
    captured = mode is Mode.RESIDENT
    gap_s = 0.0 if captured else max(known["queued_kernel_s"] - known["kernel_s"], 0.0)
    heavy = program.products + ATTENTION_KERNELS
    small_s = program.products * known["product_s"]
    small_s += program.small_kernels * SMALL_WORK * known["kernel_s"]
    launch_s = known["layer_s"] + program.launches * known["launch_s"]
    return StepTime(
        mode=mode,
        batch=work.batch,
        work=work,
        beside=device is Device.GPU,
        weights_s=work.weight_bytes / known["linear_read"],
        compute_s=2 * work.parameters * work.batch / known["matmul"],
        attention_s=work.kv_bytes / known["decode_read"] + layers * known["attend_s"],
        kernels_s=layers * (small_s + (heavy + program.small_kernels) * gap_s),
        step_s=known["step_s"],
        host_s=0.0 if captured else layers * launch_s,
        link_s=work.streamed_bytes / known["link_to_device"],
        disk_s=work.cold_bytes / known["disk_read"],
    )


def shared_time(work: Work, rates: Rates, split: SplitRates) -> StepTime:
    """The time of one decode step in which the CPU attends, beside a GPU, as much as ends it soonest."""
    known, alone = rates.to_table(), step_time(Mode.SHARED, work, rates)
    resident_s = (work.kv_bytes - work.streamed_bytes) / known["decode_read"]
    launches_s = work.num_layers * known["attend_s"]
    gpu_s = max(alone.weights_s, alone.compute_s) + alone.kernels_s + resident_s + launches_s
    hand_over_s = work.num_layers * known["hand_over_s"]
    wanted = SplitWork(work.ram_bytes, work.cold_bytes, gpu_s, hand_over_s)
    share = best_split(wanted, split).fraction
    attended = share * work.ram_bytes
    streamed = work.streamed_bytes - attended
    shared = Shared(
        share=share,
        attended_bytes=attended,
        before_s=gpu_s + hand_over_s,
        hand_over_s=hand_over_s,
        attend_s=attended / (split.cpu if streamed else split.only_cpu),
        rates=split,
    )
    return replace(
        alone,
        attention_s=(work.kv_bytes - attended) / known["decode_read"] + launches_s,
        link_s=streamed / (split.link if attended else split.only_link),
        shared=shared,
    )


def prefill_time(work: Work, context: int, q_width: int, rates: Rates) -> float:
    """Seconds to compute `context` tokens of each of the batch's sequences, without reuse of stored prefixes.

    Parameters
    ----------
    q_width: query heads times head size.
    """
    known = rates.to_table()
    products = 2.0 * work.parameters * work.batch * context
    attention = 2.0 * work.batch * work.num_layers * q_width * context * context  # 4, causal: half
    computed = products / known["matmul"] + attention / known["prefill"]
    return max(computed, work.streamed_bytes / known["link_to_host"])
