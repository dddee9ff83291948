"""Rows of JSON files in pieces, and files that are no JSON."""

import json
from pathlib import Path

import pytest

from mlxpref.data import tables
from mlxpref.data.tables import read_json_rows
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
    with pytest.raises(DataError, match=r"list\.json: not valid JSON at row 2 \(Unterminated string"):
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
