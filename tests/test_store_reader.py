"""Looking into a store: closed, in use, damaged, and what is no store."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from flips import count_flips
from store_cases import (
    MODEL,
    NUM_PAGES,
    PAGE,
    PROMPTS,
    TENANT,
    make_store,
    open_store,
    store_prompt,
)
from test_manager import grow
from world import LAYOUT

from tiermem import TierManager
from tiermem.errors import ConfigError, CorruptPageError
from tiermem.slot_scan import Part
from tiermem.store_check import CheckResult, Verdict, check_page, check_pages
from tiermem.store_format import TRAILER_BYTES
from tiermem.store_match import Stop, explain
from tiermem.store_names import ChainRoot, GoneReason, root_hash
from tiermem.store_reader import StoreReader


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "store")


def checked(path: Path, part: Part = Part.WHOLE) -> CheckResult:
    with StoreReader(path) as reader:
        content = reader.content()
        return check_pages(reader, content, content.rows(), part)


def tree_of(path: Path) -> dict[str, bytes]:
    """Every file with its bytes, but for the lock, which names its last owner."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "lock"]
    return {str(file): file.read_bytes() for file in files}


def root_of(salt: bytes = b"", model: str = MODEL) -> ChainRoot:
    return ChainRoot.of(root_hash(LAYOUT, model, (0, 1), salt), model, (0, 1), salt)


# ---- what it says --------------------------------------------------------------------------------------


def test_it_tells_every_page_with_its_chain_session_and_root(store: Path) -> None:
    before = tree_of(store)
    with StoreReader(store) as reader:
        content = reader.content()
        assert reader.layout == LAYOUT
        assert reader.owner_pid() is None
    assert tree_of(store) == before
    assert len(content) == NUM_PAGES
    assert sorted(content.labels.values()) == sorted(PROMPTS)
    assert {(root.model_id, root.salt == root_of(TENANT).salt) for root in content.roots.values()} == {
        (MODEL, False), (MODEL, True),
    }  # fmt: skip
    forest = content.forest()
    ends = [int(row) for row in np.flatnonzero(forest.num_after == 0)]
    lengths = {content.label(row): len(forest.chain_to(row)) for row in ends}
    assert lengths == {label: len(tokens) // PAGE for label, tokens in PROMPTS.items()}


def test_what_is_found_again_counts_as_a_hit(store: Path) -> None:
    with open_store(store) as manager:
        manager.open_sequence(PROMPTS["b"]).close()
    with StoreReader(store) as reader:
        content = reader.content()
    hits = {content.label(row): int(content.hits[row]) for row in content.rows()}
    assert hits["b"] == hits["c"] + 1


def test_a_store_without_a_page_is_one(tmp_path: Path) -> None:
    open_store(tmp_path / "s").close()
    with StoreReader(tmp_path / "s") as reader:
        assert len(reader.content()) == 0
    assert checked(tmp_path / "s").num_pages == 0


# ---- a store in use ------------------------------------------------------------------------------------


def test_a_store_in_use_is_read_beside_its_owner_and_left_as_it_is(store: Path) -> None:
    with open_store(store) as manager:
        manager.flush()
        before = tree_of(store)
        with StoreReader(store) as reader:
            assert reader.owner_pid() == os.getpid()
            content = reader.content()
            result = check_pages(reader, content, content.rows(), Part.WHOLE)
        assert (result.num_pages, result.reports) == (NUM_PAGES, ())
        assert tree_of(store) == before
        manager.check()


def test_pages_written_over_while_one_looks_are_no_damage(tmp_path: Path) -> None:
    make_store(tmp_path / "s", slots=NUM_PAGES)
    with open_store(tmp_path / "s", NUM_PAGES) as manager, StoreReader(tmp_path / "s") as reader:
        content = reader.content()  # of before
        sequence = manager.open_sequence()
        grow(manager, sequence, [7000 + t for t in range(8 * PAGE)])
        sequence.close()
        manager.flush()
        result = check_pages(reader, content, content.rows(), Part.WHOLE)
        assert {report.verdict for report in result.reports} == {Verdict.CHANGED}
        assert result.damaged == ()
        after = reader.content()
        assert check_pages(reader, after, after.rows(), Part.WHOLE).reports == ()


def test_an_index_that_is_written_meanwhile_is_one_state_of_it(store: Path) -> None:
    with open_store(store) as manager, StoreReader(store) as reader:
        for i in range(6):
            sequence = manager.open_sequence(label=f"more {i}")
            grow(manager, sequence, [9000 + 100 * i + t for t in range(PAGE)])
            sequence.close()
            manager.flush()
            assert len(reader.content()) == NUM_PAGES + i + 1


# ---- damage ----------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found(store: Path) -> None:
    counts = count_flips(store, 132, seed=3)
    assert {what for _, what in counts} <= {"found", "harmless"}
    assert all(part == "index" for part, what in counts if what == "harmless")
    assert counts["payload", "found"] == 66


def test_it_says_which_layer_is_damaged(store: Path) -> None:
    with StoreReader(store) as reader:
        content, stride = reader.content(), reader.slot_stride
        slot = int(content.slots[5])
        with (store / "slots").open("r+b") as file:
            file.seek(slot * stride + LAYOUT.layer_bytes + 11)
            file.write(b"\xff\x00\xff")
        report = check_page(reader, content, 5)
        assert report is not None
        assert (report.verdict, report.layers, report.slot) == (Verdict.PAYLOAD, (1,), slot)
        assert check_page(reader, content, 6) is None
    assert len(checked(store).damaged) == 1
    assert checked(store, Part.TRAILER).damaged == ()  # it does not read keys and values


def test_a_slot_file_that_was_cut_has_lost_what_lay_beyond(store: Path) -> None:
    with StoreReader(store) as reader:
        stride, slots = reader.slot_stride, reader.content().slots
    kept = int(slots[-3])
    os.truncate(store / "slots", kept * stride + 100)
    lost = checked(store).damaged
    assert [report.slot for report in lost] == [slot for slot in slots if slot >= kept]
    assert {report.verdict for report in lost} == {Verdict.BEYOND}


def test_a_trailer_of_another_page_contradicts_the_index(store: Path) -> None:
    with StoreReader(store) as reader:
        stride, slots = reader.slot_stride, reader.content().slots.tolist()
    whole = bytearray((store / "slots").read_bytes())
    one, other = slots[0] * stride, slots[1] * stride
    whole[one : one + stride] = whole[other : other + stride]
    (store / "slots").write_bytes(whole)
    (report,) = checked(store).reports
    assert report.slot == slots[0]
    assert report.verdict in (Verdict.MISMATCH, Verdict.OUTDATED)  # whichever was written first


def test_a_slot_that_was_written_again_makes_an_entry_outdated_and_no_damage(store: Path) -> None:
    with open_store(store) as manager:
        old = (store / "index" / "data.mdb").read_bytes()
        for i in range(3):
            sequence = manager.open_sequence(label="later")
            grow(manager, sequence, [5000 * (i + 1) + t for t in range(12 * PAGE)])
            sequence.close()
        manager.flush()
    (store / "index" / "data.mdb").write_bytes(old)  # as after a crash before the index was written
    result = checked(store)
    assert {report.verdict for report in result.reports} == {Verdict.OUTDATED}
    assert result.damaged == ()


# ---- why a prompt is stored as far as it is --------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "root", "pages", "stop"),
    [
        (PROMPTS["b"], root_of(), 8, Stop.COMPLETE),
        (PROMPTS["c"], root_of(), 10, Stop.COMPLETE),  # but for three tokens that fill no page
        (PROMPTS["b"][:-1], root_of(), 7, Stop.COMPLETE),
        (PROMPTS["b"] + [1] * PAGE, root_of(), 8, Stop.NEVER_STORED),
        (PROMPTS["b"][: 5 * PAGE] + [1] * PAGE, root_of(), 5, Stop.OTHER_TOKENS),
        ([1] * PAGE, root_of(), 0, Stop.OTHER_TOKENS),
        (PROMPTS["b"], root_of(TENANT), 4, Stop.OTHER_ROOT),
        (PROMPTS["b"], root_of(b"nobody"), 0, Stop.OTHER_ROOT),
        (PROMPTS["b"], root_of(model="another"), 0, Stop.OTHER_ROOT),
        ([1] * PAGE, root_of(b"nobody"), 0, Stop.NEVER_STORED),
        (PROMPTS["b"], None, 8, Stop.COMPLETE),
        ([1, 2, 3], root_of(), 0, Stop.COMPLETE),
    ],
)  # fmt: skip
def test_it_tells_why_a_prompt_is_stored_so_far(
    store: Path, tokens: list[int], root: ChainRoot | None, pages: int, stop: Stop
) -> None:
    with StoreReader(store) as reader:
        found = explain(reader, reader.content(), np.array(tokens, dtype=np.int64), root)
    assert (found.match.num_pages, found.stop) == (pages, stop)
    assert found.num_whole == len(tokens) // PAGE
    if stop is Stop.OTHER_ROOT:
        assert found.best_elsewhere is not None
        assert found.best_elsewhere.num_pages > pages


def test_it_tells_what_was_evicted_and_when(tmp_path: Path) -> None:
    path = make_store(tmp_path / "s", slots=NUM_PAGES)
    with open_store(path, NUM_PAGES) as manager:
        manager.open_sequence(PROMPTS["c"]).close()  # used last: stays
        sequence = manager.open_sequence()
        grow(manager, sequence, [7000 + t for t in range(6 * PAGE)])
        sequence.close()
    with StoreReader(path) as reader:
        content = reader.content()
        whys = {gone.why for gone in content.gone.values()}
        stops = {}
        for label, tokens in PROMPTS.items():
            root = root_of(TENANT if label == "d" else b"")
            stops[label] = explain(reader, content, np.array(tokens), root)
    assert GoneReason.EVICTED in whys
    assert stops["c"].stop is Stop.COMPLETE
    gone = [found for found in stops.values() if found.stop is Stop.GONE]
    assert gone
    assert all(found.gone is not None and found.num_gone >= 1 for found in gone)


def test_a_stored_page_that_is_damaged_is_where_a_prompt_ends(store: Path) -> None:
    with StoreReader(store) as reader:
        content, stride = reader.content(), reader.slot_stride
        row = next(
            r for r in content.rows() if content.label(r) == "b" and content.positions[r] == 5
        )
        with (store / "slots").open("r+b") as file:
            file.seek((int(content.slots[row]) + 1) * stride - TRAILER_BYTES + 90)
            file.write(b"\x01\x02")
        found = explain(reader, content, np.array(PROMPTS["b"]), root_of())
    assert (found.match.num_pages, found.stop) == (5, Stop.UNUSABLE)
    assert found.report is not None
    assert found.report.verdict is Verdict.TRAILER


# ---- what is no store ------------------------------------------------------------------------------------


def refused(path: Path, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        StoreReader(path)


def test_what_is_no_store_is_refused(tmp_path: Path, store: Path) -> None:
    refused(tmp_path / "absent", "no such directory")
    refused(store / "slots", "is not a directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no tiermem store: there is no header.json")
    (tmp_path / "link").symlink_to(store)
    refused(tmp_path / "link", "is a symbolic link, which is not followed")


@pytest.mark.parametrize("name", ["header.json", "slots"])
def test_symbolic_links_in_a_store_are_not_followed(store: Path, tmp_path: Path, name: str) -> None:
    (store / name).rename(tmp_path / name)
    (store / name).symlink_to(tmp_path / name)
    refused(store, "symbolic link")


@pytest.mark.parametrize("name", ["index", "index/data.mdb"])
def test_symbolic_links_to_an_index_are_not_followed(
    store: Path, tmp_path: Path, name: str
) -> None:
    (store / name).rename(tmp_path / "elsewhere")
    (store / name).symlink_to(tmp_path / "elsewhere")
    with StoreReader(store) as reader, pytest.raises(CorruptPageError, match="cannot be read"):
        reader.content()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("version", 1, "store format version 1"),
        ("version", 99, "store format version 99"),
        ("format", "other", "not that of a tiermem-store"),
        ("num_layers", 3, "damaged"),
        ("head_dim", -16, "damaged"),
    ],
)
def test_another_header_is_refused(store: Path, name: str, value: object, words: str) -> None:
    header = json.loads((store / "header.json").read_text())
    (store / "header.json").write_text(json.dumps({**header, name: value}))
    refused(store, words)


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(store: Path) -> None:
    for name in ("header.json", "slots"):
        kept = (store / name).read_bytes()
        (store / name).unlink()
        os.mkfifo(store / name)
        refused(store, "regular file")
        (store / name).unlink()
        (store / name).write_bytes(kept)


def test_an_index_that_is_missing_is_damage(store: Path) -> None:
    (store / "index" / "data.mdb").unlink()
    with (
        StoreReader(store) as reader,
        pytest.raises(CorruptPageError, match="the index cannot be read"),
    ):
        reader.content()


def test_keys_are_found_by_their_first_digits(store: Path) -> None:
    with StoreReader(store) as reader:
        content = reader.content()
    for row in content.rows().tolist():
        key = content.key(row).hex()
        for length in (8, 16, 17, 64):
            assert content.find(key[:length]).tolist() == [row]
    assert len(content.find("ffffffffffff")) == 0
    firsts = sorted(content.key(row).hex() for row in content.rows().tolist())
    assert [content.key(int(row)).hex() for row in content.find(firsts[0][:1])] == [
        key for key in firsts if key[0] == firsts[0][0]
    ]
    for text in ("", "xyz", "A0", "0" * 65):
        with pytest.raises(ValueError, match="hexadecimal digits"):
            content.find(text)


def test_a_manager_opens_what_was_looked_at(store: Path) -> None:
    checked(store)
    with open_store(store) as manager:
        assert isinstance(manager, TierManager)
        store_prompt(manager, "a")
        manager.check()
