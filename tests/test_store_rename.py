"""Names that cannot be written: what was stored before can still be read, and is named later."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from liveness_support import (
    PAGE,
    append,
    check_content,
    faults_fixture,  # noqa: F401
    open_manager,
    tokens_of,
)
from world import LAYOUT, kv_of

from tiermem import Sequence, TierManager, TransferError
from tiermem._core import FaultOps, FileCall

Open = Callable[[tuple[int, int, int]], TierManager]


@pytest.fixture(params=["plain", "sealed"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens a manager on one store, which is encrypted or not."""
    keys: dict[str, object] = {"io_timeout_s": 30.0}
    if request.param == "sealed":
        pytest.importorskip("cryptography")
        keys["ssd_key_file"] = tmp_path / "key"
        (tmp_path / "key").write_bytes(bytes(range(32)))
        (tmp_path / "key").chmod(0o600)
    return lambda slots: open_manager(tmp_path / "s", slots, **keys)


# ---- names that come later ---------------------------------------------------------------------------


def spilled(manager: TierManager, num_pages: int) -> Sequence:
    """Pages that left the GPU before they had a name: a flush writes their trailers anew."""
    sequence = manager.open_sequence()
    for _ in range(num_pages):
        append(manager, sequence, PAGE)
    sequence.suspend()
    sequence.record(tokens_of(0, num_pages * PAGE))
    return sequence


@pytest.mark.parametrize("slots", [(2, 0, 20), (3, 4, 20)], ids=["through", "with-ram"])
@pytest.mark.parametrize("is_read", [False, True])
def test_pages_whose_name_cannot_be_written_are_still_there(
    reopen: Open, faults: FaultOps, slots: tuple[int, int, int], is_read: bool
) -> None:
    with reopen(slots) as manager:
        sequence = spilled(manager, 6)
        faults.fail(FileCall.WRITE, faults.num_calls(FileCall.WRITE) + 1, errno.EIO, 1)
        with pytest.raises(TransferError):
            manager.flush()
        if is_read:
            check_content(sequence)
            sequence.prefetch()
            check_content(sequence)
        manager.flush()
        check_content(sequence)
    with reopen(slots) as manager:
        again = manager.open_sequence(tokens_of(0, 6 * PAGE))
        assert again.num_tokens == 6 * PAGE
        check_content(again)


def test_pages_whose_name_was_written_though_the_disk_denies_it_are_still_there(
    reopen: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reopen((6, 0, 20)) as manager:
        sequence = spilled(manager, 6)
        assert manager._store is not None
        file = manager._store._file
        write = file.write_trailers

        def deny(*arguments: Any) -> None:
            write(*arguments)
            raise TransferError(errno.EIO, "denied")

        monkeypatch.setattr(file, "write_trailers", deny)
        with pytest.raises(TransferError, match="denied"):
            manager.flush()
        monkeypatch.undo()
        append(manager, sequence, 1)  # promotes whole pages, with their trailers
        assert manager.stats().corrupt_pages == 0
        check_content(sequence)
        manager.flush()
    with reopen((6, 0, 20)) as manager:
        again = manager.open_sequence(tokens_of(0, 6 * PAGE))
        assert again.num_tokens == 6 * PAGE
        check_content(again)


@pytest.mark.parametrize("gpu", [2, 3])
def test_a_flush_while_a_step_reads_pages_without_a_name(reopen: Open, gpu: int) -> None:
    """They are named by it, and the slices that are on their way count all the same."""
    with reopen((gpu, 0, 30)) as manager:
        sequence = spilled(manager, 8)
        with manager.step([sequence], 1) as step:
            for layer in range(LAYOUT.num_layers):
                step.append(layer, *kv_of(b"", np.array([8 * PAGE]), 8 * PAGE, layer))
                if layer == 0:
                    assert any(half.ahead for half in manager._core.ring._halves)
                    manager.flush()
                step.attend(layer, torch.ones(1, 1, LAYOUT.head_dim))
        check_content(sequence)
        assert manager.stats().corrupt_pages == 0
