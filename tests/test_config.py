"""Configuration: what files and arguments mean, and how each wrong one is refused."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiermem.config import AttentionMath, IoEngine, TierConfig, profile_for_device
from tiermem.data import data_path
from tiermem.errors import ConfigError
from tiermem.profiles import hardware_profiles
from tiermem.units import Size, SizeKind

GiB = 2**30


def write(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, **overrides: object) -> str:
    """The message with which `path` is refused; it must name the file."""
    with pytest.raises(ConfigError) as caught:
        TierConfig.load(path, **overrides)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def test_sizes_keep_how_they_were_given(tmp_path: Path) -> None:
    config = TierConfig(gpu="8GiB", ram=0.5, ssd="auto", ssd_path=tmp_path)
    assert (config.gpu.kind, config.gpu.num_bytes) == (SizeKind.EXPLICIT, 8 * GiB)
    assert (config.ram.kind, config.ram.fraction) == (SizeKind.FRACTION, 0.5)
    assert (config.ssd.kind, config.ssd.fraction) == (SizeKind.AUTO, 0.25)
    assert config.ssd_path == tmp_path


def test_defaults_use_what_is_free_and_no_disk() -> None:
    config = TierConfig()
    assert config.gpu.kind is config.ram.kind is SizeKind.AUTO
    assert config.ssd.is_zero and config.ssd_path is None
    assert (config.device, config.io_engine, config.io_timeout_s) == ("auto", IoEngine.AUTO, 30.0)


def test_a_config_is_a_value() -> None:
    config = TierConfig(gpu="2MiB")
    assert config == TierConfig(gpu=2 * 2**20) and hash(config) == hash(TierConfig(gpu="2048KiB"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.device = "cpu"  # type: ignore[misc]
    assert dataclasses.replace(config, ram=0, io_engine="threads") == TierConfig(
        gpu="2MiB", ram="0", io_engine=IoEngine.THREADS
    )


def test_a_tier_of_size_zero_is_legal_except_the_hot_one() -> None:
    config = TierConfig(gpu=1, ram=0, ssd=0)
    assert config.ram.is_zero and config.ssd.is_zero
    with pytest.raises(ConfigError, match=r"^gpu=0: must be above 0"):
        TierConfig(gpu=0)


def test_the_home_directory_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert TierConfig(ssd="1GiB", ssd_path="~/cache").ssd_path == Path("/home/someone/cache")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("gpu", "8GB/s", "text with a unit"),
        ("gpu", True, "text with a unit"),
        ("ram", -1, "0 to 1 EiB"),
        ("ram", "8", "has no unit"),
        ("ssd", "1GiB", "needs ssd_path"),
        ("ssd", 0.5, "needs ssd_path"),
        ("ssd_path", "", "the path of a directory"),
        ("ssd_path", "a\0b", "the path of a directory"),
        ("ssd_path", 3, "the path of a directory"),
        ("ssd_path", "~nobody-of-this-name/x", "whose ~ names a user"),
        ("device", "gpu", "'cuda:N'"),
        ("device", "cuda:", "'cuda:N'"),
        ("device", "cuda:-1", "'cuda:N'"),
        ("device", "cuda:01", "'cuda:N'"),
        ("device", 0, "'cuda:N'"),
        ("gpu_limit", "auto", "bytes above 0"),
        ("gpu_limit", 0.5, "bytes above 0"),
        ("gpu_limit", 0, "bytes above 0"),
        ("low_watermark", 0.2, "must be at most high_watermark=0.1"),
        ("low_watermark", -0.01, "a number from 0 to 1"),
        ("high_watermark", 1.01, "a number from 0 to 1"),
        ("high_watermark", float("nan"), "a number from 0 to 1"),
        ("high_watermark", float("inf"), "a number from 0 to 1"),
        ("high_watermark", "0.1", "a number from 0 to 1"),
        ("high_watermark", True, "a number from 0 to 1"),
        ("high_watermark", 10**400, "a number from 0 to 1"),
        ("staging_pages", 0, "an int from 1 to 4096"),
        ("staging_pages", 2.0, "an int from 1 to 4096"),
        ("staging_pages", True, "an int from 1 to 4096"),
        ("max_sequences", 0, "an int from 1 to 65536"),
        ("max_sequences", 65537, "an int from 1 to 65536"),
        ("io_engine", "libaio", "'auto', 'uring', 'threads'"),
        ("io_engine", None, "'auto', 'uring', 'threads'"),
        ("io_timeout_s", 0, "a number from 0.001 to 3600"),
        ("io_timeout_s", 3601, "a number from 0.001 to 3600"),
        ("pressure_warning", 0.98, "must be at most pressure_critical=0.97"),
        ("pressure_critical", -1, "a number from 0 to 1"),
        ("attention_math", "fp8", "'auto', 'float32'"),
    ],
)
def test_a_wrong_value_is_refused_with_key_value_and_range(
    tmp_path: Path, key: str, value: object, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        TierConfig(**{key: value})  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{key}=") and says in str(caught.value)
    # The same in a file, which the message names.
    text = "{" + json.dumps(key) + ": " + json.dumps(value) + "}"
    if not isinstance(value, float) or value - value == 0:
        assert refusal(write(tmp_path, "a.json", text)) == str(caught.value)


def test_an_explicit_size_must_keep_to_the_limit() -> None:
    assert TierConfig(gpu="4GiB", gpu_limit="4GiB").gpu_limit == Size.parse("4GiB")
    assert TierConfig(gpu="80%", gpu_limit="4GiB").gpu.kind is SizeKind.FRACTION
    with pytest.raises(ConfigError, match=r"^gpu=5GiB: must be at most gpu_limit=4GiB"):
        TierConfig(gpu="5GiB", gpu_limit="4GiB")


def test_json_and_toml_mean_the_same(tmp_path: Path) -> None:
    toml = write(
        tmp_path, "a.toml", 'gpu = "2MiB"\nram = 0.5\nio_timeout_s = 5\ndescription = "x"\n'
    )
    plain = write(tmp_path, "a.JSON", '{"gpu": "2MiB", "ram": 0.5, "io_timeout_s": 5}')
    assert (
        TierConfig.load(toml)
        == TierConfig.load(str(plain))
        == TierConfig("2MiB", 0.5, io_timeout_s=5.0)
    )


def test_overrides_replace_keys_before_the_check(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '{"ssd": "1GiB", "gpu": "1TiB"}')
    assert refusal(path).startswith("ssd=1GiB: needs ssd_path")
    assert TierConfig.load(path, ssd_path="store", gpu="1MiB").gpu.num_bytes == 2**20
    assert refusal(path, ssd_path="store", gpu="1Mi").startswith("gpu='1Mi': unit 'Mi'")


@pytest.mark.parametrize("suffix", [".json", ".toml"])
def test_every_config_survives_the_way_through_a_table(suffix: str) -> None:
    profiles = [path for path in hardware_profiles().values() if path.suffix == suffix]
    assert profiles
    for path in profiles:
        for config in (TierConfig.load(path), TierConfig.load(path, ssd="64GiB", ssd_path="store")):
            assert TierConfig.from_table(json.loads(json.dumps(config.to_table()))) == config


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("gpu_byte", None),
        ("low_watermrk", "low_watermark"),
        ("ssdpath", "ssd_path"),
        ("kv_cache_gpu", "kv_cache_gpu_mb"),
        ("io-timeout-s", "io_timeout_s"),
        ("", None),
        ("kernel", None),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(
    tmp_path: Path, key: str, nearest: str | None
) -> None:
    message = refusal(write(tmp_path, "a.json", json.dumps({key: 1})))
    assert message.startswith(f"{key!r}: unknown key")
    assert nearest is None or f"did you mean {nearest!r}?" in message
    with pytest.raises(ConfigError, match="unknown key"):
        TierConfig.from_profile("cpu", **{key: 1})


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "gpu: 1", "must end in .json or .toml"),
        ("a", "{}", "must end in .json or .toml"),
        ("a.json", "", "not well formed"),
        ("a.json", "{", "not well formed"),
        ("a.json", '{"gpu": 1,}', "not well formed"),
        ("a.json", "[1, 2]", "must hold a table"),
        ("a.json", "null", "must hold a table"),
        ("a.json", '{"gpu": 1, "gpu": 2}', "'gpu': the key is there twice"),
        ("a.json", '{"gpu": NaN}', "NaN: must be a finite number"),
        ("a.json", '{"gpu": -Infinity}', "-Infinity: must be a finite number"),
        ("a.json", '{"gpu": 1e999}', "gpu=inf"),
        ("a.json", '{"gpu": ' + "9" * 5000 + "}", ""),
        ("a.json", '{"gpu": ' + "[" * 200_000 + "]" * 200_000 + "}", ""),
        ("a.json", " " * (2**20) + "{}", "larger than 1048576 bytes"),
        ("a.toml", "gpu = ", "not well formed"),
        ("a.toml", 'gpu = "1MiB"\ngpu = "1MiB"', "not well formed"),
        ("a.toml", "gpu = nan", "gpu=nan"),
        ("a.toml", "gpu = 2026-01-01", "gpu=datetime.date(2026, 1, 1)"),
        ("a.toml", '[gpu]\nsize = "1MiB"', "gpu={'size': '1MiB'}"),
        ("a.toml", "gpu = " + "[" * 100_000, ""),
        ("a.toml", 'description = ""', "description=''"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, text: str, says: str) -> None:
    message = refusal(write(tmp_path, name, text))
    assert says in message
    assert len(message) < 600


def test_what_is_no_file_is_refused_by_name(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent.json") == "no such file"
    directory = tmp_path / "directory.json"
    directory.mkdir()
    assert refusal(directory) == "not a regular file"
    fifo = tmp_path / "fifo.toml"
    os.mkfifo(fifo)
    assert refusal(fifo) == "not a regular file"
    (tmp_path / "latin.json").write_bytes('{"description": "é"}'.encode("latin-1"))
    assert "not UTF-8" in refusal(tmp_path / "latin.json")
    with pytest.raises(ConfigError):
        TierConfig.load("a\0b.json")


def test_every_shipped_profile_loads_and_its_file_names_no_unknown_key() -> None:
    profiles = hardware_profiles()
    assert sorted(profiles) == ["a10", "a100", "cpu", "h100", "h200", "t4"]
    for name, path in profiles.items():
        config = TierConfig.from_profile(name)
        assert config == TierConfig.load(path)
        assert config.device == ("cpu" if name == "cpu" else "auto")
        assert config.ssd.is_zero, "no profile names a directory"
        assert TierConfig.from_profile(name, ssd_path="store").ssd.kind is SizeKind.AUTO


def test_an_unknown_profile_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match="profile='b200': must be one of a10, a100, cpu, h100, h200, t4"
    ):
        TierConfig.from_profile("b200")
    with pytest.raises(ConfigError, match="must be one of"):
        TierConfig.from_profile("../t4")


def test_the_readme_explains_every_key_and_profile() -> None:
    text = data_path("configs/README.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(TierConfig):
        assert f"| `{field.name}` |" in text
    for path in hardware_profiles().values():
        assert f"| `{path.name}` |" in text


def test_older_names_of_t4_are_mapped() -> None:
    table = json.loads(data_path("configs/t4.json").read_text(encoding="utf-8"))
    older = {
        "gpu_memory_budget_mb": 14336,
        "kv_cache_gpu_mb": 8192,
        "model_gpu_mb": 4096,
        "batch_size": 8,
        "enable_tensor_cores": True,
        "fp16_matmul": True,
    }
    assert {key: table[key] for key in older} == older
    config = TierConfig.from_profile("t4")
    assert (str(config.gpu), str(config.gpu_limit), config.max_sequences) == ("8GiB", "10GiB", 8)
    assert config.attention_math is AttentionMath.AUTO


@pytest.mark.parametrize("key", ["enable_tensor_cores", "fp16_matmul"])
def test_either_math_switch_of_the_older_names_gives_float32(key: str) -> None:
    assert TierConfig.from_table({key: False}).attention_math is AttentionMath.FLOAT32
    other = {"enable_tensor_cores": True, "fp16_matmul": True, key: False}
    assert TierConfig.from_table(other).attention_math is AttentionMath.FLOAT32
    with pytest.raises(ConfigError, match=f"^{key}=1: must be true or false"):
        TierConfig.from_table({key: 1})


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"kv_cache_gpu_mb": 8192, "gpu": "8193MiB"}, "gpu='8193MiB': contradicts kv_cache_gpu_mb"),
        ({"batch_size": 8, "max_sequences": 9}, "max_sequences=9: contradicts batch_size"),
        ({"batch_size": 1, "max_sequences": True}, "max_sequences=True: must be an int"),
        (
            {"fp16_matmul": False, "attention_math": "auto"},
            "attention_math='auto': contradicts fp16_matmul",
        ),
        (
            {"gpu_memory_budget_mb": 12287, "kv_cache_gpu_mb": 8192, "model_gpu_mb": 4096},
            "at least",
        ),
        (
            {"gpu_memory_budget_mb": 4096, "model_gpu_mb": 4096},
            "gpu_memory_budget_mb=4096: must be at least",
        ),
        ({"model_gpu_mb": 4096}, "model_gpu_mb=4096: needs gpu_memory_budget_mb"),
        ({"kv_cache_gpu_mb": 0}, "kv_cache_gpu_mb=0: must be an int from 1"),
        ({"kv_cache_gpu_mb": "8GiB"}, "kv_cache_gpu_mb='8GiB': must be an int"),
        ({"kv_cache_gpu_mb": True}, "kv_cache_gpu_mb=True: must be an int"),
        ({"batch_size": 0}, "batch_size=0: must be an int from 1"),
        ({"batch_size": 8.0}, "batch_size=8.0: must be an int"),
    ],
)
def test_older_names_that_contradict_are_refused(table: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TierConfig.from_table(table)
    assert says in str(caught.value)


def test_older_names_may_agree_with_todays() -> None:
    table = {"kv_cache_gpu_mb": 1024, "gpu": "1GiB", "batch_size": 4, "max_sequences": 4}
    assert TierConfig.from_table(table) == TierConfig(gpu=GiB, max_sequences=4)
    whole = {"gpu_memory_budget_mb": 2048, "kv_cache_gpu_mb": 1024, "model_gpu_mb": 1024}
    assert TierConfig.from_table(whole).gpu_limit == Size.parse("1GiB")
    assert TierConfig.from_table({"gpu_memory_budget_mb": 2048}).gpu_limit == Size.parse("2GiB")


@pytest.mark.parametrize(
    ("gpu_name", "gib", "profile"),
    [
        (None, 0, "cpu"),
        ("Tesla T4", 15, "t4"),
        ("NVIDIA T4G", 15, "t4"),
        ("NVIDIA A10", 22, "a10"),
        ("NVIDIA A10G", 22, "a10"),
        ("NVIDIA A100-SXM4-40GB", 40, "a100"),
        ("NVIDIA A100 80GB PCIe", 80, "a100"),
        ("NVIDIA H100 80GB HBM3", 80, "h100"),
        ("NVIDIA H200", 141, "h200"),
        ("NVIDIA H200 NVL", 141, "h200"),
        # No profile is made for these: chosen by memory, and never one with sizes in bytes.
        ("NVIDIA T400", 4, "a10"),
        ("NVIDIA A1000", 8, "a10"),
        ("NVIDIA GeForce RTX 4090", 24, "a10"),
        ("NVIDIA L40S", 45, "a100"),
        ("NVIDIA GH200 96GB HBM3", 95, "h100"),
        ("NVIDIA B200", 180, "h200"),
    ],
)
def test_a_profile_is_chosen_by_the_detected_device(
    gpu_name: str | None, gib: int, profile: str
) -> None:
    assert profile_for_device(gpu_name, gib * GiB) == profile


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=4,
)
some_keys = st.sampled_from(
    [field.name for field in dataclasses.fields(TierConfig)] + ["batch_size"]
)


@given(st.dictionaries(some_keys | st.text(max_size=8), json_values, max_size=4))
def test_any_table_is_a_config_or_a_config_error(table: dict[str, object]) -> None:
    try:
        config = TierConfig.from_table(table)
    except ConfigError:
        return
    assert TierConfig.from_table(config.to_table()) == config
