"""How much host time does a step cost, and how fast is the page table?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch

from tiermem import _core
from tiermem.bench.result import MICRO, Better, Result, Subject, measured
from tiermem.bench.run import Run, Scale
from tiermem.config import TierConfig
from tiermem.device.discovery import open_device
from tiermem.errors import InvariantError
from tiermem.layout import PageLayout
from tiermem.manager import TierManager
from tiermem.pools import Ids, Tier, as_ids
from tiermem.sequence import Sequence

NAME = "step"
STEP_BUDGET_US = 150.0
ATTEND_BUDGET_US = 30.0
TABLE_BUDGET = 10.0
NO_CEILING = "host time has no physical ceiling; see the budget"
NO_TABLE_CEILING = "page-table operations have no physical ceiling; see the budget"

FEW_LAYERS, MANY_LAYERS = 2, 32
PREFILL_TOKENS = 1 << 16
CONTEXTS = (1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20)
CPU_CONTEXTS = (1 << 12, 1 << 14, 1 << 16)
"""There the device's work is the host's: longer ones take minutes."""
QUICK_CONTEXTS = (1 << 11, 1 << 12)
TABLE_PAGES = 10_000_000
QUICK_TABLE_PAGES = 200_000
BATCH_PAGES = 50_000


def run(bench: Run) -> Iterator[Result]:
    """Every row of the benchmark.

    Raises
    ------
    ConfigError: no room for the pages. InvariantError: the page table contradicts itself.
    """
    quick = bench.scale is Scale.QUICK
    contexts = QUICK_CONTEXTS if quick else CONTEXTS if bench.on_gpu else CPU_CONTEXTS
    yield from _steps(bench, FEW_LAYERS, contexts)
    # As many layers as models have: what the first calls after a wait cost more is spread over them.
    yield from _steps(bench, MANY_LAYERS, contexts[:1])
    yield from _table(bench)


def _steps(bench: Run, num_layers: int, contexts: SequenceOf[int]) -> Iterator[Result]:
    """Entry and exit of steps of one sequence that lies on the device, and append + attend of a layer."""
    layout = PageLayout(num_layers, 1, 64, "float16", 64)
    pages = layout.pages_for(contexts[-1]) * 5 // 4 + 64
    config = TierConfig(gpu=pages * layout.slot_bytes, ram=0, device=str(bench.device.torch_device))
    repeats = bench.pick(gpu=200, cpu=30, quick_gpu=8, quick_cpu=8)
    device, _ = open_device(config.device)
    with TierManager(layout, config, "bench", device=device) as manager:
        sequence = manager.open_sequence()
        for context in contexts:
            bench.progress(f"step: {num_layers} layers, {context} tokens")
            _grow(manager, sequence, context)
            timed = [_timed_step(manager, sequence, context) for _ in range(repeats)][2:]
            for part, budget, name in (
                (0, STEP_BUDGET_US, "entry + exit"),
                (1, ATTEND_BUDGET_US, "append + attend"),
            ):
                parameters = {"context": context, "sequences": 1, "layers": num_layers}
                subject = Subject(
                    NAME, name, parameters, "us", Better.LOWER, budget=bench.aim(budget)
                )
                values = [times[part] / MICRO for times in timed]
                yield measured(subject, values, NO_CEILING)


def _grow(manager: TierManager, sequence: Sequence, context: int) -> None:
    layout = manager.layout
    while sequence.num_tokens < context:
        count = min(PREFILL_TOKENS, context - sequence.num_tokens)
        kv = torch.zeros(
            count, layout.num_kv_heads, layout.head_dim, dtype=torch.float16,
            device=manager.torch_device,
        )  # fmt: skip
        with manager.step([sequence], count) as step:
            for layer in range(layout.num_layers):
                step.append(layer, kv, kv)


def _timed_step(manager: TierManager, sequence: Sequence, context: int) -> tuple[float, float]:
    """Host seconds of entry + exit, and of append + attend of one layer; the device is idle at the start."""
    layout = manager.layout
    row = torch.ones(
        1, layout.num_kv_heads, layout.head_dim, dtype=torch.float16, device=manager.torch_device
    )
    _synchronize(manager)
    start_s = time.perf_counter()
    step = manager.step([sequence]).__enter__()
    entered_s = time.perf_counter()
    outs = []
    for layer in range(layout.num_layers):
        step.append(layer, row, row)
        outs.append(step.attend(layer, row))
    body_s = time.perf_counter()
    _synchronize(manager)
    leaving_s = time.perf_counter()
    step.__exit__(None, None, None)
    end_s = time.perf_counter()
    # K of the old tokens is 0 and that of the new ones 1, so the output lies between
    if not 0 < float(outs[0].min()) <= float(outs[0].max()) <= 1:
        raise InvariantError(f"attention over {context} tokens gave {outs[0].flatten()[:4]}")
    return entered_s - start_s + end_s - leaving_s, (body_s - entered_s) / layout.num_layers


def _synchronize(manager: TierManager) -> None:
    if manager.torch_device.type == "cuda":
        torch.cuda.synchronize(manager.torch_device)


def _table(bench: Run) -> Iterator[Result]:
    """Operations of the native page table in batches, on one core, with everything in it."""
    quick = bench.scale is Scale.QUICK
    pages = QUICK_TABLE_PAGES if quick else TABLE_PAGES
    bench.progress(f"step: page table of {pages} pages")
    work = _TableWork(pages)
    repeats = 20 if quick else 100
    operations: dict[str, Callable[[Ids], float]] = {
        "look-up": work.look_up,
        "reserve + commit": work.reserve_and_commit,
        "LRU touch": work.touch,
    }
    for name, operation in operations.items():
        batches = (work.random_batch() for _ in range(repeats))
        values = [len(ids) / operation(ids) / 1e6 for ids in batches]
        parameters = {"pages": pages, "batch": work.batch_pages}
        subject = Subject(NAME, f"page table: {name}", parameters, "million pages/s",
                          budget=bench.aim(TABLE_BUDGET))  # fmt: skip
        yield measured(subject, values, NO_TABLE_CEILING)
    work.check()


class _TableWork:
    """A page table of which half of the GPU tier and all of the RAM tier are in use."""

    def __init__(self, pages: int) -> None:
        self.batch_pages = min(BATCH_PAGES, pages // 4)
        self._table = _core.PageTable(pages + self.batch_pages, pages, 0)
        self._ids = self._table.create(pages)
        self._table.reserve(self._ids, Tier.GPU)
        self._table.commit(self._ids, Tier.GPU)
        self._table.seal(self._ids)
        self._random = np.random.default_rng(0)

    def random_batch(self) -> Ids:
        """Different pages in random order."""
        drawn = self._random.integers(0, len(self._ids), 2 * self.batch_pages)
        places = self._random.permutation(np.unique(drawn))[: self.batch_pages]
        return as_ids(self._ids[places])

    def look_up(self, ids: Ids) -> float:
        """Seconds of asking for the slots of a batch."""
        start_s = time.perf_counter()
        self._table.slots(ids, Tier.GPU)
        return time.perf_counter() - start_s

    def reserve_and_commit(self, ids: Ids) -> float:
        """Seconds of giving a batch copies in RAM; they are dropped again outside of the time."""
        start_s = time.perf_counter()
        self._table.reserve(ids, Tier.RAM)
        self._table.commit(ids, Tier.RAM)
        seconds = time.perf_counter() - start_s
        self._table.drop(ids, Tier.RAM)
        return seconds

    def touch(self, ids: Ids) -> float:
        """Seconds of making a batch the most recently used."""
        start_s = time.perf_counter()
        self._table.touch(ids)
        return time.perf_counter() - start_s

    def check(self) -> None:
        """Verify that slots are as many and different, and every invariant of the table."""
        slots = self._table.slots(self._ids, Tier.GPU)
        if len(np.unique(slots)) != len(self._ids) or int(slots.min()) < 0:
            raise InvariantError("page table: two pages share a slot, or one has none")
        self._table.check()
