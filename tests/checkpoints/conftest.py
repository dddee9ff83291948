"""Copies of tiny checkpoints, which a test may change."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import GOLDEN


@pytest.fixture
def folder(family: str, tmp_path: Path) -> Path:
    """A copy of each family's checkpoint."""
    return Path(shutil.copytree(GOLDEN / family, tmp_path / "model", ignore=shutil.ignore_patterns("*.npz")))


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """A copy of one checkpoint: tied, in one file, in bfloat16."""
    return Path(shutil.copytree(GOLDEN / "qwen2_5_vl", tmp_path / "model", ignore=shutil.ignore_patterns("*.npz")))
