"""Actor: random work on one manager, every byte that comes back compared with what it must be."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from world import LAYOUT

from tiermem import NotDurableError, OutOfPagesError, Sequence, TierManager, TierMemError
from tiermem.publication import NO_SLOT_LEFT
from torture.content import PAGE, SALTS, Prompts, chain_words, kv_of, num_wrong_bytes
from torture.tally import Tally, ViolationError

WEIGHTS = {
    "open": 8,
    "grow": 30,
    "grow_two": 5,
    "undo": 3,
    "read": 8,
    "fork": 4,
    "rollback": 5,
    "suspend": 4,
    "prefetch": 3,
    "close_one": 6,
    "poll": 6,
    "flush": 4,
}
MAX_SEQUENCES = 4


@dataclass(eq=False)
class Known:
    """What must be true of one sequence: it holds `tokens` of `prompt` under `salt`."""

    sequence: Sequence
    salt: bytes
    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    named: int = 0


class BodyError(Exception):
    """Raised within a step, to have it undone."""


class Actor:
    """Drives `manager` by `rng`.

    With `strays`, sequences leave their prompts now and then, so that ever more pages are stored. Errors of
    the types `expected` are counted: their sequence is closed, for its pages may be lost; OutOfPagesError always
    may come, and changes nothing.
    """

    def __init__(
        self,
        manager: TierManager,
        prompts: Prompts,
        rng: random.Random,
        tally: Tally,
        *,
        strays: bool = False,
        expected: tuple[type[TierMemError], ...] = (),
        limit_s: float = 60.0,
    ) -> None:
        self.manager = manager
        self.prompts = prompts
        self.rng = rng
        self.tally = tally
        self.strays = strays
        self.expected = expected
        self.limit_s = limit_s
        self.known: list[Known] = []
        self.slow: dict[str, float] = {}

    # ---- operations --------------------------------------------------------------------------------

    def act(self, name: str | None = None) -> str:
        """Do one operation, by its weight unless named; its name."""
        if name is None:
            name = self.rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        try:
            getattr(self, f"do_{name}")()
        except OutOfPagesError:
            self.tally.refused += 1
        except NotDurableError as error:
            if error.reason != NO_SLOT_LEFT and not issubclass(NotDurableError, self.expected):
                raise
            self.tally.refused += 1
        except self.expected:
            self.tally.refused += 1
            self.drop_damaged()
        self.tally.operations += 1
        return name

    def do_open(self) -> None:
        """Attach what is stored of a prompt; compare all of it."""
        if len(self.known) >= MAX_SEQUENCES:
            self.do_close_one()
        salt, prompt = self.rng.choice(SALTS), self.rng.choice(self.prompts.tokens)
        end = self.rng.randint(0, len(prompt))
        with self.timed("open_sequence"):
            sequence = self.manager.open_sequence(prompt[:end], salt=salt, label="torture")
        if sequence.num_tokens > end or sequence.num_tokens % PAGE:
            raise ViolationError(f"{sequence.num_tokens} of {end} tokens attached")
        tokens = list(prompt[: sequence.num_tokens])
        self.known.append(Known(sequence, salt, prompt, tokens, len(tokens)))
        if self.rng.random() < 0.3:
            self.compare(self.known[-1])

    def do_grow(self) -> None:
        """Append and name more tokens of one sequence."""
        self.grow(1)

    def do_grow_two(self) -> None:
        """The same for two sequences in one step."""
        self.grow(2)

    def do_undo(self) -> None:
        """A step whose body fails: nothing has changed after it."""
        self.grow(1, fails=True)

    def do_read(self) -> None:
        """Compare a range of tokens of one layer."""
        known = self.pick()
        if known:
            start = self.rng.randint(0, len(known.tokens))
            end = self.rng.randint(start, len(known.tokens))
            self.compare(known, start, end)

    def do_fork(self) -> None:
        """A second sequence from where one is."""
        known = self.pick()
        if known and len(self.known) < MAX_SEQUENCES:
            with self.timed("fork"):
                twin = known.sequence.fork("twin")
            others = [
                p for p in self.prompts.tokens if p[: len(known.tokens)] == tuple(known.tokens)
            ]
            prompt = self.rng.choice(others) if others else known.prompt
            self.known.append(Known(twin, known.salt, prompt, list(known.tokens), known.named))

    def do_rollback(self) -> None:
        """Take back some tokens."""
        known = self.pick()
        if known:
            left = len(known.tokens) - min(len(known.tokens), self.rng.choice([1, 2, 17, 40]))
            with self.timed("rollback"):
                known.sequence.rollback(len(known.tokens) - left)
            del known.tokens[left:]
            known.named = min(known.named, left)

    def do_suspend(self) -> None:
        """Move one sequence down."""
        known = self.pick()
        if known:
            with self.timed("suspend"):
                known.sequence.suspend()

    def do_prefetch(self) -> None:
        """Start bringing one sequence up."""
        known = self.pick()
        if known:
            with self.timed("prefetch"):
                known.sequence.prefetch()

    def do_close_one(self) -> None:
        """Let go of one sequence."""
        known = self.pick()
        if known:
            self.known.remove(known)
            with self.timed("close_sequence"):
                known.sequence.close()

    def do_poll(self) -> None:
        """Idle work."""
        with self.timed("poll"):
            self.manager.poll()
        self.manager.check()

    def do_flush(self) -> None:
        """Make everything published durable."""
        with self.timed("flush"):
            self.manager.flush()

    # ---- steps -------------------------------------------------------------------------------------

    def grow(self, count: int, *, fails: bool = False) -> None:
        """One step of up to `count` sequences, recorded mostly."""
        batch, new = [], []
        for known in self.rng.sample(self.known, min(count, len(self.known))):
            tokens = self.next_tokens(known)
            if tokens:
                batch.append(known)
                new.append(tokens)
        if not batch:
            return
        fail_at = self.rng.randrange(2 * LAYOUT.num_layers) if fails else -1
        try:
            self.step(batch, new, fail_at)
        except BodyError:
            return
        for known, tokens in zip(batch, new, strict=True):
            known.tokens += tokens
            if self.rng.random() < 0.9:
                with self.timed("record"):
                    known.sequence.record(known.tokens[known.named :])
                known.named = len(known.tokens)

    def step(self, batch: list[Known], new: list[list[int]], fail_at: int) -> None:
        """Append `new` to `batch` and compare what one row attends to; fails where `fail_at` says."""
        words = [
            chain_words(k.salt, np.array(k.tokens + n)) for k, n in zip(batch, new, strict=True)
        ]
        counts = [len(tokens) for tokens in new]
        q = torch.full((sum(counts), 1, LAYOUT.head_dim), 0.5)
        sequences = [k.sequence for k in batch]
        results: list[torch.Tensor] = []
        with ExitStack() as stack:
            with self.timed("step_begins"):
                step = stack.enter_context(self.manager.step(sequences, new_tokens=counts))
            for layer in range(LAYOUT.num_layers):
                if fail_at == 2 * layer:
                    raise BodyError
                kv = [kv_of(w[-n:], layer) for w, n in zip(words, counts, strict=True)]
                together = torch.cat(kv, dim=1)
                with self.timed("append"):
                    step.append(layer, together[0], together[1])
                with self.timed("attend"):
                    out = step.attend(layer, q)
                results.append(out[-1, 0].clone())
                if fail_at == 2 * layer + 1:
                    raise BodyError
            with self.timed("step_ends"):
                stack.close()
        # what was found damaged meanwhile has undone the step: its results are nobody's
        for layer, out in enumerate(results):
            self.compare_attention(out, kv_of(words[-1], layer))

    def compare_attention(self, out: torch.Tensor, kv: torch.Tensor) -> None:
        """The last row's output against the definition in float64."""
        k, v = kv[:, :, 0].double()
        weights = torch.softmax(
            (k @ torch.full((k.shape[1],), 0.5).double()) / k.shape[1] ** 0.5, 0
        )
        if not torch.allclose(out.double(), weights @ v, rtol=1e-4, atol=1e-5):
            self.tally.wrong_bytes += out.numel() * out.element_size()
            raise ViolationError("attention over stored pages gives a wrong result")
        self.tally.bytes_checked += kv.numel() * kv.element_size()

    def next_tokens(self, known: Known) -> list[int]:
        """What `known`'s prompt says next; rarely something else, with `strays`."""
        start = len(known.tokens)
        count = min(self.rng.choice([1, 3, 16, 33, 60]), len(known.prompt) - start)
        if self.strays and self.rng.random() < 0.3:
            return [self.rng.randrange(2**32) for _ in range(count)]
        return list(known.prompt[start : start + count])

    # ---- comparing ---------------------------------------------------------------------------------

    def pick(self) -> Known | None:
        """Any sequence."""
        return self.rng.choice(self.known) if self.known else None

    def compare(self, known: Known, start: int = 0, end: int | None = None) -> None:
        """Every byte of tokens [start, end) in all layers against what was appended."""
        if known.sequence.num_tokens != len(known.tokens):
            raise ViolationError(f"{known.sequence.num_tokens} tokens, not {len(known.tokens)}")
        end = len(known.tokens) if end is None else end
        self.compare_tokens(known.sequence, known.salt, known.tokens[:end], start)

    def compare_tokens(
        self, sequence: Sequence, salt: bytes, tokens: SequenceOf[int], start: int = 0
    ) -> None:
        """All layers of what `sequence` holds of `tokens` from `start` on."""
        words = chain_words(salt, np.array(tokens, dtype=np.int64))[start:]
        for layer in range(LAYOUT.num_layers):
            with self.timed("read"):
                found = sequence.read(layer, start, len(tokens))
            for part, wanted in zip(found, kv_of(words, layer), strict=True):
                wrong = num_wrong_bytes(part, wanted)
                self.tally.bytes_checked += part.numel() * part.element_size()
                self.tally.wrong_bytes += wrong
                if wrong:
                    raise ViolationError(
                        f"{wrong} wrong bytes in tokens [{start}, {len(tokens)}) of layer {layer}, salt {salt!r}"
                    )

    def drop_damaged(self) -> None:
        """Close every sequence that lost pages; the other ones are whole."""
        for known in list(self.known):
            if self.manager._core.table.is_lost(known.sequence.pages).any():
                self.known.remove(known)
                known.sequence.close()

    def close_all(self) -> None:
        """Close every sequence."""
        for known in self.known:
            known.sequence.close()
        self.known.clear()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Note how long a call takes, and whether that is too long."""
        start_s = time.monotonic()
        try:
            yield
        finally:
            took_s = time.monotonic() - start_s
            self.tally.call_s = max(self.tally.call_s, took_s)
            self.slow[name] = max(self.slow.get(name, 0.0), took_s)
            if took_s > self.limit_s:
                self.tally.late += 1
