"""A store that was filled and closed, what lies in it where, and copies of it to damage."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from world import LAYOUT

from tiermem import TierManager
from tiermem._core import Tier
from torture.content import PAGE, SALTS, Prompts, chain_words, kv_of
from torture.setting import Setting

SLOTS = 90
"""More than half of what all prompts fill under one salt."""


@dataclass(frozen=True, slots=True)
class Chain:
    """The pages of one prompt under one salt, and the slot of each."""

    prompt: tuple[int, ...]
    salt: bytes
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Built:
    """The store at `path`, closed."""

    path: Path
    setting: Setting
    prompts: Prompts
    chains: tuple[Chain, ...]

    @classmethod
    def made(cls, rng: random.Random, path: Path) -> Built:
        """A new one, with two prompts under each of two salts."""
        prompts = Prompts.made(rng)
        engine = rng.choice(["threads", "auto"])
        setting = Setting(gpu=12, ram=rng.choice([0, 12]), ssd=SLOTS, engine=engine)
        chosen = [(p, s) for p in rng.sample(prompts.tokens, 3) for s in rng.sample(SALTS, 2)]
        with setting.open(path) as manager:
            for prompt, salt in chosen:
                store_prompt(manager, prompt, salt)
            manager.flush()
            chains = tuple(Chain(p, s, slots_of(manager, p, s)) for p, s in chosen)
        return cls(path, setting, prompts, chains)

    def copied(self, path: Path) -> Path:
        """A copy of its files at `path`, instead of what was there."""
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.path, path)
        return path


def store_prompt(manager: TierManager, prompt: tuple[int, ...], salt: bytes) -> None:
    """Append and name all that is not stored yet of a prompt."""
    sequence = manager.open_sequence(prompt, salt=salt)
    start = sequence.num_tokens
    if start < len(prompt):
        words = chain_words(salt, np.array(prompt))[start:]
        with manager.step([sequence], new_tokens=len(words)) as step:
            for layer in range(LAYOUT.num_layers):
                k, v = kv_of(words, layer)
                step.append(layer, k, v)
                step.attend(layer, torch.zeros(len(words), 1, LAYOUT.head_dim))
        sequence.record(prompt[start:])
    sequence.close()


def slots_of(manager: TierManager, prompt: tuple[int, ...], salt: bytes) -> tuple[int, ...]:
    """Where the pages of a prompt lie in the slot file."""
    sequence = manager.open_sequence(prompt, salt=salt)
    assert sequence.num_tokens == len(prompt) // PAGE * PAGE
    slots = manager._core.table.slots(sequence.pages, Tier.SSD)
    assert (slots >= 0).all()
    sequence.close()
    return tuple(slots.tolist())
