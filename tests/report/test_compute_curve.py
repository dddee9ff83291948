"""The drawing of test-time compute: what it says, and where its points are."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlxpref.errors import ConfigError
from mlxpref.judge.compute_curve import ComputePoint
from mlxpref.judge.strategies import StrategyVariant
from mlxpref.report.compute_curve import draw_curves
from mlxpref.report.drawing import FORMATS


@pytest.fixture
def points() -> list[ComputePoint]:
    at_once = ComputePoint(StrategyVariant("soft", False, 1), 0, 0.6, 0.55, 0.65)
    grid = [
        ComputePoint(StrategyVariant("soft", True, n, limit), 2 * n * limit, value, value - 0.05, value + 0.05)
        for n, limit, value in ((1, 8, 0.58), (1, 16, 0.66), (4, 8, 0.62), (4, 16, 0.72))
    ]
    return [at_once, *grid]


def words(path: Path) -> list[str]:
    root = ElementTree.parse(path).getroot()
    return [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_words(points: list[ComputePoint], tmp_path: Path) -> None:
    draw_curves({"one": points, "two": points[:3]}, tmp_path / "curve.svg")
    texts = words(tmp_path / "curve.svg")
    for text in ("one", "two", "1 sample, greedy", "4 samples", "up to 8 tokens", "up to 16 tokens", "best so far"):
        assert texts.count(text) == 1, text
    assert {"no tokens, at once", "tokens written about a pair, in both orders"} <= {*texts}
    assert {"20", "50", "100", "60\u00a0%", "70\u00a0%"} <= {*texts}
    assert [path.name for path in tmp_path.iterdir()] == ["curve.svg"]


def test_panels_share_an_axis_for_all_points(points: list[ComputePoint], tmp_path: Path) -> None:
    far = [replace(each, tokens=20 * each.tokens) for each in points[1:]]
    for panels in ({"one": points, "far": far}, {"far": far, "one": points}):
        draw_curves(panels, tmp_path / "curve.svg")
        assert {"20", "2000"} <= {*words(tmp_path / "curve.svg")}


@pytest.mark.parametrize("chosen", [slice(0, 1), slice(0, 2), slice(1, 2), slice(1, 3), slice(1, 5)])
def test_few_points(points: list[ComputePoint], tmp_path: Path, chosen: slice) -> None:
    draw_curves({"": points[chosen]}, tmp_path / "curve.svg")
    assert "best so far" in words(tmp_path / "curve.svg")


def test_points_are_where_their_numbers_are(points: list[ComputePoint], tmp_path: Path) -> None:
    """The colours of lines from left to right, and from bottom to top."""
    draw_curves({"": points}, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        pixels = np.asarray(picture.convert("RGB"), int)
    # Without the legend, which begins below the axis.
    pixels = pixels[: int(0.65 * len(pixels))]
    blue, green = (
        np.argwhere(np.abs(pixels - colour).sum(axis=-1) < 30) for colour in ((0x2A, 0x78, 0xD6), (0x1A, 0x93, 0x6F))
    )
    assert blue[:, 1].min() < green[:, 1].min()
    assert blue[:, 1].max() < green[:, 1].max()
    assert green[:, 0].min() < blue[:, 0].min()
    assert pixels.shape[1] > 700


@pytest.mark.parametrize("ending", FORMATS)
def test_equal_drawings_are_equal_files(points: list[ComputePoint], tmp_path: Path, ending: str) -> None:
    for name in ("a", "b"):
        draw_curves({"": points}, tmp_path / f"{name}{ending}")
    first, second = ((tmp_path / f"{name}{ending}").stat().st_size for name in ("a", "b"))
    assert first == second


def test_unwritable_file(points: list[ComputePoint], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends with \.svg or \.png"):
        draw_curves({"": points}, tmp_path / "curve.pdf")
    with pytest.raises(ConfigError, match="cannot be written there"):
        draw_curves({"": points}, tmp_path / "nowhere" / "curve.svg")
