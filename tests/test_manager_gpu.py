"""The manager on a real GPU: random runs, order shown with held streams, accuracy, and no leak."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from world import LAYOUT, World, kv_of

from tiermem import CorruptPageError, PageLayout, Sequence, TierConfig, TierManager, _core
from tiermem._core import CopyState, Tier

pytestmark = pytest.mark.gpu

POLLS = 2000
CYCLES = 200


@pytest.mark.parametrize("seed", range(6))
def test_random_operations_never_serve_a_wrong_byte(seed: int, tmp_path: Path) -> None:
    from tiermem.device.cuda_device import CudaDevice

    slots = ((4, 8, 0), (3, 4, 30), (6, 0, 40))[seed % 3]
    store = tmp_path / "store" if slots[2] else None
    world = World(seed, slots, store, make_device=lambda _: CudaDevice(0))
    try:
        world.run(300)
        if store:
            world.reopen()
        world.run(100)
    except BaseException:
        world.manager.close()  # or the memory that it pinned would be in the way of other tests
        raise
    world.close()


@pytest.fixture
def manager() -> Iterator[TierManager]:
    slot = LAYOUT.slot_bytes
    config = TierConfig(gpu=8 * slot, ram=32 * slot, ssd=0, device="cuda:0", low_watermark=0)
    with TierManager(LAYOUT, config) as opened:
        yield opened


def grow(
    manager: TierManager,
    sequence: Sequence,
    count: int,
    before_end: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Append `count` tokens with telling K and V; the last layer's output."""
    start = sequence.num_tokens
    tokens = torch.arange(start, start + count).numpy()
    generator = torch.Generator().manual_seed(start)
    q = torch.randn(count, 2, LAYOUT.head_dim, generator=generator).cuda()
    kv = [kv_of(b"", tokens, start, layer).cuda() for layer in range(LAYOUT.num_layers)]
    with manager.step([sequence], new_tokens=count) as step:
        for layer in range(LAYOUT.num_layers):
            step.append(layer, kv[layer][0], kv[layer][1])
            out = step.attend(layer, q)
        before_end()
    return out


def test_a_page_is_never_read_before_its_copy_has_ended(manager: TierManager) -> None:
    from latch import Latch

    latch = Latch(manager._device)
    core = manager._core
    sequence = manager.open_sequence()
    grow(manager, sequence, 5 * LAYOUT.page_tokens)
    for _ in range(2):  # the second time everything is loaded and allocated
        sequence.suspend()
        grow(manager, sequence, 1)
        sequence.rollback(1)
    want = grow(manager, sequence, 1).clone()
    sequence.rollback(1)
    sequence.suspend()
    torch.cuda.synchronize()
    # what was hot is overwritten, so that only the copies can bring the bytes back
    core.hot.data.fill_(float("nan"))
    torch.cuda.synchronize()

    def check() -> None:
        finished = core.device.compute_stream().record()
        assert not any(finished.done() for _ in range(POLLS)), "attention overtook the copies"
        latch.release()

    with latch.holding(core.mover.to_device):
        out = grow(manager, sequence, 1, check)  # its end waits until the copies were compared
    assert torch.equal(out, want)


def test_a_slot_is_never_reused_while_a_copy_reads_it(manager: TierManager) -> None:
    from latch import Latch

    latch = Latch(manager._device)
    core = manager._core
    sequence = manager.open_sequence()
    grow(manager, sequence, 4 * LAYOUT.page_tokens)
    core.in_flight.drain()
    torch.cuda.synchronize()
    core.leases.end_all()
    with latch.holding(core.mover.to_host):
        assert core.room.demote(Tier.GPU, 4) == 4
        for _ in range(POLLS):
            core.in_flight.reap()
        assert core.room.evict(Tier.GPU, 8) == 0, "a slot was given away under a copy"
        assert (core.table.states(sequence.pages, Tier.RAM) == CopyState.FILLING).all()
        latch.release()
        core.in_flight.drain()
    assert core.room.evict(Tier.GPU, 8) == 4
    core.hot.data.fill_(float("nan"))
    k, v = sequence.read(1, 0, sequence.num_tokens)
    want = kv_of(b"", torch.arange(sequence.num_tokens).numpy(), 0, 1)
    assert torch.equal(k.cpu(), want[0])
    assert torch.equal(v.cpu(), want[1])


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float16", 2e-3), ("bfloat16", 1.2e-2), ("float32", 1e-5)]
)
def test_streamed_attention_is_as_exact_as_resident(dtype: str, bound: float) -> None:
    layout = PageLayout(2, 4, 128, dtype, 32)
    torch_dtype = getattr(torch, dtype)
    slot = layout.slot_bytes
    config = TierConfig(gpu=6 * slot, ram=64 * slot, ssd=0, device="cuda:0")
    total, outs = 0, []
    keys = [torch.randn(1501, 4, 128, device="cuda").to(torch_dtype) for _ in range(4)]
    with TierManager(layout, config) as manager:
        sequence = manager.open_sequence()
        for count in (333, 700, 1, 1, 400, 65, 1):
            q = torch.randn(count, 28, 128, device="cuda").to(torch_dtype)
            rows = slice(total, total + count)
            with manager.step([sequence], new_tokens=count) as step:
                for layer in range(2):
                    step.append(layer, keys[2 * layer][rows], keys[2 * layer + 1][rows])
                    outs.append((layer, rows, q, step.attend(layer, q)))
            total += count
    for layer, rows, q, out in outs:
        want = reference(q, keys[2 * layer][: rows.stop], keys[2 * layer + 1][: rows.stop])
        error = (out.double() - want).norm() / want.norm()
        assert error <= bound, f"{dtype}, rows {rows}: {float(error):.2e}"


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k = k.double().repeat_interleave(group, 1)
    v = v.double().repeat_interleave(group, 1)
    scores = torch.einsum("nhd,mhd->hnm", q.double(), k) * q.shape[-1] ** -0.5
    past = k.shape[0] - q.shape[0]
    rows = torch.arange(q.shape[0], device=q.device)[:, None] + past
    scores.masked_fill_(torch.arange(k.shape[0], device=q.device)[None] > rows, -torch.inf)
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v)


def test_nothing_leaks_over_many_managers(tmp_path: Path) -> None:
    process = psutil.Process()

    def one_cycle() -> None:
        slot = LAYOUT.slot_bytes
        config = TierConfig(
            gpu=64 * slot, ram=64 * slot, ssd="2MiB", ssd_path=tmp_path / "s", device="cuda:0"
        )
        with TierManager(LAYOUT, config) as manager:
            sequence = manager.open_sequence()
            grow(manager, sequence, 40)
            sequence.record(range(40))

    def measure() -> tuple[int, int, int]:
        gc.collect()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        return free, process.memory_info().rss, sum(1 for _ in Path("/proc/self/fd").iterdir())

    for _ in range(10):
        one_cycle()
    free, rss, files = measure()
    for _ in range(CYCLES):
        one_cycle()
    free_after, rss_after, files_after = measure()
    assert abs(free - free_after) <= 8 << 20
    assert rss_after - rss <= 64 << 20
    assert files_after == files


def damaged(manager: TierManager, sequence: Sequence, number: int, layer: int) -> int:
    """Flip a bit of the RAM copy of a page of `sequence`; its id."""
    core = manager._core
    page = sequence.pages[number : number + 1]
    slot = int(core.table.slots(page, Tier.RAM)[0])
    where = slot * LAYOUT.slot_bytes + layer * LAYOUT.layer_bytes + 99
    core.pools[Tier.RAM].memory.tensor[where] ^= 8
    return int(page[0])


def test_a_bit_flipped_in_pinned_memory_is_found_on_promotion(manager: TierManager) -> None:
    sequence = manager.open_sequence()
    grow(manager, sequence, 5 * LAYOUT.page_tokens)
    sequence.suspend()
    grow(manager, sequence, 1)
    sequence.rollback(1)
    sequence.suspend()
    bad = damaged(manager, sequence, 2, 1)
    with pytest.raises(CorruptPageError) as caught:
        grow(manager, sequence, 1)
    assert caught.value.pages == caught.value.lost == (bad,)
    assert manager.stats().corrupt_pages == 1
    sequence.rollback(3 * LAYOUT.page_tokens)
    grow(manager, sequence, 1)
    manager.check()


def test_a_bit_flipped_in_pinned_memory_is_found_in_a_streamed_slice(
    manager: TierManager,
) -> None:
    sequence = manager.open_sequence()
    grow(manager, sequence, 20 * LAYOUT.page_tokens + 3)
    grow(manager, sequence, 1)
    core = manager._core
    alone = core.table.states(sequence.pages, Tier.GPU) == int(CopyState.ABSENT)
    bad = damaged(manager, sequence, int(alone.nonzero()[0][-1]), 0)
    with pytest.raises(CorruptPageError) as caught:
        grow(manager, sequence, 1)
    assert caught.value.pages == caught.value.lost == (bad,)
    assert sequence.num_tokens == 20 * LAYOUT.page_tokens + 4
    manager.check()


def test_sums_on_the_gpu_are_those_of_the_bytes(manager: TierManager) -> None:
    core = manager._core
    sequence = manager.open_sequence()
    grow(manager, sequence, 20 * LAYOUT.page_tokens + 3)
    for _ in range(LAYOUT.page_tokens):
        grow(manager, sequence, 1)
    core.in_flight.drain()
    torch.cuda.synchronize()
    pages = sequence.pages[core.table.is_sealed(sequence.pages)]
    for tier in (Tier.GPU, Tier.RAM):
        held = pages[core.table.states(pages, tier) == int(CopyState.VALID)]
        assert len(held)
        slots = core.table.slots(held, tier)
        memory = core.pools[tier].memory.tensor.cpu()
        starts = memory.data_ptr() + slots * LAYOUT.slot_bytes
        want = _core.checksum_pages(starts, LAYOUT.layer_bytes, LAYOUT.num_layers)
        assert (core.mover.sums.of(tier, slots) == want).all()
