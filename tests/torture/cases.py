"""The kinds of cases, and one case in a process of its own."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torture.faults import run_faults
from torture.flips import run_flips, run_index_flips, run_memory_flips
from torture.kills import run_kills
from torture.parsers import run_parsers
from torture.process import FAILED, Child
from torture.scarcity import run_scarcity
from torture.soak import run_soak
from torture.stores import run_stores
from torture.tally import Finding, Tally

Run = Callable[[int, Path, Tally], None]
"""One case from its seed, in an empty directory; raises, or leaves findings, where something is wrong."""

KINDS: dict[str, Run] = {
    "kill": run_kills,
    "fault": run_faults,
    "scarcity": run_scarcity,
    "flip": run_flips,
    "memory": run_memory_flips,
    "index": run_index_flips,
    "store": run_stores,
    "soak": run_soak,
    "parse": run_parsers,
}
TALLY, TEXT = "tally.json", "error.txt"


def seed_of(seed: int, kind: str, number: int) -> int:
    """The seed of case `number` of a kind."""
    return random.Random(f"{seed} {kind} {number}").getrandbits(48)


@dataclass(slots=True, eq=False)
class Case:
    """A case that runs in a child process, in a temporary directory of its own."""

    kind: str
    seed: int
    child: Child
    where: Path

    @classmethod
    def start(
        cls, kind: str, seed: int, parent: Path | None = None, run: Run | None = None
    ) -> Case:
        """Fork it. `parent`: where directories are made; `run`: what to do instead of what KINDS says."""
        chosen = run or KINDS[kind]
        where = Path(tempfile.mkdtemp(prefix=f"torture-{kind}-", dir=parent))

        def body(report: int) -> None:
            os.environ["TIERMEM_RUNTIME_DIR"] = os.environ["TIERMEM_CACHE_DIR"] = str(where / "run")
            (where / "run").mkdir(mode=0o700)
            (where / "work").mkdir()
            tally = Tally()
            tally.cases[kind] += 1
            try:
                chosen(seed, where / "work", tally)
            finally:
                (where / TALLY).write_text(json.dumps(tally.to_table()))

        child = Child.start(body, (where / TEXT).write_text)
        return cls(kind, seed, child, where)

    def end(self, timeout_s: float) -> Tally | None:
        """What it saw once it has ended; None while it runs."""
        status = self.child.wait(timeout_s)
        if status is None:
            return None
        path = self.where / TALLY
        tally = Tally.from_table(json.loads(path.read_text())) if path.exists() else Tally()
        if status != 0:
            path = self.where / TEXT
            text = path.read_text() if status == FAILED else self.child.hang_text()
            self._find(tally, f"ended with status {status}\n{text}")
        self._clean()
        return tally

    def hangs(self) -> Tally:
        """End it and say where it hangs."""
        tally = Tally(hangs=1)
        self._find(tally, f"hangs\n{self.child.explain_hang()}")
        self._clean()
        return tally

    def kill(self) -> None:
        """End it; nothing of it counts."""
        self.child.kill()
        self._clean()

    def _find(self, tally: Tally, text: str) -> None:
        tally.findings.append(Finding(self.kind, self.seed, text))

    def _clean(self) -> None:
        self.child.forget()
        shutil.rmtree(self.where, ignore_errors=True)
