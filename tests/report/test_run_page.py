"""The page of a training run: whatever its folder lacks, safe, small; and looked at in a real browser."""

import html
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from mlxpref.errors import DataError
from mlxpref.preferences import ImageLike
from mlxpref.report.run_log import RunLog, format_number
from mlxpref.report.run_page import write_run_page
from tests.browser import Browser
from tests.conftest import picture
from tests.pages import HOSTILE, Tags, assert_no_script_gets_in, complaints

RUN = {"settings": {"model": "demo", "data": "demo", "reward": "soft", "group": 4}, "versions": {"mlx": "0.32.4"}}


def step_line(step: int, steps: int = 20, **more: Any) -> dict[str, Any]:
    """A line of log.jsonl; what is measured moves with the step."""
    share = step / steps
    return {
        "step": step, "steps": steps, "reward": 0.5 + share / 2 + 0.01 * (step % 3),
        "reward_parts": {"soft": 0.4 + share / 3, "own.py:short": 0.1 * share}, "accuracy": 0.5 + 0.4 * share,
        "format_rate": 1.0, "label_mass": 0.99, "truncated": 0.0, "entropy": 0.2, "loss": 0.1, "grad_norm": 0.3,
        "kl": None, "clip_fraction": 0.0, "mismatch": 1e-6, "skipped": step % 2, "groups": 4, "updated": True,
        "tokens": 400, "tokens_per_second": 200.0, "learning_rate": 1e-5, "rollout_seconds": 2.0,
        "score_seconds": 0.5, "update_seconds": 1.0, "evaluation_seconds": 0.0, "peak_bytes": 3_000_000_000,
        "held_out": None,
    } | more  # fmt: skip


def metrics(accuracy: float) -> dict[str, Any]:
    interval = {"accuracy_low": accuracy - 0.05, "accuracy_high": accuracy + 0.04}
    return {"pairs": 400, "accuracy": accuracy, **interval, "position_consistency": 0.9, "ece": 0.05}


def rollout(step: int, reward: float, **more: Any) -> dict[str, Any]:
    return {"step": step, "prompt": "a hat", "first": None, "second": None, "y": 0.25, "text": f"<think>r{reward}",
            "p_first": 0.75, "label_mass": 0.5, "reward": reward, "advantage": -0.125} | more  # fmt: skip


def run_in(folder: Path, log: Any = (), rollouts: Any = (), run: Any = RUN) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run))
    for name, lines in (("log.jsonl", log), ("rollouts.jsonl", rollouts)):
        (folder / name).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return folder


def text_of(page: Path) -> str:
    """What is read on a page, with a blank where a tag was."""
    text = re.sub(r"<style>.*?</style>|<[^>]*>", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(html.unescape(text).split())


def titles(page: Path) -> list[str]:
    return re.findall(r'<h3 id="figure[^>]*>([^<]*)<', page.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with everything logged."""
    folder = tmp_path_factory.mktemp("whole")
    log = [step_line(i, held_out=metrics(0.7 + i / 100) if i in (10, 20) else None) for i in range(1, 21)]
    files = [folder / f"{'f' * 99}{i}.png" for i in range(2)]
    for i, file in enumerate(files):
        picture(i).save(file)
    paths = {"first": str(files[0]), "second": str(files[1])}
    rollouts = [rollout(i, i + j, **paths) for i in range(1, 21) for j in range(3)]
    run = run_in(folder / "run", log, rollouts, RUN | {"note": "n" * 200})
    page = write_run_page(run)
    assert page == run / "report.html"
    return page


def test_a_whole_run(whole: Path) -> None:
    text = text_of(whole)
    for number in ("61.0 %", "81.0 %", "8,000", "3.0 GB", "20 of 20", "0.32.4", "75.0 % of people", "25.0 % of people"):
        assert number in text
    assert {"Reward", "Agreement with people", "Gradient norm", "Seconds a step"} <= set(titles(whole))
    assert "Clipped tokens" not in titles(whole)  # always 0
    assert "Distance from the judge without adapter" not in titles(whole)  # not logged


def test_twenty_rollouts_spread_over_the_run(whole: Path) -> None:
    tags = Tags(whole.read_text(encoding="utf-8"))
    steps = [int(step) for step in re.findall(r"Step (\d+):", tags.text)]
    assert len(steps) == 20
    assert (steps[0], steps[-1]) == (1, 20)
    assert steps == sorted(steps)
    rewards = [int(reward) for reward in re.findall(r"<think>r(\d+)", tags.text)]
    assert rewards == [step + extra for step, extra in zip(steps, [2, 0] * 10, strict=True)]
    assert len(tags.all("img")) == 40


def test_images_from_the_caller(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []

    def images(record: dict[str, Any]) -> tuple[ImageLike, ImageLike] | None:
        records.append(record)
        return (picture(1), picture(2)) if record["prompt"] == "a hat" else None

    lines = [rollout(1, 0.0), rollout(1, 1.0), rollout(1, 2.0, prompt="a shoe"), rollout(1, 0.5)]
    page = write_run_page(run_in(tmp_path, [step_line(1)], lines), images).read_text()
    assert page.count("data:image/") == 2
    assert page.count("no picture") == 2
    assert [record["reward"] for record in records] == [2.0, 0.0]  # of those shown only


def test_totals_count_steps_without_a_line(tmp_path: Path) -> None:
    """A log of every fifth step says of the whole run what a log of all steps says."""
    names = ("tokens", "skipped", "groups", "rollout_seconds", "score_seconds", "update_seconds", "evaluation_seconds")
    lines = [step_line(i, updated=i != 7, peak_bytes=i * 10**9 % 7) for i in range(1, 21)]
    for i, line in enumerate(lines, 1):
        sums = {name: sum(each[name] for each in lines[:i]) for name in (*names, "updated")}
        line["totals"] = sums | {"peak_bytes": max(each["peak_bytes"] for each in lines[:i])}
    logs = [
        RunLog(part) for part in ([{k: v for k, v in x.items() if k != "totals"} for x in lines], lines, lines[4::5])
    ]
    facts = [log.facts() for log in logs]
    assert facts[0] == facts[1] == facts[2]
    assert ("steps without an update", "1") in facts[0]


def test_broken_lines_are_left_out(tmp_path: Path) -> None:
    folder = run_in(tmp_path, [step_line(1, 3), step_line(2, 3)], [rollout(1, 1, text="a\u2028b")])
    with (folder / "log.jsonl").open("ab") as file:
        file.write(b'[1]\n\n{"step": "9", "x": 1}\n{"step": 3, "reward": 0.9, "text": "\xc3')
    text = text_of(write_run_page(folder))
    assert "steps 2 of 3" in text
    assert "a b" in text


def test_missing_and_null_values(tmp_path: Path) -> None:
    assert "Step" not in text_of(write_run_page(run_in(tmp_path / "lone", [step_line(1, 1)])))
    sparse = run_in(tmp_path / "sparse", [{"step": 2}, {"step": 1, "reward": 0.5}, {"step": 2, "accuracy": 0.5}], [{}])
    assert titles(write_run_page(sparse)) == ["Reward", "Agreement with people"]
    nulls = [dict.fromkeys(step_line(1), None) | {"step": i} for i in (1, 2)]
    assert titles(write_run_page(run_in(tmp_path / "nulls", nulls, run={"settings": None}))) == []
    strange = [step_line(i, reward=10**400, accuracy="x", held_out=[1], reward_parts=3, kl=math.nan) for i in (1, 2)]
    assert "Reward" not in titles(write_run_page(run_in(tmp_path / "strange", strange, [], 7)))
    assert "No step is recorded." in text_of(write_run_page(run_in(tmp_path / "nothing")))
    with pytest.raises(DataError, match=r"holds no run\.json"):
        write_run_page(tmp_path)


def test_error_of_a_change() -> None:
    log = RunLog([step_line(i, reward=(0.4, 0.8, 0.5, 0.9)[i - 1], accuracy=0.5 + 0.4 * (i > 2)) for i in range(1, 5)])
    reward = log.first_last(log.column("reward"))
    assert reward is not None
    assert (reward.first, reward.last) == (pytest.approx(0.6), pytest.approx(0.7))
    assert reward.error == pytest.approx(math.sqrt((0.08 + 0.08) / 2))
    rows = {row.name: row for row in log.changes()}
    assert rows["reward"].change == "+0.10 ± 0.28"
    assert rows["rollouts that agree with people"].change == "+40"
    assert RunLog([step_line(1)]).changes() == []


def test_numbers_for_a_person() -> None:
    assert [format_number(x) for x in (0.12345, 1234.5, math.nan)] == ["0.123", "1,234", ""]
    assert format_number(0.615, share=True) == "61.5\u00a0%"


def hostile_run(folder: Path) -> Path:
    """Every text that comes from outside holds markup, or what drawings would take for formulas."""
    names = (HOSTILE, "$\\frac{", "_hidden")
    log = [step_line(i, reward_parts=dict.fromkeys(names, 0.1 * i), **{HOSTILE: HOSTILE}) for i in (1, 2)]
    texts = dict.fromkeys(("prompt", "text", "first", "second"), HOSTILE)
    settings = {"model": HOSTILE, "data": HOSTILE, "reward": HOSTILE, HOSTILE: HOSTILE}
    run = {"settings": settings, "started": HOSTILE, HOSTILE: {HOSTILE: [HOSTILE]}, "bad": "\ud800"}
    lines = [rollout(1, 1.0, **texts), rollout(2, 0.0, first="/dev/zero", second="a\0b", text="x\u202e\ud800\n\ny")]
    folder.mkdir()
    for name, records in (("log.jsonl", log), ("rollouts.jsonl", lines)):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def test_texts_are_escaped(tmp_path: Path) -> None:
    page = write_run_page(hostile_run(tmp_path / "run")).read_text(encoding="utf-8")
    tags = Tags(page)
    assert not {name for name, _ in tags.found} & {"script", "iframe", "object", "embed", "form", "base"}
    assert not [name for _, attributes in tags.found for name in attributes if name.startswith("on")]
    addresses = [
        a[name] or "" for _, a in tags.found for name in ("src", "href", "xlink:href", "srcset", "action") if name in a
    ]
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "\u202e" not in page
    assert (tags.all("meta")[1]["content"] or "").startswith("default-src 'none'; img-src data:; style-src")


def test_long_run_stays_small(tmp_path: Path) -> None:
    """Nothing is harder to compress than noise."""
    log = [step_line(i, 2000, reward=math.sin(i**2), grad_norm=math.cos(i**2)) for i in range(1, 2001)]
    lines = [
        rollout(i, math.sin(i + j), text="'<&>" * 5000, prompt=f"{i}'" * 999) for i in range(1, 2001, 9) for j in (0, 1)
    ]
    run = RUN | {"much": {f"name {i}": "x" * 9999 for i in range(999)}}
    count = iter(range(99))
    page = write_run_page(
        run_in(tmp_path, log, lines, run),
        lambda _: (picture(next(count), (700, 500)), picture(next(count), (700, 500))),
    )
    assert page.stat().st_size < 5_000_000


def test_hostile_texts_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    page = write_run_page(hostile_run(tmp_path / "run"))
    browser.open(page)
    browser.run("new Promise(done => setTimeout(done, 100))")
    assert browser.run("typeof window.hacked") == "undefined"
    assert browser.run("document.querySelector('h1').innerText.includes('window.hacked=1</script>')")
    assert complaints(browser) == []
    assert_no_script_gets_in(browser)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1200])
def test_page_fits_and_is_accessible(browser: Browser, whole: Path, width: int, dark: bool) -> None:
    browser.show_as(width, 800, dark)
    browser.open(whole)
    browser.press("Tab", "Enter")  # the settings fold out by keyboard
    assert browser.run("document.activeElement.tagName + document.querySelector('details').open") == "SUMMARYtrue"
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert (browser.run("getComputedStyle(document.body).color") == "rgb(232, 234, 238)") == dark
    assert browser.run("[...document.querySelectorAll('img')].every(i => i.naturalWidth == 84 && i.clientWidth > 80)")
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    named = [
        (node["role"]["value"], node.get("name", {}).get("value"))
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in ("image", "heading")
    ]
    assert all(name for _, name in named)
    assert {("image", "Image 1"), ("image", "Image 2"), ("image", "Reward")} <= set(named)
    assert complaints(browser) == []
    if folder := os.environ.get("MLXPREF_SCREENSHOTS"):
        browser.page.screenshot(path=Path(folder) / f"run-{width}-{'dark' if dark else 'light'}.png", full_page=True)
