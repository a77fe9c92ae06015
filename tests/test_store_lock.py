"""The lock of a store that is closed while something is late there: it is kept until that has ended."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from liveness_support import (
    PAGE,
    check_content,
    faults_fixture,  # noqa: F401
    grow,
    in_time,
    open_manager,
    reopened,
    tokens_of,
)

from tiermem import ConfigError, TransferError
from tiermem._core import FaultOps, FileCall

SLOTS = (6, 0, 20)


def check_kept(path: Path) -> None:
    with pytest.raises(ConfigError, match="has this store open"):
        open_manager(path, SLOTS)


def test_nobody_gets_a_store_whose_slots_a_late_write_may_still_reach(
    tmp_path: Path, faults: FaultOps, caplog: pytest.LogCaptureFixture
) -> None:
    manager = open_manager(tmp_path / "s", SLOTS)
    grow(manager, manager.open_sequence(), 2 * PAGE)
    faults.hold(FileCall.WRITE, faults.num_calls(FileCall.WRITE) + 1, 1 << 40)
    with pytest.raises(TransferError):
        manager.flush()
    with in_time():
        manager.close()
    assert "stays locked until what is late there has ended" in caplog.text
    check_kept(tmp_path / "s")
    faults.release()
    with reopened(tmp_path / "s", SLOTS) as again:
        sequence = again.open_sequence()
        grow(again, sequence, 2 * PAGE)
        again.flush()
        check_content(sequence)
    with reopened(tmp_path / "s", SLOTS) as again:
        found = again.open_sequence(tokens_of(0, 2 * PAGE))
        assert found.num_tokens == 2 * PAGE
        check_content(found)


def test_nobody_gets_a_store_whose_index_a_late_commit_may_still_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = open_manager(tmp_path / "s", SLOTS)
    grow(manager, manager.open_sequence(), 2 * PAGE)
    assert manager._store is not None
    go_on, index = threading.Event(), manager._store.index
    write = index.write

    def hang(records: object) -> None:
        go_on.wait()
        write(records)  # type: ignore[arg-type]

    monkeypatch.setattr(index, "write", hang)
    with in_time(), pytest.raises(TransferError):
        manager.flush()
    with in_time():
        manager.close()
    check_kept(tmp_path / "s")
    go_on.set()
    with reopened(tmp_path / "s", SLOTS) as again:
        found = again.open_sequence(tokens_of(0, 2 * PAGE))
        assert found.num_tokens == 2 * PAGE  # the commit went well after all
        check_content(found)
