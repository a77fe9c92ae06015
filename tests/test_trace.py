"""Trace: ranges around calls where they are switched on, nothing at all where they are not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cli_support import environment

from tiermem import trace

SHOW = "from tiermem import trace; print(trace.ENABLED)"


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is pushed and popped, with ranges switched on."""
    seen: list[str] = []
    monkeypatch.setattr(trace, "ENABLED", True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", seen.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: seen.append("end"))
    return seen


def test_a_call_is_a_range_and_keeps_its_result(ranges: list[str]) -> None:
    @trace.traced("outer")
    def outer(value: int, *, more: int) -> int:
        """Adds."""
        return inner(value) + more

    @trace.traced("inner")
    def inner(value: int) -> int:
        return 2 * value

    assert outer(3, more=1) == 7
    assert ranges == ["tiermem: outer", "tiermem: inner", "end", "end"]
    assert (outer.__name__, outer.__doc__) == ("outer", "Adds.")


def test_a_range_ends_when_the_call_raises(ranges: list[str]) -> None:
    @trace.traced("failing")
    def failing() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert ranges == ["tiermem: failing", "end"]


def test_ranges_by_hand(ranges: list[str]) -> None:
    trace.begin("a")
    trace.end()
    assert ranges == ["tiermem: a", "end"]


def test_switched_off_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "ENABLED", False)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda _: pytest.fail("pushed"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: pytest.fail("popped"))

    def function() -> None:
        return None

    assert trace.traced("name")(function) is function
    trace.begin("name")
    trace.end()


@pytest.mark.parametrize(("value", "wanted"), [("", "False"), ("0", "False"), ("1", "cuda")])
def test_the_environment_switches_it(value: str, wanted: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHOW], env=environment(TIERMEM_NVTX=value), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    has_cuda = torch.version.cuda is not None
    assert done.stdout.strip() == (str(has_cuda) if wanted == "cuda" else wanted)


STEPS = """
import torch
seen = []
torch.cuda.nvtx.range_push = seen.append
torch.cuda.nvtx.range_pop = lambda: seen.append(")")
torch.version.cuda = torch.version.cuda or "13.0"
from tiermem import PageLayout, TierConfig, TierManager
layout = PageLayout(2, 1, 16, "float16", 16)
config = TierConfig(gpu=layout.slot_bytes * 4, ram="1MiB", device="cpu", cpu_share=0)
with TierManager(layout, config) as manager:
    sequence = manager.open_sequence()
    for count in (40, 40, 1):
        with manager.step([sequence], count) as step:
            for layer in range(2):
                kv = torch.ones(count, 1, 16).half()
                step.append(layer, kv, kv)
                step.attend(layer, kv)
    try:
        with manager.step([sequence], 1):
            raise KeyError
    except KeyError:
        pass
print(" ".join(seen))
"""


def test_steps_and_transfers_are_ranges_that_nest() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STEPS], env=environment(TIERMEM_NVTX="1"), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    depth, within_step = 0, set()
    names = done.stdout.strip().removeprefix("tiermem: ").split(" tiermem: ")
    for text in names:
        name, *ends = text.split(" )")
        if depth:
            within_step.add(name)
        assert (name == "step") <= (depth == 0)
        depth += 1 - len(ends)
        assert depth >= 0
    assert depth == 0
    assert sum(text.split(" )")[0] == "step" for text in names) == 4
    assert within_step >= {
        "plan", "append", "attend", "reap", "submit copies", "stream slices in",
        "stream slices out",
    }  # fmt: skip
