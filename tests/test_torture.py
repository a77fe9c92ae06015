"""The fault suite at small size, and that it finds what it is there to find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LIMIT_S = 280
LEAST_KILLS = 200
MARGIN_S = "20"
"""What a call may take beyond its deadline here, where other tests take the cores."""
HARM = ("fault", "scarcity", "flip", "memory", "index", "store", "soak", "parse")


def torture(*arguments: str, code: str = "") -> tuple[int, dict[str, object]]:
    """Exit status and summary of a run of the fault suite, after `code`."""
    program = f"{code}\nimport sys\nfrom torture.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, "--json", *arguments],
        env={
            **os.environ,
            "PYTHONPATH": str(TESTS),
            "OMP_NUM_THREADS": "1",
            "TORTURE_MARGIN_S": MARGIN_S,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def assert_clean(status: int, summary: dict[str, object]) -> None:
    assert summary["findings"] == [], f"seed {summary['seed']}"
    for name in ("wrong_bytes", "lost_pages", "hangs", "late"):
        assert summary[name] == 0, f"{name}, seed {summary['seed']}"
    assert status == 0


def total(counts: object) -> int:
    assert isinstance(counts, dict)
    return sum(counts.values())


@pytest.mark.slow
def test_killed_processes_leave_stores_that_lose_and_mix_up_nothing() -> None:
    status, summary = torture("--kind", "kill", "--kills", str(LEAST_KILLS))
    assert_clean(status, summary)
    assert total(summary["kills"]) >= LEAST_KILLS
    assert isinstance(summary["kills"], dict)
    assert {"opening", "working", "flushing", "closing"} <= summary["kills"].keys()
    assert isinstance(summary["bytes_checked"], int)
    assert summary["bytes_checked"] > 1e6


@pytest.mark.slow
def test_flipped_bits_damaged_stores_hostile_bytes_and_long_use_do_no_harm() -> None:
    kinds = [word for kind in HARM for word in ("--kind", kind)]
    status, summary = torture(*kinds, "--cases", "2")
    assert_clean(status, summary)
    assert isinstance(summary["flips"], dict)
    assert isinstance(summary["faults"], dict)
    assert summary["faults"].get("memory refused", 0) > 0
    assert {"payload", "trailer", "memory"} <= summary["flips"].keys()
    assert any(place.startswith("index") for place in summary["flips"])
    assert isinstance(summary["corrupt_found"], int)
    assert summary["corrupt_found"] > 0
    assert total(summary["stores"]) >= 2 * 12
    assert isinstance(summary["inputs"], dict)
    assert len(summary["inputs"]) >= 14
    assert min(summary["inputs"].values()) >= 400
    assert isinstance(summary["disk_samples"], int)
    assert isinstance(summary["disk_share"], float)
    assert summary["disk_samples"] > 10
    assert 0 < summary["disk_share"] <= 1


LOSES = """
import tiermem.manager as m
m.write_published = m.flush_published = lambda core, store: None
"""
"""flush() and close() that write nothing."""
MIXES_UP = """
import numpy as np
from tiermem.store import ColdStore
from tiermem.store_index import StoreIndex
ColdStore.verify = lambda self, transfer: np.ones(len(transfer.slots), dtype=bool)
publish = StoreIndex.publish
StoreIndex.publish = lambda self, slots, names: publish(self, slots, names[1:] + names[:1])
StoreIndex.are_called = lambda self, slots, keys: np.ones(len(slots), dtype=bool)
"""
"""An index with its names exchanged, and nobody who looks."""


@pytest.mark.parametrize(("code", "name"), [(LOSES, "lost_pages"), (MIXES_UP, "wrong_bytes")])
def test_a_broken_store_is_found(code: str, name: str) -> None:
    status, summary = torture("--kind", "kill", "--cases", "1", "--seed", "1", code=code)
    assert status == 1
    count = summary[name]
    assert isinstance(count, int)
    assert count > 0
    assert summary["findings"]
