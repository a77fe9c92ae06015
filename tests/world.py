"""World: a manager on a simulated device driven at random, and the small oracle that knows every byte.

K and V of a token are a function of (salt, token id, position, layer), so that pages shared by content are
equal and any mix-up of pages, positions, layers or tenants shows as wrong bytes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from tiermem import (
    NotDurableError,
    OutOfPagesError,
    PageLayout,
    Sequence,
    Step,
    TierConfig,
    TierManager,
    TransferError,
)
from tiermem._core import CopyState, Tier
from tiermem.device.protocol import Device
from tiermem.device.simulated import SimulatedDevice
from tiermem.publication import NO_SLOT_LEFT

LAYOUT = PageLayout(num_layers=2, num_kv_heads=1, head_dim=16, dtype="float32", page_tokens=16)
SALTS = (b"", b"tenant")
MAX_TOKENS = 192
NUM_PROMPTS = 3


def kv_of(salt: bytes, tokens: np.ndarray, first: int, layer: int) -> torch.Tensor:
    """(2, n, kv_heads, head_dim) K and V of `tokens` at positions from `first` on; K small, V telling."""
    positions = np.arange(first, first + len(tokens))
    seeds = (tokens * 7919 + positions * 104729 + layer * 15485863 + len(salt) * 32452843) % 999983
    dims = np.arange(LAYOUT.head_dim)
    k = np.sin(seeds[:, None] * 0.37 + dims)
    v = (seeds[:, None] * 31 + dims * 17) % 1009 / 1009.0
    kv = np.stack([k, v]).astype(np.float32)
    return torch.from_numpy(kv)[:, :, None, :]


@dataclass(eq=False)
class Known:
    """What the oracle knows of one sequence."""

    sequence: Sequence
    salt: bytes
    tokens: list[int] = field(default_factory=list)
    named: int = 0


class Failure(Exception):
    """Raised inside a step's body to have it undone."""


class World:
    """One manager, its sequences, and the operations that may happen to them.

    `num_operations` counts what was done, `num_refused` how often there was no room.
    """

    def __init__(
        self,
        seed: int,
        slots: tuple[int, int, int],
        store: Path | None,
        eagerness: float = 0.5,
        make_device: Callable[[int], Device] | None = None,
    ) -> None:
        torch.set_num_threads(1)  # tensors are tiny here
        self.random = random.Random(seed)
        self.seed = seed
        self.slots = slots
        self.store = store
        self.make_device = make_device or (
            lambda seed: SimulatedDevice(seed, total_bytes=1 << 28, eagerness=eagerness)
        )
        self.num_operations = 0
        self.num_refused = 0
        self.num_attached = 0
        self.num_failed = 0
        self.copies_fail = False
        self.known: list[Known] = []
        self.prompts = [
            [self.random.randrange(50) for _ in range(MAX_TOKENS)] for _ in range(NUM_PROMPTS)
        ]
        self.open_manager()

    # ---- the manager -------------------------------------------------------------------------------

    def open_manager(self) -> None:
        gpu, ram, ssd = self.slots
        slot = LAYOUT.slot_bytes
        self.device = self.make_device(self.random.randrange(2**31))
        config = TierConfig(
            gpu=gpu * slot,
            ram=ram * slot,
            ssd=store_bytes(ssd) if self.store else 0,
            ssd_path=self.store,
            staging_pages=self.random.choice([1, 4, 8]),
            low_watermark=0.2,
            high_watermark=0.4,
            cpu_share=self.random.choice([None, 0.0, 0.4, 1.0]),
            cpu_threads=1,
        )
        self.manager = TierManager(LAYOUT, config, model_id="world", device=self.device)
        self.core = self.manager._core
        assert self.core.table.counts(Tier.GPU).slots == gpu

    def reopen(self) -> None:
        """A new process: everything that was published and fits is found again, nothing else."""
        self.manager.close()
        self.known.clear()
        self.open_manager()

    def close(self) -> None:
        for known in self.known:
            self.verify(known)
        self.manager.close()

    # ---- one operation -----------------------------------------------------------------------------

    def run(self, num_operations: int) -> None:
        names = list(OPERATIONS)
        weights = list(OPERATIONS.values())
        for name in self.random.choices(names, weights, k=num_operations):
            try:
                getattr(self, name)()
            except OutOfPagesError:
                self.num_refused += 1
            except TransferError:
                assert self.copies_fail, "nothing was made to fail"
                self.num_failed += 1
            self.num_operations += 1
            self.manager.check()

    def op_open(self) -> None:
        if len(self.known) >= 5:
            self.op_close()
            return
        salt = self.random.choice(SALTS)
        prompt = self.random.choice(self.prompts)[: self.random.randrange(MAX_TOKENS)]
        at_most = self.random.choice([None, None, len(prompt) // 2])
        sequence = self.manager.open_sequence(prompt, salt=salt, label="w", at_most=at_most)
        assert sequence.num_tokens <= (len(prompt) if at_most is None else at_most)
        tokens = prompt[: sequence.num_tokens]
        self.num_attached += len(tokens)
        self.known.append(Known(sequence, salt, tokens, len(tokens)))

    def op_close(self) -> None:
        if self.known:
            known = self.known.pop(self.random.randrange(len(self.known)))
            known.sequence.close()

    def op_step(self) -> None:
        self.step(fails=False)

    def op_failing_step(self) -> None:
        self.step(fails=True)

    def op_record(self) -> None:
        known = self.pick()
        if known and len(known.tokens) > known.named:
            upto = self.random.randint(known.named, len(known.tokens))
            known.sequence.record(known.tokens[known.named : upto])
            known.named = upto

    def op_rollback(self) -> None:
        known = self.pick()
        if known:
            count = min(len(known.tokens), self.random.choice([0, 1, 2, 5, 17, 40]))
            known.sequence.rollback(count)
            del known.tokens[len(known.tokens) - count :]
            known.named = min(known.named, len(known.tokens))

    def op_fork(self) -> None:
        known = self.pick()
        if known and len(self.known) < 5:
            twin = known.sequence.fork("fork")
            self.known.append(Known(twin, known.salt, list(known.tokens), known.named))

    def op_suspend(self) -> None:
        known = self.pick()
        if known:
            known.sequence.suspend()
            own = known.sequence.pages[self.core.table.refs(known.sequence.pages) == 1]
            assert not (self.core.table.states(own, Tier.GPU) == CopyState.VALID).any()

    def op_prefetch(self) -> None:
        known = self.pick()
        if known:
            known.sequence.prefetch()

    def op_poll(self) -> None:
        self.manager.poll()

    def op_progress(self) -> None:
        if isinstance(self.device, SimulatedDevice):
            for _ in range(self.random.randrange(10)):
                self.device.progress()

    def op_fail_a_copy(self) -> None:
        if self.copies_fail and isinstance(self.device, SimulatedDevice):
            self.device.fail_copy(self.random.randrange(8))

    def op_read(self) -> None:
        known = self.pick()
        if known:
            self.verify(known)

    def op_flush(self) -> None:
        if self.store:
            try:
                self.manager.flush()
            except NotDurableError as error:
                if error.reason != NO_SLOT_LEFT:
                    raise
                self.num_refused += 1

    # ---- steps -------------------------------------------------------------------------------------

    def step(self, fails: bool) -> None:
        if not self.known:
            return
        batch = self.random.sample(self.known, self.random.randint(1, min(3, len(self.known))))
        counts = [self.random.choice([1, 1, 1, 2, 7, 16, 33, 70]) for _ in batch]
        batch = [k for k, n in zip(batch, counts, strict=True) if len(k.tokens) + n <= MAX_TOKENS]
        counts = counts[: len(batch)]
        if not batch or any(
            len(k.tokens) + n > MAX_TOKENS for k, n in zip(batch, counts, strict=True)
        ):
            return
        new = [self.next_tokens(k, n) for k, n in zip(batch, counts, strict=True)]
        fail_at = self.random.randrange(2 * LAYOUT.num_layers) if fails else -1
        try:
            with self.manager.step([k.sequence for k in batch], new_tokens=counts) as step:
                for layer in range(LAYOUT.num_layers):
                    if fail_at == 2 * layer:
                        raise Failure
                    self.run_layer(step, layer, batch, new)
                    if fail_at == 2 * layer + 1:
                        raise Failure
        except Failure:
            for known in batch:
                assert known.sequence.num_tokens == len(known.tokens)
            return
        for known, tokens in zip(batch, new, strict=True):
            known.tokens += tokens
            assert known.sequence.num_tokens == len(known.tokens)

    def next_tokens(self, known: Known, count: int) -> list[int]:
        """Mostly what the prompts say, so that other sequences meet the same content."""
        start = len(known.tokens)
        for prompt in self.prompts:
            if prompt[:start] == known.tokens and self.random.random() < 0.8:
                return prompt[start : start + count]
        return [self.random.randrange(50) for _ in range(count)]

    def run_layer(self, step: Step, layer: int, batch: list[Known], new: list[list[int]]) -> None:
        rows = [
            kv_of(k.salt, np.array(tokens), len(k.tokens), layer)
            for k, tokens in zip(batch, new, strict=True)
        ]
        kv = torch.cat(rows, dim=1)
        where = self.manager.torch_device
        step.append(layer, kv[0].to(where), kv[1].to(where))
        q = torch.from_numpy(
            np.random.default_rng(self.random.randrange(2**31))
            .standard_normal((kv.shape[1], 2, LAYOUT.head_dim))
            .astype(np.float32)
        )
        window = self.random.choice([None, None, 5, 40])
        out = step.attend(layer, q.to(where), window=window).cpu()
        row = 0
        for known, tokens in zip(batch, new, strict=True):
            all_tokens = np.array(known.tokens + tokens)
            rows = slice(row, row + len(tokens))
            past = len(known.tokens)
            kv = kv_of(known.salt, all_tokens, 0, layer).numpy()
            want = attention(q[rows].numpy(), kv, past, window)
            np.testing.assert_allclose(out[rows].numpy(), want, rtol=1e-4, atol=1e-5)
            row += len(tokens)

    # ---- looking -----------------------------------------------------------------------------------

    def pick(self) -> Known | None:
        return self.random.choice(self.known) if self.known else None

    def verify(self, known: Known) -> None:
        """Every stored byte of a random range is what was appended."""
        total = len(known.tokens)
        assert known.sequence.num_tokens == total
        start = self.random.randint(0, total)
        end = self.random.randint(start, total)
        layer = self.random.randrange(LAYOUT.num_layers)
        k, v = known.sequence.read(layer, start, end)
        want = kv_of(known.salt, np.array(known.tokens[start:end], dtype=np.int64), start, layer)
        assert torch.equal(k.cpu(), want[0]), f"K of seed {self.seed} differs"
        assert torch.equal(v.cpu(), want[1]), f"V of seed {self.seed} differs"


OPERATIONS = {
    "op_open": 6,
    "op_close": 4,
    "op_step": 20,
    "op_failing_step": 3,
    "op_record": 16,
    "op_rollback": 5,
    "op_fork": 3,
    "op_suspend": 3,
    "op_prefetch": 6,
    "op_poll": 8,
    "op_progress": 8,
    "op_read": 6,
    "op_flush": 1,
    "op_fail_a_copy": 2,
}


def attention(q: np.ndarray, kv: np.ndarray, past: int, window: int | None) -> np.ndarray:
    """The plain definition, in float64: q (n, heads, dim), kv (2, past + n, 1, dim)."""
    k, v = kv[0, :, 0].astype(np.float64), kv[1, :, 0].astype(np.float64)
    scores = q.astype(np.float64) @ k.T * q.shape[-1] ** -0.5
    places, rows = np.arange(k.shape[0])[None], past + np.arange(q.shape[0])[:, None]
    seen = places <= rows
    if window is not None:
        seen &= places > rows - window
    scores = np.where(seen[:, None, :], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights @ v / weights.sum(-1, keepdims=True)


def store_bytes(num_pages: int) -> int:
    """A cap that holds just `num_pages` pages of the world's layout."""
    from tiermem.store import INDEX_BYTES, INDEX_BYTES_PER_SLOT
    from tiermem.store_format import TRAILER_BYTES

    return INDEX_BYTES + num_pages * (LAYOUT.slot_bytes + TRAILER_BYTES + INDEX_BYTES_PER_SLOT)
