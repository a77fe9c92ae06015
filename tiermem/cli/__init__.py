"""The command line: `tiermem generate`, `tiermem doctor`, `tiermem stats`.

Modules named after a command declare its options and import nothing heavy; torch and transformers are imported
when a command needs them, so that help, version and stats start quickly.
"""

from __future__ import annotations

from tiermem.cli.app import main

__all__ = ["main"]
