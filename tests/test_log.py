"""As a library, mlxpref shows warnings by default, and progress where it is asked to."""

import subprocess
import sys

import pytest

from mlxpref.log import MANY, logger, showing, track, track_many
from tests.messages import Tracked, messages

PROGRAM = """
import mlxpref, sys
assert not {"mlx.core", "numpy", "PIL"} & set(sys.modules)
from mlxpref import Judge, PairVerdict, Preference, Ranking, Verdict
from mlxpref.log import logger
logger.warning("rows are left out")
logger.info("downloading")
"""


def test_warnings_without_configuration() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "rows are left out\n")


def test_progress_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    names = []
    assert list(track("ab", 2, "reading")) == ["a", "b"]
    with showing(Tracked(lambda work, count, what: names.append(f"{what}: {count}") or work)):
        assert list(track("ab", 2, "reading")) == ["a", "b"]
    assert list(track("ab", 2, "reading")) == ["a", "b"]
    assert names == ["reading: 2"]
    with messages() as lines:
        logger.info("seen")
    logger.info("not seen")
    assert lines == ["seen"]
    assert capsys.readouterr() == ("", "")


def test_quick_work_shows_progress_of_many_items() -> None:
    names: list[str] = []
    with showing(Tracked(lambda work, count, what: names.append(f"{what}: {count}") or work)):
        assert len(list(track_many(range(MANY), "looking"))) == MANY
        assert len(list(track_many(range(MANY + 1), "looking"))) == MANY + 1
    assert names == [f"looking: {MANY + 1}"]
