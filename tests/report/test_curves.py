"""Drawings of curves: the same again, small, and without names that the page did not choose."""

import re

import matplotlib as mpl
import numpy as np

from mlxpref.report.curves import Dots, _thinned, curve_svg

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


def test_thinned_curves_show_the_same() -> None:
    values = np.sin(np.arange(9000.0) ** 2)
    values[3000:3500] = NAN
    at, kept = _thinned(np.arange(1.0, 9001), values, 300)
    assert len(kept) < 3 * 300
    assert [at[0], at[-1]] == [1, 9000]
    assert np.array_equal(kept, values[at.astype(int) - 1], equal_nan=True)
    parts = np.array_split(np.arange(9000), 300)
    for part in (part for part in parts if np.isfinite(values[part]).all()):
        shown = kept[(at > part[0]) & (at <= part[-1] + 1)]
        assert [shown.min(), shown.max()] == [values[part].min(), values[part].max()]
    gap = kept[(at > 3030) & (at < 3470)]
    assert len(gap)
    assert np.isnan(gap).all()
    few = np.arange(5.0)
    assert _thinned(few, few, 300) == (few, few)


def test_many_measurements_do_not_hide_each_other() -> None:
    steps = [float(step) for step in range(600)]
    ends = [[level] * 600 for level in (0.5, 0.4, 0.6)]
    few, many = (str(curve_svg({}, dots={"a": Dots(steps[:n], *(end[:n] for end in ends))})) for n in (60, 600))
    assert ["stroke-width: 1.5" in svg for svg in (few, many)] == [True, False]
