"""Shipped files are found in a checkout and in an installed package, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiermem import data
from tiermem.data import data_path


def test_shipped_files_are_found() -> None:
    assert data_path("configs/t4.json").is_file()
    assert data_path("configs/models").is_dir()
    assert data_path("models/reference/model.safetensors").is_file()
    assert data_path("examples/long_prompt.txt").is_file()


def test_an_installed_package_finds_them_within_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiermem" / "_data" / "configs" / "x.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    monkeypatch.setattr(data, "_PACKAGE", tmp_path / "tiermem")
    assert data_path("configs/x.json") == file


def test_what_does_not_ship_is_not_found() -> None:
    with pytest.raises(FileNotFoundError, match=r"configs/b200\.json"):
        data_path("configs/b200.json")


@pytest.mark.parametrize("name", ["/etc/hostname", "../configs/t4.json", "configs/../../x"])
def test_names_stay_within_the_data(name: str) -> None:
    with pytest.raises(ValueError, match="relative path"):
        data_path(name)
