"""Plots and tables of saved results: what they show, when they are refused, and that documents are up to date."""

from __future__ import annotations

import builtins
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from cli_support import Cli

from tiermem.bench.markdown import fill_markers, markdown_tables
from tiermem.bench.result import Better, Ceiling, Result, Subject, measured, not_measured
from tiermem.bench.result_file import SavedResult, write_results
from tiermem.bench.words import parameters_text, value_text
from tiermem.errors import ConfigError

MACHINE = {"cpu": "a CPU", "gpu": "a GPU"}
RESULTS = (
    measured(
        Subject("copy", "one way", {"piece_bytes": 65536, "direction": "h2d"}, "GB/s",
                target_percent=91),
        [50.0, 52.0, 51.0], Ceiling("one large copy", 55.0),
    ),
    measured(
        Subject("step", "entry + exit", {"context": 4096}, "us", Better.LOWER, budget=150.0),
        [200.0], "no physical ceiling",
    ),
    not_measured(Subject("pool", "speed | up", {}, "x"), "needs a GPU"),
)  # fmt: skip


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


def saved(*results: Result, commit: str = "0123456789abcdef") -> list[SavedResult]:
    return [SavedResult(result, MACHINE, commit) for result in results]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_results(tmp_path / "now.jsonl", saved(*RESULTS))
    return tmp_path / "now.jsonl"


# ---- words ----------------------------------------------------------------------------------------


def test_values_and_parameters_as_people_read_them() -> None:
    assert [value_text(v) for v in (0.012345, 9.8765, 98.765, 987.65, 4547.3, 1e6)] == [
        "0.01235", "9.877", "98.77", "987.6", "4,547", "1,000,000",
    ]  # fmt: skip
    given = {"piece_bytes": 65536, "way": "read", "q_heads": 56}
    assert parameters_text(given) == "piece 64KiB, way read, q heads 56"


# ---- tables ---------------------------------------------------------------------------------------


def test_tables_have_every_result_and_the_run_it_is_of() -> None:
    tables = markdown_tables(saved(*RESULTS))
    assert list(tables) == ["copy", "step", "pool", "summary"]
    assert (
        "| one way | piece 64KiB, direction h2d | 51 GB/s | 50.1 – 51.9 | 92.7 % | 91 %: met |"
        in (tables["copy"])
    )
    assert "one large copy: 55 |" in tables["copy"]
    assert "| 200 us | 200 – 200 |  | 150 us: missed | no physical ceiling |" in tables["step"]
    assert "| speed \\| up |  | skipped |" in tables["pool"]
    for name in ("copy", "step", "pool"):
        assert "a GPU, a CPU; commit 0123456789ab." in tables[name]


def test_the_summary_has_a_row_for_all_figures_of_one_name() -> None:
    other = replace(RESULTS[0], ceiling=Ceiling("one large copy", 60.0))
    assert markdown_tables(saved(*RESULTS, other))["summary"].splitlines()[2:] == [
        "| copy | one way | 2 | 85.0 – 92.7 % of the ceiling | 1 of 2 |",
        "| step | entry + exit | 1 | 200 us | 0 of 1 |",
    ]


def test_runs_of_different_commits_stay_apart() -> None:
    both = [*saved(RESULTS[0], commit="a" * 40 + "+changes"), *saved(RESULTS[0], commit="b" * 40)]
    text = markdown_tables(both)["copy"]
    assert text.count("| one way |") == 2
    assert "commit aaaaaaaaaaaa with changes." in text
    assert "commit bbbbbbbbbbbb." in text


def test_a_document_gets_its_tables_and_keeps_the_rest(cli: Cli, path: Path) -> None:
    document = path.parent / "README.md"
    document.write_text(
        "before\n<!-- bench:copy -->\nold\n<!-- /bench -->\nbetween\n"
        "<!-- bench:other -->\nkept\n<!-- /bench -->\nafter\n"
    )
    assert cli("bench", "table", path, "--into", document, "--check").code == 1
    assert "old" in document.read_text()
    assert cli("bench", "table", path, "--into", document).code == 0
    text = document.read_text()
    assert "old" not in text
    for words in ("before\n", "| one way |", "\nbetween\n", "\nkept\n", "after\n"):
        assert words in text, words
    assert cli("bench", "table", path, "--into", document, "--check").code == 0
    assert document.read_text() == text


def test_without_a_document_the_tables_are_printed(cli: Cli, path: Path) -> None:
    ran = cli("bench", "table", path)
    assert ran.code == 0
    assert ran.out.startswith("## copy\n\n| what |")
    assert cli("bench", "table", path, "--check").code == 2


def test_a_document_without_markers_is_refused(cli: Cli, path: Path) -> None:
    document = path.parent / "README.md"
    document.write_text("nothing to fill\n")
    ran = cli("bench", "table", path, "--into", document)
    assert ran.code == 2
    assert "has no <!-- bench:copy -->" in ran.err
    with pytest.raises(ConfigError, match="bench:a"):
        fill_markers("<!-- bench:b -->\n<!-- /bench -->", {"a": ""}, "f")


# ---- plots ----------------------------------------------------------------------------------------


def test_a_plot_shows_shares_of_ceilings_and_budgets(cli: Cli, path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = path.parent / "plots"
    ran = cli("bench", "plot", path, "--out", out)
    assert (ran.code, ran.out) == (0, f"{out / 'now.svg'}\n")
    first = (out / "now.svg").read_bytes()
    assert ET.fromstring(first).tag.endswith("svg")
    comments = first.decode()
    for words in ("copy: percent of the ceiling", "step: percent of the budget", "92.7 %",
                  "piece 64KiB, direction h2d"):  # fmt: skip
        assert f"<!-- {words}" in comments or words in comments, words
    assert cli("bench", "plot", path).code == 0
    assert (path.parent / "now.svg").read_bytes() == first


def test_nothing_to_draw_is_refused(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_results(tmp_path / "f.jsonl", saved(RESULTS[2]))
    ran = cli("bench", "plot", tmp_path / "f.jsonl")
    assert ran.code == 2
    assert "all of them were skipped" in ran.err


def test_without_matplotlib_it_says_what_to_install(
    cli: Cli, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    ran = cli("bench", "plot", path)
    assert ran.code == 2
    assert "pip install 'tiermem[bench]'" in ran.err
