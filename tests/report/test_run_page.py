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
from mlxpref.report.run_log import RunLog
from mlxpref.report.run_page import read_lines, write_run_page
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


def test_a_whole_run_is_summed_up(whole: Path) -> None:
    text = text_of(whole)
    for expected in (
        "demo trained on demo, reward soft",
        "Held-out accuracy was at best 90.0 % after step 20 (95 % interval 85.0 % to 94.0 %, 400 pairs); it was 80.0 % "
        "after step 10 and 90.0 % after step 20. As the best of 2 measurements it flatters a little.",
        "From the first 10 steps to the last, the mean reward went from 0.647 to 0.899 and the share of rollouts that "
        "agree with people went from 61.0 % to 81.0 %.",
        "rollouts that agree 61.0 % 81.0 % +20.0 ± 2.7",
        "steps 20 of 20 time 1 min 10 s tokens written 8,000 tokens a second of writing 200 most memory 3.00 GB "
        "groups that taught nothing 10 of 80 steps without update 0 of 20",
        "part: own.py:short",
        "versions.mlx 0.32.4",
        "Zero in every step, so not drawn: clipped tokens.",
    ):
        assert expected in text
    assert titles(whole) == [
        "Reward", "Agreement with people", "Held-out: how steady, how calibrated", "Form", "Entropy",
        "Mismatch of sampling and scoring", "Gradient norm", "Learning rate", "Groups that taught nothing",
        "Seconds a step", "Tokens a second", "Tokens a rollout", "Most memory in GB",
    ]  # fmt: skip
    assert whole.read_text().count("data:image/") == 2  # each picture once, however often it is shown
    assert "25.0 % of people" in text
    assert "75.0 % of people" in text
    assert "prefers Image 1 with 75.0 % mass on the labels 50.0 % reward 22.000 advantage −0.125" in text


def test_samples_are_spread_over_the_run_and_few(whole: Path) -> None:
    tags = Tags(whole.read_text(encoding="utf-8"))
    steps = re.findall(r"Step (\d+):", tags.text)
    assert steps == ["1", "7", "14", "20"]
    assert re.findall(r"<think>r(\d+)", tags.text) == ["3", "1", "9", "7", "16", "14", "22", "20"]
    assert "most reward of the run, most reward of its step" in tags.text
    shown = [attributes["href"] for name, attributes in tags.found if name == "use" and attributes.get("href")]
    assert shown == ["#picture-0", "#picture-1"] * 4


def test_images_in_memory_are_found_by_the_caller(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def images(record: dict[str, Any]) -> tuple[ImageLike, ImageLike] | None:
        asked.append(record)
        return (picture(1), picture(2)) if record["prompt"] == "a hat" else None

    lines = [rollout(1, 0.0), rollout(1, 1.0), rollout(1, 2.0, prompt="a shoe"), rollout(1, 0.5)]
    page = write_run_page(run_in(tmp_path, [step_line(1)], lines), images).read_text()
    assert page.count("data:image/") == 2
    assert page.count("not recorded, or not there any more") == 2
    assert len(asked) == 2  # of those shown only


def test_half_a_line_and_what_is_no_record_are_left_out(tmp_path: Path) -> None:
    folder = run_in(tmp_path, [step_line(1, 3), step_line(2, 3)], [rollout(1, 1, text="a\u2028b")])
    with (folder / "log.jsonl").open("ab") as file:
        file.write(b'[1]\n\n{"step": 9}\n{"step": "9", "x": 1}\n{"step": 3, "reward": 0.9, "text": "\xc3')
    assert [len(read_lines(folder / name)[0]) for name in ("log.jsonl", "rollouts.jsonl", "none")] == [4, 1, 0]
    text = text_of(write_run_page(folder))
    assert "log.jsonl: 2 lines could not be read and are left out." in text
    (folder / "log.jsonl").write_bytes((folder / "log.jsonl").read_bytes().replace(b'{"step": 9}\n', b""))
    text = text_of(write_run_page(folder))
    assert "2 of 3 steps are recorded: the run was ended, or goes on." in text


def test_what_is_missing_or_null_costs_no_page(tmp_path: Path) -> None:
    lone = run_in(tmp_path / "lone", [step_line(1, 1)])
    assert "No rollout is recorded" in text_of(write_run_page(lone))
    assert "From the first" not in text_of(write_run_page(lone))
    sparse = run_in(tmp_path / "sparse", [{"step": 2}, {"step": 1, "reward": 0.5}, {"step": 2, "accuracy": 0.5}], [{}])
    assert titles(write_run_page(sparse)) == ["Reward", "Agreement with people"]
    nulls = [dict.fromkeys(step_line(1), None) | {"step": i} for i in (1, 2)]
    assert titles(write_run_page(run_in(tmp_path / "nulls", nulls, run={"settings": None}))) == []
    strange = [step_line(i, reward=10**400, accuracy="x", held_out=[1], reward_parts=3, kl=math.nan) for i in (1, 2)]
    assert "Reward" not in titles(write_run_page(run_in(tmp_path / "strange", strange, [], 7)))
    assert "run.json is missing or damaged" in text_of(tmp_path / "strange" / "report.html")
    assert "No step is recorded." in text_of(write_run_page(run_in(tmp_path / "nothing")))
    with pytest.raises(DataError, match=r"holds no run\.json"):
        write_run_page(tmp_path)


def test_steps_that_are_not_finite_are_told_from_those_that_taught_nothing(tmp_path: Path) -> None:
    log = [
        step_line(1),
        step_line(2, updated=False, loss=None, grad_norm=None),
        step_line(3, updated=False, loss=0.0, grad_norm=0.0),
        step_line(4, 4),
    ]
    text = text_of(write_run_page(run_in(tmp_path, log, run=RUN | {"resumed": [{"after_step": 2}]})))
    assert "In 1 of 4 steps loss or gradient was not finite, and the adapter stayed as it was: 2." in text
    assert "steps without update 2 of 4 of them not finite 1" in text
    assert "The run was resumed after step 2." in text


def test_small_runs_do_not_claim_what_chance_could_do() -> None:
    lines = [step_line(i, reward=(0.4, 0.8, 0.5, 0.9)[i - 1], accuracy=0.5 + 0.4 * (i > 2)) for i in range(1, 5)]
    (line,) = RunLog(lines).headlines()
    assert "from 0.6 to 0.7 (within two standard errors: perhaps by chance)" in line
    assert line.endswith("from 50.0 % to 90.0 %.".replace(" %", "\u00a0%"))


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


def test_texts_cannot_become_markup(tmp_path: Path) -> None:
    page = write_run_page(hostile_run(tmp_path / "run")).read_text(encoding="utf-8")
    tags = Tags(page)
    assert {name for name, _ in tags.found} <= {
        *("html", "head", "meta", "link", "title", "style", "body", "main", "h1", "h2", "h3", "p", "b", "br", "i"),
        *("div", "ul", "li", "dl", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td", "details", "summary"),
        *("figure", "figcaption", "article", "header", "blockquote", "span", "svg", "g", "defs", "path", "text"),
        *("clippath", "rect", "use"),
    }
    assert not [name for _, attributes in tags.found for name in attributes if name.startswith("on")]
    addresses = [
        a[name] or "" for _, a in tags.found for name in ("src", "href", "xlink:href", "srcset", "action") if name in a
    ]
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "\u202e" not in page
    assert (tags.all("meta")[1]["content"] or "").startswith("default-src 'none'; img-src data:; style-src")
    assert not set(re.findall(r"https?://[^\"' ]*", page)) - {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_a_long_run_of_detailed_pictures_stays_small(tmp_path: Path) -> None:
    """Nothing is harder to compress than noise."""
    log = [
        step_line(i, 2000, reward=math.sin(i**2), grad_norm=10.0 ** (i % 9), held_out=metrics(0.8))
        for i in range(1, 2001)
    ]
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
    assert "more characters in rollouts.jsonl" in text_of(page)


def test_hostile_texts_stay_texts_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    page = write_run_page(hostile_run(tmp_path / "run"))
    browser.open(page)
    browser.run("new Promise(done => setTimeout(done, 100))")
    assert browser.run("typeof window.hacked") == "undefined"
    assert browser.run("document.querySelector('h1').innerText.includes('window.hacked=1</script>')")
    assert complaints(browser) == []
    assert_no_script_gets_in(browser)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_fits_and_has_names_for_a_screen_reader(browser: Browser, whole: Path, width: int, dark: bool) -> None:
    browser.show_as(width, 800, dark)
    browser.open(whole)
    browser.press("Tab", "Enter")  # the settings fold out by keyboard
    assert browser.run("document.activeElement.tagName + document.querySelector('details').open") == "SUMMARYtrue"
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert (browser.run("getComputedStyle(document.body).color") == "rgb(232, 234, 238)") == dark
    # Pictures that are shown from one place are there, and are as wide as their place.
    assert browser.run("[...document.querySelectorAll('svg.picture')].every(s => s.getBBox().width == 84)")
    assert browser.run("document.querySelector('svg.picture').clientWidth") > 80
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
        browser.screenshot(Path(folder) / f"run-{width}-{'dark' if dark else 'light'}.png")
