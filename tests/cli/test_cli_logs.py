"""Warnings of the log, in words for a person."""

from __future__ import annotations

from loadstone.cli import logs
from loadstone.telemetry.log import log_event
from loadstone.telemetry import Event


def test_a_warning_names_its_first_tensors(capsys):
    """Whoever has broken weights learns which; of many, the first few and how many more."""
