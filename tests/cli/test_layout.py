"""Text and tables keep to the width of a terminal, and lose nothing without one."""

import pytest
from rich.cells import cell_len

from mlxpref.cli.layout import shortened, table_text, wrapped

COLUMNS = (">rank", "image", ">strength", "tied with")
ROWS = [["1", "a-long-name-of-a-picture-0001.png", "+1.00", "2 to 9"], ["2", "b.png", "-1.00", "1"]]


def test_a_pipe_has_all_of_a_table() -> None:
    text, dropped = table_text(COLUMNS, ROWS, None, "image", ("tied with",))
    assert text.splitlines() == [
        "rank  image                              strength  tied with",
        "   1  a-long-name-of-a-picture-0001.png     +1.00  2 to 9",
        "   2  b.png                                 -1.00  1",
    ]
    assert dropped == []


@pytest.mark.parametrize(
    ("width", "expected", "missing"),
    [
        (61, "   1  a-long-name-of-a-picture-0001.png     +1.00  2 to 9", []),
        (50, "   1  a-long-name-…ture-0001.png     +1.00  2 to 9", []),
        (40, "   1  a-long-name…ure-0001.png     +1.00", ["tied with"]),
        (30, "   1  a-long-name…ure-0001.png", ["tied with", "strength"]),
    ],
)
def test_a_terminal_cuts_names_then_drops_columns(width: int, expected: str, missing: list[str]) -> None:
    text, dropped = table_text(COLUMNS, ROWS, width, "image", ("tied with", "strength"))
    assert text.splitlines()[-2] == expected
    assert dropped == missing
    assert max(map(cell_len, text.splitlines())) <= width


def test_the_widest_column_is_wrapped_between_words() -> None:
    text, _ = table_text(("state", "found"), [["ok", "one thing and another thing"]], 27)
    assert [line.strip() for line in text.splitlines()] == ["state  found", "ok     one thing and", "another thing"]


def test_names_of_columns_take_several_lines() -> None:
    text, dropped = table_text(("name", ">both orders"), [["a judge of pictures", "1"]], 30, "name", ("both orders",))
    words = [line.split() for line in text.splitlines()]
    assert words == [["both"], ["name", "orders"], ["a", "judge", "of", "pictures", "1"]]
    assert dropped == []


def test_short_names_stay_different() -> None:
    assert shortened(["abcdefghij", "abc"], 7) == ["abc…hij", "abc"]
    for names in (["x1-aaaaaaaaaaaaaa", "x2-aaaaaaaaaaaaaa"], ["aaaaaaaaaaaaaa-1.png", "aaaaaaaaaaaaaa-2.png"]):
        cut = shortened(names, 9)
        assert cut[0] != cut[1]
        assert all(cell_len(each) <= 9 for each in cut)
    assert cell_len(shortened(["你好你好你好.png"], 9)[0]) <= 9


def test_text_is_wrapped_between_words() -> None:
    path = "/a/long/path/that/stays/whole/to/be/copied.png"
    assert wrapped(f"  see {path} for 60.0 % of it", 20).splitlines() == ["  see", f"  {path}", "  for 60.0 % of it"]
    assert wrapped("it agrees in 60.0 %", 18) == "it agrees in\n60.0 %"
    assert wrapped("", 10) == ""
    assert max(map(cell_len, wrapped("你好 " * 20, 15).splitlines())) <= 15
