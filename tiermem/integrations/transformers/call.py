"""Call: what one call of the model says about its new tokens, brought to the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tiermem.errors import ConfigError

HARMLESS_TENSORS = frozenset({
    "input_ids", "attention_mask", "position_ids", "cache_position", "labels", "logits_to_keep",
})  # fmt: skip
"""Tensor arguments that do not change K and V, or that are looked at here."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """The new tokens of one call: `rows` rows of `columns` columns, padding included.

    `real` (rows, columns) is False at padding, of the new columns alone. `past_real` (rows, past columns) is what
    the mask says of columns before; None where it says nothing. `ids` (rows, columns) are the token ids, None
    where K and V do not depend on ids and positions alone. `positions` (rows, columns), None for column numbers.
    """

    rows: int
    columns: int
    real: NDArray[np.bool_]
    past_real: NDArray[np.bool_] | None
    ids: NDArray[np.int64] | None
    positions: NDArray[np.int64] | None

    @classmethod
    def read(cls, arguments: Mapping[str, object]) -> Call:
        """What `arguments`, by the names of the model's forward, mean.

        Raises
        ------
        ConfigError: an argument that tiermem cannot honour. ValueError: a wrong shape.
        """
        if arguments.get("output_attentions"):
            raise ConfigError("output_attentions=True: TieredCache never has the attention weights")
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        tokens = embeds if ids is None else ids
        if not isinstance(tokens, torch.Tensor) or tokens.dim() < 2:
            raise ValueError("input_ids or inputs_embeds: must be a tensor (rows, tokens, ...)")
        rows, columns = tokens.shape[:2]
        if rows == 0 or columns == 0:
            raise ValueError(f"input_ids of shape {tuple(tokens.shape)}: there must be new tokens")
        real, past_real = _read_mask(arguments.get("attention_mask"), rows, columns)
        named = isinstance(ids, torch.Tensor) and ids.dim() == 2 and not _unusual(arguments)
        positions = arguments.get("position_ids")
        if isinstance(positions, torch.Tensor) and positions.dim() != 2:
            named, positions = False, None
        return cls(
            rows=rows,
            columns=columns,
            real=real,
            past_real=past_real,
            ids=_to_host(ids) if named and isinstance(ids, torch.Tensor) else None,
            positions=_read_positions(positions, rows, columns),
        )


def _read_mask(
    mask: object, rows: int, columns: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_] | None]:
    """Which new columns are real, and which of the columns before."""
    if mask is None:
        return np.ones((rows, columns), dtype=np.bool_), None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ConfigError(
            f"attention_mask of {shape}: TieredCache takes masks (rows, tokens) of 0 at padding"
        )
    if mask.shape[0] != rows or mask.shape[1] < columns:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)}: must be ({rows}, past tokens + {columns})"
        )
    host: NDArray[np.bool_] = mask.detach().bool().cpu().numpy()
    past = host.shape[1] - columns
    return host[:, past:], host[:, :past]


def _read_positions(positions: object, rows: int, columns: int) -> NDArray[np.int64] | None:
    if not isinstance(positions, torch.Tensor):
        return None
    return np.broadcast_to(_to_host(positions), (rows, columns))


def _to_host(tensor: torch.Tensor) -> NDArray[np.int64]:
    host: NDArray[np.int64] = tensor.detach().to(torch.int64).cpu().numpy()
    return host


def _unusual(arguments: Mapping[str, object]) -> bool:
    """Whether a tensor that may change K and V is given besides the ids."""
    return any(
        isinstance(value, torch.Tensor) and name not in HARMLESS_TENSORS
        for name, value in arguments.items()
    )
