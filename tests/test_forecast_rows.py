"""Forecasts of many requests: which are asked, as results, and in tables beside what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiermem
from tiermem.bench.forecast_plot import forecast_panels
from tiermem.bench.forecast_rows import ENVIRONMENT, NAME, forecast_results, forecast_tables
from tiermem.bench.markdown import SUMMARY, markdown_tables
from tiermem.bench.plot import draw
from tiermem.bench.result import Parameters, Result, Subject, measured
from tiermem.bench.result_file import SavedResult, read_results, write_results
from tiermem.errors import ConfigError
from tiermem.forecast import Hardware, Request, WeightFormat, predict
from tiermem.forecast.survey import (
    ALL,
    CONTEXTS,
    HOT,
    MACHINES,
    MODELS,
    RAM_SHARE,
    Surveyed,
    survey,
    widest,
)
from tiermem.model_shape import ModelShape

COMMITTED = Path(tiermem.__file__).parent.parent / "benchmarks" / "results" / "forecast.jsonl"
SHAPES = {name: ModelShape.from_profile(name) for name in MODELS}
MACHINE = {name: Hardware.from_profile(name) for name in MACHINES}
LIKE = Request(SHAPES["7b"], 1, ram=RAM_SHARE)


def all_rows() -> list[Surveyed]:
    return list(survey(LIKE, list(SHAPES.values()), CONTEXTS, MACHINE))


def saved(results: list[Result], gpu: str | None = None) -> list[SavedResult]:
    environment = ENVIRONMENT if gpu is None else {"gpu": gpu, "cpu": "a CPU"}
    return [SavedResult(result, environment, "feed") for result in results]


def row(name: str, gpu_bytes: int | None, value: float, context: int = 131072) -> Result:
    parameters: Parameters = {"model": "33b", "context": context}
    if gpu_bytes is not None:
        parameters = {**parameters, "gpu_bytes": gpu_bytes, "cpu_share": "auto"}
    return measured(Subject("long_context", name, parameters, "tokens/s"), [value], "none")


# ---- what is asked --------------------------------------------------------------------------------


def test_the_widest_weights_that_fit_are_taken() -> None:
    for machine, model, wanted in (
        ("t4", "7b", WeightFormat.FP16), ("t4", "13b", WeightFormat.INT8),
        ("t4", "33b", WeightFormat.INT4), ("h200", "70b", WeightFormat.FP16),
    ):  # fmt: skip
        found = widest(Request(SHAPES[model], 16384, ram=RAM_SHARE), MACHINE[machine])
        assert found.request.weights is wanted
        assert found.fits == ((machine, model) != ("t4", "33b"))
    narrow = Request(SHAPES["7b"], 16384, weights=WeightFormat.INT8)
    assert widest(narrow, MACHINE["t4"]).request.weights is WeightFormat.INT8


def test_every_shape_context_and_machine_has_an_answer() -> None:
    rows = all_rows()
    asked = {
        (row.machine, row.forecast.request.shape.name, row.forecast.request.context)
        for row in rows
        if row.hot == ALL
    }
    assert asked == {(a, b, c) for a in MACHINES for b in MODELS for c in CONTEXTS}
    # 8 GiB where the same weights leave more: beside all but 70B on the H200, nowhere on the T4
    small = [row for row in rows if row.hot == HOT]
    assert {row.machine for row in small} == {"h200"}
    assert {row.forecast.request.shape.name for row in small} == {"7b", "13b", "33b"}
    assert len(small) == 3 * len(CONTEXTS)
    for found in small:
        assert found.forecast.budget.tiers[0].num_bytes <= 8 << 30


def test_tiers_that_are_named_are_all_answered() -> None:
    rows = list(survey(LIKE, [SHAPES["70b"]], [32768], MACHINE, ["10GiB", ALL]))
    assert [(row.machine, row.hot) for row in rows] == [
        ("t4", "10GiB"), ("t4", ALL), ("h200", "10GiB"), ("h200", ALL),
    ]  # fmt: skip
    # 10 GiB beside 70B: not in fp16, which leaves 10.5 GB
    assert rows[2].forecast.request.weights is WeightFormat.INT8
    with pytest.raises(ConfigError, match="gpu=16GiB: must be at most gpu_limit"):
        list(survey(LIKE, [SHAPES["7b"]], [32768], MACHINE, ["16GiB"]))
    assert rows[3].forecast.request.weights is WeightFormat.FP16


def test_an_answer_is_that_of_a_forecast_of_its_own() -> None:
    found = next(
        row
        for row in all_rows()
        if (row.hot, row.forecast.request.shape.name, row.forecast.request.context)
        == (HOT, "33b", 131072)
    )
    alone = predict(Request(SHAPES["33b"], 131072, gpu="8GiB", ram=RAM_SHARE), MACHINE["h200"])
    table = found.to_table()
    assert table["predicted_tokens_per_s"] == alone.tokens_per_s
    assert table["limit"] == "link and cpu"
    assert table["mode"] == "streamed + CPU"
    assert table["predicted_modes"] == {step.mode.value: step.tokens_per_s for step in alone.modes}
    assert table["cpu_share"] == alone.to_table()["modes"][0]["cpu_share"]  # type: ignore[index]


# ---- as results -----------------------------------------------------------------------------------


def test_results_name_their_mode_and_what_does_not_fit() -> None:
    rows = all_rows()
    results = [result for found in rows for result in forecast_results(found)]
    first = [result for result in results if result.subject.name == "predicted"]
    assert len(first) == len(rows)
    assert len({result.subject.key for result in results}) == len(results)
    for found, result in zip(rows, first, strict=True):
        if found.forecast.fits:
            assert result.figures is not None
            assert result.figures.median == found.forecast.tokens_per_s
            assert result.subject.note.startswith(f"{found.forecast.modes[0].mode.value}; ")
        else:
            assert "do not fit NVIDIA T4" in str(result.skipped)
        assert ("estimated" in result.subject.note) == (
            found.machine == "t4" and "CPU share" in result.subject.note
        )
    others = {result.subject.name for result in results} - {"predicted"}
    assert others == {
        "predicted: fixed set and streaming", "predicted: streamed + CPU",
        "predicted: resident, launched one by one",
    }  # fmt: skip


def test_measured_figures_of_such_a_machine_stand_beside() -> None:
    wanted = [row for row in all_rows() if row.forecast.request.shape.name == "33b"]
    predicted = saved([result for found in wanted for result in forecast_results(found)])
    h200 = saved(
        [
            row("decode", 8 << 30, 5.25), row("decode", 8 << 30, 4.5), row("decode", 4 << 30, 7.75),
            row("everything in device memory", None, 31.5), row("decode", 8 << 30, 12.5, 65536),
        ],
        "NVIDIA H200",
    )  # fmt: skip
    other = saved([row("decode", 8 << 30, 99.5)], "NVIDIA H100")
    on_cpu = [SavedResult(row("decode", 8 << 30, 98.5), {"cpu": "a CPU", "gpu": None}, "feed")]
    tables = markdown_tables([*predicted, *h200, *other, *on_cpu])
    text = tables[NAME]
    assert "for the profile `t4`, with the profile's GPU tier" in text
    assert "for the profile `h200`, with a GPU tier of 8GiB" in text
    assert "| model | 16,384 | 32,768 | 65,536 | 131,072 |" in text
    assert "(streamed + CPU, fp16); **measured 5.25**" in text
    assert "(streamed + CPU, fp16); **measured 12.5**" in text
    assert "(resident, fp16); **measured 31.5**" in text
    assert text.count("measured") == 3
    assert text.count("does not fit") == len(CONTEXTS)
    assert NAME not in tables[SUMMARY]
    assert "long_context" in tables[SUMMARY]


def test_a_machine_that_is_no_profile_has_nothing_beside() -> None:
    here = Surveyed("auto", ALL, predict(Request(SHAPES["33b"], 131072), MACHINE["h200"]))
    rows = saved(list(forecast_results(here)))
    measured_here = saved([row("everything in device memory", None, 31.5)], "NVIDIA H200")
    assert "**" not in forecast_tables([*rows, *measured_here])


def test_they_are_drawn(tmp_path: Path) -> None:
    results = [result for found in all_rows() for result in forecast_results(found)]
    panels = forecast_panels(results)
    assert list(panels) == [
        "forecast: t4, gpu profile", "forecast: h200, gpu profile", "forecast: h200, gpu 8GiB",
    ]  # fmt: skip
    assert set(panels["forecast: t4, gpu profile"]) == {"7b", "13b"}
    assert [x for x, _ in panels["forecast: h200, gpu profile"]["70b"]] == list(CONTEXTS)
    pytest.importorskip("matplotlib")
    draw(saved(results), tmp_path / "forecast.svg")
    text = (tmp_path / "forecast.svg").read_text(encoding="utf-8")
    assert "forecast: h200, gpu 8GiB" in text
    assert "predicted tokens/s" in text


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    results = saved([result for found in all_rows() for result in forecast_results(found)])
    write_results(tmp_path / "forecast.jsonl", results)
    assert read_results(tmp_path / "forecast.jsonl") == results


def test_the_committed_forecasts_are_those_of_the_profiles() -> None:
    """Up to two percent, so that a trifle elsewhere does not put them out of date."""
    found = {item.result.subject.key: item.result for item in read_results(COMMITTED)}
    wanted = {result.subject.key: result for row in all_rows() for result in forecast_results(row)}
    how = f"run tiermem plan --table --save benchmarks/results/{COMMITTED.name}"
    assert found.keys() == wanted.keys(), how
    for key, result in wanted.items():
        mode = result.subject.note.partition(";")[0]
        assert found[key].subject.note.partition(";")[0] == mode, how
        if result.figures is None:
            assert found[key].figures is None, how
        else:
            old = found[key].figures
            assert old is not None, how
            assert old.median == pytest.approx(result.figures.median, rel=0.02), how
