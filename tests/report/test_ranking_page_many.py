"""The page of many images: a page of them at a time, bounded in bytes, and as safe as that of few."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlxpref.data.images import load_image
from mlxpref.data.thumbnails import Thumbnail
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.judge.ranking_result import BY_SCORES, JudgedPair, Ranking
from mlxpref.preferences import ImageLike
from mlxpref.ranking.strength_ranking import rank_images
from mlxpref.report import ranking_page
from mlxpref.report.ranking_page import write_ranking_page
from tests.browser import Browser
from tests.conftest import picture
from tests.pages import HOSTILE, Tags, assert_no_script_gets_in, complaints
from tests.report.test_ranking_page import many_images, page_of, text_at, verdict


@pytest.fixture
def paged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page of 15 images, 6 at a time."""
    monkeypatch.setattr(ranking_page, "_PAGE", 6)
    page_of(tmp_path, many_images(15))
    return tmp_path / "page.html"


def shown(browser: Browser) -> list[int]:
    """The numbers of the images that stand in the list."""
    found: list[str] = browser.run("[...document.querySelectorAll('.ranked > li')].map((item) => item.dataset.index)")
    return [int(number) for number in found]


def test_pages_are_turned(browser: Browser, paged: Path) -> None:
    order = [image.index for image in many_images(15)]
    browser.show_as(1000, 900)
    browser.open(paged)
    assert shown(browser) == order[:6]
    browser.press("Tab", "Tab", "Tab", "ArrowDown")  # past what there is to say and "Compare two"
    assert browser.run("document.activeElement.getAttribute('aria-label')") == "Images shown"
    browser.page.wait_for_url("**/page.html#page-0-2")
    assert shown(browser) == order[6:12]
    assert browser.run("document.images.length") == 6
    assert browser.run("[...document.images].every((image) => image.complete && image.naturalWidth === 160)")
    assert browser.run("[...document.querySelectorAll('.pager select')].map((each) => each.value)") == ["2", "2"]
    browser.run("document.querySelectorAll('[data-turn=\"1\"]')[1].click()")  # the one at the end leads to the top
    browser.page.wait_for_url("**/page.html#page-0-3")
    assert shown(browser) == order[12:]
    assert browser.run("document.querySelector('[data-turn=\"1\"]').disabled")
    assert browser.run("document.activeElement === document.querySelector('.pager select')")
    assert browser.run("document.querySelector('.pager').getBoundingClientRect().top >= 0")
    browser.page.go_back()
    browser.page.wait_for_url("**/page.html#page-0-2")
    assert shown(browser) == order[6:12]
    browser.page.go_back()
    browser.page.wait_for_url("**/page.html")
    assert shown(browser) == order[:6]
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    # Arrows go from picture to picture, over the end of a page.
    browser.run("document.querySelectorAll('.ranked a.picture')[5].focus()")
    browser.press("ArrowRight")
    assert browser.run("document.activeElement.getAttribute('href')") == f"#image-0-{order[6]}"
    assert shown(browser) == order[6:12]
    assert complaints(browser) == []


def test_a_picture_of_another_page_opens(browser: Browser, paged: Path) -> None:
    result = many_images(15)
    order = [image.index for image in result]
    browser.open(paged)
    browser.page.goto(paged.as_uri() + f"#image-0-{order[12]}")
    browser.page.wait_for_selector("#picture[open]")
    assert shown(browser) == order[12:]
    assert "Rank 13 of 15" in text_at(browser, "#picture")
    others = {pair.a + pair.b - order[12] for pair in result.pairs_of[order[12]]}
    assert browser.run("document.querySelectorAll('.opponents img').length") == len(others) == 2
    assert browser.run("document.querySelectorAll('#picture figure img').length") == 2
    browser.press("ArrowLeft")
    browser.page.wait_for_selector("#picture >> text=Rank 12 of 15")
    assert shown(browser) == order[6:12]
    browser.run(f"compare(0, {order[0]}, {order[14]})")
    assert browser.run("document.querySelectorAll('#compare .two img').length") == 2
    for place, side in ((0, 0), (14, 1)):
        wanted = f"itemOf(0, {order[place]}).querySelector('img').src"
        assert browser.run(f"document.querySelectorAll('#compare .two img')[{side}].src === {wanted}")
    browser.press("Escape", "Escape")
    browser.page.wait_for_url("**/page.html#page-0-2")
    browser.page.wait_for_selector(f"a[href='#image-0-{order[11]}']:focus")
    # An address of nothing opens nothing.
    browser.page.goto(paged.as_uri() + "#image-0-99")
    browser.page.goto(paged.as_uri() + "#page-0-4")
    assert shown(browser) == order[6:12]
    assert complaints(browser) == []


def test_the_way_back_of_several_rankings(browser: Browser, paged: Path) -> None:
    """Each ranking shows the page that it showed before; a link to a page leads to its ranking."""
    page_of(paged.parent, many_images(15), many_images(15))
    browser.show_as(390, 600)
    browser.open(paged)
    browser.page.goto("about:blank")
    browser.page.goto(paged.as_uri() + "#page-1-2")
    assert browser.run("shown") == [1, 2]
    assert abs(browser.run("document.getElementById('prompt-1').getBoundingClientRect().top")) < 2
    browser.page.goto("about:blank")
    browser.open(paged)
    for pager, address in ((0, "#page-0-2"), (2, "#page-1-2"), (2, "#page-1-3")):
        browser.run(f"document.querySelectorAll('[data-turn=\"1\"]')[{pager}].click()")
        browser.page.wait_for_url(f"**/page.html{address}")
    assert browser.run("shown") == [2, 3]
    for address, pages in (("#page-1-2", [2, 2]), ("#page-0-2", [2, 1]), ("", [1, 1])):
        browser.page.go_back()
        browser.page.wait_for_url(f"**/page.html{address}")
        browser.page.wait_for_function(f"String(shown) === '{pages[0]},{pages[1]}'")
    assert complaints(browser) == []


def test_the_way_back_closes_what_is_open(browser: Browser, paged: Path) -> None:
    """Of a picture on another page the focus goes to the first of the page that is shown."""
    order = [image.index for image in many_images(15)]
    browser.open(paged)
    browser.run(f"location.hash = '#image-0-{order[12]}'")
    browser.page.wait_for_selector("#picture[open]")
    browser.run(f"compare(0, {order[0]}, {order[1]})")
    browser.page.go_back()
    browser.page.wait_for_selector(f"a[href='#image-0-{order[0]}']:focus")
    assert shown(browser) == order[:6]
    assert browser.run("document.querySelectorAll('dialog[open]').length") == 0
    # With another key held an arrow is the browser's.
    for held in ("altKey", "ctrlKey", "metaKey"):
        event = f"new KeyboardEvent('keydown', {{key: 'ArrowRight', bubbles: true, {held}: true}})"
        browser.run(f"document.activeElement.dispatchEvent({event})")
    assert browser.run("document.activeElement.getAttribute('href')") == f"#image-0-{order[0]}"
    assert complaints(browser) == []


@pytest.mark.parametrize("width", [390, 1280])
def test_a_later_page_fits_and_is_accessible(browser: Browser, paged: Path, width: int) -> None:
    browser.show_as(width, 800)
    browser.open(paged)
    browser.run("location.hash = '#page-0-3'")
    browser.page.wait_for_url("**/page.html#page-0-3")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    widths = browser.run("[...document.querySelectorAll('.ranked > li')].map((item) => item.offsetWidth)")
    assert len(set(widths)) == 1  # none is large
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    named = [
        (node["role"]["value"], node.get("name", {}).get("value"), node.get("value", {}).get("value"))
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in ("combobox", "button", "link", "image")
    ]
    assert named.count(("combobox", "Images shown", "13 to 15 of 15")) == 2
    assert all(name for _, name, _ in named)


def test_without_javascript_there_are_names(browser: Browser, paged: Path) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto(paged.as_uri())
    assert page.locator(".ranked > li").count() == 6
    assert not page.locator(".pager").first.is_visible()
    result = many_images(15)
    names = page.locator("noscript li")
    assert [each.inner_text() for each in names.all()] == [image.short_name for image in result[6:]]
    assert names.first.get_attribute("value") == "7"
    assert names.first.get_attribute("id") == f"image-0-{result[6].index}"
    assert "cannot be compared here." in page.content()
    assert "Everything else works" not in page.content()
    page.context.close()


def test_texts_of_later_pages_are_only_texts(browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking_page, "_PAGE", 2)
    files = [tmp_path / f"{i}<img src=x onerror=window.hacked=1>&amp;.png" for i in range(5)]
    for i, file in enumerate(files):
        picture(i).save(file, "PNG")
    pairs = [JudgedPair(i, i + 1, PairVerdict((verdict(1, HOSTILE),), (verdict(-1, HOSTILE),))) for i in range(4)]
    fit = rank_images(5, [pair.verdict.outcome(pair.a, pair.b) for pair in pairs])
    page = page_of(tmp_path, Ranking(HOSTILE, tuple(files), fit, tuple(pairs), 1.0))
    kinds = [attributes.get("type") for attributes in Tags(page).all("script")]
    assert kinds == ["text/html", "text/html", "application/json", None]
    browser.open(tmp_path / "page.html")
    for number in (2, 3):
        browser.run(f"location.hash = '#page-0-{number}'")
        browser.page.wait_for_url(f"**/page.html#page-0-{number}")
        assert "onerror" in text_at(browser, ".ranked")
        browser.run("location.hash = document.querySelector('.ranked a').hash")
        browser.page.wait_for_selector("#picture[open]")
        assert "window.hacked=1</script>" in text_at(browser, "#picture")
        browser.press("Escape")
    browser.run("new Promise(done => setTimeout(done, 100))")
    assert browser.run("typeof window.hacked") == "undefined"
    assert complaints(browser) == []
    assert_no_script_gets_in(browser)


def test_many_rankings_are_shown_when_they_are_reached(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking_page, "_AT_ONCE", 20)
    rankings = [many_images(15) for _ in range(4)]
    page_of(tmp_path, *rankings)
    browser.show_as(390, 844)
    browser.open(tmp_path / "page.html")
    count = "document.querySelectorAll('.ranked')[{}].children.length"
    assert [browser.run(count.format(place)) for place in (0, 3)] == [15, 0]
    browser.run("document.documentElement.style.overflowAnchor = 'none'")  # as in Safari
    browser.run("document.querySelector('nav a[href=\"#prompt-3\"]').click()")
    browser.page.wait_for_selector(".ranked >> nth=3 >> li >> nth=14", state="attached")
    browser.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 100)))")
    assert abs(browser.run("document.getElementById('prompt-3').getBoundingClientRect().top")) < 2
    assert browser.run("document.querySelectorAll('.later').length") >= 1  # those above come when they are scrolled to
    browser.run("document.querySelectorAll('.ranked')[2].scrollIntoView()")
    browser.page.wait_for_selector(".ranked >> nth=2 >> li >> nth=14", state="attached")
    browser.run(f"location.hash = '#image-2-{rankings[2][0].index}'")
    browser.page.wait_for_selector("#picture[open] >> text=Rank 1 of 15")
    assert complaints(browser) == []


def test_limits_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out, where it is: of scores every tie is known, however many images there are."""
    result = many_images(5)
    monkeypatch.setattr(ranking_page, "names_only_near_ties", lambda _: True)
    pictures = ranking_page._Pictures([len(result)], load_image)
    assert ranking_page._limits(result, pictures).startswith("Ties are looked for among the 16 nearest")
    assert ranking_page._limits(replace(result, orders=BY_SCORES), pictures) == ""
    pictures.best, pictures._left = 1, 100_000
    words = "After the best 1, pictures have fewer pixels or bytes."
    assert ranking_page._limits(replace(result, orders=BY_SCORES), pictures) == words


@pytest.mark.parametrize("counts", [[200], [201], [300], [1000], [5000], [100] * 3, [200] * 25, [5] * 1000])
def test_bytes_of_pictures_are_bounded(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that take as many bytes as they may; up to 200 are large, and of those that take little all are."""
    total, sizes = 0, set[tuple[int, int]]()

    def thumbnail(image: ImageLike, side: int, load: object, limit: int) -> Thumbnail:
        nonlocal total
        total += limit * share // 100
        sizes.add((side, limit))
        return Thumbnail(b"x" * (limit * share // 100), side, side)

    monkeypatch.setattr(ranking_page, "try_thumbnail", thumbnail)
    for share in (10, 50, 100) if len(counts) == 1 else (10, 50):
        total, sizes = 0, set()
        pictures = ranking_page._Pictures(counts, load_image)
        for count in counts:
            size = pictures.large
            for place in range(count):
                size = pictures.small if place == pictures.best else size
                pictures.make(Path("x.png"), place < pictures.best, size)
        assert total <= 14_000_000
        assert max(sizes) == (480, 50_000) or pictures.best == 0
        assert min(side for side, _ in sizes) >= 130
        if share < 100:
            assert min(limit for _, limit in sizes) > 1500
        if sum(counts) <= (200 if share == 100 else 300):
            assert sizes == {(480, 50_000)}


def test_the_page_is_written_as_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier pictures are in the file, not in memory, when the last are read; and each is read once."""
    monkeypatch.setattr(ranking_page, "_PAGE", 20)
    result, written = many_images(100), list[int]()

    def load(image: ImageLike) -> Image.Image:
        written.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
        assert isinstance(image, Image.Image)
        return image

    write_ranking_page(tmp_path / "page.html", [result], load=load)
    assert len(written) == 100
    assert written[0] == written[19] < 10_000  # the head, before the best pictures
    assert written[-1] > 0.6 * (tmp_path / "page.html").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_intervals_between_many_images(browser: Browser, tmp_path: Path) -> None:
    """Of more images than have a matrix the page's size is linear, and its intervals are near those of the fit."""
    rng = np.random.default_rng(0)
    count, truth = 600, rng.normal(size=600)
    sides = np.concatenate([rng.permutation(count).reshape(-1, 2) for _ in range(6)])  # (K, 2)
    pairs = []
    for a, b in sides.tolist():
        x = truth[a] - truth[b] + rng.normal(0, 0.3)
        pairs.append(JudgedPair(a, b, PairVerdict((verdict(x, ""),), (verdict(-x, ""),))))
    fit = rank_images(count, [pair.verdict.outcome(pair.a, pair.b) for pair in pairs])
    result = Ranking("x", tuple(Path(f"{i}.png") for i in range(count)), fit, tuple(pairs), 1.0)
    data: Any = json.loads(Tags(page_of(tmp_path, result)).scripts[-2])[0]
    assert data["deviations"] == []
    assert len(data["paired"]) == len(pairs) == len(data["pairs"])
    some = rng.choice(count, 100, replace=False)
    block = fit.fit.covariance.block(np.concatenate([some, sides[:50].ravel()]))
    exact = np.sqrt(np.diag(block)[:, None] + np.diag(block) - 2 * block)
    errors = np.array(data["errors"]) / 1000
    upper = np.triu_indices(100, 1)
    assumed = np.hypot(errors[some][:, None], errors[some])
    assert np.sqrt(np.mean((assumed[upper] / exact[upper] - 1) ** 2)) < 0.05
    paired = exact[range(100, 200, 2), range(101, 200, 2)]
    assert np.array(data["paired"][:50]) / 1000 == pytest.approx(paired, rel=0.1)
    browser.open(tmp_path / "page.html")
    (a, b), strengths = some[:2].tolist(), fit.fit.strengths
    browser.run(f"compare(0, {a}, {b})")
    lead = abs(strengths[a] - strengths[b])
    ends = [100 / (1 + np.exp(-lead - x * np.hypot(errors[a], errors[b]))) for x in (-1.959964, 1.959964)]
    assert f"95 % interval about {ends[0]:.1f} % to {ends[1]:.1f} %." in text_at(browser, "#compare")
    assert "takes the errors of both for independent" in Tags((tmp_path / "page.html").read_text()).text
