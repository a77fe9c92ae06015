"""The example for newcomers runs as it is, and shows what it promises."""

from __future__ import annotations

import re
import runpy

import pytest
from cli_support import one_thread

from tiermem.data import data_path


@pytest.mark.filterwarnings("ignore:tiermem runs on the CPU:RuntimeWarning")
def test_the_quick_start_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with one_thread():
        runpy.run_path(str(data_path("examples/quickstart.py")), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("own loop: 1000 tokens")
    assert float(lines[1].rpartition(" ")[2]) < 1e-5
    assert lines[2].endswith("attaches 960 of 1000 tokens")
    first, second = (re.fullmatch(r"Hugging Face: attached (\d+) of 2000 tokens, wrote (.+)", line)
                     for line in lines[3:])  # fmt: skip
    assert first is not None
    assert second is not None
    assert (first[1], second[1]) == ("0", "1984")
    assert first[2] == second[2]
