"""TieredCache: the KV cache of a Hugging Face model, kept by a TierManager; PromptLookup: drafts for it."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ImportError(
        "tiermem.integrations.transformers needs transformers: pip install tiermem[hf]"
    )

from tiermem.integrations.transformers.cache import TieredCache
from tiermem.integrations.transformers.lookup import Acceptance, PromptLookup

__all__ = ["Acceptance", "PromptLookup", "TieredCache"]
