import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlxpref.data import load, rows
from mlxpref.data.image_cache import ImageCache
from mlxpref.data.jsonl import EXAMPLE, read_jsonl
from mlxpref.data.load import ALL_ROWS, DEMO_COUNTS, check_preferences, load_preferences
from mlxpref.data.rows import Row, read_json_rows, with_images
from mlxpref.demo.preferences import HELD_OUT, SPLITS, demo_preferences, prompt_text
from mlxpref.errors import ConfigError, DataError
from mlxpref.preferences import Preference
from tests.messages import messages

GOOD = {"prompt": "a red cube", "a": "1.png", "b": "2.png", "p_a": 0.7}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("1.png", "2.png", "sub/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()  # the reader looks for images, it does not open them
    return tmp_path


def write_rows(folder: Path, *rows: object) -> Path:
    """A file of these rows; text goes in as it is."""
    path = folder / "preferences.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), "utf-8")
    return path


def problem(folder: Path, *rows: object) -> str:
    with pytest.raises(DataError) as caught:
        read_jsonl(write_rows(folder, *rows))
    return str(caught.value)


def test_rows_become_preferences(folder: Path) -> None:
    full = {**GOOD, "a": "sub/3.png", "p_a": 1, "votes": 12, "group": "g", "id": 7, "meta": {"x": 1}}
    first, second = read_jsonl(write_rows(folder, GOOD, full))
    assert (first.prompt, first.a, first.b, first.p_people) == ("a red cube", folder / "1.png", folder / "2.png", 0.7)
    assert (first.votes, first.group) == (1, "a red cube")
    assert (second.a, second.p_people, second.votes, second.group) == (folder / "sub" / "3.png", 1.0, 12, "g")
    assert isinstance(second.p_people, float)


def test_absolute_paths_and_empty_options_are_fine(folder: Path) -> None:
    row = {**GOOD, "a": str(folder / "sub" / "3.png"), "votes": None, "group": None, "split": None}
    (preference,) = read_jsonl(write_rows(folder, row))
    assert preference.a == folder / "sub" / "3.png"
    assert (preference.votes, preference.group) == (1, "a red cube")


def test_encodings_and_line_ends(folder: Path) -> None:
    path = folder / "preferences.jsonl"
    text = "\r\n".join(["", json.dumps({**GOOD, "prompt": "ein Würfel\u2028rot"}, ensure_ascii=False), "  ", ""])
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes(text.encode(encoding))
        (preference,) = read_jsonl(path)
        assert preference.prompt == "ein Würfel\u2028rot"
    path.write_bytes(text.encode("latin-1", "replace"))
    with pytest.raises(DataError, match=r"1 of 1 rows cannot be used.*\n  line 2: not UTF-8"):
        read_jsonl(path)


def test_names_are_found_in_either_unicode_form(folder: Path) -> None:
    (folder / unicodedata.normalize("NFD", "café.png")).touch()
    (preference,) = read_jsonl(write_rows(folder, {**GOOD, "a": unicodedata.normalize("NFC", "café.png")}))
    assert isinstance(preference.a, Path)
    assert preference.a.exists()


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("{not json", "not valid JSON (Expecting property name enclosed in double quotes, column 2)"),
        ("[" * 100_000, "not valid JSON"),
        ([1, 2], f"not a JSON object like {EXAMPLE}"),
        ({"prompt": "x", "a": "1.png"}, '"b" and "p_a" missing'),
        ({**GOOD, "p_a": 1.4}, '"p_a" must be a number from 0 to 1, not 1.4'),
        ({**GOOD, "p_a": float("nan")}, "not NaN"),
        ({**GOOD, "p_a": True}, "not true"),
        ({**GOOD, "p_a": "0.5"}, 'not "0.5"'),
        ({**GOOD, "p_a": None}, "not null"),
        ({**GOOD, "p_a": 10**400}, "from 0 to 1"),
        ({**GOOD, "prompt": " "}, '"prompt" must be text, not empty'),
        ({**GOOD, "prompt": ["x"]}, '"prompt" must be text, not empty'),
        ({**GOOD, "prompt": "\ud800"}, '"prompt" must be text, not empty'),
        ({**GOOD, "a": 3}, '"a" must be text, not empty'),
        ({**GOOD, "a": "gone.png"}, '"a" is "gone.png": no such file'),
        ({**GOOD, "a": "sub"}, '"a" is "sub": no such file'),
        ({**GOOD, "b": "prompt " * 60}, "no such file"),
        ({**GOOD, "b": "nu\0ll"}, "no such file"),
        ({**GOOD, "b": "sub/../1.png"}, '"a" and "b" are the same file'),
        ({**GOOD, "votes": 0}, '"votes" must be a whole number from 1 on, not 0'),
        ({**GOOD, "votes": True}, "not true"),
        ({**GOOD, "group": 3}, '"group" must be text'),
        ({**GOOD, "Votes": 3}, 'unknown key "Votes"; "votes" may be meant'),
        ({"prompt": "x", "a": "1.png", "b": "2.png", "pa": 1}, 'unknown key "pa"; "p_a" may be meant'),
        ({**GOOD, "p_a": 2, "votes": -1}, 'not 2; "votes" must'),
    ],
)
def test_bad_rows_are_named(folder: Path, row: object, text: str) -> None:
    message = problem(folder, GOOD, "", row)
    assert message.startswith(f"{folder / 'preferences.jsonl'}: 1 of 2 rows cannot be used; correct or remove them:\n")
    assert "\n  line 3: " in message
    assert text in message
    assert len(message.splitlines()) == 2


def test_all_bad_rows_are_gathered(folder: Path) -> None:
    lines = problem(folder, *([GOOD, {**GOOD, "p_a": 2}] * 13)).splitlines()
    assert "13 of 26 rows" in lines[0]
    assert [line.split(":")[0] for line in lines[1:11]] == [f"  line {2 * i}" for i in range(1, 11)]
    assert lines[11:] == ["  and 3 more"]


def test_empty_and_missing_files_are_errors(folder: Path) -> None:
    assert "no preferences in this file" in problem(folder)
    assert "no preferences in this file" in problem(folder, "", "  ")
    with pytest.raises(DataError, match="No such file"):
        read_jsonl(folder / "gone.jsonl")


def test_splits_of_rows(folder: Path) -> None:
    train, test = {**GOOD, "split": "train"}, {**GOOD, "split": "test", "p_a": 0.0}
    path = write_rows(folder, train, test, train)
    assert [p.p_people for p in read_jsonl(path, "test")] == [0.0]
    assert len(read_jsonl(path, "train")) == 2
    assert len(read_jsonl(path)) == 3
    with pytest.raises(DataError, match='no rows of split "val"; there are test, train'):
        read_jsonl(path, "val")
    with pytest.raises(DataError, match='2 of 3 rows have no "split"'):
        read_jsonl(write_rows(folder, GOOD, train, GOOD), "train")


def test_data_without_splits_are_all_rows(folder: Path) -> None:
    """The default split of a command means all rows there; a split that was asked for must exist."""
    path = str(write_rows(folder, GOOD, GOOD))
    preferences = load_preferences(path, "test")
    assert (len(preferences), preferences.split) == (2, ALL_ROWS)
    with pytest.raises(DataError, match=r'no split "val", as it has no splits; leave out --split'):
        load_preferences(path, "val", needs_split=True)
    write_rows(folder, {**GOOD, "split": "test"}, {**GOOD, "split": "other"})
    assert load_preferences(path, "test", needs_split=True).split == "test"
    with pytest.raises(DataError, match='no rows of split "train"; there are other, test'):
        load_preferences(path, "train")
    assert load_preferences("demo", "heldout", 2).split == "heldout"


def test_a_file_is_loaded_by_its_name(folder: Path) -> None:
    path = write_rows(folder, *({**GOOD, "p_a": i / 50} for i in range(50)))
    everything = load_preferences(str(path), "test", None, 0)
    assert [p.p_people for p in everything] == [i / 50 for i in range(50)]
    sample = load_preferences(str(path), "test", 10, 0)
    assert [p.p_people for p in sample] == sorted(p.p_people for p in sample)
    assert len({p.p_people for p in sample}) == 10
    assert sample == load_preferences(str(path), "test", 10, 0)
    assert sample != load_preferences(str(path), "test", 10, 1)
    assert {p.p_people for p in sample} <= {p.p_people for p in load_preferences(str(path), "test", 20, 0)}
    assert len(load_preferences(str(path), "test", 1000, 0)) == 50


def test_the_demo_is_loaded_by_its_name() -> None:
    sample, rendered = load_preferences("demo", "heldout", 3, 5), demo_preferences("heldout", 3, 5)
    assert [(p.prompt, p.p_people) for p in sample] == [(p.prompt, p.p_people) for p in rendered]
    for one, other in zip(sample, rendered, strict=True):
        assert isinstance(one.a, Image.Image)
        assert isinstance(other.a, Image.Image)
        assert np.array_equal(np.asarray(one.a), np.asarray(other.a))
    assert {p.prompt for p in sample} <= {prompt_text(*look) for look in HELD_OUT}
    assert set(DEMO_COUNTS) == set(SPLITS)


def test_the_demo_has_a_default_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEMO_COUNTS, "test", 4)
    assert len(load_preferences("demo", "test")) == 4


@pytest.mark.parametrize(
    ("data", "split", "limit", "problem"),
    [
        ("demo", "validation", None, "split 'validation': the demo has train, test, heldout"),
        ("demo", "test", 0, "limit 0"),
        ("hpdv2", "test", None, "its files are not here; download them with `mlxpref data hpdv2 --split test`"),
        ("imagereward", "dev", None, "split 'dev': imagereward has train, validation, test"),
        ("dmeo", "test", None, "unknown --data dmeo: known are demo, imagereward, hpdv2, pickapic, pickapic_v1, hpdv3"),
        ("gone.jsonl", "test", None, "--data gone.jsonl: no such file"),
        ("some/folder", "test", None, "--data some/folder: no such file or folder"),
        ("long" * 100, "test", None, "unknown --data long"),
    ],
)
def test_unknown_names_are_errors(
    data: str, split: str, limit: int | None, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # not what the user has there
    with pytest.raises(ConfigError) as caught:
        load_preferences(data, split, limit, 0)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(ConfigError, match=r"a\.txt: not a \.jsonl, \.csv or \.tsv file"):
        load_preferences(str(tmp_path / "a.txt"), "test")


def test_a_long_list_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"n": i, "text": "é\u2028]" * (i % 50), "more": [{}, [i]]} for i in range(60)]
    path = tmp_path / "list.json"
    for text in (
        json.dumps(values),
        json.dumps(values, ensure_ascii=False, indent=1),
        "\n".join(map(json.dumps, values)),
    ):
        path.write_text(text, "utf-8")
        for chunk in (1, 7, 1000):
            monkeypatch.setattr(rows, "READ_CHARACTERS", chunk)
            assert list(read_json_rows(path)) == values


def test_endless_row_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "READ_CHARACTERS", 1000)
    monkeypatch.setattr(rows, "ROW_LIMIT", 5000)
    path = tmp_path / "list.json"
    path.write_text('[{"a": 1}, {"a": "' + "x" * 100_000 + '"}]')
    with pytest.raises(DataError, match=r"list\.json: not valid JSON at row 2 \(Unterminated string"):
        list(read_json_rows(path))


def test_few_missing_images_are_left_out(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(201)]
    for name in names[:-1]:
        (tmp_path / name).touch()
    listed = [Row("p", name, names[0], 1.0) for name in names[1:]]
    with messages() as lines:
        preferences = with_images("hpdv2", "test", listed, tmp_path, tmp_path / "a.tar.gz")
    assert [p.a for p in preferences] == [tmp_path / name for name in names[1:-1]]
    assert "1 of 201 images cannot be used and are left out:\n  200.png: is not in" in "\n".join(lines)
    with pytest.raises(DataError, match="3 of 4 images cannot be used"):
        with_images(
            "hpdv2", "test", [Row("p", "1.png", "x", 1.0), Row("p", "y", "z", 1.0)], tmp_path, tmp_path / "a.tar.gz"
        )


@pytest.fixture
def many(tmp_path: Path) -> list[Preference]:
    """60 pairs of 120 images."""
    for i in range(120):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    return [Preference("p", tmp_path / f"{i}.png", tmp_path / f"{i + 1}.png", 1.0) for i in range(0, 120, 2)]


def test_sample_of_images_is_decoded(many: list[Preference], monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[object] = []
    images = ImageCache(1000)
    monkeypatch.setattr(images, "check", decoded.append)
    check_preferences("x", many, images)
    assert len(decoded) == 120
    decoded.clear()
    monkeypatch.setattr(load, "DECODED_IMAGES", 40)
    check_preferences("x", many, images)
    assert len(decoded) == len(set(decoded)) == 40
    for i in range(0, 24, 2):
        image = many[i].a
        assert isinstance(image, Path)
        image.unlink()
    with pytest.raises(DataError) as caught:
        check_preferences("x", many, ImageCache(1000))
    lines = str(caught.value).splitlines()
    assert lines[0] == "x: 12 of 120 images cannot be read; correct them or remove their rows:"
    assert len(lines) == 12
    assert lines[-1] == "  and 2 more"
