"""One process at a time owns a store, whatever became of the one before."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from test_store_transfer import CAP, LAYOUT

from tiermem import ConfigError
from tiermem.store import ColdStore

FORK = multiprocessing.get_context("fork")


def open_store(path: Path) -> ColdStore:
    return ColdStore(path, LAYOUT, CAP, "threads", 30.0)


def own(path: Path, pipe: Connection) -> None:
    """In a child: open the store, say so, and hold it until told to end or killed."""
    try:
        store = open_store(path)
    except ConfigError as error:
        pipe.send(str(error))
        return
    pipe.send("")
    pipe.recv()
    store.close()


def start(path: Path) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=own, args=(path, theirs), daemon=True)
    child.start()
    theirs.close()
    return child, ours


def test_the_error_names_the_store_and_its_owner(tmp_path: Path) -> None:
    child, pipe = start(tmp_path / "s")
    assert pipe.recv() == ""
    with pytest.raises(ConfigError, match="one owns a store at a time") as caught:
        open_store(tmp_path / "s")
    assert repr(str(tmp_path / "s")) in str(caught.value)
    assert f"process {child.pid}" in str(caught.value)
    pipe.send("end")
    child.join(30)
    open_store(tmp_path / "s").close()


def test_the_lock_of_a_killed_owner_is_no_obstacle(tmp_path: Path) -> None:
    for _ in range(3):
        child, pipe = start(tmp_path / "s")
        assert pipe.recv() == ""
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join(30)
        assert child.exitcode == -signal.SIGKILL
    assert (tmp_path / "s" / "lock").read_text() == str(child.pid)
    open_store(tmp_path / "s").close()


@pytest.mark.parametrize("content", [b"", b"not a number", b"9" * 100, bytes(64)])
def test_what_is_in_a_lock_file_is_a_hint_only(tmp_path: Path, content: bytes) -> None:
    with_lock = open_store(tmp_path / "s")
    (tmp_path / "s" / "lock").write_bytes(content)
    with pytest.raises(ConfigError, match="another process or manager has this store open"):
        open_store(tmp_path / "s")
    with_lock.close()
    open_store(tmp_path / "s").close()


def test_of_several_openers_at_once_one_owns_the_store(tmp_path: Path) -> None:
    for _ in range(3):
        children = [start(tmp_path / "s") for _ in range(5)]
        answers = [pipe.recv() for _, pipe in children]
        assert answers.count("") == 1, answers
        for child, pipe in children:
            if child.is_alive():
                pipe.send("end")
        for child, _ in children:
            child.join(30)
            assert child.exitcode == 0
