"""What tests of reading preferences share."""

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the names of images."""
    for name in ("1.png", "2.png", "3.png", "sub/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()  # the reader looks for images, it does not open them
    return tmp_path
