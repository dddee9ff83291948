"""Rows of JSON files in pieces, files that are no JSON, and columns of tables."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlxpref.data import tables
from mlxpref.data.tables import read_json_rows, read_table
from mlxpref.errors import DataError

ROW = '{"prompt": "p"}'


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
            monkeypatch.setattr(tables, "READ_CHARACTERS", chunk)
            assert list(read_json_rows(path)) == values


def test_endless_row_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "READ_CHARACTERS", 1000)
    monkeypatch.setattr(tables, "ROW_LIMIT", 5000)
    path = tmp_path / "list.json"
    path.write_text('[{"a": 1}, {"a": "' + "x" * 100_000 + '"}]')
    with pytest.raises(DataError, match=r"list\.json: row 2 does not end within"):
        list(read_json_rows(path))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[", "it ends early"),
        ('[{"prompt": "p"', "row 1"),
        (f"[{ROW}, ", "row 2 (it ends early)"),
        (f"[{ROW}, oops]", "row 2"),
        ("[" * 100_000, "it ends early"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("\xff", "not UTF-8"),
    ],
)
def test_lists_that_are_no_json(text: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        list(read_json_rows(path))
    assert error in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_errors_name_the_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{name}: cannot be opened"):
        list(read_table(tmp_path / name))
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=rf"{name}: is a folder"):
        list(read_table(tmp_path / name))


def test_csv_with_a_mark_and_quoted_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfPrompt;a;b;p_a\r\n"two\r\nlines";1.png;2.png;0,5\r\n\r\nx;3.png;4.png;1\r\n')
    expected = [("two\r\nlines", "1.png"), ("x", "3.png")]
    assert [
        (row["prompt"], row["a"]) for _, row in read_table(path, lambda _: True) if isinstance(row, dict)
    ] == expected
    path.write_bytes(b"prompt,a\nx,\xff\n")
    with pytest.raises(DataError, match=r"a\.csv: not UTF-8"):
        list(read_table(path))


def test_columns_of_a_table_that_differ_in_case_are_one(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["x", "y"], "P_A": [0.9, 0.2], "p_a": [None, 0.7]}), path)
    assert [*read_table(path)] == [(1, {"prompt": "x", "p_a": 0.9}), (2, {"prompt": "y", "p_a": 0.7})]
