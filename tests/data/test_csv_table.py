"""One's own preferences in a spreadsheet."""

from pathlib import Path

import pytest

from mlxpref.data.csv_table import read_table
from mlxpref.data.load import load_preferences
from mlxpref.errors import DataError
from mlxpref.preferences import Preference


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("1.png", "2.png", "3.png"):
        (tmp_path / name).touch()
    return tmp_path


def write_table(folder: Path, text: str, name: str = "p.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def test_columns_equal_keys(folder: Path) -> None:
    path = write_table(
        folder,
        'prompt,a,b,p_a,votes,group,notes\r\n"a cube, red",1.png,2.png,0.7,12,g,x\r\n\r\ny,2.png,3.png,1,,,\r\n',
    )
    assert read_table(path) == [
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
        ("", "no preferences in this file; write a first line prompt,a,b,p_a"),
        ("prompt,a,b,p_a\n", "no preferences in this file"),
        ("prompt,a,b\nx,1.png,2.png\n", 'its first line names the columns prompt, a, b: "p_a" missing'),
        ("prompt,a,b,pa\nx,1.png,2.png,1\n", 'unknown key "pa"; "p_a" may be meant'),
        ("x,1.png,2.png,1\n", '"prompt" and "a" and "b" and "p_a" missing'),
        ("prompt,a,b,p_a,a\n", "a column is named twice"),
        ('prompt,a,b,p_a\n"x,1.png,2.png,1\n', "is a quote not closed?"),
        ("prompt,a,b,p_a\n" + "x" * 200_000, "is a quote not closed?"),
    ],
)
def test_files_that_cannot_be_used(folder: Path, text: str, problem: str) -> None:
    path = write_table(folder, text)
    with pytest.raises(DataError) as caught:
        read_table(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert problem in str(caught.value)
    path.write_bytes("prompt,a,b,p_a\nä,1.png,2.png,1".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_table(path)


def test_bad_rows_are_gathered(folder: Path) -> None:
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
        read_table(write_table(folder, "\n".join(lines)))
    result = str(caught.value).splitlines()
    assert result[0].endswith("p.csv: 14 of 15 rows cannot be used; correct or remove them:")
    assert result[1:7] == [
        "  line 3: 3 cells under 4 columns",
        '  line 4: "b" is "gone.png": no such file',
        "  line 5: \"p_a\" must be a number, not 'much'",
        '  line 6: "p_a" missing',
        '  line 7: "prompt" missing',
        '  line 8: "p_a" must be a number from 0 to 1, not 2.0',
    ]
    assert result[-1] == "  and 4 more"
