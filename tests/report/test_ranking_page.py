"""The page of a ranking: safe whatever the texts hold, small, honest; and used in a real browser by keyboard."""

import base64
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlxpref.data.find_images import Skipped
from mlxpref.data.thumbnails import thumbnail
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.judge.ranking_result import JudgedPair, Ranking
from mlxpref.ranking.noise import Noise
from mlxpref.ranking.outcomes import PairOutcome, all_pairs
from mlxpref.ranking.posterior import difference_variance
from mlxpref.ranking.strength_ranking import rank_images
from mlxpref.report.html import even_ticks
from mlxpref.report.ranking_page import write_ranking_page
from mlxpref.report.tie_brackets import tie_brackets
from mlxpref.verdict import Verdict
from tests.browser import Browser
from tests.conftest import picture, read_verdict
from tests.pages import HOSTILE, Tags, assert_no_script_gets_in, complaints

KNOWN = Noise(0.05, 0.05, 9, 9)
FILE = "a\"'><img src=x onerror=window.hacked=1>&amp;.png"
JUDGED = {(0, 1): 1.5, (0, 2): 2.5, (1, 2): 1.0}
"""Log-odds for the first of two images; image 3 is in no pair with 0."""


def verdict(log_odds: float, text: str) -> Verdict:
    p = float(1 / (1 + np.exp(-log_odds)))
    return read_verdict(f"<think>{text}</think><answer>", p, 1 - p, tokens=9 if text else 0)


def ranking(images: Any = None, text: str = "first: clear", prompt: str = "a hat", **more: Any) -> Ranking:
    """Four images; 0, 1, 2 thought about among each other, 3 only read beside 2 and never beside 0 and 1."""
    images = tuple(images or (picture(i) for i in range(4)))
    pairs = [
        JudgedPair(
            a,
            b,
            PairVerdict((verdict(x + 0.3, text), verdict(x, text and "twice")), (verdict(0.3 - x, text and "back"),)),
        )
        for (a, b), x in JUDGED.items()
    ]
    pairs.append(JudgedPair(3, 2, PairVerdict((verdict(-1, ""),), (verdict(1.6, ""),))))
    fit = rank_images(
        len(images), [pair.verdict.outcome(pair.a, pair.b) for pair in pairs], {0: Noise(0.05, 0.05, 9, 9)}
    )
    return Ranking(prompt, images, fit, tuple(pairs), 1.5, "demo", **more)


def page_of(folder: Path, *rankings: Ranking, notes: tuple[str, ...] = ()) -> str:
    write_ranking_page(folder / "page.html", rankings, notes)
    return (folder / "page.html").read_text(encoding="utf-8")


@pytest.fixture
def hostile(tmp_path: Path) -> Ranking:
    """Every text that comes from outside holds markup."""
    files = [tmp_path / f"{i}{FILE}" for i in range(4)]
    for i, file in enumerate(files):
        picture(i).save(file, "PNG")
    skipped = (Skipped(Path(HOSTILE), HOSTILE),)
    return ranking(files, HOSTILE, HOSTILE, skipped=skipped, warnings=(HOSTILE,))


def test_texts_are_escaped(hostile: Ranking, tmp_path: Path) -> None:
    page = page_of(tmp_path, hostile, hostile, notes=(HOSTILE,))
    tags = Tags(page)
    assert [attributes.get("type") for attributes in tags.all("script")] == ["application/json", None]
    assert not [name for _, attributes in tags.found for name in attributes if name.startswith("on")]
    addresses = [a[name] or "" for _, a in tags.found for name in ("src", "href", "srcset", "action") if name in a]
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not any(word in page for word in ("http:", "https:", "@import", "url("))
    data = json.loads(tags.scripts[0])
    assert data[0]["names"][1] == f"1{FILE}"
    reasoning = " ".join(HOSTILE.split())
    assert data[0]["pairs"][0][5][0][1] == reasoning
    # The note, also in its summary; twice a warning, nav, heading, the long prompt, what was skipped, and reasons.
    assert " ".join(tags.text.split()).count(reasoning) == 2 + 2 * (1 + 1 + 1 + 1 + 2 + 3)
    policy = tags.all("meta")[1]["content"] or ""
    digest = base64.b64encode(hashlib.sha256(tags.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_each_picture_is_embedded_once(tmp_path: Path) -> None:
    page = page_of(tmp_path, ranking(), ranking([picture(i) for i in range(10, 14)]))
    pictures = [attributes["src"] for attributes in Tags(page).all("img")]
    assert len(set(pictures)) == len(pictures) == 8
    assert page.count("data:image/") == 8


def test_200_pictures_take_under_15_mb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is harder to compress than noise; measured on 6 pictures of it and scaled; 6 alone are sharper."""
    images = [picture(i, (700, 500)) for i in range(6)]
    pairs = [JudgedPair(i, i + 1, PairVerdict((verdict(1, "x" * 1000),), (verdict(-1, "x" * 1000),))) for i in range(5)]
    fit = rank_images(6, [pair.verdict.outcome(pair.a, pair.b) for pair in pairs])
    noise = Ranking("noise", tuple(images), fit, tuple(pairs), 1.0)
    few = page_of(tmp_path, noise)
    monkeypatch.setattr("mlxpref.report.ranking_page._MANY", 6)
    many = page_of(tmp_path, noise)
    assert len(many) / 6 * 200 < 15_000_000
    assert len(many) < len(few) < 4 * 15_000_000 / 200 * 6
    assert 'width="700"' in few
    assert 'width="480"' in many


def test_thumbnails_are_plain_and_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "where I live"
    picture(0, (640, 320)).save(tmp_path / "turned.jpg", exif=exif)
    small = thumbnail(tmp_path / "turned.jpg")
    file = base64.b64decode(small.uri.partition(",")[2])
    with Image.open(io.BytesIO(file)) as image:
        assert (image.format, image.size) == ("WEBP", (160, 320)) == ("WEBP", (small.width, small.height))
        assert not image.getexif()
    assert b"where I live" not in file
    with Image.open(io.BytesIO(base64.b64decode(thumbnail(picture(1)).uri.partition(",")[2]))) as image:
        assert image.convert("RGB").tobytes() == picture(1).tobytes()  # small ones are exact


def test_a_reason_is_beside_both_pictures(tmp_path: Path) -> None:
    result = ranking()
    page = page_of(tmp_path, result)
    assert page.count("judged without thinking, so without reasons</p>") == 1
    for image in result.strengths.images:
        item = page.partition(f'<li id="image-0-{image.index}"')[2].partition("</li>")[0]
        reason = result.reason(image)
        assert (reason is None) == ("data-picture" not in item)
        if reason:
            pictures = [int(attributes["data-picture"] or "") for attributes in Tags(item).all("figure")]
            assert pictures == [reason.first, reason.second]
            assert item.index("<b>Image 1</b>") < item.index("<b>Image 2</b>") < item.index(reason.text)


def test_uncertainty_is_shown(tmp_path: Path) -> None:
    note = "The judge cannot tell these images apart."
    lone = ranking(skipped=(Skipped(Path("x/broken.png"), "is damaged"),))
    page = page_of(tmp_path, lone, notes=(note,))
    text = " ".join(Tags(page).text.split())
    for expected in (
        note,
        "1 skipped x/broken.png: is damaged",
        "it does not say what people think",
        "4 images, 4 of 6 pairs judged, each in both orders, by demo, in 1.5 s.",
        "This judge favours the image that is shown first: position bias +0.",
    ):
        assert expected in text
    for image in lone.strengths.images:
        assert f"{image.strength:+.2f} ({image.low:+.2f} to {image.high:+.2f})" in text
        assert f"{image.wins} of {image.pairs} pairs" in text
    tied = rank_images(4, [])
    equal = page_of(tmp_path, Ranking("x", lone.images, tied, (), 0.0))
    assert "No image is clearly the best: image 0 comes first, but is tied with all others." in equal
    assert equal.count("tied with all others</p>") == 4
    assert equal.count("not judged: no pair with this image was asked") == 4
    assert "This judge shows no position bias" in equal
    assert equal.count('<i class="') == 4
    assert (equal.count('<i class="begins "'), equal.count('<i class="ends"'), equal.count('"second')) == (1, 1, 0)


def test_warnings_are_with_their_prompt(tmp_path: Path) -> None:
    images = [picture(i) for i in range(4)]
    first, second = (ranking(images, prompt, warnings=(f"about {prompt}",)) for prompt in ("a hat", "a shoe"))
    text = Tags(page_of(tmp_path, first, second)).text
    assert 0 < text.index("about a hat") < text.index("about a shoe")


def test_data_of_the_script(tmp_path: Path) -> None:
    result = ranking()
    data = json.loads(Tags(page_of(tmp_path, result)).scripts[0])[0]
    assert data["strengths"] == pytest.approx(result.strengths.fit.strengths, abs=1e-4)
    errors = np.sqrt(difference_variance(result.strengths.fit.covariance.block()))
    for a, b in ((0, 1), (1, 3), (2, 3)):
        assert data["deviations"][a][b - a - 1] / 1000 == pytest.approx(errors[a, b], abs=6e-4)
    assert [pair[:2] for pair in data["pairs"]] == [[0, 1], [0, 2], [1, 2], [3, 2]]
    assert [len(sample) for pair in data["pairs"] for order in pair[5:] for sample in order] == [3] * 9 + [1] * 2


def test_missing_picture(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for i, file in enumerate(files[:3]):
        picture(i).save(file)
    page = page_of(tmp_path, ranking(files))
    assert page.count("data:image/") == 3
    assert page.count("This picture could not be read again.") == 1


def test_axes_are_round() -> None:
    assert even_ticks(-1.7, 2.2) == [-2, -1, 0, 1, 2, 3]
    assert even_ticks(0.0, 0.0)[-1] > even_ticks(0.0, 0.0)[0]
    for low, high in ((-0.031, 0.044), (-40.0, 3.0), (1e-3, 2e-3)):
        ticks = even_ticks(low, high)
        assert ticks[0] <= low < high <= ticks[-1]
        assert 3 <= len(ticks) <= 9


def text_at(browser: Browser, selector: str) -> str:
    """What a person reads in a part of the page, with blanks made plain."""
    return " ".join(str(browser.run(f"document.querySelector({json.dumps(selector)}).innerText")).split())


def test_comparing_by_keyboard(browser: Browser, tmp_path: Path) -> None:
    result = ranking()
    page_of(tmp_path, result)
    browser.show_as(1000, 900)
    browser.open(tmp_path / "page.html")
    browser.press("Tab", "Tab", "Enter")
    assert browser.run("document.activeElement.tagName + document.querySelector('dialog').open") == "SELECTtrue"
    assert [image.index for image in result.strengths.images][:2] == [0, 1]
    text = text_at(browser, "dialog")
    p = result.pairs[0].verdict
    assert f"image 0 is preferred, {100 * p.p_a:.1f} %, both orders combined." in text
    for expected in (
        "image 0 shown first Image 1: image 0 Image 2: image 1",
        f"{100 * (p.p_a_shown_first or 0):.1f} % for image 0, the mean of 2 samples",
        f"({100 * (p.a_shown_first[0].p_first('soft') or 0):.1f} % for image 1) first: clear",
        f"({100 * (p.a_shown_first[1].p_first('soft') or 0):.1f} % for image 1) twice",
        "image 1 shown first Image 1: image 1 Image 2: image 0",
        f"{100 * (p.p_a_shown_second or 0):.1f} % for image 0 back",
    ):
        assert expected in text
    assert browser.run("document.querySelectorAll('dialog img').length") == 6
    browser.press("Tab", "ArrowDown", "ArrowDown")
    number = browser.run("document.querySelectorAll('select')[1].value")
    assert int(number) == result.strengths.images[3].index == 3
    text = text_at(browser, "dialog")
    strengths, errors = (
        result.strengths.fit.strengths,
        np.sqrt(difference_variance(result.strengths.fit.covariance.block())),
    )
    middle, low, high = (
        100 / (1 + np.exp(-(strengths[0] - strengths[3] + x * errors[0, 3]))) for x in (0, -1.959964, 1.959964)
    )
    assert "Not judged: estimated by the model of strengths." in text
    assert f"{middle:.1f} % for image 0, 95 % interval {low:.1f} % to {high:.1f} %." in text
    assert "shown first" not in text
    browser.press("Escape")
    assert browser.run("document.querySelector('dialog').open") is False
    assert browser.run("document.activeElement.textContent") == "Compare two…"
    assert complaints(browser) == []


def test_a_picture_opens_with_its_reason_and_opponents(browser: Browser, tmp_path: Path) -> None:
    result = ranking()
    assert [image.index for image in result.strengths.images] == [0, 1, 2, 3]
    page_of(tmp_path, result)
    browser.show_as(1000, 900)
    browser.open(tmp_path / "page.html")
    browser.press("Tab", "Tab", "Tab", "ArrowRight", "Enter")
    browser.page.wait_for_selector("#picture[open]")
    text = text_at(browser, "#picture")
    p = result.pairs[0].verdict
    image = result.strengths.images[1]
    reason = result.reason(image)
    assert reason
    for expected in (
        "Rank 2 of 4: image 1",
        f"{image.strength:+.2f} ({image.low:+.2f} to {image.high:+.2f})",
        reason.text,
        f"Judged against 2 images, by rank lost with {100 * (1 - p.p_a):.1f} % against rank 1, image 0 won with",
    ):
        assert expected in text
    # Arrows lead to the neighbours, and end at the last picture.
    browser.press("ArrowRight", "ArrowRight", "ArrowRight")
    browser.page.wait_for_selector("#picture >> text=Rank 4 of 4: image 3")
    assert browser.run("document.querySelector('[data-step=\"1\"]').disabled") is True
    assert "judged without thinking, so without reasons" in text_at(browser, "#picture")
    # An opponent is compared on top of the picture, which is there again afterwards.
    browser.run("document.querySelector('.opponents button').click()")
    assert "Two images compared" in text_at(browser, "#compare")
    assert browser.run("document.querySelectorAll('select')[1].value") == "2"
    browser.press("Escape")
    browser.page.wait_for_selector("#compare:not([open])", state="attached")
    assert browser.run("document.querySelector('#picture').open") is True
    browser.press("Escape")
    browser.page.wait_for_selector("#picture:not([open])", state="attached")
    browser.page.wait_for_selector("a[href='#image-0-3']:focus")  # the way back in the history takes a moment
    browser.page.wait_for_url("**/page.html")
    # The same picture opens again, an address with a picture opens it, and the way back closes it.
    browser.press("Enter")
    browser.page.wait_for_selector("#picture[open]")
    browser.page.go_back()
    browser.page.wait_for_selector("#picture:not([open])", state="attached")
    browser.page.goto((tmp_path / "page.html").as_uri() + "#image-0-2")
    browser.page.wait_for_selector("#picture[open]")
    assert "Rank 3 of 4" in text_at(browser, "#picture")
    assert complaints(browser) == []


def many_images(count: int) -> Ranking:
    """A ranking of many pictures, a pair for each two neighbours, with a long prompt and remarks."""
    images = [picture(i, (160, 120)) for i in range(count)]
    pairs = [JudgedPair(i, i + 1, PairVerdict((verdict(1, "a"),), (verdict(-1, "b"),))) for i in range(count - 1)]
    fit = rank_images(count, [pair.verdict.outcome(pair.a, pair.b) for pair in pairs])
    return Ranking("a fox " * 80, tuple(images), fit, tuple(pairs), 1.0, warnings=("something " * 30,) * 5)


def test_many_images_are_an_overview(browser: Browser, tmp_path: Path) -> None:
    """The page of 135 images is a few screens tall, and begins with a picture, however much there is to say."""
    page_of(tmp_path, many_images(135), notes=("a note " * 30,))
    for width, height, limit in ((1400, 1000, 5000), (390, 844, 10_000)):
        browser.show_as(width, height)
        browser.open(tmp_path / "page.html")
        assert browser.run("document.documentElement.scrollHeight") < limit
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        top, bottom = browser.run(
            "(({top, bottom}) => [top, bottom])(document.querySelector('img').getBoundingClientRect())"
        )
        assert top < 140
        assert bottom < height
        lines = "[...document.querySelectorAll('h1, summary, .lead p, .lead li')].filter(e => e.checkVisibility())"
        assert browser.run(f"{lines}.map(e => e.tagName)") == ["H1", "SUMMARY"]
        assert "6 remarks" in text_at(browser, "summary")
        browser.run("document.querySelector('summary').click()")
        assert text_at(browser, ".lead").count("something") == 5 * 30
    assert browser.run("document.getElementsByTagName('*').length") < 40 * 135


def test_brackets_are_lines_from_picture_to_picture(browser: Browser, tmp_path: Path) -> None:
    """Of two pictures of one row, the parts of one bracket touch; it begins and ends at the edges of pictures."""
    noise = np.random.default_rng(0).normal(size=(30, 30))
    p = 1 / (1 + np.exp((np.arange(30)[:, None] - np.arange(30)) / 4 + noise))
    pairs = [PairOutcome(a, b, p[a, b], p[a, b]) for a, b in all_pairs(30)]
    result = Ranking("x", tuple(picture(i) for i in range(30)), rank_images(30, pairs), (), 1.0)
    page_of(tmp_path, result)
    browser.show_as(390, 844)
    browser.open(tmp_path / "page.html")
    parts = browser.run(
        """[...document.querySelectorAll('.ranked > li')].map((li) => {
          const edges = (each) => (({left, right, top}) => [left, right, top])(each.getBoundingClientRect());
          const parts = [...li.querySelectorAll('.ties i')].map((i) => [i.className.split(' '), edges(i)]);
          return {picture: edges(li.querySelector('img')), parts};
        })"""
    )
    drawn = [
        (place, bracket)
        for bracket in tie_brackets(result.strengths.images)
        for place in range(bracket.first, bracket.last + 1)
    ]
    assert sum(len(each["parts"]) for each in parts) == len(drawn) > 30
    ends = {}
    for each in parts:
        left, right, _ = each["picture"]
        for classes, (start, end, top) in each["parts"]:
            line = "second" in classes
            assert ("begins" in classes) == (start == pytest.approx(left, abs=0.1))
            assert ("ends" in classes) == (end == pytest.approx(right, abs=0.1))
            if "begins" not in classes and ends[line][1] == pytest.approx(top, abs=0.1):
                assert ends[line][0] == pytest.approx(start, abs=0.1)
            ends[line] = end, top


def test_pairs_in_one_order(browser: Browser, tmp_path: Path) -> None:
    """An order without completions was not asked; one with completions that say nothing is unreadable."""
    once, unread = PairVerdict((verdict(2, "clear"),), ()), PairVerdict((verdict(2, "x"),), (Verdict("", 0.0, 0.0),))
    pairs = (JudgedPair(0, 1, once), JudgedPair(1, 2, unread))
    fit = rank_images(3, [pair.verdict.outcome(pair.a, pair.b) for pair in pairs])
    result = Ranking("x", tuple(picture(i) for i in range(3)), fit, pairs, 1.0)
    page = page_of(tmp_path, result)
    assert "2 of 3 pairs\njudged, 1 in both orders, 1 in one, in 1.0 s." in page
    browser.open(tmp_path / "page.html")
    browser.run("location.hash = '#image-0-0'")
    browser.page.wait_for_selector("#picture[open]")
    p = f"{100 * result.preference(pairs[0]):.1f} %"
    assert 50 < 100 * result.preference(pairs[0]) < 88  # some of what the judge says may be its position bias
    assert f"won with {p} against rank 2, image 1, shown in one order" in text_at(browser, "#picture")
    browser.run("document.querySelector('.opponents button').click()")
    text = text_at(browser, "#compare")
    assert f"image 0 is preferred, {p}, shown in one order." in text
    assert "image 1 shown first not asked in this order" in text
    browser.run("compare(0, 1, 2)")
    text = text_at(browser, "#compare")
    assert (
        f"image 1 is preferred, {100 * result.preference(pairs[1]):.1f} %, by the one order that could be read." in text
    )
    assert "image 2 shown first Image 1: image 2 Image 2: image 1 unreadable" in text


def test_without_javascript_everything_is_there(browser: Browser, tmp_path: Path) -> None:
    page_of(tmp_path, ranking())
    page = browser.new_page(java_script_enabled=False, viewport={"width": 390, "height": 844})
    page.goto((tmp_path / "page.html").as_uri())
    for shown in (".picture", ".more"):
        assert all((each.bounding_box() or {"width": 0})["width"] > 300 for each in page.locator(shown).all())
    assert "cannot be compared here. Everything else works without it." in page.content()
    page.context.close()


def test_hostile_texts_in_a_browser(browser: Browser, hostile: Ranking, tmp_path: Path) -> None:
    page_of(tmp_path, hostile, hostile, notes=(HOSTILE,))
    browser.open(tmp_path / "page.html")
    browser.run("document.querySelectorAll('.reason button')[0].click()")
    assert "window.hacked=1</script>" in text_at(browser, "dialog")
    browser.run("new Promise(done => setTimeout(done, 100))")
    assert browser.run("typeof window.hacked") == "undefined"
    assert complaints(browser) == []
    # The page's policy holds even where markup got in.
    assert_no_script_gets_in(browser)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1100])
def test_page_fits_and_is_accessible(browser: Browser, tmp_path: Path, width: int, dark: bool) -> None:
    page_of(tmp_path, ranking(prompt="a" * 200, skipped=(Skipped(Path("b" * 200), "c" * 200),)))
    browser.show_as(width, 800, dark)
    browser.open(tmp_path / "page.html")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert (browser.run("getComputedStyle(document.body).color") == "rgb(232, 234, 238)") == dark
    browser.run("document.querySelector('.reason button').click()")
    assert browser.run("document.querySelector('dialog').scrollWidth <= innerWidth")
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    named = [
        (node["role"]["value"], node.get("name", {}).get("value"))
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in ("dialog", "combobox", "button", "image")
    ]
    assert ("dialog", "Two images compared") in named
    assert ("combobox", "The other image") in named
    assert all(name for _, name in named)
    assert complaints(browser) == []
    if folder := os.environ.get("MLXPREF_SCREENSHOTS"):
        browser.page.screenshot(path=Path(folder) / f"ranking-{width}-{'dark' if dark else 'light'}.png")
