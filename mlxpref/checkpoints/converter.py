"""The conversion, which `checkpoints` may not import: `mlxpref/__init__.py` hands it in, so nothing large is here."""

from collections.abc import Callable
from pathlib import Path

Convert = Callable[[Path, Path, str], object]
"""Converts a checkpoint folder to 4 bit, into a folder that it replaces; the last is the source's name on the hub."""
_handed_in: list[Convert] = []


def hand_in(convert: Convert) -> None:
    """Let judges be converted by this function."""
    _handed_in[:] = [convert]


def convert(source: Path, output: Path, name: str) -> None:
    """Convert a checkpoint folder; see `Convert`. What it raises it leaves nothing behind of."""
    _handed_in[0](source, output, name)
