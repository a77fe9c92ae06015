"""AttentionBackend: what stores K and V into a pool and attends over it, and how one is chosen."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tiermem.attention.host import HostBackend
from tiermem.attention.page_lse import PageLse
from tiermem.attention.pool_view import TORCH_DTYPES, PagedTables, PoolView, ProductMath
from tiermem.attention.work_list import PlannedWork
from tiermem.layout import PageLayout

OLDEST_CAPABILITY = (7, 5)
"""Compute capability of the T4, the oldest GPU that tiermem's kernels are built for."""


class AttentionBackend(Protocol):
    """Stores K and V into slots and attends over them, on one device.

    Every method works on the current stream of the tensors' device, returns before the device has
    finished, and neither waits for the device nor reads anything back from it: a CUDA graph may capture it.
    """

    def plan(self, layout: PageLayout, kv_lens: NDArray[np.int64]) -> PlannedWork | None:
        """How to divide decoding among programs: once a step, for all layers; see WorkList.

        Parameters
        ----------
        kv_lens: (B,) tokens that each sequence's only query row sees, on the host. The plan stays valid
            while they grow, and good while they grow by few pages.

        Returns
        -------
        What to upload and pass in PagedTables.work; None where the backend has no use for it.
        """

    def store(
        self,
        pool: PoolView,
        layer: int,
        k: torch.Tensor,
        v: torch.Tensor,
        token_slots: torch.Tensor,
    ) -> None:
        """Write the K and V of n tokens to their places in the pool.

        Parameters
        ----------
        k, v: (n, kv_heads, head_dim), the pool's dtype and device, any strides whose last is 1.
        token_slots: (n,) int64, slot * page_tokens + offset in the page; negative: not stored here.
            No place may be named twice.

        Raises
        ------
        TypeError, ValueError: a wrong dtype, shape, stride, device or layer.
        """

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
        """Softmax attention of each query row over the stored tokens that `tables` lets it see.

        Parameters
        ----------
        q: (num_rows, q_heads, head_dim), the pool's dtype and device, any strides whose last is 1.
            q_heads is a multiple of kv_heads; query head i reads head i // (q_heads // kv_heads).
        scale: what q . k is multiplied by before the softmax.
        window: how many positions a row sees, its own included; None: all.
        out_dtype: float16, bfloat16 or float32; float32 for a partial result that will be merged.
        page_lse: from `new_page_lse`: gets the log-sum-exp of the scores of each page that `tables` names, in
            the place of the page's number in its sequence (its start over page_tokens). A page's scores that
            are more than 87 below those of others may count as unseen.

        Returns
        -------
        Output (num_rows, q_heads, head_dim) of out_dtype, and the natural logarithm of the sum of
        exp(score), (num_rows, q_heads) float32. A row that sees nothing has output 0 and lse -inf.

        Raises
        ------
        TypeError, ValueError: a wrong dtype, shape, stride, device, layer, window or page_lse.
        """

    def new_page_lse(
        self, pool: PoolView, num_rows: int, num_heads: int, num_pages: int
    ) -> PageLse:
        """What `attend` takes as page_lse, for all of its calls over one layer of pools of this layout.

        Parameters
        ----------
        num_rows, num_heads: of the queries.
        num_pages: of the longest sequence, or more.
        """

    def page_mass(self, page_lse: PageLse, lse: torch.Tensor) -> torch.Tensor:
        """The share of each row's softmax that each page has, over all pages that were attended.

        Parameters
        ----------
        lse: (num_rows, q_heads), of `attend` over the pages, or of `merge`.

        Returns
        -------
        (num_rows, q_heads, num_pages) float32: the sum of the softmax's weights of each page's tokens, 0 where
        nothing is seen. They sum up to 1, or to 0 in a row that sees nothing.

        Raises
        ------
        TypeError, ValueError: a wrong dtype, shape or device.
        """

    def merge(
        self, outs: list[torch.Tensor], lses: list[torch.Tensor], out_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Join results over disjoint sets of tokens into the result over all of them, exactly.

        Parameters
        ----------
        outs, lses: one or more results of `attend`, all of one shape.

        Returns
        -------
        As `attend`. A partial result whose lse is -inf adds nothing; where all are, the output is 0
        and the lse -inf.

        Raises
        ------
        ValueError: no partial result, or shapes that differ.
        """


def backend_for(
    torch_device: torch.device,
    compute_capability: tuple[int, int] | None,
    dtype: str,
    math: ProductMath = ProductMath.STORED,
    threads: int | None = None,
) -> AttentionBackend:
    """The backend for a device and a dtype of K and V.

    Parameters
    ----------
    torch_device: "cpu" or "cuda"; Triton is imported for "cuda" alone.
    compute_capability: of the GPU, (7, 5) or later; not looked at for the CPU.
    dtype: the layout's.
    math: what a GPU multiplies; the CPU multiplies float32 always.
    threads: that attend on the CPU; None: one for each CPU. Not looked at for a GPU.

    Raises
    ------
    ValueError: no backend for this device, this capability, or this dtype on it; more threads than CPUs.
    """
    if dtype not in TORCH_DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(TORCH_DTYPES)}")
    if torch_device.type == "cpu":
        return HostBackend(threads)
    if torch_device.type != "cuda":
        raise ValueError(f"device={str(torch_device)!r}: attention runs on cpu or cuda")
    if compute_capability is None or compute_capability < OLDEST_CAPABILITY:
        raise ValueError(
            f"compute capability {compute_capability}: must be at least {OLDEST_CAPABILITY}"
        )
    if dtype == "bfloat16" and compute_capability < (8, 0):
        raise ValueError(
            f"dtype='bfloat16' on compute capability {compute_capability}: "
            f"needs (8, 0) or later; use float16"
        )
    from tiermem.attention.kernels.backend import TritonBackend

    properties = torch.cuda.get_device_properties(torch_device)
    return TritonBackend(compute_capability, properties.multi_processor_count, math)
