"""Measure: how long things take, and the rates that this machine cannot exceed."""

from __future__ import annotations
