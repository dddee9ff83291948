"""Reliability diagrams: bins by hand, the calibration error that follows from them, and files that are drawings."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlxpref.errors import ConfigError
from mlxpref.judge.metrics import calibration_bins, calibration_error
from mlxpref.report.reliability import Panel, draw_reliability


def test_bins_by_hand() -> None:
    count, p, people = calibration_bins(np.array([0.05, 0.1, 0.15, 0.3, 1.0]), np.array([0.0, 1.0, 0.5, 0.25, 1.0]))
    assert count.tolist() == [1, 2, 0, 1, 0, 0, 0, 0, 0, 1]
    assert p[[0, 1, 3, 9]].tolist() == pytest.approx([0.05, 0.25, 0.3, 1.0])
    assert people[[0, 1, 3, 9]].tolist() == pytest.approx([0.0, 1.5, 0.25, 1.0])


def test_both_sides_are_counted() -> None:
    """The drawing turned around its middle is itself."""
    count, p, people = calibration_bins(*Panel("", *np.random.default_rng(0).random((2, 300))).sides)
    assert count.sum() == 600
    assert p / count + (p / count)[::-1] == pytest.approx(np.ones(10))
    assert people / count + (people / count)[::-1] == pytest.approx(np.ones(10))


@pytest.fixture
def panels() -> list[Panel]:
    rng = np.random.default_rng(0)
    people = (rng.random(50) < 0.5).astype(float)
    return [Panel(f"way {i}", np.clip(people + rng.normal(0, 0.4, 50), 0, 1), people) for i in range(5)]


def test_panels_have_error_and_counts(panels: list[Panel], tmp_path: Path) -> None:
    path = tmp_path / "drawing.svg"
    draw_reliability(panels, 2, path)
    root = ElementTree.parse(path).getroot()
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    text = " ".join(texts + ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}tspan")])
    for panel in panels:
        assert panel.title in text
        assert f"{calibration_error(*panel.sides):.3f}" in text
        for count in calibration_bins(*panel.sides)[0]:
            assert not count or f"{count:.0f}" in texts
    assert list(tmp_path.iterdir()) == [path]
    before = path.read_text(encoding="utf-8")
    draw_reliability(panels, 2, path)
    # Names of clipping paths are made of addresses in memory.
    assert re.sub(r"[0-9a-f]{10}", "", path.read_text(encoding="utf-8")) == re.sub(r"[0-9a-f]{10}", "", before)


def test_png_has_all_panels(panels: list[Panel], tmp_path: Path) -> None:
    sizes = []
    for columns in (1, 5):
        draw_reliability(panels, columns, tmp_path / "drawing.PNG")
        with Image.open(tmp_path / "drawing.PNG") as picture:
            sizes.append(picture.size)
            pixels = np.asarray(picture.convert("RGB"), int)
        blue = (pixels[..., 2] > pixels[..., 0] + 80).mean(axis=0 if columns == 5 else 1)
        fifths = np.array_split(blue, 5)
        assert all(part.max() > 0 for part in fifths)
    assert sizes[0][1] > 3 * sizes[0][0]
    assert sizes[1][0] > 3 * sizes[1][1]


def test_unwritable_file(panels: list[Panel], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends with \.svg or \.png"):
        draw_reliability(panels, 2, tmp_path / "drawing.pdf")
    with pytest.raises(ConfigError, match="cannot be written there"):
        draw_reliability(panels, 2, tmp_path / "nowhere" / "drawing.svg")
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(ConfigError, match="cannot be written there"):
        draw_reliability(panels, 2, tmp_path / "folder.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.svg"]
