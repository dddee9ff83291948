"""A user's preferences in one file: every format, every name of a column, and rows that are not clear."""

import csv
import io
import json
import random
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from mlxpref.cli import main
from mlxpref.data.archives import named_image
from mlxpref.data.image_cache import ImageCache
from mlxpref.data.images import load_image
from mlxpref.data.load import check_preferences, load_preferences
from mlxpref.data.preference_table import read_preferences
from mlxpref.errors import ConfigError, DataError
from mlxpref.preferences import Preference, image_name, placed
from tests.conftest import picture
from tests.data.own_rows import GOOD, write_rows
from tests.data_layouts import make_layout, write_zip
from tests.messages import messages


def problem(folder: Path, *rows: object) -> str:
    with pytest.raises(DataError) as caught:
        read_preferences(write_rows(folder, *rows))
    return str(caught.value)


def test_rows_become_preferences(folder: Path) -> None:
    full = {**GOOD, "a": "sub/3.png", "p_a": 1, "votes": 12, "group": "g", "id": 7, "meta": {"x": 1}}
    first, second = read_preferences(write_rows(folder, GOOD, full))
    assert (first.prompt, first.a, first.b, first.p_people) == ("a red cube", folder / "1.png", folder / "2.png", 0.7)
    assert (first.votes, first.group) == (1, "a red cube")
    assert (second.a, second.p_people, second.votes, second.group) == (folder / "sub" / "3.png", 1.0, 12, "g")
    assert isinstance(second.p_people, float)


def test_absolute_paths_and_empty_options_are_fine(folder: Path) -> None:
    row = {**GOOD, "a": str(folder / "sub" / "3.png"), "votes": None, "group": None, "split": None}
    (preference,) = read_preferences(write_rows(folder, row))
    assert preference.a == folder / "sub" / "3.png"
    assert (preference.votes, preference.group) == (1, "a red cube")


def test_encodings_and_line_ends(folder: Path) -> None:
    path = folder / "preferences.jsonl"
    text = "\r\n".join(["", json.dumps({**GOOD, "prompt": "ein Würfel\u2028rot"}, ensure_ascii=False), "  ", ""])
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes(text.encode(encoding))
        (preference,) = read_preferences(path)
        assert preference.prompt == "ein Würfel\u2028rot"
    path.write_bytes(text.encode("latin-1", "replace"))
    with pytest.raises(DataError, match="none of 1 rows can be used: not UTF-8"):
        read_preferences(path)


def test_names_are_found_in_either_unicode_form(folder: Path) -> None:
    (folder / unicodedata.normalize("NFD", "café.png")).touch()
    (preference,) = read_preferences(write_rows(folder, {**GOOD, "a": unicodedata.normalize("NFC", "café.png")}))
    assert isinstance(preference.a, Path)
    assert preference.a.exists()


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("{not json", "not valid JSON (Expecting property name enclosed in double quotes, column 2)"),
        ("[" * 100_000, "not valid JSON"),
        ([1, 2], "not a JSON object like"),
        ({"prompt": "x", "a": "1.png"}, '"b" and "p_a" missing'),
        ({**GOOD, "p_a": 1.4}, '"p_a" must be a number from 0 to 1, not 1.4'),
        ({**GOOD, "p_a": float("nan")}, "not NaN"),
        ({**GOOD, "p_a": True}, "not true"),
        ({**GOOD, "p_a": "much"}, 'not "much"'),
        ({**GOOD, "p_a": None}, '"p_a" missing'),
        ({**GOOD, "p_a": 10**400}, "from 0 to 1"),
        ({**GOOD, "prompt": " "}, '"prompt" must be text, not empty'),
        ({**GOOD, "prompt": ["x"]}, '"prompt" must be text, not empty'),
        ({**GOOD, "prompt": "\ud800"}, '"prompt" must be text, not empty'),
        ({**GOOD, "a": 3}, '"a" must name an image'),
        ({**GOOD, "a": "https://example.org/1.png"}, "is no file: save the image"),
        ({**GOOD, "a": "gone.png"}, '"a" is "gone.png": no such file'),
        ({**GOOD, "a": "sub"}, '"a" is "sub": no such file'),
        ({**GOOD, "b": "prompt " * 60}, "no such file"),
        ({**GOOD, "b": "nu\0ll"}, "no such file"),
        ({**GOOD, "b": "sub/../1.png"}, '"a" and "b" are the same file'),
        ({**GOOD, "votes": 0}, '"votes" must be a whole number from 1 on, not 0'),
        ({**GOOD, "votes": True}, "not true"),
        ({**GOOD, "group": 3}, '"group" must be text'),
        ({**GOOD, "Grup": "x"}, 'unknown key "Grup"; "group" may be meant'),
        ({"prompt": "x", "a": "1.png", "b": "2.png", "pa": 1}, 'unknown key "pa"; "p_a" may be meant'),
        ({**GOOD, "p_a": 2, "votes": -1}, 'not 2; "votes" must'),
    ],
)
def test_bad_rows_are_named(folder: Path, row: object, text: str) -> None:
    message = problem(folder, GOOD, "", row)
    assert message.startswith(f"{folder / 'preferences.jsonl'}: 1 of 2 rows cannot be used; correct or remove them:\n")
    assert "\n  line 3: " in message
    assert text in message
    assert len(message.splitlines()) == 2 + ("no such file" in message)


def test_all_bad_rows_are_gathered(folder: Path) -> None:
    lines = problem(folder, *([GOOD, {**GOOD, "p_a": 2}] * 13)).splitlines()
    assert "13 of 26 rows" in lines[0]
    assert [line.split(":")[0] for line in lines[1:11]] == [f"  line {2 * i}" for i in range(1, 11)]
    assert lines[11:] == ["  and 3 more"]


def test_empty_and_missing_files_are_errors(folder: Path) -> None:
    assert "no preferences in this file" in problem(folder)
    assert "no preferences in this file" in problem(folder, "", "  ")
    with pytest.raises(DataError, match="No such file"):
        read_preferences(folder / "gone.jsonl")


def test_splits_of_rows(folder: Path) -> None:
    train, test = {**GOOD, "split": "train"}, {**GOOD, "split": "test", "p_a": 0.0}
    path = write_rows(folder, train, test, train)
    assert [p.p_people for p in read_preferences(path, "test")] == [0.0]
    assert len(read_preferences(path, "train")) == 2
    assert len(read_preferences(path)) == 3
    with pytest.raises(DataError, match='no rows of split "val"; there are test, train; give one with --split'):
        read_preferences(path, "val")
    with pytest.raises(DataError, match='2 of 3 rows have no "split"'):
        read_preferences(write_rows(folder, GOOD, train, GOOD), "train")


def write_table(folder: Path, text: str, name: str = "p.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def test_columns_equal_keys(folder: Path) -> None:
    path = write_table(
        folder,
        'prompt,a,b,p_a,votes,group,notes\r\n"a cube, red",1.png,2.png,0.7,12,g,x\r\n\r\ny,2.png,3.png,1,,,\r\n',
    )
    assert read_preferences(path) == [
        Preference("a cube, red", folder / "1.png", folder / "2.png", 0.7, 12, "g"),
        Preference("y", folder / "2.png", folder / "3.png", 1.0, 1, "y"),
    ]


@pytest.mark.parametrize(("name", "comma"), [("p.csv", ","), ("p.csv", ";"), ("p.TSV", "\t")])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_delimiters(folder: Path, name: str, comma: str, mark: str) -> None:
    rows = [
        ("prompt", "a", "b", "p_a", "split"),
        ("x", "1.png", "2.png", "0.5", "dev"),
        ("y", "1.png", "3.png", "0", "test"),
    ]
    path = write_table(folder, mark + "\n".join(comma.join(row) for row in rows), name)
    (preference,) = load_preferences(str(path), "test")
    assert preference == Preference("y", folder / "1.png", folder / "3.png", 0.0, 1, "y")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no preferences in this file; write rows like"),
        ("prompt,a,b,p_a\n", "no preferences in this file"),
        ("prompt,a,b\nx,1.png,2.png\n", '"p_a" missing: nothing says which image is preferred'),
        ("caption,a,b\nx,1.png,2.png\n", "its columns are caption, a, b"),
        ("a,b,p_a\n1.png,2.png,1\n", '"prompt" missing'),
        ("prompt,a,b,pa\nx,1.png,2.png,1\n", 'unknown key "pa"; "p_a" may be meant'),
        ("x,1.png,2.png,1\ny,1.png,2.png,0\n", "its columns are x, 1.png, 2.png, 1"),
        ("prompt,a,b,p_a,a\n", "a column is named twice"),
        ('prompt,a,b,p_a\n"x,1.png,2.png,1\n', "is a quote not closed?"),
        ("prompt,a,b,p_a\n" + "x" * 200_000, "is a quote not closed?"),
    ],
)
def test_files_that_cannot_be_used(folder: Path, text: str, problem: str) -> None:
    path = write_table(folder, text)
    with pytest.raises(DataError) as caught:
        read_preferences(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert problem in str(caught.value)
    path.write_bytes("prompt,a,b,p_a\nä,1.png,2.png,1".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_preferences(path)


def test_bad_rows_of_a_table_are_gathered(folder: Path) -> None:
    bad = [
        "x,1.png,2.png",
        "x,1.png,gone.png,1",
        "x,1.png,2.png,much",
        "x,1.png,2.png,",
        ",1.png,2.png,1",
        "x,1.png,2.png,2",
    ]
    lines = ["prompt,a,b,p_a", "x,1.png,2.png,1", *bad, *["x,1.png,1.png,1"] * 8]
    with pytest.raises(DataError) as caught:
        read_preferences(write_table(folder, "\n".join(lines)))
    result = str(caught.value).splitlines()
    assert result[0].endswith("p.csv: 14 of 15 rows cannot be used; correct or remove them:")
    assert result[1:7] == [
        '  line 3: "p_a" missing',
        '  line 4: "b" is "gone.png": no such file',
        '  line 5: "p_a" must be a number from 0 to 1, not "much"',
        '  line 6: "p_a" missing',
        '  line 7: "prompt" missing',
        '  line 8: "p_a" must be a number from 0 to 1, not "2"',
    ]
    assert result[-2:] == ["  and 4 more", f"  images are looked for in {folder}; --data-dir names another folder"]


# other names of columns, and other formats

LAYOUTS: dict[str, tuple[dict[str, object], float]] = {
    "chosen, rejected": ({"prompt": "x", "chosen": "1.png", "rejected": "2.png"}, 1.0),
    "rejected first": ({"rejected": "2.png", "chosen": "1.png", "caption": "x"}, 1.0),
    "image_chosen": ({"text": "x", "image_chosen": "1.png", "image_rejected": "2.png"}, 1.0),
    "chosen_image_path": ({"Prompt": "x", "chosen_image_path": "1.png", "rejected_image_path": "2.png"}, 1.0),
    "preferred": ({"prompt": "x", "preferred": "1.png", "rejected": "2.png"}, 1.0),
    "a share": ({"prompt": "x", "chosen": "1.png", "rejected": "2.png", "p_a": 0.75}, 0.75),
    "winner": ({"prompt": "x", "winner": "1.png", "loser": "2.png", "label": 1}, 1.0),
    "list of one": ({"prompt": "x", "chosen": ["1.png"], "rejected": [{"path": "2.png"}]}, 1.0),
    "p_a of others": ({"prompt": "x", "image_0": "1.png", "image_1": "2.png", "p_a": 0.25}, 0.25),
    "index": ({"prompt": "x", "images": ["1.png", "2.png"], "label": 0}, 1.0),
    "index of second": ({"prompt": "x", "images": ["1.png", "2.png"], "preference": 1}, 0.0),
    "index as text": ({"prompt": "x", "image_a": "1.png", "image_b": "2.png", "label": "1"}, 0.0),
    "named from 1": ({"prompt": "x", "image_1": "1.png", "image_2": "2.png", "label": 1}, 1.0),
    "counted from 1": ({"prompt": "x", "images": ["1.png", "2.png"], "label": 2}, 0.0),
    "letter": ({"prompt": "x", "image_a": "1.png", "image_b": "2.png", "winner": "B"}, 0.0),
    "left": ({"prompt": "x", "left_image": "1.png", "right_image": "2.png", "vote_type": "leftvote"}, 1.0),
    "both bad": ({"prompt": "x", "left_image": "1.png", "right_image": "2.png", "vote_type": "bothbad_vote"}, 0.5),
    "tie": ({"prompt": "x", "image1": "1.png", "image2": "2.png", "choice": "tie"}, 0.5),
    "column": ({"prompt": "x", "image_0": "1.png", "image_1": "2.png", "preferred": "image_1"}, 0.0),
    "the file": ({"prompt": "x", "images": ["1.png", "2.png"], "best": "2.png"}, 0.0),
    "its last name": ({"prompt": "x", "images": ["./1.png", "./2.png"], "winner": "2.png"}, 0.0),
    "windows": ({"prompt": "x", "chosen": ".\\1.png", "rejected": "2.png"}, 1.0),
    "pick-a-pic": ({"caption": "x", "jpg_0": "1.png", "jpg_1": "2.png", "label_0": 0.0, "label_1": 1.0}, 0.0),
    "pick-a-pic tie": ({"caption": "x", "jpg_0": "1.png", "jpg_1": "2.png", "label_0": 0.5, "label_1": 0.5}, 0.5),
    "votes": ({"prompt": "x", "a": "1.png", "b": "2.png", "votes_a": 3, "votes_b": 1}, 0.75),
    "hpdv2 pair": ({"prompt": "x", "file_path": ["1.png", "2.png"], "human_preference": [0, 1]}, 0.0),
    "hpdv2 ranking": ({"prompt": "x", "image_path": ["1.png", "2.png"], "rank": [2, 1]}, 0.0),
    "hpdv3": ({"prompt": "x", "path1": "1.png", "path2": "2.png", "choice_dist": [9, 3], "confidence": 0.9}, 0.75),
    "imagereward": ({"id": "7-1", "prompt": "x", "generations": ["1.png", "2.png"], "ranking": [1, 4]}, 1.0),
    "mmrb2": (
        {"prompt_text": "x", "response_a_images": ["1.png"], "response_b_images": ["2.png"], "chosen": "b"},
        0.0,
    ),
    "messages": (
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}],
            "chosen": [{"role": "assistant", "content": [{"type": "image", "image": "1.png"}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "image", "image": "2.png"}]}],
        },
        1.0,
    ),
}  # fmt: skip


def for_first(preference: Preference, first: Path) -> float:
    """The share for one image, wherever it stands."""
    return preference.p_people if preference.a == first else 1 - preference.p_people


@pytest.mark.parametrize("name", LAYOUTS)
def test_columns_of_other_tools(folder: Path, name: str) -> None:
    row, share = LAYOUTS[name]
    (preference,) = read_preferences(write_rows(folder, row))
    assert {preference.a, preference.b} == {folder / "1.png", folder / "2.png"}
    assert (preference.prompt, for_first(preference, folder / "1.png")) == ("x", share)


def write_format(folder: Path, kind: str, rows: list[dict[str, object]]) -> Path:
    path = folder / f"rows.{kind.split()[0]}"
    match kind:
        case "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case "csv" | "tsv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
                writer.writeheader()
                writer.writerows(rows)
        case "json wrapped":
            path.write_text(json.dumps({"version": 1, "data": rows}))
        case "json" | "jsonl array":
            path.write_text(json.dumps(rows, indent=1))
        case _:
            path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize(
    "kind", ["jsonl", "ndjson", "jsonl array", "json", "json lines", "json wrapped", "csv", "tsv", "parquet"]
)
def test_every_format_gives_the_same(folder: Path, kind: str) -> None:
    chosen = [{"prompt": f"p{i}", "chosen": "1.png", "rejected": "2.png", "votes": 3, "seed": i} for i in range(40)]
    preferences = load_preferences(str(write_format(folder, kind, chosen)), "test")  # type: ignore[arg-type]
    assert [(p.prompt, for_first(p, folder / "1.png"), p.votes) for p in preferences] == [
        (f"p{i}", 1.0, 3) for i in range(40)
    ]
    # The columns tell the label, so the sides are drawn.
    assert 8 < sum(p.a == folder / "1.png" for p in preferences) < 32
    own = [{"prompt": "x", "a": "1.png", "b": "2.png", "p_a": 0.75, "split": s} for s in ("dev", "test")]
    assert len(load_preferences(str(write_format(folder, kind, own)), "test")) == 1


def test_lists_in_the_cells_of_a_spreadsheet(folder: Path) -> None:
    row = {"prompt": "[x]", "images": "['1.png', '2.png', '3.png']", "ranking": "[2, 1, 3]"}
    preferences = read_preferences(write_format(folder, "csv", [row]))  # type: ignore[list-item]
    assert [(p.prompt, p.p_people) for p in preferences] == [("[x]", 0.0), ("[x]", 1.0), ("[x]", 1.0)]
    row = {"prompt": "x", "images": '["1.png", "2.png"]', "label": "b"}
    (preference,) = read_preferences(write_format(folder, "csv", [row]))  # type: ignore[list-item]
    assert for_first(preference, folder / "1.png") == 0.0


def test_sides_are_drawn_where_the_order_tells_the_label(folder: Path) -> None:
    first = [{"prompt": "x", "images": ["1.png", "2.png"], "label": "a"}] * 40
    for rows in (first, [{"prompt": "x", "path1": "1.png", "path2": "2.png"}] * 40):
        assert 8 < sum(p.a == folder / "1.png" for p in read_preferences(write_rows(folder, *rows))) < 32
    balanced = [*first, {**first[0], "label": "b"}]
    assert all(p.a == folder / "1.png" for p in read_preferences(write_rows(folder, *balanced)))


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"chosen": "1.png"}, '"rejected" missing'),
        ({"rejected": "2.png", "chosen": None}, '"chosen" missing'),
        ({}, '"chosen" and "rejected" missing'),
        ({"chosen": "1.png", "rejected": "2.png", "p_a": 0.2}, "'p_a' contradicts that chosen is preferred"),
        ({"chosen": "1.png", "rejected": "./1.png"}, '"chosen" and "rejected" are the same file'),
        ({"chosen": "a sunny day", "rejected": "2.png"}, '"chosen" is "a sunny day": no such file'),
        ({"chosen": [{"role": "assistant", "content": "1."}], "rejected": "2.png"}, '"chosen" must name an image'),
        ({"chosen": ["1.png", "3.png"], "rejected": "2.png"}, '"chosen" holds 2 images, not one'),
    ],
)
def test_unclear_rows_of_chosen_and_rejected(folder: Path, row: dict[str, object], text: str) -> None:
    good = {"prompt": "x", "chosen": "1.png", "rejected": "2.png"}
    message = problem(folder, good, {"prompt": "x", **row})
    assert f"1 of 2 rows cannot be used; correct or remove them:\n  line 2: {text}" in message


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({}, '"label" missing'),
        ({"label": "the nicer one"}, "names none of the two images: write a, b or tie"),
        ({"label": 3}, "names none of the two images"),
        ({"label": True}, "names none of the two images"),
        ({"label": "a", "winner": "b"}, "'label' and 'winner' contradict each other"),
        ({"p_a": 0.9, "winner": "b"}, "'p_a' and 'winner' contradict each other"),
        ({"human_preference": [0, 0]}, "prefer none of the two images"),
        ({"human_preference": [1, 1]}, '"human_preference" prefers both images'),
        ({"label_0": 1, "label_1": 1}, '"label_0" prefers both images'),
        ({"votes_0": 0, "votes_1": 0}, "prefer none of the two images"),
        ({"label": "a", "images": ["1.png"]}, '"images" must be a list of two images'),
        ({"label": "a", "images": ["1.png", "gone.png"]}, '"images[1]" is "gone.png": no such file'),
    ],
)
def test_unclear_labels(folder: Path, row: dict[str, object], text: str) -> None:
    images = (
        {"image_0": "1.png", "image_1": "2.png"}
        if any(key[-1] in "01" for key in row)
        else {"images": ["1.png", "2.png"]}
    )
    good = {"prompt": "x", **images, **dict.fromkeys(row, "a"), "label": "a"}
    for key in row:
        good |= {key: {"p_a": 1, "human_preference": [1, 0], "images": ["1.png", "2.png"]}.get(key, good[key])}
        good |= {key: int(key[-1] == "0")} if key[-1] in "01" else {}
    message = problem(folder, good, {"prompt": "x", **images, **row})
    assert "1 of 2 rows cannot be used" in message
    assert text in message


def test_a_label_means_what_its_own_row_says(folder: Path) -> None:
    images = [("1.png", "2.png"), ("2.png", "1.png"), ("1.png", "sub/3.png")]
    rows = [{"prompt": "x", "image_0": a, "image_1": b, "winner": "1.png"} for a, b in images]
    assert [p.p_people for p in read_preferences(write_rows(folder, *rows))] == [1.0, 0.0, 1.0]
    line_3 = problem(folder, {**GOOD, "p_a": 1}, {**GOOD, "p_a": 1.0}, {**GOOD, "p_a": True})
    assert 'line 3: "p_a" must be a number from 0 to 1, not true' in line_3


def test_numbers_must_agree_with_each_other(folder: Path) -> None:
    rows = [{"prompt": "x", "images": ["1.png", "2.png"], "label": i} for i in (0, 1, 2)]
    assert "1 of 3 rows" in problem(folder, *rows)
    with messages() as lines:
        preferences = read_preferences(write_rows(folder, *rows[1:]))
    assert [for_first(p, folder / "1.png") for p in preferences] == [1.0, 0.0]
    assert any('"label" 1 is read as images[0], 2 as images[1]' in line for line in lines)


@pytest.mark.parametrize("last", [0, 2])
def test_a_row_far_below_says_what_numbers_mean(folder: Path, last: int) -> None:
    """The first thousand rows all say 1: who is that?"""
    row = {"prompt": "x", "images": ["1.png", "2.png"], "label": 1}
    with messages() as lines:
        preferences = read_preferences(write_rows(folder, *[row] * 1500, row | {"label": last}))
    assert len(preferences) == 1501
    first = 1.0 if last == 2 else 0.0
    assert [for_first(p, folder / "1.png") for p in preferences] == [first] * 1500 + [1 - first]
    assert [line for line in lines if "is read as" in line] == [
        f'{folder / "preferences.jsonl"}: "label" {last // 2} is read as images[0], {last // 2 + 1} as images[1]'
    ]


def test_columns_may_begin_far_below(folder: Path) -> None:
    rows = [{"prompt": "x", "a": "1.png"}] * 1500 + [GOOD]
    assert "1500 of 1501 rows cannot be used" in problem(folder, *rows)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("sides", ["12", "01", ["_left", "_right"]])
@pytest.mark.parametrize("labels", [[0, 1, 2], [-1, 1], [-1, 0, 1]])
def test_numbers_of_more_than_two_sides_are_refused(folder: Path, kind: str, sides: str, labels: list[int]) -> None:
    """A number that is neither side may be a tie or the other side, whatever the columns are named."""
    images = {f"image{side}": f"{i}.png" for i, side in enumerate(sides, 1)}
    path = write_format(folder, kind, [{"prompt": "x", **images, "winner": label} for label in labels])  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"\"winner\" is '?(2|-1)'?, .*: write a, b or tie in all rows"):
        read_preferences(path)


def test_rows_that_nobody_labelled_are_left_out(folder: Path) -> None:
    rows = [{"caption": "x", "jpg_0": "1.png", "jpg_1": "2.png", "label_0": i, "label_1": 1 - i} for i in (0, 1)]
    preferences = read_preferences(write_rows(folder, rows[0] | {"has_label": True}, rows[1] | {"has_label": False}))
    assert [for_first(p, folder / "1.png") for p in preferences] == [0.0]
    assert "nobody labelled any of its rows (has_label is false)" in problem(folder, rows[0] | {"has_label": False})


VALUES: list[Any] = [
    "x", "1.png", "2.png", " ", None, True, 0, 2, 0.5, -1, 10**400, float("nan"), [], ["1.png", "2.png"], [1, 2],
    [None, None], {}, {"path": "1.png"}, [{"role": "user", "content": "x"}], [{"rank": 3}], [{"content": None}], "tie",
    "\ud800", [["1.png"]], {"content": [{"type": "image", "image": "1.png"}]},
]  # fmt: skip


def test_rows_of_anything_are_read_or_refused(folder: Path) -> None:
    """Whatever stands in a cell, only our own error is raised."""
    draw = random.Random(0)
    rows = [row for row, _ in LAYOUTS.values()]
    names = sorted({name for row in rows for name in row} | {"split", "group", "votes", "raw_annotations", "prompt_id"})
    refused = 0
    for _ in range(1000):
        row = draw.choice(rows)
        changed = [row | {draw.choice(names): draw.choice(VALUES) for _ in range(3)} for _ in range(2)]
        try:
            read_preferences(write_rows(folder, row, *changed), draw.choice([None, "train"]))
        except DataError:
            refused += 1
    assert 0 < refused < 1000


# images inside parquet


def png(seed: int) -> bytes:
    content = io.BytesIO()
    picture(seed, (24, 16)).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize("form", ["bytes", "struct", "path", "list"])
def test_images_in_a_table_are_read_from_it(folder: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(1, (24, 16)).save(folder / "1.png")

    def cell(seed: int) -> object:
        content = png(seed)
        return {
            "bytes": content,
            "struct": {"bytes": content, "path": "x.png"},
            "list": [{"bytes": content, "path": None}],
        }.get(form, {"bytes": None, "path": "1.png"} if seed == 1 else {"bytes": content, "path": "gone.png"})

    rows = [{"prompt": "x", "chosen": cell(1), "rejected": cell(2), "seed": 3, "notes": b"x"} for _ in range(5)]
    path = folder / "images.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    preferences = load_preferences(str(path), "test")
    assert len(preferences) == 5
    for preference in preferences:
        better, worse = placed(preference.a, preference.b, preference.p_people == 1)
        for image, seed in ((better, 1), (worse, 2)):
            assert np.array_equal(np.asarray(load_image(image)), np.asarray(picture(seed, (24, 16))))
            if not isinstance(image, Path):
                assert named_image(image_name(image)) == image
    check_preferences("x", preferences, ImageCache(10_000))


def test_an_image_that_a_table_lacks_is_named(folder: Path) -> None:
    rows = [{"prompt": "x", "chosen": {"bytes": png(1), "path": None}, "rejected": {"bytes": None, "path": None}}]
    rows += [{"prompt": "x", "chosen": {"bytes": png(1), "path": None}, "rejected": {"bytes": png(2), "path": None}}]
    path = folder / "images.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(DataError, match='row 1: "rejected" missing'):
        read_preferences(path)


@pytest.mark.parametrize("form", ["bytes", "fixed size", "struct", "file"])
def test_a_list_of_pairs_of_images_in_a_table(folder: Path, form: str) -> None:
    path = folder / "images.parquet"
    picture(1, (24, 16)).save(folder / "1.png")
    first_cell = {"bytes": None, "path": "1.png"} if form == "file" else {"bytes": png(1), "path": None}
    cells = [first_cell, {"bytes": png(2), "path": None}] if form in ("struct", "file") else [png(1), png(2)]
    kind = pa.list_(pa.binary(), 2) if form == "fixed size" else None
    images = pa.array([cells, cells], kind)
    pq.write_table(pa.table({"prompt": ["x", "x"], "images": images, "label": [0, 1]}), path)
    first, second = read_preferences(path)
    assert (first.p_people, second.p_people) == (1.0, 0.0)
    for image, seed in ((first.a, 1), (second.a, 1), (second.b, 2)):
        assert np.array_equal(np.asarray(load_image(image)), np.asarray(picture(seed, (24, 16))))


# ImageReward's own list and tables, with and without images

RANKINGS = [
    {"id": "1-1", "prompt": "x", "generations": ["part/1.png", "part/2.png", "part/3.png"], "ranking": [2, 1, 2]},
    {"id": "1-2", "prompt": "x", "generations": ["part/4.png", "part/5.png"], "ranking": [1, 2]},
]


def test_a_list_of_rankings_needs_no_images_for_scores(tmp_path: Path) -> None:
    path = tmp_path / "test.json"
    path.write_text(json.dumps(RANKINGS))
    preferences = load_preferences(str(path), "test", needs_images=False)
    assert [(Path(str(p.a)).name, Path(str(p.b)).name, p.p_people, p.group) for p in preferences] == [
        ("1.png", "2.png", 0.0, "1-1"),
        ("1.png", "3.png", 0.5, "1-1"),
        ("2.png", "3.png", 1.0, "1-1"),
        ("4.png", "5.png", 1.0, "1-2"),
    ]
    (tmp_path / "s.csv").write_text("image,score\n" + "\n".join(f"part/{i}.png,{-i}" for i in range(1, 6)))
    output = json.loads(
        CliRunner().invoke(main, ["eval", "--data", str(path), "--scores", str(tmp_path / "s.csv"), "--json"]).stdout
    )
    assert (output["pairs"], output["accuracy"]) == (3, pytest.approx(2 / 3))
    done = CliRunner().invoke(main, ["eval", "--data", str(path), "--model", "demo"])
    assert done.exit_code == 1
    assert "2 of 2 rows cannot be used" in done.stderr
    assert 'row 1: "generations[0]" is "part/1.png": no such file; and 2 more' in done.stderr
    assert f"images are looked for in {tmp_path}; --data-dir names another folder" in done.stderr


def test_images_are_found_below_another_folder(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    path = tmp_path / "lists" / "test.json"
    path.write_text(json.dumps(RANKINGS))
    images = tmp_path / "images" / "test"
    images.mkdir(parents=True)
    for i in (1, 2):
        (images / f"{i}.png").write_bytes(png(i))
    write_zip(images / "test_2.zip", {f"test_2/{i}.png": png(i) for i in (3, 4, 5)})
    preferences = load_preferences(str(path), "test", data_dir=tmp_path / "images")
    check_preferences("x", preferences, ImageCache(10_000))
    assert [str(p.b).partition("test/")[2] for p in preferences] == [
        "2.png", "test_2.zip/test_2/3.png", "test_2.zip/test_2/3.png", "test_2.zip/test_2/5.png",
    ]  # fmt: skip
    (images / "test_2").mkdir()
    (images / "test_2" / "5.png").write_bytes(png(5))  # unpacked, the zip still beside it
    assert load_preferences(str(path), "test", data_dir=tmp_path / "images")[-1].b == images / "test_2" / "5.png"
    (images / "more").mkdir()
    (images / "more" / "1.png").write_bytes(png(7))
    with pytest.raises(DataError, match="no such file, but 2 of its last name"):
        load_preferences(str(path), "test", data_dir=tmp_path / "images")


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_table_of_one_image_a_row_is_rankings(folder: Path, kind: str) -> None:
    rows: list[dict[str, object]] = [
        {"image_path": f"{i}.png", "prompt_id": "1-1", "prompt": "x", "rank": rank, "overall_rating": 7}
        for i, rank in ((1, 2), (2, 1), (3, 2))
    ]
    with messages() as lines:
        preferences = read_preferences(write_format(folder, kind, rows))
    assert not lines, "a rank is no number of an image"
    assert [(p.a, p.b, p.p_people, p.group) for p in preferences] == [
        (folder / "1.png", folder / "2.png", 0.0, "1-1"),
        (folder / "1.png", folder / "3.png", 0.5, "1-1"),
        (folder / "2.png", folder / "3.png", 1.0, "1-1"),
    ]
    rows[1]["prompt"] = "y"
    with pytest.raises(DataError, match='"prompt_id" 1-1 has another prompt in an earlier row'):
        read_preferences(write_format(folder, kind, rows))


def test_rankings_by_several_people(folder: Path) -> None:
    raters = [{"rank": [1, 2]}, {"rank": [2, 1]}, {"rank": [1, 2]}, {"rank": [1, 1]}]
    row = {"prompt": "x", "image_path": ["1.png", "2.png"], "rank": [2, 1], "raw_annotations": raters}
    (preference,) = read_preferences(write_rows(folder, row))
    assert (preference.p_people, preference.votes, preference.label) == (0.625, 4, "b")
    assert "equally long" in problem(folder, row, {**row, "rank": [1]})


def test_public_lists_are_read_without_images(tmp_path: Path) -> None:
    """`eval --scores` on a public set needs only its list."""
    for name in ("imagereward-list", "hpdv2", "hpdv3"):
        make_layout(name, tmp_path / name)
        for path in (tmp_path / name).iterdir():
            if path.suffix != ".json":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        data = name.removesuffix("-list")
        assert load_preferences(data, "test", data_dir=tmp_path / name, needs_images=False)
        with pytest.raises(ConfigError):
            load_preferences(data, "test", data_dir=tmp_path / name)
