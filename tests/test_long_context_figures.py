"""The arithmetic of the long-context benchmark: ceilings, fits, ratios and sweeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tiermem.bench.long_context.case import CpuShare
from tiermem.bench.long_context.decoding import Decoded, Traffic
from tiermem.bench.long_context.derived import OFFLOADED_TARGET, derived_results, is_derived
from tiermem.bench.long_context.fit import fit_line
from tiermem.bench.long_context.predicted import predicted_results
from tiermem.bench.long_context.rates import MachineRates
from tiermem.bench.long_context.rows import (
    DECODE,
    LOGITS,
    NOT_RESIDENT,
    OVER_STREAMING,
    STEP,
    Aims,
    case_results,
)
from tiermem.bench.long_context.synthetic import OUTLIER, PIECE_TOKENS, V_SCALE, SyntheticKv
from tiermem.bench.markdown import markdown_tables
from tiermem.bench.result import Ceiling, Parameters, Result, Subject, measured
from tiermem.bench.result_file import SavedResult
from tiermem.bench.suite import BENCHMARKS
from tiermem.bench.sweep_plot import sweeps
from tiermem.layout import PageLayout
from tiermem.measure.beside_link import BesideLink
from tiermem.model_shape import ModelShape

GIB = 1 << 30
REQUEST: Parameters = {"model": "33b", "context": 131072, "kv": "synthetic", "dtype": "float16"}
ON_GPU = MachineRates(4e12, 50e9, 120e9, BesideLink(75e9, 50e9), 16)
ON_CPU = MachineRates(20e9, 5e9, 10e9, None, 2)


def moved(streamed: float, attended: float) -> Traffic:
    return Traffic(streamed, 0, attended, 0.1, 0, {"GPU": 8 * GIB, "RAM": 25 * GIB})


def case(gpu_gib: int, share: str, context: int = 131072) -> Parameters:
    return {**REQUEST, "context": context, "gpu_bytes": gpu_gib * GIB, "cpu_share": share}


def row(name: str, parameters: Parameters, value: float, unit: str = "tokens/s") -> Result:
    return measured(Subject("long_context", name, parameters, unit), [value], "none")


# ---- ceilings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "traffic", "ceiling"),
    [
        (ON_GPU, moved(25e9, 0), 2.0),
        (ON_GPU, moved(10e9, 15e9), 5.0),
        (ON_GPU, moved(0, 25e9), 5.0),
        (ON_CPU, moved(0, 5e9), 2.0),
        (ON_CPU, moved(5e9, 0), 1.0),
    ],
)
def test_the_ceiling_is_that_of_what_is_used(
    rates: MachineRates, traffic: Traffic, ceiling: float
) -> None:
    found = rates.ceiling(traffic)
    assert isinstance(found, Ceiling)
    assert found.value == pytest.approx(ceiling)
    assert rates.ceiling(moved(0, 0)) == "everything is resident"
    assert "SSD" in str(rates.ceiling(replace(traffic, cold=1.0)))


def test_rows_of_a_case_compare_it_with_streaming_and_with_all_other_work() -> None:
    done = Decoded((0.25, 0.25, 0.25), torch.zeros(3, 1))
    rows = {r.subject.name: r for r in case_results(
        case(8, "0.6"), done, moved(10e9, 15e9), ON_GPU, 0.05, Aims(True), "note"
    )}  # fmt: skip
    assert rows[DECODE].percent_of_ceiling == pytest.approx(80)
    assert rows[DECODE].meets_aim
    over = rows[OVER_STREAMING]
    assert over.figures is not None
    assert over.figures.median == pytest.approx(2.0)  # half a second over the link
    assert over.meets_aim is False
    with_other = rows["decode, against the ceiling and other work"]
    assert with_other.percent_of_ceiling == pytest.approx(100)
    link = rows["step: streamed bytes at the link's rate"].figures
    assert link is not None
    assert link.median == pytest.approx(200)
    hot = rows["step: hot K and V at the memory's rate"].figures
    assert hot is not None
    assert hot.median == pytest.approx(8 * GIB / 4e9)


def test_without_the_cpu_the_aim_is_the_link() -> None:
    done = Decoded((0.51,), torch.zeros(1, 1))
    for aims, wanted in ((Aims(True), 97.0), (Aims(False), None)):
        first, *others = case_results(case(8, "0"), done, moved(25e9, 0), ON_GPU, 0.05, aims, "")
        assert first.subject.target_percent == wanted
        assert all(result.subject.budget is None for result in others)


@pytest.mark.parametrize(
    ("text", "beside", "value"),
    [
        ("0.65", None, 0.65),
        ("auto", BesideLink(75e9, 25e9), None),
        ("measured", BesideLink(75e9, 25e9), 0.75),
        ("measured", None, 1.0),
    ],
)
def test_the_share_that_is_measured_ends_both_at_once(
    text: str, beside: BesideLink | None, value: float | None
) -> None:
    assert CpuShare.parse(text).value(beside) == value


# ---- what follows from several cases --------------------------------------------------------------


def test_a_line_is_found_with_its_rate_and_the_farthest_point() -> None:
    line = fit_line([1, 2, 4], [30, 40, 60])
    assert line is not None
    assert line.start_ms == pytest.approx(20)
    assert line.gb_per_s == pytest.approx(100)
    assert line.residual == pytest.approx(0, abs=1e-9)
    bent = fit_line([1, 2, 3], [30, 46, 50])
    assert bent is not None
    assert bent.residual == pytest.approx(4 / 46)
    assert fit_line([1, 2], [30, 40]) is None
    assert fit_line([2, 2, 2], [30, 40, 50]) is None
    assert fit_line([1, 2, 3], [30, 20, 10]) is None


def test_ratios_and_fits_follow_from_rows_wherever_they_were_measured() -> None:
    aimed = measured(
        Subject("long_context", DECODE, case(8, "0.65"), "tokens/s", target_percent=80),
        [6.0], Ceiling("c", 7.0),
    )  # fmt: skip
    other_request = row("transformers' offloaded cache", {**REQUEST, "context": 65536}, 3.0)
    rows = [aimed, row("transformers' offloaded cache", REQUEST, 1.5), other_request]
    for gpu, gigabytes in ((2, 31.0), (4, 29.0), (8, 25.0)):
        rows.append(row(STEP, case(gpu, "0.65"), 20 + 8 * gigabytes, "ms"))
        rows.append(row(NOT_RESIDENT, case(gpu, "0.65"), gigabytes, "GB"))
        rows.append(row(STEP, case(gpu, "0"), 500, "ms"))
    found = list(derived_results(rows))
    assert all(is_derived(result) for result in found)
    assert not any(is_derived(result) for result in rows)
    values = {r.subject.name: r.figures.median for r in found if r.figures is not None}
    assert values["over transformers' offloaded cache"] == 4.0
    assert found[0].subject.budget == OFFLOADED_TARGET
    assert values["fit: rate"] == pytest.approx(125)
    assert values["fit: step without bytes"] == pytest.approx(20)
    assert len([result for result in found if result.subject.name == "fit: rate"]) == 1


def test_a_sweep_has_one_line_a_context() -> None:
    rows = [
        row(DECODE, case(gpu, "0.65", context), 1000 / context)
        for context in (16384, 131072)
        for gpu in (2, 8)
    ]
    (sweep,) = sweeps([*rows, row(DECODE, case(8, "0"), 1.0)])
    assert set(sweep.lines) == {16384, 131072}
    assert [gib for gib, _ in sweep.lines[16384]] == [2, 8]


def test_documents_get_a_table_a_sweep_and_no_parts_of_steps() -> None:
    rows = [
        row(DECODE, case(gpu, "0.65", context), 1000 / context)
        for context in (16384, 131072)
        for gpu in (2, 8)
    ]
    rows.append(row(STEP, case(8, "0.65"), 100, "ms"))
    rows += [row(LOGITS, case(gpu, "0.65"), gpu * 1e-4, "of the norm") for gpu in (8, 2)]
    saved = [SavedResult(result, {"cpu": "a CPU", "gpu": "a GPU"}, "feed") for result in rows]
    text = markdown_tables(saved)["long_context"]
    assert "Tokens/s (percent of the ceiling), model 33b, kv synthetic" in text
    assert "| context | gpu 2GiB | gpu 8GiB |" in text
    assert "| 131,072 | 0.007629 (resident) | 0.007629 (resident) |" in text
    assert text.count("| decode |") == 4
    assert text.count("| difference of logits |") == 1
    assert "0.0008 of the norm" in text
    assert "| step |" not in text


def test_predictions_name_the_weights_that_fit() -> None:
    shape = ModelShape.from_profile("33b")
    t4, h200 = predicted_results(shape, 131072, 8 * GIB)
    assert t4.figures is None
    assert "do not fit NVIDIA T4" in str(t4.skipped)
    assert h200.figures is not None
    assert 1.5 < h200.figures.median < 20
    assert h200.subject.note.startswith("fp16 weights, hot tier 8.6 GB")


def test_it_is_no_part_of_all() -> None:
    assert "long_context" not in BENCHMARKS
    assert "long-context" not in BENCHMARKS


# ---- synthetic K and V ----------------------------------------------------------------------------


def test_synthetic_kv_can_be_made_again_and_has_outliers() -> None:
    layout = PageLayout(3, 2, 32, "float32", 16)
    kv = SyntheticKv(layout, torch.device("cpu"))
    k, v = kv.piece(1, 2, 100)
    again, _ = SyntheticKv(layout, torch.device("cpu")).piece(1, 2, PIECE_TOKENS)
    assert torch.equal(k, again[:100])
    assert not torch.equal(k, kv.piece(2, 2, 100)[0])
    assert not torch.equal(k, kv.piece(1, 1, 100)[0])
    assert not torch.equal(k, v)
    far = again.mean((0, 1)).abs() > OUTLIER / 2
    assert int(far.sum()) == 4
    assert float(again[:, :, ~far].std()) == pytest.approx(1, abs=0.05)
    assert float(v.std()) == pytest.approx(V_SCALE, abs=0.05)
    assert kv.pieces(PIECE_TOKENS + 5) == [(0, PIECE_TOKENS), (1, 5)]
