"""Model identity: a name for a model that changes whenever its K and V could."""

from __future__ import annotations

import hashlib
import json

import torch
from transformers import PreTrainedModel

SAMPLES_PER_TENSOR = 256
"""Values of each tensor that enter the name: enough for any training step to show, and quick to read."""

IGNORED_KEYS = frozenset({
    "_name_or_path", "_attn_implementation", "_attn_implementation_autoset", "_commit_hash",
    "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "output_attentions",
    "output_hidden_states", "return_dict", "id2label", "label2id", "problem_type", "auto_map",
})  # fmt: skip
"""Keys of a configuration that say where a model came from or how it is run, not what it computes."""


def model_identity(model: PreTrainedModel) -> str:
    """64 hexadecimal digits over the configuration and the weights, the same in every process.

    The weights enter with names, shapes, dtypes and a fixed sample of values of each tensor, read once: a model
    that is changed afterwards needs another id. Without the output matrix and heads on top: they do not change
    K and V.
    """
    digest = hashlib.sha256(b"tiermem-model-1")
    config = {
        key: value for key, value in model.config.to_dict().items() if key not in IGNORED_KEYS
    }
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.base_model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):  # quantized modules keep other things beside them
            digest.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(_sample_bytes(tensor))
    return digest.hexdigest()


def _sample_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of evenly spread values, first and last included."""
    values = tensor.detach().reshape(-1)
    count = min(values.numel(), SAMPLES_PER_TENSOR)
    if count == 0:
        return b""
    last = values.numel() - 1
    places = [i * last // max(count - 1, 1) for i in range(count)]
    # as bytes: not every dtype can be indexed
    rows = values.contiguous().view(torch.uint8).view(-1, values.element_size())
    return rows[torch.tensor(places, device=rows.device)].cpu().numpy().tobytes()
