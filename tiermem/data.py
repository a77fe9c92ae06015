"""Files that ship with tiermem: profiles, benchmarks and the reference model."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_path(name: str) -> Path:
    """Where the shipped file or directory `name` lies, such as "configs/t4.json" or "models/reference".

    In a checkout these lie beside the package, in an installed wheel within it, under `_data`.

    Raises
    ------
    ValueError: `name` is absolute or leaves the data directory.
    FileNotFoundError: nothing of that name ships.
    """
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"name={name!r}: must be a relative path without '..'")
    path = _root() / relative
    if not path.exists():
        raise FileNotFoundError(f"{name}: not among the files that ship with tiermem, in {_root()}")
    return path


def _root() -> Path:
    installed = _PACKAGE / "_data"
    return installed if installed.is_dir() else _PACKAGE.parent
