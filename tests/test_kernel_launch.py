"""The native core's launches: every byte that reaches the driver, and what it refuses."""

from __future__ import annotations

import ctypes
import struct
import threading
from typing import Any

import pytest
from fake_driver import CONTEXT, FakeDriver, tensor_map

from tiermem import _core

STREAM = 0x57BEA
FIXED = [
    struct.pack("<i", -2),
    tensor_map(7),
    struct.pack("<f", 0.125),
    struct.pack("<Q", 2**64 - 3),
    struct.pack("<i", 9),
    tensor_map(8),
]


def _launch(
    fake: FakeDriver, fixed: list[bytes], num_changing: int = 3, **changes: Any
) -> _core.KernelLaunch:
    def address(function: Any) -> int:
        found = ctypes.cast(function, ctypes.c_void_p).value
        assert found is not None
        return found

    calls = _core.LaunchCalls(
        launch=address(fake.cuLaunchKernelEx),
        get_context=address(fake.cuCtxGetCurrent),
        set_context=address(fake.cuCtxSetCurrent),
        error_string=address(fake.cuGetErrorString),
    )
    sizes = [8] * num_changing + [len(parameter) for parameter in fixed]
    given: dict[str, Any] = {
        "name": "merge",
        "function": fake.load("merge", sizes),
        "context": CONTEXT,
        "grid": (2**31 - 1, 65_535),
        "threads": 96,
        "shared_bytes": 232_448,
        "early": True,
    }
    return _core.KernelLaunch(calls, **{**given, **changes}, num_changing=num_changing, fixed=fixed)


def test_every_byte_reaches_the_driver_in_each_launch() -> None:
    fake = FakeDriver()
    launch = _launch(fake, FIXED).launch
    for numbers in ((1, 2**64 - 1, 0), (1 << 50, 7, 12)):
        launch(STREAM, *numbers)
        (found,) = fake.take()
        assert found.parameters == (*(struct.pack("<Q", number) for number in numbers), *FIXED)
        for address, parameter in zip(found.addresses, found.parameters, strict=True):
            assert address % min(len(parameter), 64) == 0
        assert (found.stream, found.shared_bytes) == (STREAM, 232_448)
        assert (found.grid, found.block) == ((2**31 - 1, 65_535, 1), (96, 1, 1))
        assert found.attributes == ((6, 0, 1, *[0] * 15),)


def test_the_parameters_are_the_launchs_own() -> None:
    fake = FakeDriver()
    fixed = list(FIXED)
    launch = _launch(fake, fixed).launch  # the bound method alone keeps the object
    fixed.clear()
    fixed += [b"x" * 128 for _ in range(99)]
    launch(0, 1, 2, 3)
    assert fake.take()[0].parameters[3:] == tuple(FIXED)


def test_without_early_there_is_no_attribute() -> None:
    fake = FakeDriver()
    _launch(fake, [], 0, early=False).launch(0)
    (found,) = fake.take()
    assert found.attributes == () and found.parameters == () and found.stream == 0


@pytest.mark.parametrize("before", [0, 0xC1, CONTEXT])
@pytest.mark.parametrize("status", [0, 700])
def test_the_kernels_context_is_current_for_the_launch_alone(before: int, status: int) -> None:
    fake = FakeDriver()
    fake.context, fake.status = before, status
    launch = _launch(fake, [], 0)
    if status:
        with pytest.raises(RuntimeError, match=r"^launch of merge: CUDA error 700: out of luck$"):
            launch.launch(STREAM)
    else:
        launch.launch(STREAM)
    assert fake.take()[0].context == CONTEXT and fake.context == before


def test_threads_may_share_a_launch() -> None:
    fake = FakeDriver()
    launch = _launch(fake, FIXED).launch

    def work(number: int) -> None:
        for i in range(300):
            launch(number, number, number + i, number)

    threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = fake.take()
    expected = {(n, n, n + i, n) for n in range(1000, 5000, 1000) for i in range(300)}
    assert {(a.stream, *(a.number(i) for i in range(3))) for a in found} == expected
    assert len(found) == len(expected)


def test_other_arguments_are_refused() -> None:
    fake = FakeDriver()
    for size in (0, 1, 5, 16, 64, 129):
        with pytest.raises(ValueError, match=f"merge: a parameter of {size} bytes"):
            _launch(fake, [b"x" * size])
    with pytest.raises(ValueError, match="65 parameters, must be at most 64"):
        _launch(fake, [b"x" * 8] * 62)
    launch: Any = _launch(fake, [b"x" * 8] * 61).launch
    for numbers in ((), (1, 2), (1, 2, 3, 4), range(65)):
        with pytest.raises(ValueError, match=r"must be 3|more numbers"):
            launch(0, *numbers)
    for number in (-1, 2**64, 1.0, "1", None):
        with pytest.raises(TypeError):
            launch(0, 1, 2, number)
        with pytest.raises(TypeError):
            launch(number, 1, 2, 3)
    assert fake.take() == []
    launch(0, 1, 2, 3)
    assert len(fake.take()) == 1
