"""The results that are committed: every line is complete, and plots and documents are made from them."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiermem
from tiermem.bench.markdown import fill_markers, markdown_tables
from tiermem.bench.result_file import read_results

ROOT = Path(tiermem.__file__).parent.parent
FILES = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))
DOCUMENTS = [
    path
    for path in (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
    if "<!-- bench:" in path.read_text(encoding="utf-8")
]
MAKE = "tiermem bench table benchmarks/results/*.jsonl --into"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_committed_results_are_complete(path: Path) -> None:
    for saved in read_results(path):
        assert saved.commit
        assert saved.environment["cpu"]
        assert saved.environment["torch"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_has_a_plot(path: Path) -> None:
    assert path.with_suffix(".svg").stat().st_size > 0


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_hold_the_committed_results(path: Path) -> None:
    tables = markdown_tables([saved for file in FILES for saved in read_results(file)])
    text = path.read_text(encoding="utf-8")
    assert fill_markers(text, tables, path.name) == text, f"run {MAKE} {path.relative_to(ROOT)}"


def test_there_are_results() -> None:
    assert FILES
    assert DOCUMENTS
