"""Stars follow from the posterior; sidecars keep all else, and programs that we did not write read the stars."""

import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from mlxpref.judge.ranking_result import Ranking
from mlxpref.ranking.covariance import DenseCovariance
from mlxpref.ranking.noise import Noise
from mlxpref.ranking.outcomes import PairOutcome, all_pairs
from mlxpref.ranking.strength_ranking import rank_images
from mlxpref.report.xmp import STARS_RULE, expected_shares, ratings_in_words, stars_of, with_rating, write_ratings
from tests.conftest import picture
from tests.report.test_ranking_files import ranked

RDF, XMP = "http://www.w3.org/1999/02/22-rdf-syntax-ns#", "http://ns.adobe.com/xap/1.0/"


def settled(count: int, pairs: Any = None) -> Ranking:
    """A ranking by sure and consistent answers about all pairs, or about those given; 0 is the best."""
    outcomes = [PairOutcome(a, b, p := 1 / (1 + np.exp(4 * (a - b))), p) for a, b in pairs or all_pairs(count)]
    images = tuple(picture(i, (4, 4)) for i in range(count))
    return Ranking("x", images, rank_images(count, outcomes, {0: Noise(0.01, 0.01, 9, 9)}), (), 0.0)


def sidecar(description: str, rdf: str = "") -> bytes:
    """A sidecar as programs write it, with comments, a packet and unknown properties."""
    return f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<!-- é -->
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="Some program 1.0">
 <rdf:RDF xmlns:rdf="{RDF}"{rdf}>{description}
 </rdf:RDF>
</x:xmpmeta><?xpacket end="w"?>""".encode()


HISTORY = f"""
  <rdf:Description rdf:about="uuid:1" xmlns:d="http://darktable.sf.net/" d:params="a&#10;b &lt;" xmlns:xmp="{XMP}" {{}}>
   <d:history><rdf:Seq><rdf:li d:num="0" xmp:Rating="1"/><!-- kept -->
    <rdf:li><![CDATA[ <&> ]]></rdf:li></rdf:Seq></d:history>
  </rdf:Description>"""
BODY = sidecar(HISTORY.format("")).decode().partition("?>")[2]
SIDECARS = {
    "attribute": sidecar(HISTORY.format('xmp:Rating="2"')),
    "element": sidecar(HISTORY.format("").replace("<d:history", "<xmp:Rating>2</xmp:Rating><d:history")),
    "second description": sidecar(
        HISTORY.format("") + f'<rdf:Description rdf:about="uuid:1" xmlns:xap="{XMP}" xap:Rating="2" xap:Label="Red"/>'
    ),
    "qualified": sidecar(
        HISTORY.format("").replace(
            "<d:history",
            '<xmp:Rating rdf:parseType="Resource"><rdf:value>2</rdf:value><d:by>me</d:by></xmp:Rating><d:history',
        )
    ),
    "none": sidecar(HISTORY.format("")),
    "other prefix": sidecar('<r:Description r:about="" xmlns:xmp="urn:other" xmp:Rating="2"/>', f' xmlns:r="{RDF}"'),
    "no description": sidecar(""),
    "latin": b'<?xml version="1.0" encoding="ISO-8859-1"?>' + BODY.encode("latin-1"),
    "utf-16": sidecar(HISTORY.format("")).decode().encode("utf-16"),
}  # fmt: skip


def ratings_in(content: bytes) -> list[str]:
    """The ratings of the descriptions, read by Python's own parser."""
    found = []
    for description in ElementTree.fromstring(content).iter(f"{{{RDF}}}Description"):
        found += [text for name, text in description.attrib.items() if name == f"{{{XMP}}}Rating"]
        for element in description.findall(f"{{{XMP}}}Rating"):
            value = element.find(f"{{{RDF}}}value")
            found.append((element if value is None else value).text or "")
    return found


def without_rating(content: bytes) -> str:
    """The canonical form of a sidecar whose ratings are gone."""
    root = ElementTree.fromstring(content, ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True)))
    graph = root.find(f"{{{RDF}}}RDF")
    assert graph is not None
    for description in graph.findall(f"{{{RDF}}}Description"):
        description.attrib.pop(f"{{{XMP}}}Rating", None)
        for element in description.findall(f"{{{XMP}}}Rating"):
            (element if (value := element.find(f"{{{RDF}}}value")) is None else value).text = ""
        if set(description.attrib) <= {f"{{{RDF}}}about"} and not len(description):
            graph.remove(description)
    return ElementTree.canonicalize(ElementTree.tostring(root, "unicode"), with_comments=True, strip_text=True)


# stars


@pytest.mark.parametrize("count", [5, 8, 30])
def test_a_settled_ranking_uses_all_stars(count: int) -> None:
    stars = stars_of(settled(count))
    assert stars == sorted(stars, reverse=True)
    assert {*stars} == {1, 2, 3, 4, 5}
    assert stars.count(5) == stars.count(1) <= -(-count // 10)


def test_few_images() -> None:
    assert [stars_of(settled(count)) for count in (2, 3, 4)] == [[5, 1], [5, 3, 1], [5, 3, 3, 1]]


def test_images_that_are_not_told_apart_have_three() -> None:
    assert stars_of(Ranking("x", (), rank_images(40, []), (), 0.0)) == [3] * 40
    equal = [PairOutcome(a, b, 0.5, 0.5) for a, b in all_pairs(12)]
    assert stars_of(Ranking("x", (), rank_images(12, equal), (), 0.0)) == [3] * 12


def test_an_image_without_answers_is_in_the_middle() -> None:
    stars = stars_of(settled(20, list(all_pairs(19))))
    assert {*stars[:19]} == {1, 2, 3, 4, 5}
    assert stars[19] == 3


def test_shares_are_those_of_draws_from_the_posterior() -> None:
    rng = np.random.default_rng(0)
    strengths, half = rng.normal(size=6), rng.normal(size=(6, 6))
    covariance = half @ half.T / 6
    draws = rng.multivariate_normal(strengths, covariance, 100_000)
    shares = (draws[:, :, None] > draws[:, None]).sum(axis=2).mean(axis=0) / 5
    assert expected_shares(strengths, DenseCovariance(covariance)) == pytest.approx(shares, abs=0.006)


# one sidecar


@pytest.mark.parametrize("name", SIDECARS)
def test_everything_else_stays(name: str) -> None:
    before = SIDECARS[name]
    after, rating = with_rating(before, 4)
    assert rating == (int(ratings_in(before)[0]) if ratings_in(before) else None)
    assert ratings_in(after) == ["4"]
    assert without_rating(after) == without_rating(before)
    second, rating = with_rating(after, 4)
    assert second is after  # a second run changes nothing
    assert rating == 4
    assert ratings_in(with_rating(after, 1)[0]) == ["1"]
    if name not in ("utf-16", "latin"):
        assert after.startswith(b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>')
        assert after.endswith(b'<?xpacket end="w"?>')
        assert b"&#10;" in after or b"&#10;" not in before
        assert b"<![CDATA[ <&> ]]>" in after or b"CDATA" not in before


@pytest.mark.parametrize("name", ["attribute", "element", "second description", "qualified"])
@pytest.mark.parametrize("value", ["-1", "-1.0"])
def test_a_reject_stays(name: str, value: str) -> None:
    content = SIDECARS[name].replace(b'Rating="2"', f'Rating="{value}"'.encode()).replace(b">2<", f">{value}<".encode())
    assert ratings_in(content) == [value]
    rated, before = with_rating(content, 4)
    assert rated is content
    assert before == -1


@pytest.mark.parametrize(
    ("first", "second", "before"), [("4", "2", 2), ("2", "5", 2), ("0", "4", None), ("4", "4.0", 4), ("", "3.0", 3)]
)
def test_the_earlier_of_several_ratings(first: str, second: str, before: int | None) -> None:
    """It is one that is lost, if any is; 0 is none."""
    content = SIDECARS["second description"].replace(b'Rating="2"', f'Rating="{second}"'.encode())
    content = content.replace(b" d:params=", f' xmp:Rating="{first}" d:params='.encode())
    rated, found = with_rating(content, 4)
    assert found == before
    assert [float(text) for text in ratings_in(rated)] == [4, 4]


def bomb() -> bytes:
    entities = [f'<!ENTITY {name} "{f"&{of};" * 10}">' for of, name in zip("abcdefgh", "bcdefghi", strict=True)]
    return f'<!DOCTYPE x [<!ENTITY a "aaaa">{"".join(entities)}]><x:xmpmeta xmlns:x="adobe:ns:meta/" y="&i;"/>'.encode()


HOSTILE = {
    "is no XML (Document is empty": b"",
    "is no XML (Maximum entity": bomb(),
    "is no XML (Unsupported encoding": b'<?xml version="1.0" encoding="nonsense"?><a/>',
    "is no XML (Invalid bytes": BODY.strip().encode("latin-1"),
    "is no XML (Start tag expected": b"\xff\xd8\xff\xe0JFIF",
    "is no XML (Excessive depth": b"<a>" * 10_000,
    "has a document type": b'<!DOCTYPE a SYSTEM "file:///etc/passwd">' + BODY.encode(),
    "has no rdf:RDF": b"<html><body/></html>",
    "has an xmp:Rating that is no number": SIDECARS["element"].replace(b">2<", b"><rdf:Bag/><"),
    "has an xmp:Rating that is no number; repair": SIDECARS["attribute"].replace(b'"2"', b'"five"'),
}


@pytest.mark.parametrize("reason", HOSTILE)
def test_what_is_no_sidecar_stays_as_it_is(tmp_path: Path, reason: str) -> None:
    files = photographs(tmp_path, "a.png", "b.png")
    (tmp_path / "a.xmp").write_bytes(HOSTILE[reason])
    errors = [rating.error for rating in write_ratings(ranked(files))]
    assert errors[1] is None
    assert str(errors[0]).startswith(f"{tmp_path / 'a.xmp'}: {reason}")
    assert "\n" not in str(errors[0])
    assert (tmp_path / "a.xmp").read_bytes() == HOSTILE[reason]
    assert ratings_in((tmp_path / "b.xmp").read_bytes()) == ["1"]


# sidecars of a folder


def photographs(folder: Path, *names: str) -> list[Path]:
    for name in names:
        picture(len(name), (4, 4)).save(folder / name)
    return [folder / name for name in names]


def stars_in(folder: Path) -> dict[str, str]:
    """The rating in every sidecar that is one."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() == ".xmp":
            found[path.name] = ratings_in(path.read_bytes())[0]
    return found


def test_names_of_sidecars(tmp_path: Path) -> None:
    """A new one is a.xmp, but two images never share one; whatever is there is rated, in any case of letters."""
    files = photographs(tmp_path, "a.jpg", "b.jpg", "b.png", "c.jpg", "d.jpg", "e.jpg")
    (tmp_path / "a.CR2").touch()  # the same shot: no image that is ranked
    (tmp_path / "b.xmp").write_bytes(SIDECARS["attribute"])  # whose?
    (tmp_path / "c.jpg.xmp").write_bytes(SIDECARS["attribute"])
    for name in ("d.xmp", "d.jpg.xmp", "E.XMP"):
        (tmp_path / name).write_bytes(SIDECARS["element"])
    ratings = write_ratings(ranked(files))
    places = [(rating.image.name, rating.sidecar.name, str(rating.stars)) for rating in ratings]
    assert [place[:2] for place in places] == [
        ("a.jpg", "a.xmp"), ("b.jpg", "b.jpg.xmp"), ("b.png", "b.png.xmp"), ("c.jpg", "c.jpg.xmp"),
        ("d.jpg", "d.xmp"), ("d.jpg", "d.jpg.xmp"), ("e.jpg", "E.XMP"),
    ]  # fmt: skip
    assert stars_in(tmp_path) == {"b.xmp": "2", **{name: stars for _, name, stars in places}}
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


def test_links_modes_and_second_runs(tmp_path: Path) -> None:
    files = photographs(tmp_path, "a.png", "b.png")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/a.xmp").write_bytes(SIDECARS["attribute"])
    (tmp_path / "kept/a.xmp").chmod(0o640)
    (tmp_path / "a.xmp").symlink_to("kept/a.xmp")
    write_ratings(ranked(files))
    assert (tmp_path / "a.xmp").is_symlink()
    assert (tmp_path / "kept/a.xmp").stat().st_mode & 0o777 == 0o640
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in tmp_path.rglob("*.xmp")}
    write_ratings(ranked(files))
    assert before == {path: (path.stat().st_ino, path.read_bytes()) for path in tmp_path.rglob("*.xmp")}


def test_ratings_that_are_lost_and_rejects_are_named(tmp_path: Path) -> None:
    files = photographs(tmp_path, *(f"{letter}.png" for letter in "abcde"))
    for name, rating in {"a": "5", "b": "1", "c": "-1", "d": "0"}.items():
        (tmp_path / f"{name}.xmp").write_bytes(SIDECARS["attribute"].replace(b'"2"', f'"{rating}"'.encode()))
    (tmp_path / "e.xmp").mkdir()
    ratings = write_ratings(ranked(files))
    assert [rating.before for rating in ratings] == [5, 1, -1, None, None]
    a, b, _, d, _ = (rating.stars for rating in ratings)
    shutil.rmtree(tmp_path / "e.xmp")
    assert stars_in(tmp_path) == {"a.xmp": str(a), "b.xmp": str(b), "c.xmp": "-1", "d.xmp": str(d)}
    assert a == 5
    assert b > 1
    assert ratings_in_words(ratings) == [
        f"1 sidecar not rated: {tmp_path / 'e.xmp'}: is a folder or a device, not a file",
        f"3 sidecars rated; 1 had another rating: b.xmp 1 -> {b}; 1 reject (rating -1) left as before; {STARS_RULE}",
    ]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    files = photographs(tmp_path, "a.png", "b.png", "c.png", "e.png", f"{'f' * 246}.png")
    (tmp_path / "e.xmp").symlink_to("e.xmp")
    (tmp_path / "a.xmp").write_bytes(SIDECARS["attribute"])
    (tmp_path / "a.xmp").chmod(0o444)
    (tmp_path / "b.xmp").mkdir()
    gone = tmp_path / "gone/d.png"
    a, b, c, e, f, d = write_ratings(ranked([*files, gone, picture(0)]))  # and one from memory
    assert a.error == f"{tmp_path / 'a.xmp'}: is read-only, so its rating stays as it is"
    assert b.error == f"{tmp_path / 'b.xmp'}: is a folder or a device, not a file"
    assert c.error is None
    assert str(d.error).startswith(f"{gone.with_suffix('.xmp')}: cannot be written (No such file or directory)")
    assert str(e.error).startswith(f"{tmp_path / 'e.xmp'}: cannot be opened (Too many levels")
    assert "cannot be written (File name too long)" in str(f.error)
    assert (tmp_path / "a.xmp").read_bytes() == SIDECARS["attribute"]


def test_an_image_that_is_named_like_a_sidecar_is_never_written(tmp_path: Path) -> None:
    files = photographs(tmp_path, "a.png", "b.png")
    shutil.move(files[0], tmp_path / "a.xmp")
    before = (tmp_path / "a.xmp").read_bytes()
    ratings = write_ratings(ranked([tmp_path / "a.xmp", files[1]]))
    assert ratings[0].error
    assert (tmp_path / "a.xmp").read_bytes() == before


READERS = {
    "exiftool": ("exiftool", "-T", "-XMP-xmp:Rating"),
    "exiv2": ("exiv2", "-q", "-Pv", "-K", "Xmp.xmp.Rating"),
}
UNREAD = {("exiv2", "other prefix"), ("exiv2", "latin"), ("exiv2", "utf-16")}
"""exiv2 reads UTF-8, and takes the prefix `xmp` for what it usually is."""


@pytest.mark.parametrize("program", READERS)
def test_other_programs_read_the_rating(tmp_path: Path, program: str) -> None:
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")
    for name, content in SIDECARS.items():
        (tmp_path / f"{name}.xmp").write_bytes(content)
    files = photographs(tmp_path, *(f"{name}.png" for name in (*SIDECARS, "new")))
    ratings = [each for each in write_ratings(ranked(files)) if (program, each.image.stem) not in UNREAD]
    command = [*READERS[program], *(rating.sidecar for rating in ratings)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [int(line.split()[-1]) for line in done.stdout.splitlines()] == [rating.stars for rating in ratings]
