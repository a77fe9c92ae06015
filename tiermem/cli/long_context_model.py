"""Long-context model: a model of transformers as the benchmark uses it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel

from tiermem.bench.long_context.model import PlainCache
from tiermem.cli.model_files import load_model, random_model
from tiermem.config import TierConfig
from tiermem.device.protocol import Progress
from tiermem.forecast import find_model
from tiermem.integrations.transformers import TieredCache
from tiermem.model_shape import ModelShape

LABEL = "tiermem bench long-context"


class OffloadedCache(DynamicCache):
    """transformers' offloaded cache whose copies wait for the work before them.

    Some releases fetch the next layer while its copy to the host is still under way, and into memory that
    attention still reads: a fast small model then gets NaN. The wait costs others nothing, since they wait too.
    """

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Start to fetch the next layer from `layer_idx` on."""
        self.prefetch_stream.wait_stream(torch.cuda.current_stream())
        super().prefetch(layer_idx, only_non_sliding)


class LongContextModel:
    """Random weights of a shape, or those of a directory, on `device`."""

    def __init__(self, name: str, shape: ModelShape, device: torch.device) -> None:
        self.shape = shape
        self._model: PreTrainedModel = (
            load_model(Path(name).expanduser(), device, "auto")
            if is_directory(name)
            else random_model(shape, device, "auto", 0)
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, K and V."""
        return self._model.dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._model.device

    @property
    def read_bytes(self) -> int:
        """Bytes of weights that one token reads: all but the embedding, of which it reads a row."""
        embedding = self._model.get_input_embeddings().weight
        parameters = self._model.parameters()
        return sum(p.numel() * p.element_size() for p in parameters if p is not embedding)

    def open_tiered(
        self, config: TierConfig, page_tokens: int, progress: Progress | None
    ) -> TieredCache:
        """A cache of tiermem, which the caller closes."""
        return TieredCache(
            self._model, config, page_tokens=page_tokens, model_id=self.shape.name, label=LABEL,
            progress=progress,
        )  # fmt: skip

    def open_offloaded(self) -> PlainCache:
        """transformers' offloaded cache."""
        return OffloadedCache(config=self._model.config, offloading=True)

    @torch.no_grad()
    def feed(self, cache: object, ids: torch.Tensor) -> torch.Tensor:
        """Give the model tokens behind what `cache` holds; logits (vocabulary,) behind the last."""
        out = self._model(
            input_ids=ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        logits: torch.Tensor = out.logits[0, -1]
        return logits


def is_directory(name: str) -> bool:
    """Whether `name` is a model directory rather than a shape."""
    return Path(name).expanduser().is_dir()


def shape_of(name: str) -> ModelShape:
    """The shape of that name, or of the model in a directory.

    Raises
    ------
    ConfigError: there is neither.
    """
    return find_model(name)
