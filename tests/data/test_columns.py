"""What labels say of a row, also where the same ones stood in a row before."""

from collections.abc import Mapping
from typing import Any

import pytest

from mlxpref.data.columns import Layout, layout_of, share_for_first, share_reader
from mlxpref.errors import DataError

IMAGES = ("1.png", "2.png")
ROW = {"prompt": "x", "image_0": IMAGES[0], "image_1": IMAGES[1]}
LABELS: list[dict[str, Any]] = [
    {"label": 1}, {"label": True}, {"label": 1.0}, {"label": "1"}, {"label": "1.png"}, {"label": "2.png"}, {"label": 0},
    {"label": False}, {"label": "tie"}, {"label": 0.5}, {"label": 1, "p_a": 0.9}, {"label": 1, "p_a": "0,1"},
    {"label": 1, "p_a": True}, {"label": 1, "p_a": 1}, {"label": 2}, {},
]  # fmt: skip


def said(layout: Layout, row: Mapping[str, Any], images: tuple[str, str]) -> object:
    try:
        return share_for_first(row, layout, 0, images)
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("columns", [ROW | {"label": 1}, ROW | {"label": 1, "p_a": 1}])
def test_what_was_read_before_changes_nothing(columns: dict[str, Any]) -> None:
    layout = layout_of(columns)
    read = share_reader(layout, 0)
    for images in (IMAGES, IMAGES[::-1], IMAGES):
        for labels in LABELS:
            try:
                found: object = read(ROW | labels, images)
            except DataError as error:
                found = str(error)
            assert found == said(layout, ROW | labels, images), labels
            assert type(found) is type(said(layout, ROW | labels, images))
