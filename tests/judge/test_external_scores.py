"""Scores of any tool: what is read, which images they are of, and the same protocols without a model."""

import json
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from mlxpref.cli import main
from mlxpref.data.load import load_preferences
from mlxpref.errors import DataError
from mlxpref.judge.external_scores import match_scores, prefer_by_score, read_scores
from mlxpref.judge.protocols import PROTOCOLS
from mlxpref.preferences import ImageLike, PackedImage, Preference
from tests.data_layouts import LAYOUTS, make_layout

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*lines: str, name: str = "scores.csv") -> Path:
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


def of(*images: str | Path | PackedImage) -> list[Preference]:
    """Preferences of neighbours."""
    result = [Path(image) if isinstance(image, str) else image for image in images]
    return [Preference("x", a, b, 1.0) for a, b in pairwise(result)]


def test_columns_are_found_by_name(write: Write) -> None:
    path = write("\ufeffprompt, image ,score", 'a hat,"x, 1.png",0.5', "", "a cat,y.png, -1e3 ", "a dog,z.png,2,")
    assert read_scores(path) == {"x, 1.png": 0.5, "y.png": -1000.0, "z.png": 2.0}


def test_bad_rows_are_gathered(write: Write) -> None:
    rows = ["a.png,1", "b.png,nan", "c.png,high", ",1", "a.png,2", "d.png,inf", "e.png"]
    with pytest.raises(DataError) as error:
        read_scores(write("image,score", *rows))
    lines = str(error.value).splitlines()
    assert lines[0].endswith("scores.csv: 6 of 7 rows cannot be used; correct or remove them:")
    assert lines[1:] == [
        "  line 3: the score of b.png must be a finite number, not 'nan'",
        "  line 4: the score of c.png must be a finite number, not 'high'",
        "  line 5: no image",
        "  line 6: a.png has a score already, in an earlier row",
        "  line 7: the score of d.png must be a finite number, not 'inf'",
        "  line 8: the score of e.png must be a finite number, not ''",
    ]
    with pytest.raises(DataError, match=r"12 of 12 rows cannot(.|\n)*line 11: no image\n  and 2 more$"):
        read_scores(write("image,score", *[",1"] * 12))


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["image,points", "a,1"], "its columns must be image and score; it has image, points"),
        (["image,score,score", "a,1,2"], "named twice"),
        ([""], "no scores in this file"),
        (["image,score"], "no scores in this file"),
        (["image,score", '"a,1'], "is a quote not closed"),
    ],
)
def test_files_that_hold_no_scores(write: Write, lines: list[str], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        read_scores(write(*lines))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be opened \(No such file"):
        read_scores(tmp_path / "nothing.csv")
    (tmp_path / "latin.csv").write_bytes(b"image,score\n\xe9.png,1\n")
    with pytest.raises(DataError, match="not UTF-8"):
        read_scores(tmp_path / "latin.csv")


def matched(rows: list[str], preferences: list[Preference]) -> dict[str, float]:
    return match_scores({row: float(number) for number, row in enumerate(rows)}, preferences, Path("scores.csv"))


def test_path_endings_name_images() -> None:
    preferences = of("/data/one/a.png", "/data/two/a.png", "/data/b.png")
    assert matched(["/data/one/a.png", "two/a.png", "./b.png", "c.png"], preferences) == {
        "/data/one/a.png": 0, "/data/two/a.png": 1, "/data/b.png": 2,
    }  # fmt: skip


def test_absolute_path_is_no_ending() -> None:
    assert matched(["b/a.png", "a.png"], of("a.png", "b/a.png")) == {"b/a.png": 0, "a.png": 1}


def test_images_in_archives_have_unpacked_names() -> None:
    preferences = of(
        PackedImage(Path("/hub/images/test/test_1.zip"), "test_1/x.webp"),
        PackedImage(Path("/hub/images/test/test_2.zip"), "test_2/x.webp"),
        PackedImage(Path("/hub/test.parquet"), "jpg_0", 7),
        PackedImage(Path("/hub/test.parquet"), "response_a_images/0", 7, "pair_7/a"),
    )
    names = ["images/test/test_1/x.webp", "test_2.zip/test_2/x.webp", "test.parquet/7/jpg_0", "pair_7/a", "."]
    result = matched(names, preferences)
    assert [result[str(p)] for p in (preferences[0].a, *(p.b for p in preferences))] == [0, 1, 2, 3]


def test_ambiguous_and_missing_scores_are_named() -> None:
    preferences = of("/data/one/a.png", "/data/two/a.png", "/data/b.png")
    with pytest.raises(DataError) as error:
        matched(["a.png", "b.png", "data/b.png"], preferences)
    assert str(error.value).splitlines() == [
        "scores.csv: 2 images are not clear; give longer paths, once:",
        "  a.png may be any of 2 images, such as /data/one/a.png and /data/two/a.png",
        "  /data/b.png has 2 scores: b.png, data/b.png",
    ]
    with pytest.raises(DataError, match=r"2 of 3 images have no score; add them:\n  /data/two/a.png\n  /data/b.png$"):
        matched(["one/a.png", "c.png"], preferences)


def test_the_higher_score_is_preferred() -> None:
    scores = {"a": 2.0, "b": -1.0, "c": -1.0, "d": 5.0}
    assert prefer_by_score(scores, of("a", "b", "c", "d")).tolist() == [1.0, 0.5, 0.0]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in ("eval", *arguments)])


@pytest.fixture
def ones_own(tmp_path: Path, write: Write) -> Path:
    """Ten pairs of two prompts with votes, one of them a tie."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(10):
        for side in "ab":
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / f"{number}{side}.png")
        p_a = (0.5, 0.8, 0.2, 1.0, 0.6)[number % 5] if number < 6 else 0.9
        rows.append({"prompt": str(number % 3), "a": f"{number}a.png", "b": f"{number}b.png", "p_a": p_a, "votes": 10})
    return write(*map(json.dumps, rows), name="mine.jsonl")


def a_first(number: int) -> list[str]:
    return [f"{number}a.png,2", f"{number}b.png,1"]


def test_eval_of_scores_needs_no_model(ones_own: Path, write: Write) -> None:
    path = write("image,score", *(line for number in range(10) for line in a_first(number)), "other.png,3")
    done = run("--data", ones_own, "--scores", path, "--json")
    assert done.exit_code == 0, done.stderr
    # Four images are of ties.
    assert done.stderr.splitlines() == [f"{path}: 5 of 21 scores are of images that were not asked for"]
    result = json.loads(done.stdout)
    assert (result["pairs"], result["ties_dropped"], result["strategy"], result["tokens"]) == (8, 2, None, 0)
    assert result["accuracy"] == result["official"]["value"] == result["first_image_baseline"] == 7 / 8
    unknown = {"both_orders_accuracy", "position_consistency", "first_choice_rate", "brier", "ece",
               "unreadable", "seconds", "tokens_per_pair", "seconds_per_pair", "calibration", "model", "adapter",
               "limit", "learned_from"}  # fmt: skip
    assert {key for key, value in result.items() if value is None} == unknown | {"strategy"}
    # 8:2 and 2:8, 10:0, 6:4, and four times 9:1: of 45 pairs of people 29, 45, 21 and 36 agree.
    assert result["human_ceiling"] == pytest.approx((29 / 45 * 2 + 1 + 21 / 45 + 4 * 36 / 45) / 8)


def test_eval_of_scores_by_every_protocol(ones_own: Path, write: Write) -> None:
    # Pair 0 is a tie, and so are its scores; pair 1 has equal scores, too.
    path = write(
        "image,score", "0a.png,1", "0b.png,1", "1a.png,1", "1b.png,1", *(x for i in range(2, 10) for x in a_first(i))
    )
    actual = {}
    for protocol in PROTOCOLS:
        result = run("--data", ones_own, "--scores", path, "--protocol", protocol, "--json")
        assert result.exit_code == 0, result.output
        actual[protocol] = json.loads(result.stdout)
    # Pairs 0 and 5 are ties; a is better in all others but 2.
    assert all(each["pairs"] == 8 and each["accuracy"] == 6 / 8 for each in actual.values())
    plain = ("pairs", "imagereward", "hpdv3", "mmrb2", "genai_bench")
    assert {actual[name]["official"]["value"] for name in plain} == {6 / 8}
    assert actual["genai_bench"]["official"]["tau"] == (6 + 1) / 10
    # Prompts: 0 has pairs 3, 6, 9; 1 has 1, 4, 7; 2 has 2, 8.
    assert actual["hpdv2"]["official"]["value"] == pytest.approx((1 + 2.5 / 3 + 1 / 2) / 3)
    assert actual["hpdv2"]["accuracy_macro"] == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)
    # 0 is a tie found, 5 a tie missed, 1 undecided, 2 wrong, six right.
    assert actual["pickapic"]["official"]["value"] == pytest.approx((1 + 0.5 + 0.5 + 0 + 6) / 10)
    assert actual["pickapic"]["tie_threshold"] == 0
    output = run("--data", ones_own, "--scores", path, "--protocol", "hpdv2").stdout.splitlines()
    assert output[0].split()[:3] == ["judged", "pairs", "official"]
    assert output[1].split()[-5:] == ["n/a"] * 5
    assert "two people agree on" in output[2]
    assert "HPDv2: macro" in output[2]


def name_in_the_data(image: ImageLike, folder: Path) -> str:
    """What a user calls an image of a data set in this folder, by its own lists."""
    if isinstance(image, Path) and image.is_relative_to(folder):
        return str(image.relative_to(folder))
    if isinstance(image, Path):  # unpacked into the cache
        return re.split("/(?:test|images)-.{12}/", str(image))[1]
    assert isinstance(image, PackedImage)
    if image.archive.suffix == ".zip":
        return f"images/test/{image.member}"
    row, column, *_ = image.member.split("/")
    if column.startswith("response_"):
        return f"{pq.read_table(image.archive)['pair_id'][int(row)]}/{column[9]}"
    return image.member


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_data_set_by_names_alone(layout: str, tmp_path: Path, write: Write) -> None:
    """Scores by the names that a data set's own lists give: with all images, and without any file of one."""
    folder, name = make_layout(layout, tmp_path / "data", 6), layout.removesuffix("-list")
    preferences = load_preferences(name, "test", data_dir=folder)
    images = [(name_in_the_data(p.a, folder), name_in_the_data(p.b, folder)) for p in preferences]
    unique = list(dict.fromkeys(image for pair in images for image in pair))
    scores = dict(zip(unique, np.random.default_rng(0).permutation(len(unique)).tolist(), strict=True))
    path = write("image,score", *(f"{image},{score}" for image, score in scores.items()))
    results = []
    for _ in range(2):
        done = run("--data", name, "--data-dir", folder, "--scores", path, "--json")
        assert done.exit_code == 0, done.output
        results.append(json.loads(done.stdout))
        for each in {*folder.glob("images*"), *folder.glob("part-*"), *folder.glob("*.tar.gz*")}:
            shutil.rmtree(each) if each.is_dir() else each.unlink()
    assert results[0] == results[1]
    right = [
        (scores[a] > scores[b]) == (p.better == "a")
        for p, (a, b) in zip(preferences, images, strict=True)
        if p.better != "tie"
    ]
    assert results[0]["accuracy"] == sum(right) / len(right)
    assert 0 < sum(right) < len(right)
    assert results[0]["protocol"] == ("pickapic" if name == "pickapic_v1" else name)


def test_tables_of_names(tmp_path: Path, write: Write) -> None:
    """A user's table, a folder of tables, and addresses: none of the images is here."""
    rows = [
        {"prompt": f"{i}", "image_a": f"{i}a.png", "image_b": f"https://x.invalid/{i}b.png", "label": i % 2}
        for i in range(4)
    ]
    (tmp_path / "tables").mkdir()
    for table in (tmp_path / "tables" / "test.parquet", tmp_path / "mine.parquet"):
        pq.write_table(pa.Table.from_pylist(rows), table)
    cells = [{**row, "image_a": {"bytes": None, "path": row["image_a"]}} for row in rows]
    pq.write_table(pa.Table.from_pylist(cells), tmp_path / "cells.parquet")
    lines = write(*map(json.dumps, rows), name="mine.jsonl")
    path = write(
        "image,score", *(f"{i}a.png,1" for i in range(4)), *(f"https://x.invalid/{i}b.png,0" for i in range(4))
    )
    for data in (tmp_path / "tables", tmp_path / "mine.parquet", tmp_path / "cells.parquet", lines):
        done = run("--data", data, "--scores", path, "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["accuracy"] == 0.5
        assert run("--data", data, "--model", "demo", "--no-think").exit_code == 1


def test_scores_by_the_protocol_of_mmrb2(tmp_path: Path, write: Write) -> None:
    """A score has no place: both orders are judged alike, and an equal one is a wrong judgement, not a missing one."""
    folder = make_layout("mmrb2", tmp_path / "data", 4)
    preferences = load_preferences("mmrb2", "test", data_dir=folder, needs_images=False)
    names = [(p.a.known_as, p.b.known_as) for p in preferences]
    better = [(a, b) if p.better == "a" else (b, a) for p, (a, b) in zip(preferences, names, strict=True)]
    lines = [f"{good},{1 if i < 5 else 0}" for i, (good, _) in enumerate(better)]
    path = write("image,score", *lines, *(f"{bad},{int(i == 5)}" for i, (_, bad) in enumerate(better)))
    done = run("--data", "mmrb2", "--data-dir", folder, "--scores", path, "--json")
    assert done.exit_code == 0, done.output
    number = json.loads(done.stdout)["official"]
    assert number["value"] == number["value_missing_wrong"] == 5 / 8
    assert (number["judgements"], number["of_judgements"]) == (16, 16)
    assert number["definition"].endswith("a judgement is the higher score, in both orders the same")


def test_options_without_scores(ones_own: Path, write: Write) -> None:
    path = write("image,score", "0a.png,1")
    for more in (["--no-think"], ["--tie-threshold", "0.1", "--protocol", "pickapic"]):
        assert run("--data", ones_own, "--scores", path, *more).exit_code == 2
    result = run("--data", ones_own, "--scores", path)
    assert result.exit_code == 1
    assert f"Error: {path}: 16 of 16 images have no score" in result.stderr
