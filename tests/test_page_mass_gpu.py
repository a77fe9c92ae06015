"""The mass of each page on a GPU: by the kernels, in steps over every tier, and in captured graphs.

Inputs are fresh in every run; a failure names its seed.
"""

from __future__ import annotations

import os
from dataclasses import replace

import attention_cases as cases
import numpy as np
import pytest
import torch
from attention_cases import Shape, make_case
from mass_steps import check, poison, run_step
from texts import Q_HEADS, Text, config_of

from tiermem import PageLayout, TierConfig, TierManager
from tiermem.attention import ProductMath, SlotHolds, backend_for
from tiermem.attention.backend import AttentionBackend
from tiermem.graphs import CapturedDecode
from tiermem.hand_over import HandOver
from tiermem.ram_attention import FixedShare
from tiermem.step import Step

pytestmark = pytest.mark.gpu

HEADS = ((8, 7), (8, 4), (52, 1), (1, 1), (2, 3), (4, 13))
HEAD_DIMS = (64, 80, 128, 256)
PAGE_TOKENS = (16, 32, 64, 128)
CAPABILITIES = ((7, 5), (8, 0), (8, 6), (9, 0))


@pytest.fixture(scope="module")
def num_sms() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


@pytest.fixture(scope="module")
def backend() -> AttentionBackend:
    return backend_for(torch.device("cuda", 0), torch.cuda.get_device_capability(0), "float16")


@pytest.fixture
def seed() -> int:
    return int.from_bytes(os.urandom(4), "little")


def run_and_check(shape: Shape, seed: int, backend: AttentionBackend, parts: int = 1) -> None:
    case = make_case(shape, seed).to("cuda")
    expected = case.expected_quickly()
    cases.check(case, cases.check_mass(case, backend, parts), expected=expected)
    if set(shape.rows) == {1} and not shape.scattered and parts == 1:
        planned = cases.with_work(case, backend, padding=seed % 4)
        cases.check(case, cases.check_mass(planned, backend), expected=expected)


@pytest.mark.parametrize("page_tokens", PAGE_TOKENS, ids="page{}".format)
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids="dim{}".format)
@pytest.mark.parametrize("dtype", cases.TOLERANCE)
def test_decode(
    dtype: str, head_dim: int, page_tokens: int, backend: AttentionBackend, seed: int
) -> None:
    kv_heads, group = HEADS[(HEAD_DIMS.index(head_dim) + PAGE_TOKENS.index(page_tokens)) % 6]
    stored = (1, page_tokens, 3 * page_tokens + 7, 1000 + seed % 999)
    shape = Shape(kv_heads, group, head_dim, page_tokens, dtype, (1,) * 4, stored)
    run_and_check(shape, seed, backend)


@pytest.mark.parametrize("page_tokens", PAGE_TOKENS, ids="page{}".format)
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("dtype", cases.TOLERANCE)
def test_short_rows(
    dtype: str, scattered: bool, page_tokens: int, backend: AttentionBackend, seed: int
) -> None:
    rows = (1 + seed % 32, 8, 0, 32)
    shape = Shape(4, 7, 128, page_tokens, dtype, rows, (1777, 8, 20, 333), scattered=scattered)
    run_and_check(shape, seed, backend)


@pytest.mark.parametrize("page_tokens", PAGE_TOKENS, ids="page{}".format)
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids="dim{}".format)
def test_prefill(head_dim: int, page_tokens: int, backend: AttentionBackend, seed: int) -> None:
    rows = (130 + seed % 99, 1, 70)
    shape = Shape(2, 4, head_dim, page_tokens, "float16", rows, (rows[0], 333, 500))
    run_and_check(shape, seed, backend)


@pytest.mark.parametrize("rows", [1, 3, 90])
@pytest.mark.parametrize(("page_tokens", "scattered"), [(16, False), (64, False), (64, True)])
def test_windows(
    page_tokens: int, scattered: bool, rows: int, backend: AttentionBackend, seed: int
) -> None:
    shape = Shape(2, 3, 64, page_tokens, "float16", (rows, 2), (1500, 77), scattered=scattered)
    for window in (1, page_tokens, 100, 1000):
        run_and_check(replace(shape, window=window), seed, backend)


@pytest.mark.parametrize("holds", SlotHolds)
@pytest.mark.parametrize("rows", [1, 30])
def test_parts_fill_one_object_between_them(
    rows: int, holds: SlotHolds, backend: AttentionBackend, seed: int
) -> None:
    shape = Shape(8, 4, 128, 64, "float16", (rows, 2), (3000, 700), window=900, holds=holds)
    run_and_check(shape, seed, backend, parts=5)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("rows", [1, 20, 100])
def test_the_tiles_of_every_capability(
    capability: tuple[int, int], rows: int, num_sms: int, seed: int
) -> None:
    from tiermem.attention.kernels.backend import TritonBackend

    shape = Shape(2, 7, 128, 32, "float16", (rows,), (777,))
    run_and_check(shape, seed, TritonBackend(capability, num_sms))


@pytest.mark.parametrize("num_sms", [1, 40, 1000])
@pytest.mark.parametrize("page_tokens", [16, 128])
def test_planned_decode_of_any_number_of_splits(num_sms: int, page_tokens: int, seed: int) -> None:
    """Splits that end within a page too."""
    from tiermem.attention.kernels.backend import TritonBackend

    stored = (12000, 7, 300, 1, 4096 + seed % 32)
    shape = Shape(8, 4, 64, page_tokens, "float16", (1,) * 5, stored)
    run_and_check(shape, seed, TritonBackend(torch.cuda.get_device_capability(0), num_sms))


def test_widened_products(num_sms: int, seed: int) -> None:
    from tiermem.attention.kernels.backend import TritonBackend

    capability = torch.cuda.get_device_capability(0)
    backend = TritonBackend(capability, num_sms, ProductMath.FLOAT32)
    run_and_check(Shape(2, 3, 128, 64, "bfloat16", (1, 9), (500, 77)), seed, backend)


def test_a_captured_decode_follows_growing_sequences(backend: AttentionBackend, seed: int) -> None:
    stored = (5000, 900)
    shape = Shape(8, 7, 128, 64, "float16", (1, 1), stored)
    case = cases.with_work(make_case(shape, seed).to("cuda"), backend, padding=9)
    num_pages = case.tables.max_pages + 1

    def attend() -> tuple[torch.Tensor, torch.Tensor]:
        page_lse = backend.new_page_lse(case.pool, 2, 56, num_pages)
        out, lse = case.run(backend, page_lse=page_lse)
        return out, backend.page_mass(page_lse, lse)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, mass = attend()
    for shorter in (0, 1, 63, 700):
        case.tables.kv_end.sub_(shorter)
        case.tables.q_start.sub_(shorter)
        graph.replay()
        assert cases.relative_error(out, case.expected_quickly()[0].cpu()) < 2e-3
        assert (mass.double() - case.expected_mass(num_pages)).abs().max() < 1e-5


# ---- steps -------------------------------------------------------------------------------------------


def config_on_gpu(layout: PageLayout, **more: object) -> TierConfig:
    config = config_of(layout, **more)  # type: ignore[arg-type]
    return TierConfig.from_table({**config.to_table(), "device": "cuda"})


@pytest.mark.parametrize("page_tokens", [16, 64])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_share_of_a_step(dtype: str, page_tokens: int) -> None:
    layout = PageLayout(9, 2, 64, dtype, page_tokens)
    with TierManager(
        layout, config_on_gpu(layout, gpu=8, ram=160 * 16 // page_tokens, cpu_share=1.0)
    ) as manager:
        poison(manager)
        ram, random = manager._core.ram, np.random.default_rng()
        assert isinstance(ram, HandOver)
        texts = [Text.new(manager) for _ in range(2)]
        run_step(manager, texts, [900, 350])
        for share in [1.0, 0.0, *random.uniform(0, 1, 6)]:
            ram.policy = FixedShare(float(share))
            run_step(manager, texts, random.integers(1, 33, 2).tolist())
        run_step(manager, texts, [4, 1], window=200)
        assert manager.stats().attended_bytes > 0
        manager.check()


def body(
    step: Step, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    results = []
    for layer in range(len(k)):
        step.append(layer, k[layer], v[layer])
        results.append(step.attend_with_mass(layer, q[layer]))
    return results


def test_captured_steps_give_the_mass_of_pages_that_come_later() -> None:
    layout = PageLayout(3, 2, 64, "float16", 16)
    with TierManager(layout, config_on_gpu(layout, gpu=300, ram=0)) as manager:
        poison(manager)
        texts = [Text.new(manager) for _ in range(2)]
        run_step(manager, texts, [100, 30])
        decoding = CapturedDecode(manager, body)
        for _ in range(60):
            for text in texts:
                text.draw(1)
            k = torch.cat([text.k[:, -1:] for text in texts], 1).cuda()
            v = torch.cat([text.v[:, -1:] for text in texts], 1).cuda()
            q = torch.randn(3, 2, Q_HEADS, 64).half()
            results = decoding.run([text.sequence for text in texts], k, v, q.cuda())
            for layer, (out, mass) in enumerate(results):
                for i, text in enumerate(texts):
                    row = slice(i, i + 1)
                    its = (q[layer, row], out[row].cpu(), mass[row].cpu())
                    check(text, layer, *its, None, 16)
        assert decoding.num_graphs > 0
