"""`tiermem ls`, `show`, `explain`, `verify`, `du` on a store that is closed, in use, empty, damaged, or none."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from cli_support import Cli, end, start_holder
from store_cases import MODEL, NUM_PAGES, PAGE, PROMPTS, make_store, open_store
from world import LAYOUT

from tiermem.store_format import TRAILER_BYTES

STRIDE = LAYOUT.slot_bytes + TRAILER_BYTES
EVERY = ("ls", "ls --sessions", "ls --pages", "verify", "verify --quick", "du")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "store")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


def ids_file(path: Path, tokens: list[int]) -> Path:
    path.write_text(", ".join(str(token) for token in tokens))
    return path


def key_of(cli: Cli, store: Path, label: str) -> str:
    """The key of the last page of a session's prompt."""
    chains = cli("ls", store, "--json").json()["chains"]
    keys = [chain["key"] for chain in chains if chain["session"] == label and chain["is_end"]]
    assert len(keys) == 1
    return str(keys[0])


# ---- ls --------------------------------------------------------------------------------------------------


def test_ls_shows_shared_beginnings_once(cli: Cli, store: Path) -> None:
    found = cli("ls", store)
    assert (found.code, found.err) == (0, "")
    assert f"4 chains of 4 sessions, {NUM_PAGES} pages, {NUM_PAGES * PAGE} tokens" in found.out
    lines = found.out.splitlines()
    tree = [line for line in lines if "├ " in line or "└ " in line]
    assert [line.split()[-1] for line in tree] == ["a", "b", "c"]
    assert [line.split()[0] for line in tree] == ["├", "├", "└"]
    assert sum("0 - 64" in line for line in lines) == 2  # of a, b, c together, and of d
    assert any(f"model {MODEL}, salt none" in line for line in lines)
    assert any("salt fingerprint" in line for line in lines)


def test_ls_as_json_has_every_page_of_every_chain(cli: Cli, store: Path) -> None:
    document = cli("ls", store, "--json").json()
    assert sum(chain["pages"] for chain in document["chains"]) == NUM_PAGES
    assert (document["found"], document["shown"], document["in_use"]) == (4, 4, False)
    assert document["total_bytes"] == NUM_PAGES * STRIDE
    pages = cli("ls", store, "--pages", "--limit", 0, "--json").json()["pages"]
    assert (
        len({page["slot"] for page in pages}) == len({page["key"] for page in pages}) == NUM_PAGES
    )
    sessions = cli("ls", store, "--sessions", "--json").json()["sessions"]
    assert {one["session"]: one["pages"] for one in sessions} == {"a": 6, "b": 4, "c": 6, "d": 4}


def test_ls_sorts_limits_and_chooses(cli: Cli, store: Path) -> None:
    found = cli("ls", store, "--sort", "size", "--limit", 1)
    assert "1 of 4 chains shown; --limit 0 shows all" in found.out
    document = cli("ls", store, "--sort", "size", "--limit", 1, "--json").json()
    assert [chain["session"] for chain in document["chains"]] == [
        "a",
        "c",
    ]  # the shared beginning first
    document = cli("ls", store, "--label", "b", "--json").json()
    assert [chain["session"] for chain in document["chains"]] == ["a", "b"]
    document = cli("ls", store, "--label", "b", "--pages", "--json").json()
    assert document["found"] == 4
    with open_store(store) as manager:
        manager.open_sequence(PROMPTS["b"]).close()
    document = cli("ls", store, "--sort", "hits", "--sessions", "--json").json()
    assert document["sessions"][0]["session"] == "a"  # stored what all others found
    found = cli("ls", store, "--label", "x")
    assert found.code == 2
    assert "no session of this store; known are 'a', 'b', 'c', 'd'" in found.err


# ---- show --------------------------------------------------------------------------------------------------


def test_show_tells_all_of_one_page(cli: Cli, store: Path) -> None:
    key = key_of(cli, store, "b")
    found = cli("show", store, key[:12])
    assert found.code == 0
    for words in (key, "112 - 128 of its prompt (page 7)", "8 pages up to here", MODEL, "salt", "b",
                  "sound, not encrypted", "yes: every byte is as it was written"):  # fmt: skip
        assert words in found.out
    document = cli("show", store, key[:12], "--chain", "--json").json()
    assert len(document["chain"]) == 8
    assert document["chain"][-1] == document["key"] == key
    assert document["is_intact"]
    assert len(document["layer_checksums"]) == LAYOUT.num_layers
    assert document["followed_by"] == []
    middle = cli("show", store, document["chain"][3], "--json").json()
    assert len(middle["followed_by"]) == 3
    assert cli("show", store, key, "--chain").out.count("\n") > found.out.count("\n") + 8


def test_show_says_what_is_damaged(cli: Cli, store: Path) -> None:
    key = key_of(cli, store, "b")
    offset = cli("show", store, key, "--json").json()["offset_bytes"]
    with (store / "slots").open("r+b") as file:
        file.seek(offset + 5)
        file.write(b"\xfe")
    found = cli("show", store, key)
    assert found.code == 1
    assert "no: its bytes are not those that were written (layer 0)" in found.out


def test_show_refuses_keys_that_are_none(cli: Cli, store: Path) -> None:
    for text, words in (
        ("12", "must be 4 to 64 hexadecimal digits"),
        ("wxyz", "must be 4 to 64 hexadecimal digits"),
        ("0" * 64, "no page of this store has a key that begins so"),
    ):
        found = cli("show", store, text)
        assert (found.code, found.out) == (2, "")
        assert words in found.err


def test_show_tells_what_became_of_a_page_that_is_gone(cli: Cli, tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", slots=NUM_PAGES)
    key = key_of(cli, store, "d")
    with open_store(store, 1):
        pass  # a smaller cap: one page stays
    found = cli("show", store, key)
    assert found.code == 2
    assert "not stored any more: dropped: the store was opened with a smaller cap" in found.err


# ---- explain -----------------------------------------------------------------------------------------------


def test_explain_tells_why_in_words(cli: Cli, store: Path, tmp_path: Path) -> None:
    ids = ids_file(tmp_path / "ids", PROMPTS["c"])
    found = cli("explain", store, "--token-ids-file", ids, "--model-id", MODEL)
    assert found.code == 0
    assert "stored: 10 of 10 pages, tokens 0 - 160" in found.out
    assert "the last 3 tokens do not fill a page" in found.out
    found = cli("explain", store, "--token-ids-file", ids, "--model-id", MODEL, "--salt", "tenant")
    assert "stored: 4 of 10 pages" in found.out
    assert "these tokens are stored, but for another salt" in found.out
    found = cli("explain", store, "--token-ids-file", ids, "--model-id", "other", "--shard", "0/2")
    assert "but for another model and shard 0 of 1" in found.out
    ids = ids_file(tmp_path / "ids", [*PROMPTS["c"][: 5 * PAGE], *range(600, 600 + PAGE)])
    found = cli("explain", store, "--token-ids-file", ids, "--model-id", MODEL)
    assert "1 stored prompt goes on from here with other tokens" in found.out
    document = cli("explain", store, "--token-ids-file", ids, "--json").json()
    assert (document["stored_pages"], document["stop"]) == (5, "other_tokens")
    assert document["root"]["model_id"] == MODEL


def test_explain_refuses_what_makes_no_question(cli: Cli, store: Path, tmp_path: Path) -> None:
    ids = ids_file(tmp_path / "ids", [1, 2])
    (tmp_path / "words").write_text("1 2 three")
    (tmp_path / "none").write_text(" [] ")
    for arguments, words in (
        ((), "one of the arguments --prompt-file --prompt --token-ids-file is required"),
        (("--prompt", "x"), "need --model, whose tokenizer makes tokens of them"),
        (("--token-ids-file", tmp_path / "words"), "'three' must be a token id"),
        (("--token-ids-file", tmp_path / "none"), "has no token id in it"),
        (("--token-ids-file", tmp_path / "absent"), "cannot be read"),
        (("--token-ids-file", ids, "--shard", "2/2"), "must be I/N with I from 0 to N - 1"),
        (("--token-ids-file", ids, "--model", tmp_path / "absent"), "no such directory"),
    ):
        found = cli("explain", store, *arguments)
        assert (found.code, found.out) == (2, "")
        assert words in found.err
    open_store(tmp_path / "empty").close()
    found = cli("explain", tmp_path / "empty", "--token-ids-file", ids)
    assert found.code == 2
    assert "holds no page and knows no model" in found.err


# ---- verify ------------------------------------------------------------------------------------------------


def test_verify_says_that_all_is_well_or_what_is_not(cli: Cli, store: Path) -> None:
    for option in ((), ("--quick",)):
        found = cli("verify", store, *option)
        assert (found.code, found.err) == (0, "")
        assert f"{NUM_PAGES} of {NUM_PAGES} intact" in found.out
        assert found.out.endswith("all is well\n")
    with (store / "slots").open("r+b") as file:
        file.seek(3 * STRIDE + 77)
        file.write(b"\x55\xaa")
    found = cli("verify", store)
    assert found.code == 1
    assert "1 page: its bytes are not those that were written" in found.out
    document = cli("verify", store, "--json").json()
    assert (document["is_well"], document["damaged_pages"]) == (False, 1)
    (finding,) = document["findings"]
    assert (finding["slot"], finding["verdict"], finding["layers"]) == (3, "payload", [0])
    assert cli("verify", store, "--quick").code == 0  # does not read keys and values


def test_what_another_process_may_be_writing_is_not_told_as_damage(
    cli: Cli, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (store / "slots").open("r+b") as file:
        file.seek(3 * STRIDE + 77)
        file.write(b"\x55\xaa")
    monkeypatch.setattr("tiermem.store_reader.StoreReader.owner_pid", lambda _reader: 1)
    monkeypatch.setattr("tiermem.store_check.SECOND_LOOKS_S", (0.0, 0.0))
    found = cli("verify", store)
    assert found.code == 1
    assert "may be being written" in found.out
    assert found.out.endswith("not settled: verify it again when no process has it in use\n")
    document = cli("verify", store, "--json").json()
    assert (document["damaged_pages"], document["unsettled_pages"]) == (0, 1)


def test_verify_tells_of_a_damaged_index_and_goes_no_further(cli: Cli, store: Path) -> None:
    os.truncate(store / "index" / "data.mdb", 5000)
    found = cli("verify", store)
    assert found.code == 1
    assert "index: damaged" in found.out
    assert cli("verify", store, "--json").json()["pages"] is None
    for command in ("ls", "du"):
        found = cli(command, store)
        assert (found.code, found.out) == (1, "")
        assert "data.mdb" in found.err


# ---- du ----------------------------------------------------------------------------------------------------


def test_du_counts_what_du_counts(cli: Cli, store: Path) -> None:
    (store / "index.damaged").write_bytes(bytes(9000))
    document = cli("du", store, "--json").json()
    said = subprocess.run(["du", "-s", "-B1", store], capture_output=True, text=True, check=True)
    assert document["total"] == int(said.stdout.split()[0])
    assert document["pages"] == NUM_PAGES * STRIDE
    assert document["set_aside"] >= 9000
    text = cli("du", store).out
    for words in (
        "pages",
        "free",
        "index",
        "set aside",
        "others",
        "of a cap of",
        "free on its file system",
    ):
        assert words in text


# ---- all of them -------------------------------------------------------------------------------------------


def test_a_store_in_use_by_another_process_is_looked_at_and_left_alone(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIERMEM_RUNTIME_DIR", str(tmp_path / "run"))
    holder = start_holder(tmp_path / "s", tmp_path / "run")
    try:
        for command in EVERY:
            name, *options = command.split()
            found = cli(name, tmp_path / "s", *options)
            assert (found.code, found.err) == (0, "")
        assert f"in use by process {holder.pid}, which holds pages" in cli("ls", tmp_path / "s").out
        document = cli("ls", tmp_path / "s", "--json").json()
        assert (document["in_use"], document["pids"]) == (True, [holder.pid])
        assert holder.poll() is None
    finally:
        end(holder)
    assert cli("ls", tmp_path / "s", "--json").json()["in_use"] is False


def test_an_empty_store_is_no_error(cli: Cli, tmp_path: Path) -> None:
    open_store(tmp_path / "s").close()
    for command in EVERY:
        name, *options = command.split()
        found = cli(name, tmp_path / "s", *options)
        assert (found.code, found.err) == (0, "")
    assert "0 chains of 0 sessions, 0 pages" in cli("ls", tmp_path / "s").out


@pytest.mark.parametrize(
    "command", [*EVERY, "show STORE cafe", "explain STORE --token-ids-file IDS"]
)
def test_what_is_no_store_is_refused(cli: Cli, tmp_path: Path, store: Path, command: str) -> None:
    ids = ids_file(tmp_path / "ids", [1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(store)
    for path, words in (
        (tmp_path / "absent", "no such directory"),
        (tmp_path / "empty", "no tiermem store"),
        (tmp_path / "link", "is a symbolic link, which is not followed"),
        (ids, "is not a directory"),
    ):
        given = command if "STORE" in command else f"{command} STORE"
        arguments = given.replace("STORE", str(path)).replace("IDS", str(ids)).split()
        found = cli(*arguments)
        assert (found.code, found.out) == (2, "")
        assert words in found.err
        assert found.err.count("\n") == 1


def test_nobody_without_the_right_to_read_is_let_in(
    cli: Cli, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_options: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tiermem.private_files.os.open", refuse)
    found = cli("ls", store)
    assert (found.code, found.out) == (2, "")
    assert "Permission denied: run this as the user who owns it" in found.err
