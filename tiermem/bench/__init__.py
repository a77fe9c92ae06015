"""Bench: what tiermem does on this machine, as shares of what the machine could do; one question a file."""

from __future__ import annotations
