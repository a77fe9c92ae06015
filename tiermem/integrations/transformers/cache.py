"""TieredCache: a transformers cache whose K and V live in the tiers of a TierManager."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from tiermem.config import TierConfig
from tiermem.device.discovery import open_device
from tiermem.device.protocol import Progress
from tiermem.errors import ClosedError, ConfigError, TierMemError
from tiermem.integrations.transformers.layer import TieredLayer
from tiermem.integrations.transformers.model_calls import ModelCalls
from tiermem.integrations.transformers.model_identity import model_identity
from tiermem.integrations.transformers.rows import Rows
from tiermem.integrations.transformers.support import ModelAttention, attention_of
from tiermem.manager import TierManager
from tiermem.stats import Stats


class TieredCache(Cache):
    """The KV cache of `model`, larger than its GPU: `model.generate(ids, past_key_values=cache)`.

    In calls with this cache, and no others, tiermem computes the model's attention: exactly, over pages in GPU
    memory, RAM and SSD. Padding is not stored. Tokens are named by their ids as they are stored, so that `attach`
    finds them again, here, in another cache or in another process on the same store. A call that raises stores
    nothing. Where pages are damaged or cannot be read, their tokens are computed again within the call that finds
    it (hooks within the model see that too), and it goes on. Where all pages are on a GPU, calls of one token a
    row are replayed as CUDA graphs.

    A context manager that closes; single-threaded; the weights must not change while it is open.

    Parameters
    ----------
    model: a decoder-only transformers model on one device.
    config: sizes and behaviour of the tiers; `device` must be "auto" or name the model's device.
    page_tokens: tokens of a page, 16, 32, 64 or 128.
    model_id: names the weights; `model_identity(model)` if not given.
    salt: pages of different salts never match (tenants).
    label: for stats, up to 200 characters.
    progress: called with the bytes of the RAM tier that are ready and with all of them.

    Raises
    ------
    ConfigError: a model that tiermem cannot serve, and why; sizes, a device or a store that cannot be had.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: TierConfig,
        *,
        page_tokens: int = 64,
        model_id: str | None = None,
        salt: bytes = b"",
        label: str = "",
        progress: Progress | None = None,
    ) -> None:
        attention = attention_of(model, page_tokens)
        identity = model_identity(model) if model_id is None else model_id
        self.manager = _open_manager(attention, config, identity, progress)
        self.layout = attention.layout
        self._reusable = attention.reusable
        self._rows = Rows(self.manager, salt, label, attention.reusable)
        self._closed = False
        super().__init__(
            layers=[TieredLayer(self, i, window) for i, window in enumerate(attention.windows)]
        )
        self._calls = ModelCalls(self, model, self.manager, attention, self._rows)

    def __enter__(self) -> TieredCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- using it ----------------------------------------------------------------------------------

    def attach(
        self,
        input_ids: torch.Tensor | SequenceOf[int],
        attention_mask: torch.Tensor | None = None,
    ) -> int:
        """Reuse what is stored of the beginning of `input_ids`; give all of `input_ids` to generate afterwards.

        Parameters
        ----------
        input_ids: (rows, tokens) or (tokens,), as for generate.
        attention_mask: (rows, tokens), 0 at padding, which must be on the left; none if not given.

        Returns
        -------
        Columns that need not be computed, padding included; every row has at least one token left to compute.

        Raises
        ------
        TierMemError: the cache is not empty. TypeError, ValueError: ids or mask that cannot be.
        """
        self._settle()
        if self._rows.columns:
            raise TierMemError(
                f"the cache holds {self._rows.columns} tokens: reset it before attach"
            )
        ids, real = _host_ids(input_ids, attention_mask)
        self._rows.reset()
        return self._rows.attach(ids, real) if self._reusable else 0

    def stats(self) -> Stats:
        """A frozen picture of the manager now."""
        return self.manager.stats()

    def reset(self) -> None:
        """Empty the cache for another batch, whatever went wrong before; named pages stay in the tiers."""
        self._check_open()
        self._calls.undo()
        self._rows.reset()
        self._rows.names_wait = False

    def close(self) -> None:
        """Close the manager and leave the model as it was. A second call does nothing."""
        if self._closed:
            return
        self._calls.undo()
        self._rows.reset()
        self._closed = True
        self._calls.close()
        self.manager.close()

    # ---- what transformers asks --------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Columns stored, padding included; the same for all layers."""
        return self._calls.columns

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: object,
        **__: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one layer's new K and V; returns them, not the stored ones, which stay where they are.

        Raises
        ------
        ClosedError: the cache is closed. ConfigError: called outside a call of the cache's model.
        """
        if self._closed:
            raise ClosedError("the TieredCache is closed")
        forward = self._calls.forward
        if forward is None or not forward.is_open:
            raise ConfigError(
                "past_key_values: a TieredCache serves calls of the model that it was made for"
            )
        forward.append(layer_idx, key_states, value_states)
        return key_states, value_states

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns, as transformers' assisted decoding asks.

        Parameters
        ----------
        tokens_to_remove: minus the number of columns to forget; above 0, as older transformers 5 asks, the
            number to keep at most.

        Raises
        ------
        ValueError: there are fewer columns to forget.
        """
        self._settle()
        columns = self._rows.columns
        gone = -tokens_to_remove if tokens_to_remove <= 0 else max(columns - tokens_to_remove, 0)
        self._rows.crop(gone)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes row `beam_idx[i]`; pages are shared."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        chosen = torch.arange(len(self._rows.sequences))[indices.cpu()]
        self._select(chosen.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, one after the other; pages are shared."""
        count = len(self._rows.sequences)
        self._select([row for row in range(count) for _ in range(repeats)])

    def activate_past_recording(self) -> None:
        """Drafts come: tokens of a call get their names by the `crop` that follows it, those that are left."""
        self._rows.names_wait = True

    # ---- inside ------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the TieredCache is closed")

    def _settle(self) -> None:
        """Undo a call that never ended: it raised, or was interrupted."""
        self._check_open()
        self._calls.undo()
        self._rows.settle()

    def _select(self, rows: list[int]) -> None:
        self._settle()
        self._rows.select(rows)


def _open_manager(
    attention: ModelAttention, config: TierConfig, model_id: str, progress: Progress | None
) -> TierManager:
    """A manager on the model's device."""
    if not isinstance(config, TierConfig):
        raise TypeError(f"config: must be a TierConfig, not {type(config).__name__}")
    place = attention.device
    if config.device not in {"auto", place.type, str(place)}:
        raise ConfigError(
            f"device={config.device!r}: the model is on {place}; must be 'auto' or '{place}'"
        )
    device, _ = open_device(str(place))
    return TierManager(attention.layout, config, model_id, device=device, progress=progress)


def _host_ids(
    input_ids: torch.Tensor | SequenceOf[int], attention_mask: torch.Tensor | None
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Ids (rows, columns) and which of them are real."""
    ids = torch.as_tensor(input_ids)
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"input_ids of {ids.dtype}: must be integers")
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(
            f"input_ids of shape {tuple(ids.shape)}: must be (rows, tokens), not empty"
        )
    if attention_mask is None:
        return ids.cpu().numpy(), np.ones(tuple(ids.shape), dtype=np.bool_)
    if attention_mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)}: must be {tuple(ids.shape)}"
        )
    real: NDArray[np.bool_] = attention_mask.bool().cpu().numpy()
    if (np.diff(real.astype(np.int8), axis=1) < 0).any():
        raise ValueError("attention_mask: padding must be on the left")
    return ids.cpu().numpy(), real
