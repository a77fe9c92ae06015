"""The mass of each page by the Triton kernels in Triton's interpreter, against a softmax in float64.

As interpreted_attention.py, run by test_attention_interpreter.py.
"""

from __future__ import annotations

from dataclasses import replace

import attention_cases as cases
import pytest
import torch
from attention_cases import Shape, make_case
from mass_steps import poison, run_step
from texts import Text, config_of

from tiermem import PageLayout, TierConfig, TierManager
from tiermem.attention import ProductMath, SlotHolds
from tiermem.attention.kernels.backend import TritonBackend
from tiermem.attention.page_lse import PageLse
from tiermem.device.simulated import SimulatedDevice

DTYPES = ("float16", "float32")
"""The interpreter multiplies the raw bits of bfloat16."""


@pytest.fixture
def seed() -> int:
    return int(torch.randint(1 << 31, ()))


def _backend(capability: tuple[int, int] = (9, 0), num_sms: int = 2) -> TritonBackend:
    return TritonBackend(capability, num_sms)


@pytest.mark.parametrize(("capability", "num_sms"), [((9, 0), 1), ((8, 0), 12)])
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "page_tokens"),
    [(1, 7, 32, 64), (1, 16, 16, 16), (2, 1, 64, 128), (1, 4, 128, 16), (1, 20, 16, 32)],
)
def test_decode_by_a_work_list(
    kv_heads: int,
    group: int,
    head_dim: int,
    page_tokens: int,
    capability: tuple[int, int],
    num_sms: int,
    seed: int,
) -> None:
    stored = (1, 33, 64, 179)
    shape = Shape(kv_heads, group, head_dim, page_tokens, "float16", (1,) * len(stored), stored)
    case, backend = make_case(shape, seed), _backend(capability, num_sms)
    planned = cases.with_work(case, backend, padding=2)
    cases.check(case, cases.check_mass(planned, backend))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("page_tokens", [16, 64, 128])
def test_short_rows(page_tokens: int, scattered: bool, dtype: str, seed: int) -> None:
    shape = Shape(1, 3, 32, page_tokens, dtype, (1, 7), (190, 99), scattered=scattered)
    case = make_case(shape, seed)
    num_sms = 1 if scattered else 30
    cases.check(case, cases.check_mass(case, _backend(num_sms=num_sms)))


@pytest.mark.parametrize("window", [1, 33, 64, 10**12])
@pytest.mark.parametrize(("scattered", "page_tokens"), [(False, 64), (True, 16)])
def test_windows(window: int, scattered: bool, page_tokens: int, seed: int) -> None:
    shape = Shape(1, 2, 32, page_tokens, "float16", (1, 20), (130, 120), window, scattered)
    cases.check_mass(make_case(shape, seed), _backend(num_sms=5))


@pytest.mark.parametrize(
    ("capability", "page_tokens"), [((7, 5), 16), ((7, 5), 64), ((8, 0), 64), ((9, 0), 32)]
)
def test_prefill(capability: tuple[int, int], page_tokens: int, seed: int) -> None:
    shape = Shape(1, 2, 32, page_tokens, "float16", (70, 2), (70, 99))
    cases.check_mass(make_case(shape, seed), _backend(capability))


@pytest.mark.parametrize("head_dim", [16, 80, 256])
def test_head_dims_and_widened_products(head_dim: int, seed: int) -> None:
    case = make_case(Shape(2, 2, head_dim, 64, "float16", (2, 1), (140, 65)), seed)
    cases.check_mass(case, _backend())
    cases.check_mass(case, TritonBackend((9, 0), 2, ProductMath.FLOAT32))


@pytest.mark.parametrize("scale", [0.0, -0.2, 1.5])
def test_any_scale(scale: float, seed: int) -> None:
    case = make_case(Shape(1, 2, 64, 16, "float32", (5,), (70,), scale=scale), seed)
    cases.check_mass(case, _backend())


def test_parts_fill_one_object_between_them(seed: int) -> None:
    shape = Shape(2, 2, 32, 64, "float16", (1, 6), (330, 150), 200, holds=SlotHolds.ONE_LAYER)
    case = make_case(shape, seed)
    for backend in (_backend(), _backend((8, 0), 30)):
        cases.check(case, cases.check_mass(case, backend, parts=3))


def test_pages_outside_the_tables_are_left_alone(seed: int) -> None:
    case = make_case(Shape(1, 2, 64, 16, "float16", (3,), (100,)), seed)
    backend = _backend()
    for number, part in enumerate(cases.split_pages(case, 3)):
        page_lse = backend.new_page_lse(case.pool, 3, 2, 7)
        page_lse.values.fill_(5.0)
        part.run(backend, page_lse=page_lse)
        untouched = (page_lse.values == 5.0).all(2).all(0)
        assert untouched.tolist() == [page % 3 != number for page in range(7)]


def test_rows_that_see_nothing_and_sequences_without_pages_or_rows(seed: int) -> None:
    case = make_case(Shape(kv_heads=1, rows=(2, 0, 1, 3), stored=(20, 33, 9, 18)), seed)
    tables = replace(
        case.tables,
        kv_end=torch.tensor([0, 33, 9, 18], dtype=torch.int32),
        num_pages=torch.tensor([2, 3, 0, 2], dtype=torch.int32),
    )
    cases.check_mass(replace(case, tables=tables), _backend())


def test_no_rows_at_all() -> None:
    case = make_case(Shape(kv_heads=1, rows=(0,), stored=(20,)), 1)
    cases.check_mass(case, _backend())


def test_many_heads_and_pages(seed: int) -> None:
    """More of both than one program of the mass kernel takes."""
    case = make_case(Shape(2, 35, 16, 16, "float32", (1,), (16 * 40,)), seed)
    cases.check_mass(case, _backend())


def test_page_lse_of_other_parts_is_refused() -> None:
    case = make_case(Shape(2, 2, 64, 64, "float16", (1,), (100,)), 1)
    backend, cpu = _backend(), torch.device("cpu")
    assert backend.new_page_lse(case.pool, 1, 4, 2).parts == 2
    with pytest.raises(ValueError, match="1 parts a page: must be 2"):
        case.run(backend, page_lse=PageLse.empty(1, 4, 2, cpu))
    with pytest.raises(ValueError, match="1 pages: must be at least 2"):
        case.run(backend, page_lse=PageLse.empty(1, 4, 1, cpu, parts=2))
    case.run(backend, page_lse=PageLse.empty(1, 4, 2, cpu, parts=2))
    # What was prepared for one is not taken for another.
    with pytest.raises(ValueError, match="1 parts a page: must be 2"):
        case.run(backend, page_lse=PageLse.empty(1, 4, 4, cpu))
    with pytest.raises(TypeError, match="float64"):
        case.run(backend, page_lse=PageLse.empty(1, 4, 2, cpu, parts=2, dtype=torch.float64))


def test_steps_over_hot_streamed_and_handed_over_pages() -> None:
    """Pages of two parts each, as a GPU's backend and the CPU's threads fill them between them."""
    layout = PageLayout(1, 2, 64, "float16", 64)
    config = config_of(layout, gpu=3, ram=30, cpu_share=0.5, io_timeout_s=60.0)
    config = TierConfig.from_table({**config.to_table(), "device": "auto"})
    device = SimulatedDevice(3, total_bytes=1 << 28, eagerness=0.5)
    with TierManager(layout, config, device=device) as manager:
        poison(manager)
        texts = [Text.new(manager) for _ in range(2)]
        run_step(manager, texts, [310, 66])  # by the CPU: the interpreter takes minutes for prompts
        object.__setattr__(manager._core, "backend", _backend(num_sms=1))
        run_step(manager, texts, [1, 1])
        run_step(manager, texts, [3, 1], window=100)
        assert manager.stats().attended_bytes > 0
        assert any(flow.streamed_bytes for flow in manager.stats().flows)
