"""The division of decoding among programs: every token once, no empty chunk, an even load."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tiermem.attention import HostBackend, PagedTables, WorkList
from tiermem.attention import work_list as columns
from tiermem.attention.split_rule import MANY_WAVES, ONE_WAVE, TILE_TOKENS, equal_splits
from tiermem.attention.work_list import OPEN_END, ROW_INTS, PlannedWork, plan_work
from tiermem.layout import PageLayout

NUM_SMS = 132


def _lengths(*lengths: int) -> NDArray[np.int64]:
    return np.array(lengths, dtype=np.int64)


def _check(planned: PlannedWork, lengths: NDArray[np.int64]) -> None:
    """Chunks partition every sequence; partial results have places of their own and are found again."""
    rows = planned.rows
    assert rows.dtype == np.int32 and rows.shape[1] == ROW_INTS and not rows.flags.writeable
    assert len(rows) >= len(lengths)
    places = []
    for sequence, length in enumerate(lengths):
        mine = rows[rows[:, columns.SEQUENCE] == sequence]
        mine = mine[np.argsort(mine[:, columns.START])]
        starts, ends = mine[:, columns.START], mine[:, columns.END]
        assert starts[0] == 0 and ends[-1] == OPEN_END
        assert (starts[1:] == ends[:-1]).all()
        assert (starts % TILE_TOKENS == 0).all()
        assert (starts[1:] < length).all() and (ends > starts).all()
        assert (mine[:, columns.SPLITS] == len(mine)).all()
        assert rows[sequence, columns.MERGE_SPLITS] == len(mine)
        if len(mine) > 1:
            first = rows[sequence, columns.MERGE_FIRST]
            assert (mine[:, columns.PARTIAL] == first + np.arange(len(mine))).all()
            places += mine[:, columns.PARTIAL].tolist()
    assert sorted(places) == list(range(planned.num_partials))
    assert planned.max_splits == rows[:, columns.SPLITS].max()
    assert len(rows) == sum(rows[: len(lengths), columns.MERGE_SPLITS])


def _programs(planned: PlannedWork, lengths: NDArray[np.int64], heads: int) -> NDArray[np.int64]:
    """Tokens that each program reads, in the order of the launch."""
    rows = planned.rows.astype(np.int64)
    ends = np.minimum(rows[:, columns.END], lengths[rows[:, columns.SEQUENCE]])
    return np.repeat(np.maximum(ends - rows[:, columns.START], 0), heads)


def _balance(programs: NDArray[np.int64]) -> float:
    """Mean over greatest load, each program on the least loaded multiprocessor in turn."""
    loads = np.zeros(NUM_SMS)
    for tokens in programs:
        loads[loads.argmin()] += tokens
    return float(loads.mean() / loads.max())


@pytest.mark.parametrize(
    ("batch", "length", "heads", "splits"),
    [
        (1, 131072, 8, 33), (8, 16384, 8, 4), (32, 4096, 8, 1), (64, 1024, 8, 1),
        (8, 16384, 52, 4), (32, 4096, 52, 1), (64, 1024, 52, 1),
    ],
)  # fmt: skip
def test_even_batches(batch: int, length: int, heads: int, splits: int) -> None:
    lengths = np.full(batch, length, dtype=np.int64)
    planned = plan_work(lengths, heads, NUM_SMS)
    _check(planned, lengths)
    assert planned.max_splits == splits


def test_random_batches() -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    rng = np.random.default_rng(seed)
    for _ in range(200):
        lengths = rng.integers(0, 10 ** int(rng.integers(2, 6)), size=int(rng.integers(1, 80)))
        heads, num_sms = int(rng.integers(1, 60)), int(rng.choice([1, 40, 132]))
        planned = plan_work(lengths, heads, num_sms)
        _check(planned, lengths)
        most = MANY_WAVES * num_sms + 2 * len(lengths) * heads
        assert len(planned.rows) * heads <= most, f"seed {seed}"


@pytest.mark.parametrize("num_sms", [1, 132])
def test_a_sequence_without_tokens_has_a_chunk_that_writes_its_result(num_sms: int) -> None:
    lengths = _lengths(0, 70, 0)
    planned = plan_work(lengths, 2, num_sms)
    _check(planned, lengths)


def test_longest_chunks_come_first() -> None:
    lengths = _lengths(50, 70_000, 900, 20_000)
    programs = _programs(plan_work(lengths, 8, NUM_SMS), lengths, 8)
    assert (np.diff(programs) <= TILE_TOKENS).all()


def test_one_long_sequence_among_short_ones_is_cut_into_more_than_a_wave() -> None:
    lengths = _lengths(120_000, *[1000] * 31)
    planned = plan_work(lengths, 8, NUM_SMS)
    _check(planned, lengths)
    assert planned.max_splits > 20
    assert _balance(_programs(planned, lengths, 8)) > 0.75


def test_unequal_sequences_are_cut_finer_than_a_wave() -> None:
    rng = np.random.default_rng(3)
    lengths = rng.integers(100, 4000, 64)
    planned = plan_work(lengths, 8, NUM_SMS)
    _check(planned, lengths)
    programs = _programs(planned, lengths, 8)
    assert 4 * NUM_SMS < len(programs) < 10 * NUM_SMS
    assert programs.max() < lengths.max() / 1.9


@pytest.mark.parametrize("batch", [(131072,), (16384,) * 8, (4096,) * 32, (10000,) * 6])
def test_equal_sequences_fill_a_single_wave(batch: tuple[int, ...]) -> None:
    lengths = _lengths(*batch)
    planned = plan_work(lengths, 8, NUM_SMS)
    programs = _programs(planned, lengths, 8)
    assert 0.85 * ONE_WAVE * NUM_SMS <= len(programs) <= ONE_WAVE * NUM_SMS
    assert programs.max() - programs.min() <= TILE_TOKENS


@pytest.mark.parametrize(
    ("pairs", "splits"),
    [(8, 33), (64, 4), (160, 2), (96, 4), (192, 2), (240, 1), (512, 1), (52, 5)],
)
def test_splits_of_equal_sequences(pairs: int, splits: int) -> None:
    assert equal_splits(pairs, NUM_SMS) == splits


def test_short_sequences_are_not_cut_to_pieces() -> None:
    lengths = _lengths(100, 300, 500, 64, 900, 1000)
    planned = plan_work(lengths, 8, NUM_SMS)
    _check(planned, lengths)
    assert len(planned.rows) <= ONE_WAVE * NUM_SMS // 8 + len(lengths)


def _tables(work: WorkList, **changes: object) -> PagedTables:
    vector = torch.zeros(2, dtype=torch.int32)
    arguments: dict[str, object] = {
        "block_table": torch.zeros((2, 3), dtype=torch.int32),
        "page_starts": None,
        "num_pages": vector,
        "kv_end": vector,
        "row_starts": torch.arange(3, dtype=torch.int32),
        "q_start": vector,
        "max_rows": 1,
        "max_pages": 3,
        "num_rows": 2,
        "work": work,
    }
    return PagedTables(**{**arguments, **changes})  # type: ignore[arg-type]


def test_tables_refuse_a_work_list_that_does_not_fit_them() -> None:
    work = WorkList(torch.zeros((2, ROW_INTS), dtype=torch.int32), 1, 0)
    assert _tables(work).work is work
    starts = torch.zeros((2, 3), dtype=torch.int32)
    for changes in ({"page_starts": starts}, {"max_rows": 2}, {"num_rows": 3}):
        with pytest.raises(ValueError, match="must be one row each and pages in order"):
            _tables(work, **changes)
    with pytest.raises(ValueError, match="1 rows: must be at least 2"):
        _tables(WorkList(work.rows[:1], 1, 0))
    with pytest.raises(ValueError, match="on meta"):
        _tables(WorkList(work.rows.to("meta"), 1, 0))


def test_a_work_list_refuses_other_rows() -> None:
    with pytest.raises(TypeError, match=r"rows.dtype=torch.int64"):
        WorkList(torch.zeros((2, ROW_INTS), dtype=torch.int64), 1, 0)
    with pytest.raises(ValueError, match=r"rows of shape \(2, 7\)"):
        WorkList(torch.zeros((2, 7), dtype=torch.int32), 1, 0)
    rows = torch.zeros((2, ROW_INTS), dtype=torch.int32)
    with pytest.raises(ValueError, match="max_splits=0: must be at least 1"):
        WorkList(rows, 0, 0)
    with pytest.raises(ValueError, match="num_partials=-1: must be at least 0"):
        WorkList(rows, 1, -1)


def test_backends_plan_what_they_need() -> None:
    layout = PageLayout(2, 8, 64, "float16", 16)
    assert HostBackend().plan(layout, _lengths(100, 200)) is None
    pytest.importorskip("triton")
    from tiermem.attention.kernels.backend import TritonBackend

    backend = TritonBackend((9, 0), NUM_SMS)
    assert backend.plan(layout, _lengths()) is None
    first = backend.plan(layout, _lengths(1000, 40))
    assert first is not None
    assert (first.rows == plan_work(_lengths(1000, 40), 8, NUM_SMS).rows).all()
    # the same number of tiles: the same plan; then more tiles, then other heads
    assert backend.plan(layout, _lengths(1024, 64)) is first
    assert backend.plan(layout, _lengths(1025, 64)) is not first
    assert backend.plan(layout, _lengths(1000, 40)) is not first
    before = backend.plan(layout, _lengths(1000, 40))
    assert backend.plan(PageLayout(2, 4, 64, "float16", 16), _lengths(1000, 40)) is not before
