"""A tokenizer whose tokens are bytes: token id = byte value, and three special tokens."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BOS_ID = 256
EOS_ID = 257
PAD_ID = 258
# The next multiple of eight after 259 tokens: matrix units want aligned shapes.
VOCAB_SIZE = 264

_SPECIAL_TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}


def _byte_names() -> list[str]:
    """The printable character that the byte-level alphabet uses for each of the 256 bytes.

    Printable bytes stand for themselves and the others, in order, for U+0100 and up, as in GPT-2
    (Radford et al., 2019), whose alphabet `pre_tokenizers.ByteLevel` has.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def build(max_tokens: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer.

    It adds no special token by itself, and reads none in a text: `<|eos|>` written in a prompt is
    seven bytes. So any text has exactly as many tokens as UTF-8 bytes, and decodes to itself.
    """
    vocabulary = {name: byte for byte, name in enumerate(_byte_names())}
    vocabulary |= dict(zip(_SPECIAL_TOKENS.values(), (BOS_ID, EOS_ID, PAD_ID), strict=True))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    wrap: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    return wrap(
        tokenizer_object=backend,
        model_max_length=max_tokens,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        **_SPECIAL_TOKENS,
    )
