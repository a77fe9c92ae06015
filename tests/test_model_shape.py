"""Model profiles: their shapes, the layouts they give, and how wrong ones are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiermem.config import TierConfig
from tiermem.data import data_path
from tiermem.errors import ConfigError
from tiermem.layout import PageLayout
from tiermem.model_shape import ModelShape
from tiermem.profiles import model_profiles

SMALL: dict[str, object] = {
    "name": "small",
    "num_layers": 2,
    "hidden_size": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 256,
    "dtype": "float32",
    "tiers": {"gpu": "1MiB", "ram": 0, "ssd": "50%"},
}


@pytest.mark.parametrize(
    ("name", "token_bytes", "weight_gb"),
    [
        ("7b", 524_288, 13.5),
        ("8b", 131_072, 16.1),
        ("13b", 819_200, 26.0),
        ("33b", 253_952, 66.7),
        ("33b-mha", 1_597_440, 65.1),
        ("70b", 327_680, 138.0),
    ],
)
def test_shipped_shapes(name: str, token_bytes: int, weight_gb: float) -> None:
    shape = ModelShape.from_profile(name)
    assert shape.name == name
    assert (shape.token_bytes, round(shape.weight_bytes / 1e9, 1)) == (token_bytes, weight_gb)
    layout = shape.layout()
    assert (layout.page_tokens, layout.token_bytes, layout.dtype) == (64, token_bytes, "float16")
    readme = data_path("configs/README.md").read_text(encoding="utf-8")
    assert f"| `{name}.toml` | {token_bytes:,} | {weight_gb} GB |" in readme


def test_every_shipped_shape_has_sizes_that_a_config_takes() -> None:
    assert sorted(model_profiles()) == ["13b", "33b", "33b-mha", "70b", "7b", "8b"]
    for name in model_profiles():
        shape = ModelShape.from_profile(name)
        tiers = shape.tiers
        config = TierConfig(gpu=tiers.gpu, ram=tiers.ram, ssd=tiers.ssd, ssd_path="store")
        assert config.gpu.num_bytes < config.ram.num_bytes < config.ssd.num_bytes
        assert config.gpu.num_bytes >= 8192 * shape.token_bytes


def test_layout_of_a_shape() -> None:
    layout = ModelShape.from_table(SMALL).layout(page_tokens=16)
    assert layout == PageLayout(
        num_layers=2, num_kv_heads=2, head_dim=16, dtype="float32", page_tokens=16
    )


def test_weights_are_counted_matrix_by_matrix() -> None:
    shape = ModelShape.from_table(SMALL)
    q, k, v, o = 64 * 64, 64 * 32, 64 * 32, 64 * 64
    layer = q + k + v + o + 3 * 64 * 128 + 2 * 64
    assert shape.weight_bytes == 4 * (2 * layer + 2 * 256 * 64 + 64)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_layers": 0}, "num_layers=0: must be an int from 1 to 448"),
        ({"num_layers": "2"}, "num_layers='2': must be an int"),
        ({"num_heads": True}, "num_heads=True: must be an int"),
        ({"num_heads": 5}, "num_heads=5: must be a multiple of num_kv_heads=2"),
        ({"head_dim": 24}, "head_dim=24: must be a multiple of 16"),
        ({"head_dim": 272}, "head_dim=272: must be an int from 16 to 256"),
        ({"dtype": "int8"}, "dtype='int8': must be one of float16"),
        ({"dtype": ["float16"]}, "dtype=['float16']: must be one of float16"),
        ({"name": ""}, "name='': must be text"),
        ({"description": 3}, "description=3: must be text"),
        ({"num_kv_head": 2}, "'num_kv_head': unknown key; did you mean 'num_kv_heads'?"),
        ({"tiers": 3}, "tiers=3: must be a table"),
        ({"tiers": {"gpu": "1MiB", "ram": 0}}, "tiers.ssd: missing"),
        ({"tiers": {"gpu": "1MB/s", "ram": 0, "ssd": 0}}, "tiers.gpu='1MB/s'"),
        ({"tiers": {"gpu": 1, "ram": 0, "ssd": 0, "disk": 0}}, "'disk': unknown key"),
    ],
)
def test_a_wrong_shape_is_refused_with_file_key_and_range(
    tmp_path: Path, change: dict[str, object], says: str
) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**SMALL, **change}))
    with pytest.raises(ConfigError) as caught:
        ModelShape.load(path)
    assert str(caught.value).startswith(f"{path}: ") and says in str(caught.value)


def test_a_missing_key_is_refused(tmp_path: Path) -> None:
    for key in SMALL:
        with pytest.raises(ConfigError, match=f"^{key}: missing"):
            ModelShape.from_table({name: value for name, value in SMALL.items() if name != key})
    with pytest.raises(ConfigError, match="profile='1b': must be one of 13b, 33b"):
        ModelShape.from_profile("1b")
