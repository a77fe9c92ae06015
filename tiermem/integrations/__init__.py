"""tiermem inside other libraries; each submodule imports its library, and nothing else of tiermem does."""

from __future__ import annotations
