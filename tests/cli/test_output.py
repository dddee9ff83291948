"""Nothing that is printed can do anything to a terminal, and nothing is lost on the way."""

import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxpref.cli import output as console
from mlxpref.cli.output import note, print_json, print_table, print_text, show_on_stderr
from mlxpref.log import track
from mlxpref.text import plain

NASTY = "[red]a[/red] \x1b[31mb\x1b[0m \x9b1mc \u202etxt :smile: d\r\ne\tf\x00 \u2066g bad\udcff.png"
SHOWN = "[red]a[/red] [31mb[0m 1mc txt :smile: d  e f g bad\\xff.png"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_markup_in_text_stays(capsys: pytest.CaptureFixture[str]) -> None:
    assert plain(NASTY) == SHOWN
    assert plain("öäü 你好 🎨 “x”") == "öäü 你好 🎨 “x”"
    print_text(NASTY)
    note(NASTY)
    print_table(("name", ">[b]count[/b]"), [(NASTY, 1), ("b", 22)], title=NASTY)
    captured = capsys.readouterr()
    assert captured.err == SHOWN + "\n"
    lines = captured.out.splitlines()
    assert lines[0] == SHOWN
    assert lines[1] == SHOWN
    assert lines[2].split() == ["name", "[b]count[/b]"]
    assert lines[3].startswith(SHOWN)
    assert lines[3].endswith(" 1")
    assert lines[4].endswith(" 22")
    assert len(lines) == 5


def test_json_escapes_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"prompt": NASTY, "words": "你好 🎨", "n": None, "x": [1.5, True]}
    print_json(value)
    out = capsys.readouterr().out
    assert json.loads(out) == value
    assert "你好 🎨" in out
    out.encode("utf-8")
    assert all(character.isprintable() or character == "\n" for character in out)


def test_json_is_written_as_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Iterators are lists, in the form of all JSON; the first items are out before the last are made."""
    raw = io.StringIO()
    monkeypatch.setattr(sys, "stdout", raw)
    seen = []

    def items(count: int) -> Iterator[dict[str, object]]:
        for number in range(count):
            seen.append(len(raw.getvalue()))
            yield {"number": number, "name": NASTY, "none": iter(()), "few": iter("ab")}

    print_json({"none": items(0), "many": [{"of": items(9000)}], "plain": [[], {}]})
    lists = [{"number": number, "name": NASTY, "none": [], "few": ["a", "b"]} for number in range(9000)]
    value = {"none": [], "many": [{"of": lists}], "plain": [[], {}]}
    assert json.loads(raw.getvalue()) == value
    streamed = raw.getvalue()
    raw.seek(0)
    raw.truncate()
    print_json(value)
    assert raw.getvalue() == streamed
    assert seen[0] == 0
    assert seen[-1] > 0.9 * len(streamed)


def test_json_of_what_it_has_no_form_for(capsys: pytest.CaptureFixture[str]) -> None:
    for value, name in (({1}, "set"), (Path("a"), "PosixPath"), (range(2), "range")):
        with pytest.raises(TypeError, match=f"^Object of type {name} is not JSON serializable$"):
            print_json([value])
    assert capsys.readouterr().out == ""


def test_an_error_of_an_item_is_not_one_of_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written before it, and what comes after it, is there."""

    def items() -> Iterator[int]:
        yield from range(20_000)
        raise OSError("an image went away")

    with (tmp_path / "out").open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        with pytest.raises(OSError, match="went away"):
            print_json(items())
        print_text("later")
    assert (tmp_path / "out").read_text().endswith("later\n")
    assert (tmp_path / "out").read_text().startswith("[\n  0,\n  1,")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_of_stdout(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    print_json({"name": "é 你 🎨 \udcff"})
    assert json.loads(raw.getvalue().decode(encoding)) == {"name": "é 你 🎨 \udcff"}
    print_text("é 你 🎨 \udcff")
    print_table(("“name”",), [("é 你 🎨",)])
    assert raw.getvalue().decode(encoding)


def test_tables_keep_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    print_table(("name", ">n"), [("x" * 100, 1)])
    text = re.sub(r"\x1b\[[0-9;]*m", "", sys.stdout.getvalue())  # type: ignore[attr-defined]
    assert text.count("x") == 100
    assert max(map(len, text.splitlines())) <= 40


def test_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0.0)
    with show_on_stderr():
        assert list(track(iter("abc"), 3, "judging")) == ["a", "b", "c"]
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0].startswith("judging: 1 of 3, about ")
    assert lines[0].endswith(" s left")
    assert lines[-1].startswith("judging: 3 of 3 in ")
    assert len(lines) == 3


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with show_on_stderr():
        assert list(track(iter("abc"), 3, "judging [x]")) == ["a", "b", "c"]
    output = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "judging" in output
    assert "3/3" in output
    assert capsys.readouterr().out == ""
