"""KvField: one piece of device memory full of random K and V, seen as pools of any layout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tiermem.attention.backend import AttentionBackend
from tiermem.attention.pool_view import PagedTables, PoolView
from tiermem.attention.work_list import WorkList
from tiermem.device.protocol import Device
from tiermem.errors import ConfigError
from tiermem.layout import PageLayout


class KvField:
    """Allocated once for all cases: a GPU is slow for a while after much memory was freed. A context.

    Raises
    ------
    ConfigError: there is no room.
    """

    def __init__(self, device: Device, num_bytes: int) -> None:
        self._on = device.torch_device
        self._memory = device.allocate(num_bytes)
        self._data = self._memory.tensor.view(torch.float16)
        self._random = torch.Generator(self._on).manual_seed(0)
        for part in self._data.split(1 << 30):
            part.normal_(generator=self._random)
        device.compute_stream().synchronize()
        self._device = device

    def __enter__(self) -> KvField:
        return self

    def __exit__(self, *_: object) -> None:
        self._device.compute_stream().synchronize()
        del self._data
        self._memory.free()

    def pool(self, layout: PageLayout) -> PoolView:
        """The memory as slots of whole pages."""
        slot_items = layout.slot_bytes // layout.item_bytes
        return PoolView(self._data, layout, slot_items, self._data.numel() // slot_items)

    def tables(
        self,
        backend: AttentionBackend,
        pool: PoolView,
        lengths: Sequence[int],
        new_tokens: Sequence[int],
    ) -> PagedTables:
        """Sequences of `lengths` tokens, the last `new_tokens` of them new, in random slots of the pool.

        Decoding is planned as a step would.
        """
        counts = [pool.layout.pages_for(length) for length in lengths]
        slots = self._slots(pool, sum(counts))
        block = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        first = 0
        for row, count in zip(block, counts, strict=True):
            row[:count] = slots[first : first + count]
            first += count
        rows = [0]
        for count in new_tokens:
            rows.append(rows[-1] + count)
        past = [length - new for length, new in zip(lengths, new_tokens, strict=True)]
        return PagedTables(
            block_table=block.to(self._on),
            page_starts=None,
            num_pages=self._ints(counts),
            kv_end=self._ints(lengths),
            row_starts=self._ints(rows),
            q_start=self._ints(past),
            max_rows=max(new_tokens),
            max_pages=max(counts),
            num_rows=rows[-1],
            work=self._work(backend, pool, lengths) if max(new_tokens) == 1 else None,
        )

    def places(self, pool: PoolView, tokens: int, part: int) -> torch.Tensor:
        """Where `tokens` tokens of whole pages go, int64; different pages for each `part`."""
        pages = pool.layout.pages_for(tokens)
        slots = self._slots(pool, pages * (part + 1))[-pages:].long()
        within = torch.arange(pool.layout.page_tokens)
        flat = (slots[:, None] * pool.layout.page_tokens + within).flatten()
        return flat[:tokens].to(self._on)

    def _work(
        self, backend: AttentionBackend, pool: PoolView, lengths: Sequence[int]
    ) -> WorkList | None:
        planned = backend.plan(pool.layout, np.array(lengths, dtype=np.int64))
        if planned is None:
            return None
        rows = torch.from_numpy(planned.rows.copy()).to(self._on)
        return WorkList(rows, planned.max_splits, planned.num_partials)

    def _slots(self, pool: PoolView, count: int) -> torch.Tensor:
        """The first `count` slots of an order of all that looks random and is the same every time."""
        if count > pool.num_slots:
            raise ConfigError(
                f"{count} pages of {pool.layout.slot_bytes} bytes do not fit the "
                f"{self._memory.num_bytes} bytes of the benchmark"
            )
        order = torch.randperm(pool.num_slots, generator=torch.Generator().manual_seed(0))
        return order[:count].to(torch.int32)

    def _ints(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._on)
