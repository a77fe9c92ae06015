"""Marks and fixtures that every test may use."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import cache

import pytest
from hypothesis import settings

# A busy machine is slow, not wrong: pytest's own timeout ends what hangs.
settings.register_profile("tiermem", deadline=None)
settings.load_profile("tiermem")

# What a shell runs in the background ignores SIGINT, and so would the programs that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _own_directories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Snapshots and calibrations of this process stay out of the user's, and of those of tests beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIERMEM_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        patch.setenv("TIERMEM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        problem = _gpu_problem()
        if problem is not None:
            pytest.skip(problem)


@cache
def _gpu_problem() -> str | None:
    """Why tiermem would use no GPU here, None if it would."""
    from tiermem.device.discovery import survey

    return survey().problem
