"""TritonBackend: attention on a GPU through Triton kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tiermem.attention.arguments import (
    check_attend,
    check_mass,
    check_merge,
    check_page_lse,
    check_store,
)
from tiermem.attention.kernels import tiles
from tiermem.attention.kernels.attend_call import AttendCall, without_rows
from tiermem.attention.kernels.compiled import CompiledKernels
from tiermem.attention.kernels.driver import BoundLaunch
from tiermem.attention.kernels.launches import bind_mass, launch_merge, prepare_store
from tiermem.attention.kernels.tiles import Capability
from tiermem.attention.page_lse import PageLse
from tiermem.attention.pool_view import PagedTables, PoolView, ProductMath
from tiermem.attention.work_list import PlannedWork, plan_work, tile_counts
from tiermem.layout import PageLayout

KEPT_LAUNCHES = 256
"""Launches that a pool or a table remembers, at most: one for each shape of its arguments."""


class TritonBackend:
    """Attention through Triton kernels on the tensors' GPU; see AttentionBackend.

    Arguments are checked and a launch is worked out once for each combination of pool, tables and shapes;
    after that, a layer costs the allocation of its results and the launch itself.

    Parameters
    ----------
    capability: the GPU's compute capability, which decides the tiles.
    num_sms: its multiprocessors, which decide the splits.
    math: what the products are made of.
    """

    def __init__(
        self, capability: Capability, num_sms: int, math: ProductMath = ProductMath.STORED
    ) -> None:
        self.capability = capability
        self.num_sms = num_sms
        self.math = math
        self._kernels: dict[int, CompiledKernels] = {}
        self._planned: tuple[int, bytes, PlannedWork] | None = None
        self._masses: dict[object, BoundLaunch] = {}

    def plan(self, layout: PageLayout, kv_lens: NDArray[np.int64]) -> PlannedWork | None:
        """Chunks that keep every multiprocessor busy; None without sequences."""
        if len(kv_lens) == 0:
            return None
        # A plan depends on the lengths in tiles alone, which seldom change from step to step.
        tiles_of = tile_counts(kv_lens)
        key = tiles_of.tobytes()
        if self._planned is None or self._planned[:2] != (layout.num_kv_heads, key):
            planned = plan_work(kv_lens, layout.num_kv_heads, self.num_sms)
            self._planned = (layout.num_kv_heads, key, planned)
        return self._planned[2]

    def store(
        self,
        pool: PoolView,
        layer: int,
        k: torch.Tensor,
        v: torch.Tensor,
        token_slots: torch.Tensor,
    ) -> None:
        """Write the K and V of n tokens to their places in the pool."""
        key = (
            id(self), "store", k.shape, k.stride(), v.shape, v.stride(), k.dtype, v.dtype,
            (k.data_ptr() | v.data_ptr()) % 16, k.get_device(), v.get_device(),
            token_slots.shape, token_slots.stride(), token_slots.dtype, token_slots.get_device(),
        )  # fmt: skip
        launch = pool.prepared.get(key)
        if launch is None or launch.backend is not self:
            check_store(pool, k, v, token_slots)
            kernels = self._kernels_of(pool.data.get_device())
            launch = prepare_store(self, kernels, pool, k, v, token_slots.numel())
            _remember(pool.prepared, key, launch)
        launch(pool.layer_offset(layer), k, v, token_slots)

    def attend(
        self,
        pool: PoolView,
        layer: int,
        q: torch.Tensor,
        tables: PagedTables,
        *,
        scale: float,
        window: int | None,
        out_dtype: torch.dtype,
        page_lse: PageLse | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax attention of each query row over the stored tokens that it may see."""
        device = q.get_device()
        kernels = self._kernels_of(device)
        stream = kernels.current_stream()
        key = (
            id(self), id(pool), q.shape, q.stride(), q.dtype, q.data_ptr() % 16, device,
            scale, window, out_dtype, stream, None if page_lse is None else page_lse.form,
        )  # fmt: skip
        launch = tables.prepared.get(key)
        if launch is None or launch.backend is not self or launch.pool is not pool:
            check_attend(pool, q, tables, window)
            if page_lse is not None:
                check_page_lse(page_lse, q, tables, self._parts(pool.layout))
            if tables.num_rows == 0:
                launch = without_rows(self, kernels, pool, q, out_dtype)
            else:
                call = AttendCall(
                    self, kernels, pool, q, tables, scale, window, out_dtype, page_lse
                )
                launch = call.prepare()
            _remember(tables.prepared, key, launch)
        out, lse = launch(stream, pool.layer_offset(layer), q, page_lse)
        return out, lse

    def merge(
        self, outs: list[torch.Tensor], lses: list[torch.Tensor], out_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Join results over disjoint sets of tokens into the result over all of them."""
        check_merge(outs, lses)
        kernels = self._kernels_of(outs[0].get_device())
        return launch_merge(kernels, torch.stack(outs), torch.stack(lses), out_dtype)

    def new_page_lse(
        self, pool: PoolView, num_rows: int, num_heads: int, num_pages: int
    ) -> PageLse:
        """For calls to `attend` with this pool's layout."""
        parts = self._parts(pool.layout)
        return PageLse.empty(num_rows, num_heads, num_pages, pool.data.device, parts=parts)

    def page_mass(self, page_lse: PageLse, lse: torch.Tensor) -> torch.Tensor:
        """The share of each row's softmax that each page has."""
        values = page_lse.values
        check_mass(page_lse, lse)
        num_rows, _, heads = values.shape
        mass = lse.new_empty((num_rows, heads, page_lse.num_pages))
        if mass.numel() == 0:
            return mass
        kernels = self._kernels_of(values.get_device())
        key = page_lse.form
        launch = self._masses.get(key)
        if launch is None:
            launch = bind_mass(kernels, page_lse)
            _remember(self._masses, key, launch)
        passed = kernels.passed
        launch(kernels.current_stream(), passed(mass), passed(values), passed(lse.contiguous()))
        return mass

    def _parts(self, layout: PageLayout) -> int:
        """Places that the log-sum-exp of a page has: one for each tile."""
        item_bytes = 4 if self.math is ProductMath.FLOAT32 else layout.item_bytes
        head_block = tiles.next_power_of_2(layout.head_dim)
        return layout.page_tokens // tiles.part_tokens(head_block, item_bytes, layout.page_tokens)

    def _kernels_of(self, device: int) -> CompiledKernels:
        """The kernels for a device, by the index that its tensors give."""
        kernels = self._kernels.get(device)
        if kernels is None:
            kernels = self._kernels[device] = CompiledKernels(device)
        return kernels

    @property
    def launches_early(self) -> bool:
        """Whether a merge may be launched before the kernel ends that makes its parts."""
        return self.capability >= tiles.FIRST_WITH_DESCRIPTORS


def _remember(prepared: dict[Any, Any], key: object, launch: object) -> None:
    if len(prepared) >= KEPT_LAUNCHES:
        prepared.clear()
    prepared[key] = launch
