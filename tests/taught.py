"""The judge that was taught the forms of other judges, once for all test processes."""

import fcntl
from pathlib import Path

import pytest

from scripts.teach_profiles import teach


def taught_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the judge of `scripts/teach_profiles.py`; the first process teaches it, the others wait."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base  # of pytest-xdist
    with (shared / "taught.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "taught").exists():
            teach(shared / "new")
            (shared / "new").rename(shared / "taught")
    return shared / "taught"
