"""The estimate of time: it counts the images that will be encoded, and encodes no other."""

from collections.abc import Callable
from pathlib import Path

import pytest

import mlxpref
from mlxpref.disk_cache import DiskCache
from mlxpref.judge import time_estimate as module
from mlxpref.judge.pair_budget import PairBudget
from mlxpref.judge.time_estimate import estimate_seconds
from tests.conftest import picture


def second(work: Callable[[], object]) -> float:
    """Work that takes a second."""
    work()
    return 1.0


@pytest.mark.parametrize(("on_disk", "encoded", "left"), [(0, 3, 5), (2, 2, 4), (5, 2, 1), (7, 1, 0), (8, 0, 0)])
def test_images_on_disk_cost_nothing(
    on_disk: int, encoded: int, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_seconds", second)
    images = [picture(i) for i in range(8)]
    before = mlxpref.load("demo", think=False)
    judge = mlxpref.load("demo", think=False)
    for each in (before, judge):
        each.vlm.features.keep_in(DiskCache(tmp_path, 1 << 30), each.fingerprint.tower())
    before.vlm.features.get_all(images[:on_disk])
    assert estimate_seconds(judge, images, "a red circle", PairBudget(20, 0)) == 20 + left
    assert judge.vlm.features.runs == encoded
