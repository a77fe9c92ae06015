"""Hardware: the memory and the rates of a machine, from a file in configs/machines/ or as measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tiermem.configfile import read_table
from tiermem.data import data_path
from tiermem.errors import ConfigError
from tiermem.fields import check_int, check_keys, check_text, refuse
from tiermem.profiles import find_profile
from tiermem.rates import RELATIVES, Rates
from tiermem.units import Size, SizeKind

ASSUMED_SHARE = {"linear_read": 0.90, "decode_read": 0.90}
"""Of the memory's read rate, where it was not measured."""
ASSUMED_PREFILL_SHARE = 0.5
"""Of the rate of large products, where attention in prefill was not measured."""
ASSUMED = Rates(
    attend_s=8e-6, product_s=4e-6, kernel_s=1.5e-6, queued_kernel_s=3e-6, launch_s=6e-6,
    step_s=150e-6, layer_s=30e-6, hand_over_s=30e-6,
)  # fmt: skip
"""Costs of launches where they were not measured: what tiermem aims at, and what GPUs of these years need."""
ASSUMED_ATTEND_SHARE = 0.75
"""Of the rate at which all CPUs read RAM: what attention reaches alone."""
ASSUMED_LINK_SHARE = 0.9
"""Of its rate alone: what the link keeps beside attention, which gets what is left of the RAM's rate at most."""
NEEDED = ("hbm_read", "matmul", "link_to_device", "link_to_host", "disk_read")
FIRST_WITH_BFLOAT16 = (8, 0)

_KEYS = ("description", "gpu", "capability", "gpu_memory", "ram", "ssd", "rates", "estimated")


@dataclass(frozen=True, slots=True)
class Hardware:
    """A machine to plan for. Sizes are bytes; `gpu_bytes` is 0 where the hot tier is host memory.

    profile: of the tiers, a name of configs/. gpu: its name, empty without one. rates: all that a forecast
    needs. origin: where the rates come from, in words. is_here: this very machine, which has what it has.
    estimated: names of rates of the CPU's attention that nobody measured on such a machine.
    """

    profile: str
    gpu: str
    capability: tuple[int, int] | None
    gpu_bytes: int
    ram_bytes: int
    ssd_bytes: int
    rates: Rates
    origin: str
    is_here: bool = False
    estimated: frozenset[str] = frozenset()

    @classmethod
    def from_profile(cls, name: str) -> Hardware:
        """The shipped machine `name`.

        Raises
        ------
        ConfigError: there is none of that name, or its file is wrong.
        """
        path = find_profile(name, machine_profiles())
        try:
            return cls._from_table(name, read_table(path))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def _from_table(cls, name: str, table: Mapping[str, object]) -> Hardware:
        check_keys(table, _KEYS)
        gpu = table.get("gpu")
        rates = table.get("rates")
        if not isinstance(rates, Mapping):
            raise refuse("rates", rates, "a table of rates")
        known = Rates.from_table(rates)
        full = complete(known)
        return cls(
            profile=name,
            gpu=check_text("gpu", gpu, 100) if gpu else "",
            capability=_capability(table["capability"]) if gpu else None,
            gpu_bytes=_size("gpu_memory", table),
            ram_bytes=_size("ram", table),
            ssd_bytes=_size("ssd", table),
            rates=full,
            origin=f"profile {name}",
            estimated=_names(table.get("estimated", [])) | _attended(full) - _attended(known),
        )

    @property
    def has_bfloat16(self) -> bool:
        """Whether attention over bfloat16 runs there."""
        return self.capability is None or self.capability >= FIRST_WITH_BFLOAT16


def machine_profiles() -> dict[str, Path]:
    """Name -> file of every machine that ships, in order of the names."""
    return {path.stem: path for path in sorted(data_path("configs/machines").glob("*.toml"))}


def complete(rates: Rates) -> Rates:
    """`rates` with what can be assumed in the place of what is not known.

    Raises
    ------
    ConfigError: a rate is missing that nothing can be assumed for.
    """
    known = rates.to_table()
    missing = [name for name in NEEDED if name not in known]
    if missing:
        raise ConfigError(f"rates.{missing[0]}: missing; a forecast needs it")
    shares = {name: share * known["hbm_read"] for name, share in ASSUMED_SHARE.items()}
    assumed = Rates(**shares, prefill=ASSUMED_PREFILL_SHARE * known["matmul"])
    return rates.over(assumed).over(ASSUMED).over(_assumed_attention(rates))


def _assumed_attention(rates: Rates) -> Rates:
    """Of the CPU, beside the link too, from what RAM and link do; nothing where any of it was measured."""
    ram, link = rates.ram_read, rates.link_to_device
    if ram is None or link is None or _attended(rates):
        return Rates()
    alone, link = ASSUMED_ATTEND_SHARE * ram, ASSUMED_LINK_SHARE * link
    beside = min(alone, ram - link)
    if beside <= 0:
        return Rates()
    return Rates(
        cpu_attend_fp16=alone, cpu_attend_fp16_beside=beside, link_beside_fp16=link,
        cpu_attend_bf16=alone, cpu_attend_bf16_beside=beside, link_beside_bf16=link,
    )  # fmt: skip


def _attended(rates: Rates) -> frozenset[str]:
    """Names of the rates of the CPU's attention that are known."""
    return frozenset(RELATIVES) & frozenset(rates.to_table())


def _names(value: object) -> frozenset[str]:
    names = value if isinstance(value, list) else [value]
    for name in names:
        if name not in RELATIVES:
            raise refuse("estimated", name, f"a list of {', '.join(RELATIVES)}")
    return frozenset(names)


def _capability(value: object) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise refuse("capability", value, "two numbers, [major, minor]")
    major, minor = (check_int("capability", item, 0, 99) for item in value)
    return major, minor


def _size(key: str, table: Mapping[str, object]) -> int:
    value = table.get(key)
    if not isinstance(value, (str, int)):
        raise refuse(key, value, "a size in bytes")
    size = Size.parse(value, key)
    if size.kind is not SizeKind.EXPLICIT:
        raise refuse(key, value, "a size in bytes")
    return size.num_bytes
