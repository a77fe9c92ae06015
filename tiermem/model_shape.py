"""ModelShape: the sizes of a decoder-only model that decide how much KV cache and how many weights it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from tiermem.configfile import read_table
from tiermem.errors import ConfigError
from tiermem.fields import check_int, check_keys, check_text, refuse
from tiermem.layout import ITEM_BYTES, MAX_LAYERS, PageLayout
from tiermem.profiles import find_profile, model_profiles
from tiermem.units import Size, SizeLike

_INT_RANGES = {
    "num_layers": (1, MAX_LAYERS),
    "hidden_size": (1, 2**20),
    "num_heads": (1, 2**14),
    "num_kv_heads": (1, 1024),
    "head_dim": (16, 256),
    "intermediate_size": (1, 2**24),
    "vocab_size": (1, 2**24),
}


@dataclass(frozen=True, slots=True)
class TierSizes:
    """Sizes of the three tiers that suit a model; `TierConfig` takes them as they are."""

    gpu: Size
    ram: Size
    ssd: Size


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Shape of a Llama-family model.

    num_layers, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size: counts, as in
    the model's own configuration. dtype: of weights, keys and values. tiers: sizes that suit it.

    Raises
    ------
    ConfigError: naming key, value and allowed range.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    dtype: str
    tiers: TierSizes

    def __post_init__(self) -> None:
        check_text("name", self.name, 100)
        for key, (low, high) in _INT_RANGES.items():
            check_int(key, getattr(self, key), low, high)
        if self.head_dim % 16:
            raise refuse("head_dim", self.head_dim, "a multiple of 16")
        if self.num_heads % self.num_kv_heads:
            raise refuse(
                "num_heads", self.num_heads, f"a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.dtype not in tuple(ITEM_BYTES):  # a tuple: a value from a file may be unhashable
            raise refuse("dtype", self.dtype, f"one of {', '.join(ITEM_BYTES)}")

    @classmethod
    def load(cls, path: str | Path) -> ModelShape:
        """Read a `.json` or `.toml` file.

        Raises
        ------
        ConfigError: naming file, key, value and allowed range.
        """
        table = read_table(path)
        try:
            return cls.from_table(table)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_profile(cls, name: str) -> ModelShape:
        """The shipped model profile `name` ("7b", "8b", "13b", "33b", "33b-mha", "70b")."""
        return cls.load(find_profile(name, model_profiles()))

    @classmethod
    def from_table(cls, table: Mapping[str, object]) -> ModelShape:
        """A shape from keys and values of unknown types."""
        given = dict(table)
        check_keys(given, [*(field.name for field in fields(cls)), "description"])
        if "description" in given:
            check_text("description", given.pop("description"), 1000)
        missing = [field.name for field in fields(cls) if field.name not in given]
        if missing:
            raise ConfigError(f"{missing[0]}: missing; a model's shape needs it")
        given["tiers"] = _tier_sizes(given["tiers"])
        # Each value is checked by __post_init__, whatever its type.
        return cls(**given)  # type: ignore[arg-type]

    def layout(self, page_tokens: int = 64) -> PageLayout:
        """Pages of this model's K and V; see PageLayout for the allowed `page_tokens`."""
        return PageLayout(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            page_tokens=page_tokens,
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights: embedding and output matrix apart, gated MLP, no biases."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        norms = 2 * self.hidden_size
        layers = self.num_layers * (attention + mlp + norms)
        return (layers + 2 * self.vocab_size * self.hidden_size + self.hidden_size) * ITEM_BYTES[
            self.dtype
        ]


def _tier_sizes(value: object) -> TierSizes:
    if not isinstance(value, Mapping):
        raise refuse("tiers", value, "a table with gpu, ram and ssd")
    check_keys(value, ["gpu", "ram", "ssd"])
    return TierSizes(*(_tier_size(value, key) for key in ("gpu", "ram", "ssd")))


def _tier_size(table: Mapping[str, SizeLike], key: str) -> Size:
    if key not in table:
        raise ConfigError(f"tiers.{key}: missing; tiers needs gpu, ram and ssd")
    return Size.parse(table[key], f"tiers.{key}")
