"""`tiermem gc` and `tiermem verify --repair`: what goes, what stays, and that what stays is found and intact."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from cli_support import Cli
from store_cases import MODEL, NUM_PAGES, PAGE, PROMPTS, SALTS, make_store, open_store
from test_store_chains import RandomStore
from test_store_reader import tree_of
from world import LAYOUT

from tiermem.errors import ConfigError
from tiermem.index_image import IndexImage
from tiermem.store_chains import NO_PAGE
from tiermem.store_collect import Wish, collect
from tiermem.store_content import StoreContent
from tiermem.store_format import TRAILER_BYTES
from tiermem.store_keeper import StoreKeeper
from tiermem.store_names import GoneReason
from tiermem.store_reader import StoreReader
from tiermem.store_records import ENTRY_ROW

STRIDE = LAYOUT.slot_bytes + TRAILER_BYTES


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "store")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


def found(store: Path) -> dict[str, int]:
    """Pages of each prompt that a manager finds; everything else about the store is in order."""
    with open_store(store) as manager:
        pages = {}
        for label, tokens in PROMPTS.items():
            sequence = manager.open_sequence(tokens, salt=SALTS.get(label, b""))
            pages[label] = sequence.num_tokens // PAGE
            sequence.close()
        manager.check()
        return pages


def disk_bytes(store: Path) -> int:
    said = subprocess.run(["du", "-s", "-B1", store], capture_output=True, text=True, check=True)
    return int(said.stdout.split()[0])


# ---- gc --------------------------------------------------------------------------------------------------


def test_gc_takes_what_was_asked_for_and_gives_the_room_back(cli: Cli, store: Path) -> None:
    (store / "index.damaged").write_bytes(bytes(10000))
    before = disk_bytes(store)
    document = cli("gc", store, "--session", "b", "--json").json()
    assert (document["pages_before"], document["pages_gone"]) == (NUM_PAGES, 4)
    assert document["set_aside"] == ["index.damaged"]
    assert document["bytes_before"] == before
    assert document["bytes_after"] == disk_bytes(store) < before - 4 * STRIDE - 10000
    assert cli("verify", store).code == 0
    assert found(store) == {"a": 6, "b": 4, "c": 10, "d": 4}


def test_gc_keeps_what_others_are_found_through(cli: Cli, store: Path) -> None:
    text = cli("gc", store, "--session", "a").out
    assert "2 pages of 20 went" in text
    assert "4 pages asked for stay: pages that stay are found through them" in text
    assert found(store) == {"a": 4, "b": 8, "c": 10, "d": 4}


def test_gc_takes_pages_of_a_salt_a_model_or_an_age(cli: Cli, store: Path) -> None:
    roots = [chain["root"] for chain in cli("ls", store, "--json").json()["chains"]]
    salt = next(root["salt_fingerprint"] for root in roots if root["salt_fingerprint"])
    assert "0 pages of 20 went" in cli("gc", store, "--unused-for", "1h").out
    assert "4 pages of 20 went" in cli("gc", store, "--salt-fingerprint", salt[:6]).out
    assert found(store)["d"] == 0
    with open_store(store) as manager:
        manager.open_sequence(PROMPTS["b"]).close()
    arguments = ("--model", MODEL[:5], "--salt-fingerprint", "none", "--unused-for", "1h")
    assert "0 pages of 16 went" in cli("gc", store, *arguments).out
    assert "16 pages of 16 went" in cli("gc", store, *arguments[:4]).out
    assert found(store) == {"a": 0, "b": 0, "c": 0, "d": 0}


def test_gc_keeps_what_was_used_last_within_a_cap(cli: Cli, store: Path) -> None:
    with StoreReader(store) as reader:
        layout = reader.layout
    from tiermem.store_files import cap_of

    text = cli("gc", store, "--cap", f"{cap_of(layout, 7)}B").out
    assert "13 pages of 20 went" in text
    assert disk_bytes(store) <= cap_of(layout, 7)
    after = found(store)
    assert 3 <= max(after.values()) <= 7
    key = cli(
        "explain", store, "--token-ids-file", ids_file(store), "--model-id", MODEL, "--json"
    ).json()
    assert key["stop"] in ("gone", "complete", "other_tokens")


def ids_file(store: Path) -> Path:
    path = store.parent / "ids"
    path.write_text(" ".join(map(str, PROMPTS["a"])))
    return path


def test_a_dry_run_changes_nothing_and_asks_for_no_lock(cli: Cli, store: Path) -> None:
    with open_store(store) as manager:
        manager.flush()
        before = tree_of(store)
        text = cli("gc", store, "--unused-for", "0s", "--dry-run").out
        assert f"{NUM_PAGES} pages of {NUM_PAGES} would go" in text
        assert "nothing was changed" in text
        assert tree_of(store) == before


def test_a_store_in_use_is_not_changed(cli: Cli, store: Path) -> None:
    with open_store(store) as manager:
        manager.flush()
        before = tree_of(store)
        for arguments in (("gc", store), ("verify", store, "--repair")):
            answer = cli(*arguments)
            assert (answer.code, answer.out) == (2, "")
            assert "another process or manager has this store open" in answer.err
        assert tree_of(store) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--session x", "no session of this store"),
        ("--model x", "no model of this store"),
        ("--salt-fingerprint abcd", "no salt of this store"),
        ("--salt-fingerprint xyz", "must be 4 to 16 hexadecimal digits"),
        ("--unused-for 7", "must be a time with a unit, such as 45s, 30min, 12h, 7d or 4w"),
        ("--unused-for 7y", "must be a time with a unit"),
        ("--cap 50%", "must be a size with a unit"),
        ("--cap 5XB", "unit 'XB'"),
    ],
)
def test_gc_refuses_what_means_nothing(cli: Cli, store: Path, arguments: str, words: str) -> None:
    before = tree_of(store)
    answer = cli("gc", store, *arguments.split())
    assert (answer.code, answer.out) == (2, "")
    assert words in answer.err
    assert tree_of(store) == before


def test_nothing_is_made_where_no_store_is(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("absent", "empty"):
        for arguments in (("gc",), ("verify", "--repair")):
            assert cli(arguments[0], tmp_path / name, *arguments[1:]).code == 2
        with pytest.raises(ConfigError):
            StoreKeeper(tmp_path / name)
    assert not (tmp_path / "absent").exists()
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_file_system_without_holes_gets_the_end_back(
    cli: Cli, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiermem.store_keeper._punch", lambda *_arguments: False)
    assert cli("gc", store).code == 0
    with StoreReader(store) as reader:
        assert reader.num_slots == NUM_PAGES
    assert found(store) == {"a": 6, "b": 8, "c": 10, "d": 4}


def test_pages_that_went_do_not_come_back_with_an_index_that_is_made_again(
    cli: Cli, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no holes can be made, their bytes stay, but nothing says any more what they are."""
    monkeypatch.setattr("tiermem.store_keeper._punch", lambda *_arguments: False)
    cli("gc", store, "--session", "b")
    before = found(store)
    (store / "index" / "data.mdb").write_bytes(bytes(8192))
    assert found(store) == before == {"a": 6, "b": 4, "c": 10, "d": 4}


def test_an_index_that_cannot_be_written_leaves_the_old_one(
    cli: Cli, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tiermem.store_keeper.os.replace", fail)
    answer = cli("gc", store, "--session", "b")
    assert answer.code == 1
    assert "the index was not written" in answer.err
    monkeypatch.undo()
    assert found(store) == {"a": 6, "b": 8, "c": 10, "d": 4}
    assert cli("gc", store).code == 0
    assert not (store / "index.new").exists()


# ---- what is to go -----------------------------------------------------------------------------------------


@pytest.fixture(params=range(8))
def chance(request: pytest.FixtureRequest) -> tuple[RandomStore, StoreContent]:
    """A random forest with random times of use, and what an index would say of it."""
    seed = int(request.param)
    pages = RandomStore(seed, 80)
    numbers = np.random.default_rng(seed)
    rows = np.zeros(len(pages.names), dtype=ENTRY_ROW)
    for row, (key, parent, position) in zip(rows, pages.names, strict=True):
        row["key"], row["entry"]["parent"] = np.void(key), np.void(parent)
        row["entry"]["position"] = position
    rows["entry"]["slot"] = np.arange(len(rows))
    rows["entry"]["last_use_s"] = numbers.integers(1, 1000, len(rows))
    return pages, StoreContent.of(IndexImage(rows, {}, {}, (), ()))


@pytest.mark.parametrize(
    ("since_s", "most"), [(0, None), (500, None), (1001, None), (300, 20), (0, 0)]
)
def test_no_page_loses_the_one_before_it(
    chance: tuple[RandomStore, StoreContent], since_s: int, most: int | None
) -> None:
    pages, content = chance
    result = collect(content, Wish(unused_since_s=since_s, most_pages=most))
    kept = set(range(len(content))) - set(result.reasons)
    for row in kept:
        before = pages.before(row)
        assert before in kept or pages.names[row][2] == 0
    if most is not None:
        assert len(kept) <= most
    lost = {row for row, why in result.reasons.items() if why is GoneReason.UNREACHABLE}
    for row in range(len(content)):
        chain = row
        while pages.before(chain) != NO_PAGE:
            chain = pages.before(chain)
        assert (row in lost) == (pages.names[chain][2] > 0)
        if row in kept and most is None and content.last_use_s[row] <= since_s:
            after = pages.after(row)
            assert kept.intersection(after), "it stays for one that follows it"
        if row not in kept and row not in lost and most is None:
            assert content.last_use_s[row] <= since_s


# ---- repair ------------------------------------------------------------------------------------------------


def damage(store: Path, label: str, position: int, offset: int) -> str:
    """Change bytes of one page; its key."""
    with StoreReader(store) as reader:
        content = reader.content()
    row = next(
        row
        for row in content.rows().tolist()
        if content.label(row) == label and content.positions[row] == position
    )
    with (store / "slots").open("r+b") as file:
        file.seek(int(content.slots[row]) * STRIDE + offset)
        file.write(b"\xa5\x5a\xa5")
    return content.key(row).hex()


def test_repair_sets_damaged_pages_aside_and_keeps_the_rest(cli: Cli, store: Path) -> None:
    key = damage(store, "c", 6, 100)
    damage(store, "b", 7, LAYOUT.slot_bytes + 20)
    payload = (store / "slots").read_bytes()
    document = cli("verify", store, "--repair", "--json").json()
    assert (document["is_well"], document["damaged_pages"], document["set_aside"]) == (False, 2, 2)
    assert document["dropped"] == 3  # of c, behind the damaged one
    assert cli("verify", store).code == 0
    assert found(store) == {"a": 6, "b": 7, "c": 6, "d": 4}
    answer = cli("show", store, key)
    assert answer.code == 2
    assert "not stored any more: quarantined: its bytes were found damaged" in answer.err
    ids = store.parent / "ids"
    ids.write_text(" ".join(map(str, PROMPTS["c"])))
    told = cli("explain", store, "--token-ids-file", ids, "--model-id", MODEL).out
    assert "stored: 6 of 10 pages" in told
    assert "quarantined" in told
    changed = [
        slot
        for slot in range(len(payload) // STRIDE)
        if payload[slot * STRIDE : slot * STRIDE + LAYOUT.slot_bytes]
        != (store / "slots").read_bytes()[slot * STRIDE : slot * STRIDE + LAYOUT.slot_bytes]
    ]
    assert changed == []  # keys and values are where they were


def test_repair_of_a_store_in_order_changes_nothing(cli: Cli, store: Path) -> None:
    before = tree_of(store)
    answer = cli("verify", store, "--repair")
    assert answer.code == 0
    assert tree_of(store) == before


def test_repair_drops_records_that_are_damaged(cli: Cli, store: Path) -> None:
    file = store / "index" / "data.mdb"
    whole = bytearray(file.read_bytes())
    with StoreReader(store) as reader:
        key = reader.content().key(0)
    place = whole.rindex(b"p" + key)
    whole[place + 60] ^= 4
    file.write_bytes(whole)
    document = cli("verify", store, "--repair", "--json").json()
    assert (document["is_well"], document["damaged_records"]) == (False, 1)
    assert cli("verify", store, "--json").json()["damaged_records"] == 0


def test_repair_makes_a_damaged_index_again_from_the_trailers(cli: Cli, store: Path) -> None:
    damage(store, "b", 7, 30)
    os.truncate(store / "index" / "data.mdb", 9000)
    document = cli("verify", store, "--repair", "--json").json()
    assert not document["is_well"]
    assert "data.mdb" in document["index_error"]
    assert (document["pages"], document["set_aside"]) == (NUM_PAGES, 1)
    assert cli("verify", store).code == 0
    assert found(store) == {"a": 6, "b": 7, "c": 10, "d": 4}
