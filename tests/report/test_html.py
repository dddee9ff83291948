"""Pages: everything inside, nothing executed, whatever the texts hold."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlxpref.report.html import Dots, curve_svg, picture_uri, short_names, write_page
from tests.conftest import picture

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


def story() -> SimpleNamespace:
    metrics = SimpleNamespace(accuracy=0.9, accuracy_low=0.8, accuracy_high=0.95, pairs=400)
    evaluation = SimpleNamespace(metrics=metrics)
    return SimpleNamespace(
        before=evaluation, after=evaluation, held_out_before=evaluation, held_out_prompts=evaluation,
        training_seconds=90.0, steps=60, ranking=SimpleNamespace(prompt=HOSTILE),
    )  # fmt: skip


def test_texts_are_escaped_and_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    ranked = [
        {"picture": picture_uri(picture(1)), "name": HOSTILE, "rank": 1, "strength": 1.0, "low": 0.5, "high": 1.5,
         "wins": 3, "pairs": 4, "reason": HOSTILE}
    ]  # fmt: skip
    example = {
        "prompt": HOSTILE, "first": picture_uri(picture(1)), "second": picture_uri(picture(2)), "first_is_right": True,
        "before": HOSTILE, "after": HOSTILE, "p_before": 0.3, "p_after": 0.9,
    }  # fmt: skip
    told = story()
    write_page(
        tmp_path / "index.html",
        "demo.html",
        story=told,
        bars=[("test pictures, before", told.before, "before")],
        curve=curve_svg({"reward": [0.1, 0.5, 0.9]}, "mean"),
        ranked=ranked,
        example=example,
    )
    page = (tmp_path / "index.html").read_text()
    assert "<script" not in page
    assert "onerror=alert" not in re.sub(r"&lt;.*?&gt;", "", page)
    assert page.count("&lt;script&gt;") == 7
    loaded = re.findall(r"(?:src|href)=\"([^\"]*)\"", page)
    assert loaded
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in loaded)
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_a_missing_value_is_an_error_not_a_blank(tmp_path: Path) -> None:
    import jinja2

    with pytest.raises(jinja2.UndefinedError):
        write_page(tmp_path / "index.html", "demo.html", story=story())
    assert not (tmp_path / "index.html").exists()


def test_curves_are_drawn_the_same_again() -> None:
    drawn = [str(curve_svg({"reward": [0.1, 0.5, 0.9], "accuracy": [0.2, 0.3, 0.4]}, "mean")) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert drawn[0].startswith("<svg")
    assert "accuracy" in drawn[0]


def test_long_curves_are_thinned_and_keep_their_spikes() -> None:
    flat = [1.0 + 0.001 * (i % 7) for i in range(5000)]
    spiked = [*flat[:2500], 9.0, *flat[2501:]]
    drawn = [str(curve_svg({"norm": values}, "", legend=False)) for values in (flat, spiked)]
    assert max(map(len, drawn)) < 40_000
    assert [">8</text>" in drawing for drawing in drawn] == [False, True]


def test_gaps_dots_areas_and_single_steps_are_drawn() -> None:
    nan = float("nan")
    dots = Dots([1, 2], [0.5, 0.6], [0.4, nan], [0.6, nan])
    drawn = str(curve_svg({"a": [0.1, nan, 0.3]}, "", steps=[1, 2, 9], dots={"b": dots}, scale="share"))
    assert [drawn.count(f"stroke: {colour}") > 0 for colour in ("#2a78d6", "#1a936f", "#b3541e")] == [True, True, False]
    assert "50\u00a0%" in drawn
    for values in ([1.0], [1.0, nan, 2.0]):
        drawn = str(curve_svg({"a": values, "b": values}, "", stacked=True))
        assert "fill: #2a78d6" in drawn
        assert "fill: #1a936f" in drawn
    assert ">100</text>" in str(curve_svg({"a": [0.1, 100.0]}, "", scale="log"))


def test_names_that_would_be_formulas_stay_out_of_a_drawing_without_legend() -> None:
    names = ("$\\frac{", "_x", HOSTILE)
    drawn = str(curve_svg({name: [0.1, 0.2] for name in names}, "", legend=False))
    assert not any(word in drawn for word in ("frac", "alert", "<script"))


def test_drawings_on_one_page_share_no_names_but_those_of_equal_parts() -> None:
    drawn = [str(curve_svg({"a": [0.1, 0.2 * i]}, "")) for i in (1, 2)]
    ids = [set(re.findall(r'id="([^"]*)"', drawing)) for drawing in drawn]
    for drawing, own in zip(drawn, ids, strict=True):
        assert set(re.findall(r"(?:#|url\(#)([a-z]\w{10})\b", drawing)) <= own
    assert not any(name.endswith("_1") for name in ids[0] & ids[1])


def test_pictures_are_shrunk_to_what_a_page_needs() -> None:
    assert len(picture_uri(picture(0, (1000, 500)), side=64)) < 20_000


def test_names_are_as_short_as_tells_them_apart() -> None:
    assert short_names(["x/a/1.png", "x/b/2.png"]) == ["1.png", "2.png"]
    assert short_names(["x/a/1.png", "x/b/1.png"]) == [str(Path("a/1.png")), str(Path("b/1.png"))]
    assert short_names(["/x/1.png", "y/1.png"]) == ["/x/1.png", "y/1.png"]
