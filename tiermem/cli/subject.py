"""Subject: the model that runs, its tokenizer, and the prompt as token ids."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiermem.cli.human import count_text
from tiermem.cli.model_files import load_model, load_tokenizer, random_model, read_shape
from tiermem.cli.notes import note
from tiermem.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """`ids` is int64 (1, tokens) on the model's device; `tokenizer` is None for random weights."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    ids: torch.Tensor

    def decode(self, token_ids: list[int]) -> str:
        """The text of `token_ids`, without special tokens. Needs a tokenizer."""
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))


def load_subject(options: argparse.Namespace, prompt: str | None, device: torch.device) -> Subject:
    """What the options ask for, on `device`; `prompt` is None for random token ids.

    Raises
    ------
    ConfigError: it cannot be loaded, or the prompt and the model do not go together.
    """
    if prompt is None:
        return _random_subject(options, device)
    tokenizer = load_tokenizer(options.model)
    ids = torch.tensor([tokenizer.encode(prompt)], dtype=torch.int64)
    if ids.shape[1] == 0:
        raise ConfigError("the prompt is empty: the tokenizer makes no token of it")
    model = load_model(options.model, device, options.dtype)
    check_fits(model, ids, options.max_new_tokens)
    return Subject(str(options.model), model, tokenizer, ids.to(device))


def check_fits(model: PreTrainedModel, ids: torch.Tensor, max_new_tokens: int) -> None:
    """Refuse ids that the model has no embedding for, and more positions than it has.

    A model that computes its positions runs beyond those it was trained for; that is worth a note.
    """
    embeddings = model.get_input_embeddings()
    vocabulary = int(next(embeddings.parameters()).shape[0])
    largest = int(ids.max())
    if largest >= vocabulary:
        raise ConfigError(
            f"the tokenizer gives token id {largest}, the model has embeddings for 0 to "
            f"{vocabulary - 1}: they do not belong together"
        )
    most = getattr(model.config, "max_position_embeddings", None)
    if most is None or ids.shape[1] + max_new_tokens <= most:
        return
    text = (
        f"{count_text(ids.shape[1])} tokens of prompt and up to {count_text(max_new_tokens)} new ones; "
        f"the model was made for {count_text(most)}"
    )
    if getattr(model.config, "rope_parameters", None) is None:
        raise ConfigError(f"{text}; shorten the prompt or give fewer --max-new-tokens")
    note(f"{text}, so what it writes may make little sense")


def _random_subject(options: argparse.Namespace, device: torch.device) -> Subject:
    shape = read_shape(options.random_weights)
    model = random_model(shape, device, options.dtype, options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    ids = torch.randint(shape.vocab_size, (1, options.prompt_tokens), generator=generator)
    return Subject(f"random weights of shape {shape.name}", model, None, ids.to(device))
