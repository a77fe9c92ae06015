"""Model files: a model and its tokenizer from a local directory, or of random weights; never from the network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiermem.cli.table import clip, printable
from tiermem.errors import ConfigError
from tiermem.model_shape import ModelShape

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json",
)  # fmt: skip


def check_model_dir(path: Path) -> None:
    """Raise ConfigError unless `path` is a directory with a configuration, weights and a tokenizer."""
    if not path.is_dir():
        raise ConfigError(f"--model {path}: no such directory")
    if not (path / "config.json").is_file():
        raise ConfigError(f"--model {path}: no config.json in it, so it is no Hugging Face model")
    if not any(file.is_file() for pattern in WEIGHTS for file in path.glob(pattern)):
        raise ConfigError(f"--model {path}: no weights in it (looked for {', '.join(WEIGHTS)})")
    if not any((path / name).is_file() for name in TOKENIZERS):
        raise ConfigError(
            f"--model {path}: no tokenizer in it (looked for {', '.join(TOKENIZERS)})"
        )


def read_shape(name: str) -> ModelShape:
    """The shape of a shipped model profile, or of a file.

    Raises
    ------
    ConfigError: there is no such profile, or the file is no shape.
    """
    if name.endswith((".toml", ".json")):
        return ModelShape.load(name)
    return ModelShape.from_profile(name)


def go_offline() -> None:
    """From here on, transformers reads files only, and says nothing but errors. Before it is imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's directory.

    Raises
    ------
    ConfigError: it cannot be read.
    """
    from transformers import AutoTokenizer

    with _as_config_error(f"--model {path}: its tokenizer cannot be read"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, local_files_only=True
        )
    return tokenizer


def load_model(path: Path, device: torch.device, dtype_name: str) -> PreTrainedModel:
    """The model of a directory, in evaluation mode on `device`.

    Parameters
    ----------
    dtype_name: "float32", "float16", "bfloat16", or "auto": float32 on the CPU, else the model's own.

    Raises
    ------
    ConfigError: it cannot be read, or does not fit.
    """
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedModel

    if dtype_name == "auto" and device.type == "cpu":
        dtype_name = "float32"
    dtype = "auto" if dtype_name == "auto" else getattr(torch, dtype_name)
    with _as_config_error(f"--model {path}: cannot be loaded"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        model, report = loaded
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")
        torch.nn.Module.to(model, device)
    assert isinstance(model, PreTrainedModel)
    model.eval()
    return model


def random_model(
    shape: ModelShape, device: torch.device, dtype_name: str, seed: int
) -> PreTrainedModel:
    """A Llama of `shape` whose weights `seed` decides, made on `device`; it never ends a text by itself.

    Parameters
    ----------
    dtype_name: as in `load_model`; "auto" on a GPU is the shape's own.

    Raises
    ------
    ConfigError: it does not fit.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

    if dtype_name == "auto":
        dtype_name = "float32" if device.type == "cpu" else shape.dtype
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=2**20,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    with _as_config_error(f"--random-weights {shape.name}: cannot be made"), device:
        model: object = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype_name))
    assert isinstance(model, PreTrainedModel)
    model.eval()
    return model


@contextmanager
def _as_config_error(what: str) -> Iterator[None]:
    """What libraries raise for files that are damaged, of an unknown kind or too large, as ConfigError."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except ConfigError:
        raise
    except (
        OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError,
        SafetensorError, StrictDataclassError,
    ) as error:  # fmt: skip
        raise ConfigError(f"{what}: {clip(printable(str(error)), 300)}") from error
