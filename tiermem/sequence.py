"""Sequence: one growing list of tokens, the pages that hold their K and V, and their names."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

import numpy as np
import torch

from tiermem.core import Core
from tiermem.device.protocol import Event
from tiermem.errors import ClosedError, TierMemError
from tiermem.pools import NO_SLOT, VALID, Ids, Tier
from tiermem.store_names import ChainRoot

MAX_TOKEN_ID = 2**32 - 1


class SequenceOwner(Protocol):
    """The manager, as its sequences see it."""

    def sequence_opens(self, sequence: Sequence) -> None: ...

    def sequence_closes(self, sequence: Sequence) -> None: ...


class Sequence:
    """A sequence of tokens in the cache; made by `TierManager.open_sequence`, hashed by identity.

    `num_tokens` tokens have K and V stored; the first `num_named` of them have names (token ids), so that
    full pages of them can be published. All pages but the last are full and sealed. The sequence holds one
    reference to each of its pages until it is closed.
    """

    def __init__(
        self,
        core: Core,
        owner: SequenceOwner,
        root: ChainRoot,
        attached: Ids,
        names: SequenceOf[int],
        keys: list[bytes],
        label: str,
    ) -> None:
        self.label = label
        self.pages = attached
        self.num_tokens = len(names)
        self.step_running = False
        self.written: Event | None = None
        """Behind the step that has written the last page."""
        self._core = core
        self._root = root
        self._names = list(names)
        self._keys = keys
        self._owner: SequenceOwner | None = owner
        owner.sequence_opens(self)

    # ---- what it is --------------------------------------------------------------------------------

    @property
    def num_named(self) -> int:
        """Tokens from the start whose ids were recorded."""
        return len(self._names)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The recorded token ids."""
        return tuple(self._names)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._owner is None

    def check_usable(self) -> None:
        """Raise ClosedError once closed, TierMemError while a step on this sequence is running."""
        if self.is_closed:
            raise ClosedError(f"sequence {self.label!r} is closed")
        if self.step_running:
            raise TierMemError(f"sequence {self.label!r}: a step on it is still running")

    def intact_tokens(
        self, tiers: Iterable[Tier] = tuple(Tier), damaged: Iterable[int] = ()
    ) -> int:
        """Tokens from the start whose pages all have an intact copy in one of `tiers`, as far as is known.

        `damaged` are pages that count as lost. Does not wait, and reads nothing: damage that was not found yet
        does not count.
        """
        self.check_usable()
        table = self._core.table
        lost = np.isin(self.pages, np.fromiter(damaged, dtype=np.int64))
        lost |= ~np.logical_or.reduce([table.states(self.pages, tier) == VALID for tier in tiers])
        first = np.flatnonzero(lost)[:1]
        return int(first[0]) * self._core.layout.page_tokens if len(first) else self.num_tokens

    # ---- names -------------------------------------------------------------------------------------

    def record(self, token_ids: Iterable[int] | torch.Tensor | np.ndarray) -> None:
        """Name the earliest unnamed tokens, so that full pages of them can be found again.

        Parameters
        ----------
        token_ids: ids of tokens whose K and V were appended (the model's inputs), 0 to 2^32 - 1.

        Raises
        ------
        ValueError: more ids than unnamed tokens, or an id out of range; nothing was named.
        """
        self.check_usable()
        ids = check_token_ids(token_ids)
        unnamed = self.num_tokens - len(self._names)
        if len(ids) > unnamed:
            raise ValueError(
                f"token_ids: {len(ids)} ids given, {unnamed} appended tokens have no name yet"
            )
        self._names.extend(ids)
        self._publish_full_pages()

    # ---- shape -------------------------------------------------------------------------------------

    def rollback(self, num_tokens: int) -> None:
        """Forget the last `num_tokens` tokens and their names; pages they filled alone are released.

        A page that was full and is not any more is written on in place, unless it has a name, a copy or another
        user: then its bytes are copied first.

        Raises
        ------
        ValueError: below 0 or more than there are.
        """
        self.check_usable()
        if not 0 <= num_tokens <= self.num_tokens:
            raise ValueError(f"num_tokens={num_tokens}: must be 0 to {self.num_tokens}")
        layout = self._core.layout
        self.num_tokens -= num_tokens
        kept = layout.pages_for(self.num_tokens)
        self._core.leases.trim(self, self.num_tokens // layout.page_tokens)
        self._release(self.pages[kept:])
        self.pages = self.pages[:kept]
        del self._names[self.num_tokens :]
        del self._keys[self.num_tokens // layout.page_tokens :]
        self._reopen_tail()

    def fork(self, label: str = "") -> Sequence:
        """A second sequence with the same tokens; pages are shared, the last one until it is written."""
        self.check_usable()
        assert self._owner is not None
        self.seal_tail()
        self._core.table.add_ref(self.pages)
        twin = Sequence(
            self._core, self._owner, self._root, self.pages, self._names, list(self._keys), label
        )
        twin.num_tokens = self.num_tokens
        twin.written = self.written
        return twin

    def seal_tail(self) -> bool:
        """Seal a partly filled last page that is open, so that it can leave the GPU; whether there was one."""
        tail = self.pages[-1:]
        if len(tail) == 0 or self._core.table.is_sealed(tail)[0]:
            return False
        self._core.seal_between_steps(tail, self.written)
        return True

    # ---- place -------------------------------------------------------------------------------------

    def suspend(self) -> None:
        """Leave the GPU: pages that no other sequence uses keep copies in RAM or on the SSD only.

        The next step brings back what it needs. Waits for work in flight.

        Raises
        ------
        OutOfPagesError: the lower tiers have no room; what had room has left, nothing is lost.
        """
        self.check_usable()
        core = self._core
        core.leases.trim(self, 0)
        self.seal_tail()
        core.in_flight.drain()
        own = self.pages[core.table.refs(self.pages) == 1]
        core.room.move_down(own[core.table.states(own, Tier.GPU) == VALID], Tier.GPU)

    def prefetch(self) -> int:
        """Start bringing pages that are not hot closer, as far as slots are free or clean; never waits.

        Returns the number of pages that were started on their way.
        """
        self.check_usable()
        core = self._core
        core.in_flight.reap()
        return core.prefetch(self.pages[core.table.states(self.pages, Tier.GPU) != VALID])

    def read(self, layer: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of tokens [start, end) of one layer, as stored.

        Returns
        -------
        Two tensors (end - start, kv_heads, head_dim) of the layout's dtype on the device; copies.

        Raises
        ------
        ValueError: the layer or the range does not exist.
        CorruptPageError: a page's bytes were found damaged.
        """
        self.check_usable()
        layout = self._core.layout
        if not 0 <= layer < layout.num_layers:
            raise ValueError(f"layer={layer}: must be 0 to {layout.num_layers - 1}")
        if not 0 <= start <= end <= self.num_tokens:
            raise ValueError(
                f"start={start}, end={end}: must be 0 <= start <= end <= {self.num_tokens}"
            )
        first = start // layout.page_tokens
        pages = self.pages[first : layout.pages_for(end)] if end > start else self.pages[:0]
        k, v = self._core.read_pages(pages, layer)
        cut = slice(start - first * layout.page_tokens, end - first * layout.page_tokens)
        return k[cut].clone(), v[cut].clone()

    # ---- end ---------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the pages; published ones stay in the cache. A second call does nothing."""
        if self._owner is None:
            return
        self.check_usable()
        owner, self._owner = self._owner, None
        self._core.leases.trim(self, 0)
        self._release(self.pages)
        self.pages = self.pages[:0]
        owner.sequence_closes(self)

    # ---- for the step ------------------------------------------------------------------------------

    def advance(self, pages: Ids, new_tokens: int) -> None:
        """A step ended well: `pages` are all pages now, `new_tokens` more tokens are stored."""
        self.pages = pages
        self.num_tokens += new_tokens

    # ---- inside ------------------------------------------------------------------------------------

    def _release(self, pages: Ids) -> None:
        """Tail first, so that leaves are older than their parents in every LRU list."""
        self._core.prefixes.note_use(pages)
        self._core.table.release(pages[::-1].copy())

    def _reopen_tail(self) -> None:
        """Let a sealed last page that is not full be written on, where the GPU has all that there is of it."""
        table = self._core.table
        tail = self.pages[self.num_tokens // self._core.layout.page_tokens :]
        if len(tail) == 0 or not table.is_sealed(tail)[0]:
            return
        is_known = table.is_published(tail)[0] or table.is_lost(tail)[0]
        is_alone = table.states(tail, Tier.GPU)[0] == VALID and all(
            table.slots(tail, tier)[0] == NO_SLOT for tier in (Tier.RAM, Tier.SSD)
        )
        if table.refs(tail)[0] == 1 and is_alone and not is_known:
            table.reopen(tail)

    def _publish_full_pages(self) -> None:
        page_tokens = self._core.layout.page_tokens
        known = len(self._keys)
        full = len(self._names) // page_tokens
        if full == known:
            return
        names = np.array(self._names[known * page_tokens : full * page_tokens], dtype=np.int64)
        parent = self._keys[-1] if self._keys else self._root.hash
        keys = self._core.prefixes.chain(parent, names)
        self._core.prefixes.publish(
            self.pages[known:full], parent, keys, known, self._root, self.label
        )
        self._keys.extend(keys)


def check_token_ids(token_ids: Iterable[int] | torch.Tensor | np.ndarray) -> list[int]:
    """`token_ids` as a list of ints.

    Raises
    ------
    TypeError: not integers. ValueError: not one-dimensional, or an id outside 0 to 2^32 - 1.
    """
    if isinstance(token_ids, torch.Tensor):
        token_ids = token_ids.detach().cpu().numpy()
    array = np.asarray(token_ids if isinstance(token_ids, np.ndarray) else list(token_ids))
    if array.size == 0:
        return []
    if array.ndim != 1:
        raise ValueError(f"token_ids of shape {array.shape}: must be one-dimensional")
    if array.dtype.kind not in "iu":
        raise TypeError(f"token_ids of type {array.dtype}: must be integers")
    if int(array.min()) < 0 or int(array.max()) > MAX_TOKEN_ID:
        wrong = array[(array < 0) | (array > MAX_TOKEN_ID)][0]
        raise ValueError(f"token_ids: {wrong} is out of range, must be 0 to {MAX_TOKEN_ID}")
    return [int(token) for token in array]
