"""Child processes of a warmed parent: forked, watched, and killed when they hang."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from world import LAYOUT

from tiermem import TierConfig, TierManager
from tiermem.device import cpu, host

FAILED = 3
"""Exit status of a child that met an error; it has told its text."""
PR_SET_PDEATHSIG = 1
"""Of prctl: a child does not outlive its parent."""
HUNG_S = 5.0
"""Time that a hanging child gets to write where it hangs."""


def warm_up() -> None:
    """Import and try all that children need, so that a fork has it; leaves no thread behind.

    A driver's own threads, which bear its name, are not missed: children use the CPU device alone.

    Raises
    ------
    RuntimeError: threads are left, which a forked child would miss.
    """
    torch.set_num_threads(1)
    # reading the limits of memory takes half of the time that a manager needs to start
    free_bytes = host.host_free_bytes()
    host.host_free_bytes = cpu.host_free_bytes = lambda: free_bytes
    size = 4 * LAYOUT.slot_bytes
    with TierManager(
        LAYOUT, TierConfig(gpu=size, ram=size, ssd=0, device="cpu", cpu_threads=1)
    ) as manager:
        kv = torch.zeros(1, 1, LAYOUT.head_dim)
        with manager.step([manager.open_sequence()]) as step:
            for layer in range(LAYOUT.num_layers):
                step.append(layer, kv, kv)
                step.attend(layer, kv)
    gc.collect()
    gc.freeze()  # forked children would copy all these pages by counting references
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    ours = names.count(Path("/proc/self/comm").read_text())  # threads are called as their process
    if ours != 1:
        raise RuntimeError(f"{ours} threads are running; children are forked from one")


@dataclass(slots=True)
class Child:
    """A forked process. `report` is where it tells what it does, one byte each."""

    pid: int
    report: int
    hang_file: Path

    @classmethod
    def start(cls, body: Callable[[int], None], tell: Callable[[str], object]) -> Child:
        """Fork; the child runs body(report) and exits. An error's traceback goes to `tell`, in the child."""
        readable, writable = os.pipe()
        handle, name = tempfile.mkstemp(prefix="torture-hang-")
        pid = os.fork()
        if pid == 0:
            os.close(readable)
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            faulthandler.enable(handle)
            os._exit(_run(body, writable, tell))
        os.close(writable)
        os.close(handle)
        return cls(pid, readable, Path(name))

    def next_byte(self, timeout_s: float) -> int | None:
        """What it tells next; None when it has ended or the time is over."""
        if not select.select([self.report], [], [], max(0.0, timeout_s))[0]:
            return None
        told = os.read(self.report, 1)
        return told[0] if told else None

    def wait(self, timeout_s: float) -> int | None:
        """Its exit status, negative for a signal, once it has ended; None when the time is over."""
        end_s = time.monotonic() + timeout_s
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.report)
                return os.waitstatus_to_exitcode(status)
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                return None
            # The pipe's other end closes when the process ends.
            if select.select([self.report], [], [], left_s)[0] and not os.read(self.report, 4096):
                time.sleep(0.0002)

    def kill(self) -> int:
        """SIGKILL, and its exit status."""
        os.kill(self.pid, signal.SIGKILL)
        status = self.wait(60.0)
        assert status is not None, "SIGKILL did not end a process"
        return status

    def explain_hang(self) -> str:
        """Where it hangs; ends it."""
        os.kill(self.pid, signal.SIGABRT)
        if self.wait(HUNG_S) is None:
            self.kill()
        return self.hang_text()

    def hang_text(self) -> str:
        """What it wrote when a signal ended it."""
        return self.hang_file.read_text(errors="replace")

    def forget(self) -> None:
        """Remove what it may have left."""
        self.hang_file.unlink(missing_ok=True)


def _run(body: Callable[[int], None], report: int, tell: Callable[[str], object]) -> int:
    try:
        body(report)
    except BaseException:  # noqa: BLE001 - whatever it is, the parent must hear of it
        tell(traceback.format_exc())
        return FAILED
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
