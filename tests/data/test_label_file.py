"""The file of a labelling: nothing that was kept is ever lost, whatever ends the process or meets the file."""

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxpref.data.label_file import LabelFile, LabelRecord, active_records, record_of
from mlxpref.data.load import load_preferences
from mlxpref.errors import ConfigError, DataError
from tests.conftest import picture
from tests.messages import messages


def record(
    number: int, answer: str = "a", undoes: int | None = None, a: str = "1.png", b: str = "2.png"
) -> LabelRecord:
    return LabelRecord(number, "a hat", a, b, answer, "a", "train", 1.5, "2026-01-01T00:00:00Z", undoes)  # type: ignore[arg-type]


def write_records(path: Path, *records: LabelRecord) -> bytes:
    with LabelFile(path) as file:
        for each in records:
            file.append(each)
    return path.read_bytes()


texts = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=20)


@given(texts, texts, texts, st.sampled_from(["a", "b", "tie", "skip", "undo"]), st.floats(0, 1e6) | st.none())
def test_a_line_holds_its_record(prompt: str, a: str, b: str, answer: str, seconds: float | None) -> None:
    undoes = 1 if answer == "undo" else None
    one = LabelRecord(2, prompt, min(a, b), max(a, b) + "x", answer, "b", "test", seconds, "now", undoes)  # type: ignore[arg-type]
    line = one.line()
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert record_of(json.loads(line)) == one
    assert json.loads(line)["p_a"] == {"a": 1, "b": 0, "tie": 0.5}.get(answer)


def test_lines_are_only_added(tmp_path: Path) -> None:
    path, before = tmp_path / "p.jsonl", b""
    for number in range(1, 5):
        after = write_records(path, record(number))
        assert after.startswith(before)
        assert after.count(b"\n") == number
        before = after


def test_cut_line_is_removed(tmp_path: Path) -> None:
    whole = write_records(tmp_path / "whole.jsonl", record(1), record(2, "b"), record(3, "tie"))
    last = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    for end in range(last, len(whole) + 1):
        path = tmp_path / f"{end}.jsonl"
        path.write_bytes(whole[:end])
        with messages() as warnings, LabelFile(path) as file:
            count = 3 if end >= len(whole) - 1 else 2  # all but the line feed is a whole record
            assert [each.number for each in file.records] == list(range(1, count + 1))
            file.append(record(9))
        assert bool(warnings) == (last < end < len(whole) - 1)
        assert path.read_bytes() == whole[: last if count == 2 else len(whole)] + record(9).line()


def test_zeros_after_a_crash_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    whole = write_records(path, record(1))
    path.write_bytes(whole + b"\0" * 50)
    with LabelFile(path) as file:
        assert len(file.records) == 1
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "a hat", "a": "1.png", "b": "2.png", "p_a": 1}\n',
        b"my diary",
        b"my diary\n",
        b"\x89PNG\r\n\x1a\n\0\0",
        b'{"number": 1, "answer": "a"}\n',
        b'{"number": 7, "title": "my only note"}',
        record(1).line().replace(b'"p_a": 1.0', b'"p_a": 0.0'),
        record(1, a="2.png", b="1.png").line(),
        b"[" * 100_000 + b"\n",
    ],
)
def test_other_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"p\.jsonl: holds other lines; give another --output:\n  "):
        LabelFile(path)
    assert path.read_bytes() == content


def test_lines_of_one_kind_have_one_reason(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"a": 1}\n' * 9 + b"{\n")
    with pytest.raises(DataError) as error:
        LabelFile(path)
    assert str(error.value).split("\n  ")[1:] == [
        "line 1, line 2, line 3, and 6 more: not a line that `mlxpref label` wrote", "line 10: not valid JSON",
    ]  # fmt: skip


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with LabelFile(tmp_path / "p.jsonl"), pytest.raises(ConfigError, match="another `mlxpref label` writes there"):
        LabelFile(tmp_path / "p.jsonl")
    LabelFile(tmp_path / "p.jsonl").close()


def test_full_disk_costs_one_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "p.jsonl"
    with LabelFile(path) as file:
        file.append(record(1))
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match="this answer cannot be kept"):
            file.append(record(2))
        monkeypatch.undo()
        assert path.read_bytes() == record(1).line()
        file.append(record(2, "b"))
    assert path.read_bytes() == record(1).line() + record(2, "b").line()


def test_half_an_answer_is_removed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / "p.jsonl"
    with LabelFile(path) as file:
        file.append(record(1))
        monkeypatch.setattr(os, "fsync", full)
        monkeypatch.setattr(os, "ftruncate", full)
        with pytest.raises(DataError, match="this answer cannot be kept"):
            file.append(record(2, "tie"))
        monkeypatch.undo()
        file.append(record(2, "b"))
    assert path.read_bytes() == record(1).line() + record(2, "b").line()


def test_fields_of_other_programs(tmp_path: Path) -> None:
    for i in (1, 2):
        picture(i).save(tmp_path / f"{i}.png")
    row = {"prompt": "x", "a": "1.png", "b": "2.png", "p_a": 0.7, "answer": "1", "number": 3}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    (preference,) = load_preferences(str(tmp_path / "p.jsonl"), "train")
    assert preference.p_people == 0.7


def test_removed_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with LabelFile(path) as file:
        file.append(record(1))
        path.rename(tmp_path / "elsewhere.jsonl")
        with pytest.raises(DataError, match="was moved or removed"):
            file.append(record(2))
        (tmp_path / "elsewhere.jsonl").rename(path)
        file.append(record(2))
        assert [each.number for each in file.records] == [1, 2]


def test_undo_of_a_repeated_number() -> None:
    first = [record(1), record(2, "b"), record(3, "undo", 2)]
    assert active_records(first) == [first[0]]
    again = [*first, record(4, "undo", 1)]
    assert active_records(again) == []
    assert active_records([*first, *again]) == [first[0]]  # two files, one behind the other


def test_data_set_without_undone_answers(tmp_path: Path) -> None:
    for i in range(1, 5):
        picture(i).save(tmp_path / f"{i}.png")
    path = tmp_path / "p.jsonl"
    write_records(
        path,
        record(1, "a"),
        record(2, "b", a="2.png", b="3.png"),
        record(3, "skip", a="3.png", b="4.png"),
        record(4, "b"),  # asked again, answered otherwise
        record(5, "b", a="2.png", b="4.png"),
        record(6, "undo", 5, a="2.png", b="4.png"),
        record(7, "tie", a="1.png", b="3.png"),
        record(8, "a"),
    )
    preferences = load_preferences(str(path), "train")
    assert [(p.a.name, p.b.name, p.votes) for p in preferences] == [  # type: ignore[union-attr]
        ("1.png", "2.png", 1),
        ("2.png", "3.png", 1),
        ("1.png", "3.png", 1),
    ]
    assert [p.p_people for p in preferences] == pytest.approx([2 / 3, 0, 0.5])
    (tmp_path / "2.png").unlink()
    with messages() as lines:
        (left,) = load_preferences(str(path), "train")
    assert left.p_people == 0.5
    assert "2 of 3 pairs are left out, as a picture is gone, such as 2.png" in lines[0]
    path.write_bytes(
        path.read_bytes()
        + b'{"number": 9, "prompt": "x", "a": "1.png", "b": "3.png", "p_a": 1, "shown_first": "a", "answer": 3}\n'
    )
    with pytest.raises(DataError, match="line 9: not a line that `mlxpref label` wrote"):
        load_preferences(str(path), "train")


def test_nothing_but_skips_is_no_data(tmp_path: Path) -> None:
    write_records(tmp_path / "p.jsonl", record(1, "skip"))
    with pytest.raises(DataError, match="no preferences in this file"):
        load_preferences(str(tmp_path / "p.jsonl"), "train")
