"""Setting: sizes and engine of the manager of one case, and the manager itself."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from world import LAYOUT, store_bytes

from tiermem import ConfigError, TierConfig, TierManager

GIVE_UP_S = 20.0

AMPLE = 420
"""Slots on the SSD for everything that the prompts can become, spilled pages included: nothing is evicted."""


@dataclass(frozen=True, slots=True)
class Setting:
    """gpu, ram, ssd: pages of each tier. engine: as `TierConfig.io_engine`."""

    gpu: int
    ram: int
    ssd: int
    engine: str = "threads"
    timeout_s: float = 10.0
    cpu_share: float | None = None
    verify_ram: str = "sample"

    @classmethod
    def made(cls, rng: random.Random) -> Setting:
        """Any one; half of them with an SSD tier that holds everything."""
        return cls(
            gpu=rng.choice([3, 6, 12, 40]),
            ram=rng.choice([0, 4, 12]),
            ssd=rng.choice([AMPLE, AMPLE, rng.randint(10, 60)]),
            engine=rng.choice(["threads", "auto"]),
            cpu_share=rng.choice([None, 0.0, 0.5]),
        )

    @property
    def is_ample(self) -> bool:
        """Whether the SSD tier has room for all that a case writes."""
        return self.ssd >= AMPLE

    @property
    def cap_bytes(self) -> int:
        """What the store may take on the disk."""
        return store_bytes(self.ssd)

    def config(self, path: Path) -> TierConfig:
        """For a manager over the store at `path`."""
        return TierConfig(
            gpu=self.gpu * LAYOUT.slot_bytes,
            ram=self.ram * LAYOUT.slot_bytes,
            ssd=self.cap_bytes,
            ssd_path=path,
            device="cpu",
            io_engine=self.engine,
            io_timeout_s=self.timeout_s,
            staging_pages=4,
            low_watermark=0.2,
            high_watermark=0.4,
            cpu_threads=1,
            cpu_share=self.cpu_share,
            verify_ram=self.verify_ram,
        )

    def open(self, path: Path) -> TierManager:
        """A manager over the store at `path`."""
        return TierManager(LAYOUT, self.config(path), model_id="torture")

    def reopen(self, path: Path) -> TierManager:
        """The same, where a store is given back as soon as what was late there has ended."""
        end_s = time.monotonic() + GIVE_UP_S
        while time.monotonic() < end_s:
            with suppress(ConfigError):
                return self.open(path)
            time.sleep(0.01)
        return self.open(path)
