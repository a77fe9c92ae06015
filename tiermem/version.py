"""The version of tiermem, for files that must be told from those of another one."""

from __future__ import annotations

VERSION = "0.1.0"
