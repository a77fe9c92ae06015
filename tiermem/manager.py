"""TierManager: a KV cache over GPU memory, pinned RAM and SSD for one model in one process."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from functools import partial
from types import TracebackType

import numpy as np
import torch

from tiermem.build import build_core, open_store
from tiermem.closing import Closing, Memories
from tiermem.config import TierConfig
from tiermem.device.discovery import open_device
from tiermem.device.protocol import Device, Progress
from tiermem.errors import ClosedError, ConfigError, TierMemError
from tiermem.layout import PageLayout
from tiermem.limits import (
    attended_limit,
    calibration_of,
    disk_options,
    route_limits,
    use_best_copies,
)
from tiermem.plan import NO_PAGES
from tiermem.pools import Ids, Tier
from tiermem.pressure import Pressure
from tiermem.publication import flush_published, write_published
from tiermem.resident import ResidentPool
from tiermem.sequence import Sequence, check_token_ids
from tiermem.snapshots import Publisher
from tiermem.stats import Stats
from tiermem.step import Step
from tiermem.step_record import StepRecord
from tiermem.store import ColdStore
from tiermem.tally import Tally

log = logging.getLogger("tiermem")

MAX_LABEL = 200


class TierManager:
    """Allocates the tiers, moves pages between them and answers for every byte.

    Single-threaded: one thread calls it, its sequences and its steps. A context manager that closes.

    Parameters
    ----------
    layout: shape and dtype of the pages of this process' shard of the model.
    config: sizes and behaviour of the tiers.
    model_id: names the weights; pages of different ids are never mixed up.
    shard: (index, count) of this process among those that share a model.
    device: a device to use instead of the one that `config.device` names; closed with the manager.
    progress: called with the bytes of the RAM tier that are ready and with all of them, which for a large tier
        takes seconds.

    Raises
    ------
    ConfigError: a size, the device or the store cannot be had; nothing stays allocated.
    """

    def __init__(
        self,
        layout: PageLayout,
        config: TierConfig,
        model_id: str = "",
        shard: tuple[int, int] = (0, 1),
        *,
        device: Device | None = None,
        progress: Progress | None = None,
    ) -> None:
        _check_identity(model_id, shard)
        self.layout = layout
        self.config = config
        self.model_id = model_id
        self.shard = shard
        self._sequences: dict[Sequence, None] = {}
        self._step: Step | None = None
        self._closed = False
        self._started_s = time.time()
        self._publisher = Publisher()
        self._device = device if device is not None else open_device(config.device)[0]
        self._store: ColdStore | None = None
        try:
            # memory that lasts is written whether inference mode is on then or not
            with torch.inference_mode(False):
                self._build(progress)
            self._pressure = Pressure(
                self._device, config.pressure_warning, config.pressure_critical
            )
            self._publisher.publish(self.stats)
        except BaseException:
            self._abandon()
            raise

    def __enter__(self) -> TierManager:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._step = None  # an interrupt may have come while it was left
        self.close()

    @property
    def torch_device(self) -> torch.device:
        """Where K, V and q must lie."""
        return self._device.torch_device

    # ---- sequences and steps -----------------------------------------------------------------------

    def open_sequence(
        self,
        tokens: Iterable[int] | torch.Tensor | np.ndarray = (),
        salt: bytes = b"",
        label: str = "",
        at_most: int | None = None,
    ) -> Sequence:
        """A new sequence, with the longest stored prefix of `tokens` attached; `num_tokens` says how long.

        Whole pages are attached, possibly all tokens; the ids are looked up only, never stored.

        Parameters
        ----------
        tokens: ids of the prompt, 0 to 2^32 - 1; none opens an empty sequence.
        salt: pages of different salts never match (tenants).
        label: for stats, up to 200 characters.
        at_most: attach no more than this many tokens.

        Raises
        ------
        TypeError, ValueError: ids, salt, label or at_most that cannot be. ClosedError.
        """
        self._check_open()
        ids = check_token_ids(tokens)
        if not isinstance(salt, bytes):
            raise TypeError(f"salt={salt!r}: must be bytes")
        if not isinstance(label, str) or len(label) > MAX_LABEL:
            raise ValueError(
                f"label={str(label)[:40]!r}: must be text of at most {MAX_LABEL} characters"
            )
        if at_most is not None and at_most < 0:
            raise ValueError(f"at_most={at_most}: must be at least 0")
        core = self._core
        core.in_flight.reap()
        limit = len(ids) if at_most is None else min(len(ids), at_most)
        root = core.prefixes.chain_root(salt)
        keys = core.prefixes.chain(root.hash, np.array(ids[:limit], dtype=np.int64))
        pages = core.prefixes.match(keys)
        pages = pages[: core.num_within_reach(pages)]
        core.table.add_ref(pages)
        core.touch(pages)
        core.prefixes.note_attached(pages, keys[: len(pages)])
        attached = len(pages) * self.layout.page_tokens
        self._tally.prompt_tokens += len(ids)
        self._tally.attached_tokens += attached
        return Sequence(core, self, root, pages, ids[:attached], keys[: len(pages)], label)

    def step(self, sequences: SequenceOf[Sequence], new_tokens: int | SequenceOf[int] = 1) -> Step:
        """One pass over `new_tokens` new tokens of each of `sequences`; use it as a context.

        Parameters
        ----------
        sequences: different open sequences of this manager, 1 to `config.max_sequences`.
        new_tokens: one number for all or one each, at least 1.

        Raises
        ------
        TypeError, ValueError: as above. ClosedError: a closed sequence or manager.
        TierMemError: another step is still running. Entering the context raises OutOfPagesError when all
        tiers together have no room, and CorruptPageError or TransferError when pages cannot be brought back;
        leaving it does so when what was brought back is found damaged.
        """
        self._check_open()
        if self._step is not None:
            raise TierMemError("a step is still running: it must end before the next begins")
        chosen = list(sequences)
        counts = self._check_batch(chosen, new_tokens)
        self._core.in_flight.reap()
        return Step(self._core, self._resident, self, chosen, counts)

    def poll(self) -> None:
        """Idle work: settle what has ended, demote ahead of need, refresh the stats. Never waits."""
        self._check_open()
        self._core.in_flight.reap()
        self._core.drop_damaged()
        self._core.mover.probe()
        self._core.room.demote_ahead()
        if self._store is not None:
            self._store.poll()
        self._pressure.check()
        self._publisher.refresh(self.stats)

    def flush(self) -> None:
        """Return when every published page is durable on the SSD, within its cap (the most recent ones).

        Raises
        ------
        ConfigError: there is no SSD tier. NotDurableError: pages that ought to be durable are not: how many, and
        why. The disk is to be spared (`stats().disk.pause`), a write failed or missed its deadline, the SSD tier
        is switched off, or pages that open sequences have nowhere else fill it. What could be written is durable,
        and the other pages are where they were.
        TransferError: all are durable, but something else that was to be written is not.
        """
        self._check_open()
        if self._store is None:
            raise ConfigError("flush: there is no SSD tier (ssd=0); give ssd and ssd_path")
        self._core.mover.probe()
        self._core.in_flight.drain()
        flush_published(self._core, self._store)

    # ---- seeing ------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """A frozen picture of now."""
        return self._tally.stats(self._sequences)

    def note_computed_again(self, num_tokens: int) -> None:
        """Count tokens that were computed once more because their pages were lost, for the stats."""
        self._tally.computed_again_tokens += num_tokens

    def check(self) -> None:
        """Verify the bookkeeping by brute force; raises InvariantError saying what is wrong."""
        self._core.table.check()

    # ---- end ---------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close every sequence, write published pages to the SSD, within its cap, and give everything back.

        Always returns, also where a disk or the device hangs: memory that they may still use is then kept for the
        life of the process. A second call does nothing, or goes on where an interrupt ended the first. What cannot
        be written is logged, not raised: it is lost from the cache only.
        """
        if self._step is not None:
            raise TierMemError("a step is still running: leave it before the manager is closed")
        self._closing.run()

    # ---- for sequences and steps -------------------------------------------------------------------

    def sequence_opens(self, sequence: Sequence) -> None:
        """`sequence` was made."""
        self._sequences[sequence] = None

    def sequence_closes(self, sequence: Sequence) -> None:
        """`sequence` has let go of its pages."""
        self._sequences.pop(sequence)

    def step_begins(self, step: Step) -> None:
        """`step` is being entered."""
        self._check_open()
        if self._step is not None:
            raise TierMemError("a step is still running: it must end before the next begins")
        self._step = step

    def step_ended(
        self, sequences: list[Sequence], reads: dict[Tier, int], record: StepRecord | None
    ) -> None:
        """The running step was left, or never came to run; `reads` are the old pages it found in each tier.

        `record` is None where it was undone.
        """
        self._step = None
        for sequence in sequences:  # the order of last use
            self._sequences.pop(sequence)
            self._sequences[sequence] = None
        self._tally.note_step(reads, record)
        self.poll()

    # ---- inside ------------------------------------------------------------------------------------

    def _build(self, progress: Progress | None) -> None:
        """Open the store, allocate the tiers and put the parts together."""
        made = calibration_of(self._device)
        use_best_copies(self._device, made)
        limits = route_limits(made, self.config.ssd_path)
        self._store = open_store(self.layout, self.config, disk_options(made, self.config))
        self._core = build_core(
            self.layout, self.config, self.model_id, self.shard, self._device, self._store,
            self._seal_idle, self._open_pages, progress, made,
        )  # fmt: skip
        self._tally = Tally(
            self._core, self._device, self._store, self.model_id,
            limits, attended_limit(made), self._started_s,
        )  # fmt: skip
        self._resident = ResidentPool(self._core)
        self._closing = Closing(self._stages_of_closing())

    def _abandon(self) -> None:
        """Give back what `_build` has opened before it failed."""
        stages = [self._device.close, self._publisher.withdraw]
        if self._store is not None:
            stages.insert(0, self._store.close)
        self._closed = True
        Closing(stages).run()

    def _stages_of_closing(self) -> list[Callable[[], None]]:
        core, store = self._core, self._store
        memories = Memories(core, self._device, store, self.config.io_timeout_s)
        stages = [core.in_flight.drain, self._close_sequences]
        if store is not None:
            # what an interrupt left half done may lack the pins of a step that still runs
            stages += [self._device.drain, partial(write_published, core, store)]
        stages.append(memories.free)
        if store is not None:
            stages.append(store.close)
        return [*stages, self._device.close, self._publisher.withdraw]

    def _close_sequences(self) -> None:
        self._closed = True
        for sequence in list(self._sequences):
            sequence.step_running = False
            sequence.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the TierManager is closed")

    def _check_batch(
        self, sequences: list[Sequence], new_tokens: int | SequenceOf[int]
    ) -> list[int]:
        if not 1 <= len(sequences) <= self.config.max_sequences:
            raise ValueError(
                f"sequences: {len(sequences)} given, must be 1 to max_sequences={self.config.max_sequences}"
            )
        if len(set(sequences)) != len(sequences):
            raise ValueError("sequences: one is given twice")
        for sequence in sequences:
            sequence.check_usable()
            if sequence not in self._sequences:
                raise ValueError(f"sequence {sequence.label!r} belongs to another manager")
        counts = [new_tokens] * len(sequences) if isinstance(new_tokens, int) else list(new_tokens)
        if len(counts) != len(sequences):
            raise ValueError(f"new_tokens: {len(counts)} numbers for {len(sequences)} sequences")
        for count in counts:
            if isinstance(count, bool) or not isinstance(count, (int, np.integer)):
                raise TypeError(f"new_tokens={count!r}: must be an int")
            if count < 1:
                raise ValueError(f"new_tokens={count}: must be at least 1")
        return [int(count) for count in counts]

    def _seal_idle(self) -> bool:
        """Seal the open page of the sequence that was used longest ago and is in no step."""
        idle = (sequence for sequence in self._sequences if not sequence.step_running)
        return any(sequence.seal_tail() for sequence in idle)

    def _open_pages(self) -> Ids:
        """The pages of all sequences, each once."""
        return np.unique(np.concatenate([NO_PAGES, *(s.pages for s in self._sequences)]))


def _check_identity(model_id: str, shard: tuple[int, int]) -> None:
    if not isinstance(model_id, str):
        raise TypeError(f"model_id={model_id!r}: must be text")
    index, count = shard
    if not (0 <= index < count < 2**31):
        raise ValueError(f"shard={shard}: must be (index, count) with 0 <= index < count")
