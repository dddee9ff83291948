"""Drawings of curves: the same again, small, and without names that the page did not choose."""

import re

import matplotlib as mpl

from mlxpref.report.curves import Dots, curve_svg

NAN = float("nan")


def test_drawing_is_deterministic() -> None:
    before = mpl.get_backend(), dict(mpl.rcParams)
    svgs = [str(curve_svg({"reward": [0.1, 0.5, 0.9], "accuracy": [0.2, 0.3, 0.4]}, label="mean")) for _ in range(2)]
    assert svgs[0] == svgs[1]
    assert svgs[0].startswith("<svg")
    assert "accuracy" in svgs[0]
    assert (mpl.get_backend(), dict(mpl.rcParams)) == before


def test_long_curves_keep_their_spikes() -> None:
    flat = [1.0 + 0.001 * (i % 7) for i in range(5000)]
    spiked = [*flat[:2500], 9.0, *flat[2501:]]
    drawings = [str(curve_svg({"norm": values})) for values in (flat, spiked)]
    assert max(map(len, drawings)) < 80_000
    assert [">8</text>" in drawing for drawing in drawings] == [False, True]


def test_gaps_dots_and_single_steps() -> None:
    dots = Dots([1, 2], [0.5, 0.6], [0.4, NAN], [0.6, NAN])
    svg = str(curve_svg({"a": [0.1, NAN, 0.3]}, steps=[1, 2, 9], dots={"b": dots}, share=True))
    assert [svg.count(f"stroke: {colour}") > 0 for colour in ("#2a78d6", "#1a936f", "#b3541e")] == [True, True, False]
    assert "50\u00a0%" in svg
    assert "<use" in str(curve_svg({"a": [1.0]}))


def test_drawing_without_a_label() -> None:
    names = ("$\\frac{", "_x", "<script>")
    svg = str(curve_svg({name: [0.1, 0.2] for name in names}))
    assert not any(word in svg for word in ("frac", "<script"))


def test_drawings_share_only_equal_parts() -> None:
    drawings = [str(curve_svg({"a": [0.1, 0.2 * i]})) for i in (1, 2)]
    ids = [set(re.findall(r'id="([^"]*)"', drawing)) for drawing in drawings]
    for drawing, own in zip(drawings, ids, strict=True):
        assert set(re.findall(r"(?:#|url\(#)([a-z]\w{10})\b", drawing)) <= own
    assert not any(name.endswith("_1") for name in ids[0] & ids[1])
