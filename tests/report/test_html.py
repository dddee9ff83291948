"""Pages: everything inside, nothing executed, whatever the texts hold."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlxpref.cli.demo import Writing
from mlxpref.data.thumbnails import thumbnail
from mlxpref.demo.reasons import Truth
from mlxpref.report.curves import curve_svg
from mlxpref.report.html import write_page
from tests.conftest import picture

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


def demo_result() -> SimpleNamespace:
    metrics = SimpleNamespace(accuracy=0.9, accuracy_low=0.8, accuracy_high=0.95, pairs=400)
    evaluation = SimpleNamespace(metrics=metrics)
    return SimpleNamespace(
        evaluations=dict.fromkeys(("before", "after", "before_read", "after_read"), evaluation),
        training_seconds=90.0, steps=60, ranking=SimpleNamespace(prompt=HOSTILE),
    )  # fmt: skip


def test_texts_are_escaped(tmp_path: Path) -> None:
    ranked = [
        {"picture": thumbnail(picture(1)).uri, "name": HOSTILE, "rank": 1, "strength": 1.0, "low": 0.5, "high": 1.5,
         "wins": 3, "pairs": 4, "reason": HOSTILE}
    ]  # fmt: skip
    example = {
        "prompt": HOSTILE, "first": thumbnail(picture(1)).uri, "second": thumbnail(picture(2)).uri,
        "first_is_right": True, "before": HOSTILE, "after": HOSTILE, "p_before": 0.3, "p_after": 0.9,
    }  # fmt: skip
    result = demo_result()
    write_page(
        tmp_path / "index.html",
        "demo.html",
        result=result,
        meaning="what <intervals> mean",
        bars=[(f"thinking, {HOSTILE}", result.evaluations["before"], "before")],
        written=[(HOSTILE, Writing(0.6, 31.5, Truth(0.5, 1.0, 0.75, 1.0, None)))],
        curve=curve_svg({"reward": [0.1, 0.5, 0.9]}, label="mean"),
        length=curve_svg({"tokens": [30.0, 62.0]}, label="tokens"),
        ranked=ranked,
        example=example,
    )
    page = (tmp_path / "index.html").read_text()
    assert "<script" not in page
    assert "onerror=alert" not in re.sub(r"&lt;.*?&gt;", "", page)
    assert page.count("&lt;script&gt;") == 9
    assert re.findall(r"<td>(.*?)</td>", page) == ["60.0 %", "31.5", "50.0 %", "100.0 %", "75.0 %", "100.0 %", "-"]
    loaded = re.findall(r"(?:src|href)=\"([^\"]*)\"", page)
    assert loaded
    assert all(address.startswith(("data:image/webp;base64,", "#")) for address in loaded)
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_missing_value_is_an_error(tmp_path: Path) -> None:
    import jinja2

    with pytest.raises(jinja2.UndefinedError):
        write_page(tmp_path / "index.html", "demo.html", result=demo_result())
    assert not (tmp_path / "index.html").exists()
