"""Step: one pass of the model over new tokens of some sequences; prefill and decode alike."""

from __future__ import annotations

import contextlib
import time
from functools import partial
from types import TracebackType
from typing import Protocol

import numpy as np
import torch

from tiermem import trace
from tiermem.attention.arguments import check_attend
from tiermem.attention.page_lse import PageLse
from tiermem.chunks import hot_tables, hot_token_slots
from tiermem.core import Core
from tiermem.device_work import DeviceWork
from tiermem.errors import ClosedError, TierMemError, TransferError
from tiermem.lower_pages import LowerPages
from tiermem.plan import Plan
from tiermem.planner import make_plan, plan_resident, undo
from tiermem.pools import Ids, Tier, as_ids
from tiermem.ram_attention import RamWork, StepBytes
from tiermem.resident import ResidentPool, ResidentTables
from tiermem.sequence import Sequence
from tiermem.step_record import StepRecord
from tiermem.upload import Upload


class StepOwner(Protocol):
    """The manager, as its steps see it."""

    def step_begins(self, step: Step) -> None: ...

    def step_ended(
        self, sequences: list[Sequence], reads: dict[Tier, int], record: StepRecord | None
    ) -> None: ...


class Step:
    """New tokens of a batch of sequences on their way through the layers; made by `TierManager.step`.

    Used as a context: for each layer in order `append` once, then `attend` any number of times. Rows of k, v, q
    and of the result are the new tokens of all sequences, in the order of the sequences. Leaving the context
    normally makes the tokens part of their sequences; leaving it by an exception undoes the step.

    Ordering: everything runs on the stream that is torch's current one when the step begins; results are ready
    in stream order. The host waits for reads from the SSD only, and at the end of a step that read pages from
    lower tiers, until all of them were compared with their checksums, or that wrote pages through to one.
    """

    def __init__(
        self,
        core: Core,
        resident: ResidentPool,
        owner: StepOwner,
        sequences: list[Sequence],
        new_tokens: list[int],
    ) -> None:
        self._core = core
        self._resident_pool = resident
        self._owner = owner
        self._sequences = sequences
        self._new_tokens = new_tokens
        self._plan: Plan | None = None
        self._lower: LowerPages | None = None
        """None where all pages are hot."""
        self._wanted = StepBytes(0, 0, 0)
        self._start_s = 0.0
        self._streamed_before = (0, 0)
        self._next_layer = 0
        self._resident: ResidentTables | None = None

    # ---- the context -------------------------------------------------------------------------------

    def __enter__(self) -> Step:
        core = self._core
        self._owner.step_begins(self)
        try:
            trace.begin("step")
            # before planning: the open pages of these sequences are not idle
            self._set_running(True)
            core.leases.step_begins(self._sequences)
            self._start_s = time.perf_counter()
            self._streamed_before = self._streamed()
            self._plan = plan_resident(core, self._sequences, self._new_tokens)
            if self._plan is None:
                self._plan = make_plan(core, self._sequences, self._new_tokens)
            self._make_tables(self._plan)
        except BaseException:
            if self._plan is not None:
                self._end(self._plan, None)
            self._leave({}, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        plan = self._running_plan()
        replaced: Ids | None = None
        record: StepRecord | None = None
        try:
            if error is None:
                self._check_complete(plan)
                record = self._record(plan, self._settle_ram())
                self._check_bytes(plan)
                replaced = self._commit(plan)
        finally:
            try:
                self._end(plan, replaced)
            finally:  # even where that is interrupted
                self._leave(plan.reads, record if replaced is not None else None)

    # ---- the body ----------------------------------------------------------------------------------

    @trace.traced("append")
    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store K and V of the new tokens of one layer.

        Parameters
        ----------
        layer: the layers in order, from 0.
        k, v: (new tokens, kv_heads, head_dim), the layout's dtype, on the manager's device.

        Raises
        ------
        TypeError, ValueError: a wrong shape, dtype or device. TierMemError: not this layer's turn.
        """
        self._running_plan()
        if layer != self._next_layer:
            due = (
                f"layer {self._next_layer}"
                if self._next_layer < self._core.layout.num_layers
                else "none, all are appended"
            )
            raise TierMemError(f"append of layer {layer}: the layers come in order, due is {due}")
        _require_tensor("k", k)
        _require_tensor("v", v)
        self._core.backend.store(self._core.hot, layer, k, v, self._token_slots)
        if self._lower is not None:
            self._lower.append(layer, k, v)
        self._next_layer += 1

    @trace.traced("attend")
    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
    ) -> torch.Tensor:
        """Causal attention of the new tokens over everything stored in their sequences, exactly.

        Parameters
        ----------
        layer: the layer appended last.
        q: (new tokens, q_heads, head_dim), q_heads a multiple of kv_heads.
        scale: factor on q . k; 1 / sqrt(head_dim) if not given.
        window: each token sees this many tokens, itself included; all if not given.

        Returns
        -------
        (new tokens, q_heads, head_dim), of q's dtype.

        Raises
        ------
        TypeError, ValueError: a wrong shape, dtype or device, a scale or window out of range.
        TierMemError: not this layer's turn. CorruptPageError: a page read from the SSD or attended in RAM was
        found damaged; others are found when the context is left.
        """
        self._check_turn(layer, q)
        return self._attend(layer, q, scale, window, None)[0]

    @trace.traced("attend")
    def attend_with_mass(
        self,
        layer: int,
        q: torch.Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `attend`, and the mass of each page: the sum of the softmax's weights of its tokens.

        Returns
        -------
        The output, and the mass (new tokens, q_heads, pages) float32 on the manager's device: of each page by its
        number in the token's sequence, in whichever tier it is; 0 past the sequence's last one. `pages` is of the
        longest sequence; where a CUDA graph is captured, what its tables have room for. A row's sum up to 1.

        Raises: as `attend`. It takes 4 bytes for each number, and up to 8 times that for a while.
        """
        plan = self._check_turn(layer, q)
        core, tables = self._core, self._tables
        check_attend(core.hot, q, tables, window)
        num_pages = max(len(share.pages) for share in plan.shares)
        room = max(num_pages, tables.max_pages)
        page_lse = core.backend.new_page_lse(core.hot, q.shape[0], q.shape[1], room)
        out, lse = self._attend(layer, q, scale, window, page_lse)
        mass = core.backend.page_mass(page_lse, lse)
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            return out, mass  # when it is replayed, the sequences are longer
        return out, mass[..., :num_pages]

    # ---- replays -----------------------------------------------------------------------------------

    @property
    def resident_tables(self) -> ResidentTables | None:
        """The tables at fixed addresses that this step reads: a graph captured over them serves all steps that
        have the same ones. None unless all pages are hot and each sequence has one new token."""
        return self._resident

    def begin_again(self) -> None:
        """What was appended and attended so far did not run: start at the first layer."""
        self._next_layer = 0

    def note_replay(self) -> None:
        """The compute stream was given all layers of this step as a captured graph."""
        self._next_layer = self._core.layout.num_layers

    # ---- parts -------------------------------------------------------------------------------------

    def _make_tables(self, plan: Plan) -> None:
        if plan.is_resident and plan.num_rows == len(plan.shares):
            self._resident = self._resident_pool.tables_of(plan)
            self._tables, self._token_slots = self._resident.paged, self._resident.token_slots
            return
        core = self._core
        upload = Upload(core.device.torch_device)
        if not plan.is_resident:
            self._lower = LowerPages(core, plan, upload)
            self._wanted = self._lower.wanted
            self._start_s = time.perf_counter()
            self._lower.begin()  # the link is at work while the rest is made
        self._tables = hot_tables(core, plan, upload)
        self._token_slots = hot_token_slots(core, plan, upload)
        upload.send()
        if self._lower is not None:
            self._lower.begin_ram(plan)
            if self._lower.is_empty:
                self._lower = None

    def _check_turn(self, layer: int, q: torch.Tensor) -> Plan:
        plan = self._running_plan()
        if layer != self._next_layer - 1:
            raise TierMemError(
                f"attend of layer {layer}: must follow append of that layer; the last one appended "
                f"is {self._next_layer - 1 if self._next_layer else 'none'}"
            )
        _require_tensor("q", q)
        return plan

    def _attend(
        self,
        layer: int,
        q: torch.Tensor,
        scale: float | None,
        window: int | None,
        page_lse: PageLse | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and lse over all pages."""
        if scale is None:
            scale = self._core.layout.head_dim**-0.5
        if self._lower is not None:
            return self._lower.attend(layer, q, self._tables, scale, window, page_lse)
        return self._core.backend.attend(
            self._core.hot, layer, q, self._tables,
            scale=scale, window=window, out_dtype=q.dtype, page_lse=page_lse,
        )  # fmt: skip

    # ---- the end -----------------------------------------------------------------------------------

    def _settle_ram(self) -> RamWork:
        """What was handed to the CPU has ended, well or by an error."""
        return RamWork(0, 0.0) if self._lower is None else self._lower.settle_ram()

    def _record(self, plan: Plan, work: RamWork) -> StepRecord:
        """What the step was, for whoever looks and for the share of the next ones."""
        elapsed_s, ram = time.perf_counter() - self._start_s, self._core.ram
        if ram is not None:
            ram.policy.learn(self._wanted, work, elapsed_s)
        pairs = zip(self._streamed(), self._streamed_before, strict=True)
        streamed, cold = (now - before for now, before in pairs)
        return StepRecord(
            new_tokens=plan.num_rows,
            resident_bytes=plan.reads[Tier.GPU] * self._core.layout.page_bytes,
            streamed_bytes=streamed,
            cold_bytes=cold,
            attended_bytes=work.num_bytes,
            attended_s=work.seconds,
            awaited_s=work.awaited_s,
            elapsed_s=elapsed_s,
        )

    def _streamed(self) -> tuple[int, int]:
        """Bytes that came through the ring so far, from RAM and from the SSD."""
        meter = self._core.mover.meter
        return meter.streamed_in(Tier.RAM), meter.streamed_in(Tier.SSD)

    def _check_complete(self, plan: Plan) -> None:
        num_layers = self._core.layout.num_layers
        if self._next_layer != num_layers:
            raise TierMemError(
                f"the step ended after {self._next_layer} of {num_layers} layers; it is undone"
            )
        for transfer in plan.promotions:
            transfer.check()

    def _check_bytes(self, plan: Plan) -> None:
        """What the step read from lower tiers is what was stored there: waits for the device to say so."""
        core = self._core
        checks = [*plan.checks, *(self._lower.checks() if self._lower is not None else ())]
        if checks:
            core.device.compute_stream().record().wait()
        if damages := [damage for check in checks for damage in check.damages()]:
            raise core.mover.quarantine.report(damages)
        for transfer in plan.promotions:
            transfer.wait()
            transfer.check()

    def _commit(self, plan: Plan) -> Ids:
        """The tokens become part of their sequences; pages that continued others replace them."""
        core = self._core
        if self._lower is not None:
            self._lower.commit()
        fulls, full_pages = [], [as_ids([])]
        for share in plan.shares:
            fulls.append((share.past_tokens + share.new_tokens) // core.layout.page_tokens)
            if fulls[-1] > share.first_written:
                written = share.pages[share.first_written : fulls[-1]]
                full_pages.append(written[~core.table.is_sealed(written)])
        plan.born = core.seal(np.concatenate(full_pages))  # the last that may be refused
        before = [(share.sequence.pages, share.past_tokens) for share in plan.shares]
        try:
            for share in plan.shares:
                share.sequence.advance(share.pages, share.new_tokens)
            plan.created.clear()
        except BaseException:  # an interrupt: all of them or none
            for share, (pages, num_tokens) in zip(plan.shares, before, strict=True):
                share.sequence.pages, share.sequence.num_tokens = pages, num_tokens
            raise
        if not core.room.is_short(Tier.GPU):
            for share, full in zip(plan.shares, fulls, strict=True):
                if plan.is_resident or share.is_hot:
                    core.leases.grant(share.sequence, share.pages[:full])
        return np.concatenate([share.replaced for share in plan.shares])

    def _end(self, plan: Plan, replaced: Ids | None) -> None:
        """Hand the pins to the list of work in flight. `replaced` is None where the step is undone."""
        core = self._core
        self._plan = None
        if self._lower is not None:
            self._lower.drop_new()
        core.ring.drop_ahead()
        if replaced is not None:
            event = core.device.compute_stream().record()
            for sequence in self._sequences:
                sequence.written = event
            what = f"a step of {plan.num_rows} new tokens"
            core.in_flight.add(DeviceWork(what, [event], partial(plan.release_pins, core)))
            core.table.release(replaced)
            return
        with contextlib.suppress(TransferError):  # the step has failed already
            self._settle_ram()
        undo(core, plan, self._lower)
        if core.mover.quarantine.is_waiting:
            core.in_flight.drain()  # steps that ended before may still hold the same copies
            core.drop_damaged()

    def _leave(self, reads: dict[Tier, int], record: StepRecord | None) -> None:
        self._set_running(False)
        try:
            self._owner.step_ended(self._sequences, reads, record)
        finally:
            trace.end()

    def _set_running(self, running: bool) -> None:
        for sequence in self._sequences:
            sequence.step_running = running

    def _running_plan(self) -> Plan:
        if self._plan is None:
            raise ClosedError("the step is not running: use it inside `with tm.step(...) as step:`")
        return self._plan


def _require_tensor(name: str, tensor: object) -> None:
    """The backend checks shape, dtype and device, once for arguments that are alike."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: must be a torch.Tensor, not {type(tensor).__name__}")
