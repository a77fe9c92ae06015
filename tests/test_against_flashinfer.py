"""The comparison with FlashInfer where there is none: every line says why it was skipped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "against_flashinfer.py"


def test_without_a_gpu_every_line_says_skipped() -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines
    for line in lines:
        assert line["benchmark"] == "against_flashinfer" and line["median"] is None
        assert line["skipped"] == "FlashInfer needs a GPU"
        assert line["commit"] and line["environment"]["torch"]
