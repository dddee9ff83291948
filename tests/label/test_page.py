"""The page of `mlxpref label` in a browser: keyboard, mouse and touch, undo, reload, two tabs, a dead server."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from mlxpref.config import LabelSettings
from mlxpref.label.server import LabelServer
from mlxpref.label.session import Pictures
from tests.browser import Browser
from tests.conftest import picture
from tests.label_pages import label_command, pictures, served
from tests.pages import HOSTILE

NewPage = Callable[..., Page]


@pytest.fixture
def new_page(browser: Browser) -> Iterator[NewPage]:
    """Makes pages in windows of their own; what any of them complained of fails the test."""
    pages: list[Page] = []
    complaints: list[Any] = []

    def make(address: str, **context: Any) -> Page:
        page = browser.new_page(**context)
        pages.append(page)
        page.on("pageerror", lambda error: complaints.append(error))
        page.on(
            "request", lambda request: complaints.append(request.url) if not request.url.startswith(address) else None
        )
        page.goto(address)
        wait_for_pair(page)
        return page

    yield make
    for page in pages:
        page.context.close()
    assert [each for each in complaints if not str(each).startswith("data:")] == []


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LabelServer]:
    with served(tmp_path / "p.jsonl", {"a hat": pictures(tmp_path / "pictures", 6)}) as running:
        yield running


def wait_for_pair(page: Page, number: int | None = None) -> None:
    """Wait until a question is shown, the one with this number."""
    shown = "" if number is None else f'[data-number="{number}"]'
    page.wait_for_selector(f'#asking[aria-busy="false"]{shown}', state="attached")


def number(page: Page) -> int:
    return int(page.get_attribute("#asking", "data-number") or 0)


def shown_images(page: Page) -> list[str | None]:
    """The addresses of the pictures, left and right."""
    return [(page.get_attribute(f"#{side}", "src") or "").rpartition("/")[2] for side in ("first", "second")]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(server: LabelServer) -> list[str]:
    return [
        line["answer"] if line["answer"] in ("tie", "skip", "undo") else _side(line)
        for line in lines(server.session.file.path)
    ]


def _side(line: dict[str, Any]) -> str:
    return "left" if line["answer"] == line["shown_first"] else "right"


def test_by_keyboard(server: LabelServer, new_page: NewPage) -> None:
    page = new_page(server.address)
    for step, key in enumerate(
        ("ArrowLeft", "ArrowRight", "ArrowDown", "t", "s", "S", "u", "Backspace", "Control+z"), 1
    ):
        page.keyboard.press(key)
        wait_for_pair(page, step + 1)
    assert answers(server) == ["left", "right", "tie", "tie", "skip", "skip", "undo", "undo", "undo"]
    assert [line["undoes"] for line in lines(server.session.file.path)[6:]] == [6, 5, 4]
    for key in ("a", "ArrowUp", "Enter", "Shift+ArrowLeft", "Alt+ArrowLeft", "Control+ArrowLeft", "Control+s"):
        page.keyboard.press(key)
    page.wait_for_timeout(200)
    assert number(page) == 10
    # And with Tab and Enter alone, as who has no arrow keys does.
    for label in ("The left picture is better", "The right picture is better", "Left is better ←", "Tie ↓"):
        before = number(page)
        page.evaluate("document.activeElement.blur()")
        for _ in range(12):
            page.keyboard.press("Tab")
            focused = page.evaluate("document.activeElement.ariaLabel || document.activeElement.innerText")
            if focused == label:
                break
        assert focused == label
        page.keyboard.press("Enter")
        wait_for_pair(page, before + 1)
    assert answers(server)[9:] == ["left", "right", "left", "tie"]


def test_by_mouse(server: LabelServer, new_page: NewPage) -> None:
    page = new_page(server.address)
    for step, target in enumerate(
        ("#second", "#first", "text=Right is better", "text=Left is better", "button.tie", "button.skip", "#undo"), 1
    ):
        page.click(target)
        wait_for_pair(page, step + 1)
    assert answers(server) == ["right", "left", "right", "left", "tie", "skip", "undo"]
    assert all(0 <= line["seconds"] < 60 for line in lines(server.session.file.path)[:6])


def test_by_touch_on_a_small_screen(server: LabelServer, new_page: NewPage) -> None:
    page = new_page(server.address, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    for step, target in enumerate(("#first", "#second", "button.tie", "button.skip", "#undo"), 1):
        box = page.locator(target).bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) >= 40, f"{target} is too small for a finger"
        assert box["y"] + box["height"] <= 640, f"{target} is out of sight"
        page.tap(target)
        wait_for_pair(page, step + 1)
    assert answers(server) == ["left", "right", "tie", "skip", "undo"]


def test_a_double_click_is_one_answer(server: LabelServer, new_page: NewPage) -> None:
    page = new_page(server.address)
    page.evaluate("for (let i = 0; i < 5; i++) document.querySelector('[data-choice=tie]').click()")
    wait_for_pair(page, 2)
    page.wait_for_timeout(200)
    assert answers(server) == ["tie"]


def test_undo_shows_the_same_pair_again(server: LabelServer, new_page: NewPage) -> None:
    page = new_page(server.address)
    assert page.is_disabled("#undo")
    states = []
    for step in range(1, 4):
        states.append(shown_images(page))
        page.keyboard.press("ArrowLeft")
        wait_for_pair(page, step + 1)
    for step, before in enumerate(reversed(states), 4):
        page.keyboard.press("u")
        wait_for_pair(page, step + 1)
        assert shown_images(page) == before
    assert page.is_disabled("#undo")
    assert "0, 0 of them ties" in page.inner_text("#answer-count")


def test_reload_keeps_the_question(server: LabelServer, new_page: NewPage) -> None:
    page = new_page(server.address)
    page.keyboard.press("ArrowLeft")
    wait_for_pair(page, 2)
    before = shown_images(page)
    page.reload()
    wait_for_pair(page, 2)
    assert shown_images(page) == before
    assert "1, 0 of them ties; 0 skipped" in page.inner_text("#answer-count")


def test_two_tabs_share_a_session(server: LabelServer, new_page: NewPage) -> None:
    one, two = new_page(server.address), new_page(server.address)
    assert shown_images(one) == shown_images(two)
    one.keyboard.press("ArrowLeft")
    wait_for_pair(one, 2)
    two.keyboard.press("ArrowRight")  # of what was answered already
    wait_for_pair(two, 2)
    assert "answered in another tab" in two.inner_text("#message")
    assert shown_images(one) == shown_images(two)
    two.keyboard.press("u")
    wait_for_pair(two, 3)
    one.keyboard.press("u")
    wait_for_pair(one, 3)
    assert "answered in another tab" in one.inner_text("#message")
    two.keyboard.press("ArrowRight")
    wait_for_pair(two, 4)
    one.keyboard.press("t")
    wait_for_pair(one, 4)
    one.keyboard.press("t")
    wait_for_pair(one, 5)
    assert answers(server) == ["left", "undo", "right", "tie"]
    assert [line["number"] for line in lines(server.session.file.path)] == [1, 2, 3, 4]


def test_a_killed_server_loses_nothing(tmp_path: Path, new_page: NewPage) -> None:
    pictures(tmp_path / "pictures", 6)
    output = tmp_path / "p.jsonl"
    options = ("--prompt", "a hat")
    with label_command(tmp_path / "pictures", output, *options) as (address, process, _):
        page = new_page(address)
        for step in range(1, 4):
            page.keyboard.press("ArrowLeft")
            wait_for_pair(page, step + 1)
        question = shown_images(page)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
        page.keyboard.press("ArrowLeft")
        page.wait_for_selector("#message.bad")
        assert "The program behind this page has ended, and this answer is lost" in page.inner_text("#message")
    assert len(lines(output)) == 3
    output.write_bytes(output.read_bytes() + lines_of_half_an_answer(output))
    with label_command(tmp_path / "pictures", output, *options) as (address, process, _):
        page = new_page(address)
        assert number(page) == 4
        assert "3, 0 of them ties" in page.inner_text("#answer-count")
        assert shown_images(page) == question, "the question that was open is asked again"
        page.keyboard.press("ArrowRight")
        wait_for_pair(page, 5)
    assert [line["number"] for line in lines(output)] == [1, 2, 3, 4]


def lines_of_half_an_answer(path: Path) -> bytes:
    return path.read_bytes().splitlines()[-1][:60]


def test_end_of_labelling(tmp_path: Path, new_page: NewPage) -> None:
    pictures(tmp_path / "pictures", 4)
    with label_command(tmp_path / "pictures", tmp_path / "p.jsonl", "--prompt", "a hat") as (address, process, _):
        page = new_page(address)
        for step in range(1, 7):
            page.keyboard.press("ArrowLeft")
            wait_for_pair(page, step + 1)
        page.wait_for_selector("text=Every pair was asked.")
        assert "These pictures have only 0 pairs left" in page.inner_text("#why")
        assert page.is_hidden("#first")
        page.click("#undo")  # also of the last answer
        wait_for_pair(page, 8)
        page.keyboard.press("ArrowLeft")
        wait_for_pair(page, 9)
        page.click("#finish")
        page.wait_for_selector("text=Finished.")
        assert "mlxpref train --data" in page.inner_text("#commands")
        page.click("summary")
        page.wait_for_timeout(300)
        assert "All answers are in" in page.inner_text("#message")
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert out.startswith("6 answers about 6 pairs (0 ties, 0 skipped)")
    assert "mlxpref train --data" in out


def test_ctrl_c_keeps_answers(tmp_path: Path, new_page: NewPage) -> None:
    pictures(tmp_path / "pictures", 4)
    with label_command(tmp_path / "pictures", tmp_path / "p.jsonl", "--prompt", "a hat", "--json") as (
        address,
        process,
        _,
    ):
        page = new_page(address)
        page.keyboard.press("ArrowDown")
        wait_for_pair(page, 2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert json.loads(out)["ties"] == 1
    assert len(json.loads(out)["rankings"][0]["images"]) == 4
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_thousand_pictures(tmp_path: Path, new_page: NewPage) -> None:
    images = pictures(tmp_path / "pictures", 1000, (16, 16))
    with served(tmp_path / "p.jsonl", {"a hat": images}) as server:
        page = new_page(server.address)
        assert "0 of 2000 pairs" in page.inner_text("#count")
        for step in range(1, 81):  # more than a round, which is chosen anew in the background
            page.keyboard.press("ArrowLeft")
            wait_for_pair(page, step + 1)
        pairs = {(line["a"], line["b"]) for line in lines(server.session.file.path)}
        assert len(pairs) >= 72
        page.click("summary")
        page.wait_for_selector(".ranked li")
        assert page.locator(".ranked li").count() == 1000
        loaded = page.evaluate("[...document.querySelectorAll('.ranked img')].filter((image) => image.complete).length")
        assert loaded < 500, "pictures are fetched when they come into sight"
        page.locator(".ranked li").nth(500).scroll_into_view_if_needed()
        page.keyboard.press("ArrowDown")  # whoever reads the ranking with it answers nothing
        page.wait_for_timeout(200)
        assert number(page) == 81
        page.keyboard.press("u")
        wait_for_pair(page, 82)


def test_missing_picture_can_be_skipped(server: LabelServer, new_page: NewPage, tmp_path: Path) -> None:
    page = new_page(server.address)
    missing = server.session.pictures.images[int(shown_images(page)[0] or 0)]
    missing.unlink()
    server.session.pictures = Pictures(server.session.pictures.images)  # a new one remembers no picture
    page = new_page(server.address)  # another window, which has not kept it either
    page.wait_for_selector("#message.bad")
    assert "can no longer be read: skip this pair" in page.inner_text("#message")
    page.keyboard.press("s")
    wait_for_pair(page, 2)
    assert answers(server) == ["skip"]


def test_unsaved_answer_is_shown(server: LabelServer, new_page: NewPage) -> None:
    page = new_page(server.address)
    path = server.session.file.path
    path.rename(path.with_suffix(".moved"))
    before = shown_images(page)
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#message.bad")
    assert "this answer is not kept" in page.inner_text("#message")
    path.with_suffix(".moved").rename(path)
    assert shown_images(page) == before
    page.keyboard.press("ArrowLeft")
    wait_for_pair(page, 2)
    assert answers(server) == ["left"]
    assert "bad" not in (page.get_attribute("#message", "class") or "")


def test_pictures_keep_their_shape(tmp_path: Path, new_page: NewPage) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, size in enumerate(((900, 300), (300, 900))):
        picture(i, size).save(folder / f"{i}.png")
    with served(tmp_path / "p.jsonl", {"a hat": sorted(folder.iterdir())}) as server:
        page = new_page(server.address)
        boxes = [page.locator(f"#{side}").bounding_box() for side in ("first", "second")]
        assert boxes[0] is not None
        assert boxes[1] is not None
        assert (boxes[0]["width"], boxes[0]["height"]) == (boxes[1]["width"], boxes[1]["height"])  # neither is favoured
        assert page.evaluate("getComputedStyle(document.getElementById('first')).objectFit") == "contain"
        assert sorted(page.evaluate("[...document.querySelectorAll('.pictures img')].map((i) => i.naturalWidth)")) == [
            300,
            900,
        ]


def test_hostile_texts(tmp_path: Path, new_page: NewPage) -> None:
    folder = tmp_path / "a'b"
    folder.mkdir()
    names = ["<img src=x onerror=window.hacked=1>.png", "\u202egnp.png", "esc\x1b[31m.png"]
    for i, name in enumerate(names):
        picture(i).save(folder / name)
    with served(folder / "p.jsonl", {HOSTILE: sorted(folder.glob("*.png"))}, LabelSettings(repeats=0.0)) as server:
        page = new_page(server.address)
        assert "window.hacked=1</script>" in page.inner_text("#prompt")
        page.keyboard.press("ArrowLeft")
        wait_for_pair(page, 2)
        page.click("summary")
        page.wait_for_selector(".ranked li")
        assert "<img src=x onerror" in page.inner_text(".ranked")
        page.evaluate("document.body.insertAdjacentHTML('beforeend', \"<img src='data:,' onerror='window.hacked=1'>\")")
        page.evaluate(
            "document.body.append(Object.assign(document.createElement('script'), {text: 'window.hacked=1'}))"
        )
        page.wait_for_timeout(200)
        assert page.evaluate("typeof window.hacked") == "undefined"
        assert "'\\''" in page.text_content("#commands pre")  # type: ignore[operator]  # can be typed into a shell


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
def test_page_fits_in_light_and_dark(tmp_path: Path, new_page: NewPage, width: int, dark: bool) -> None:
    folder = pictures(tmp_path / ("n" * 100), 12, (300, 200))
    prompts = {"a hat " * 20: folder[:6], "x" * 200: folder[6:]}
    with served(tmp_path / "p.jsonl", prompts) as server:
        page = new_page(
            server.address, viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light"
        )
        for step in range(1, 13):
            page.keyboard.press("ArrowLeft" if step % 3 else "ArrowRight")
            wait_for_pair(page, step + 1)
        assert page.evaluate("scrollY") == 0
        box = page.locator(".choices").bounding_box()
        assert box is not None
        assert box["y"] + box["height"] <= 800, "pictures and buttons are seen without scrolling"
        page.click("summary")
        page.wait_for_selector(".ranked li")
        assert page.locator(".ranked li").count() == 6
        page.select_option("#task", "1")
        page.wait_for_selector(".ranked img[data-image='6']")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert (page.evaluate("getComputedStyle(document.body).color") == "rgb(232, 234, 238)") == dark
        session = page.context.new_cdp_session(page)
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
        named = [
            (node["role"]["value"], node.get("name", {}).get("value"))
            for node in nodes
            if not node["ignored"] and node["role"]["value"] in ("button", "image", "combobox", "progressbar", "status")
        ]
        assert all(name for role, name in named if role != "status")
        assert ("button", "The left picture is better") in named
        if folder := os.environ.get("MLXPREF_SCREENSHOTS"):
            page.screenshot(path=Path(folder) / f"label-{width}-{'dark' if dark else 'light'}.png", full_page=True)
