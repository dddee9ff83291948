from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlxpref.data.image_cache import ImageCache
from mlxpref.data.prompt_syntax import plain_prompt
from mlxpref.data.prompts import find_groups


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red cube, <lora:detail_xl:0.8>", "a red cube"),
        ("<lora:a:1> <hypernet:b> a red cube, <lyco:c:0.5:0.5>, on grass", "a red cube, on grass"),
        ("a (red:1.2) cube", "a red cube"),
        ("a ((red)) cube, (((shiny)))", "a red cube, shiny"),
        ("((a:1.1) red cube:1.3) on [[grass]]", "a red cube on grass"),
        ("(a red cube, (on grass:1.2), 4k:.9)", "a red cube, on grass, 4k"),
        ("a red cube BREAK on grass", "a red cube, on grass"),
        ("a red cube,\nBREAK\non grass", "a red cube, on grass"),
        ("a [blue:red:0.5] cube", "a red cube"),
        ("a [red:12] cube [shiny::0.3]", "a red cube shiny"),
        (r"a (red \(dark\):1.2) cube", "a red (dark) cube"),
        (r"rem \(re:zero\)", "rem (re:zero)"),
        ("a {{{red}}} cube, 1.3::shiny::", "a red cube, shiny"),
        ("a (red)1.3 cube, (shiny)++", "a red cube, shiny"),
        # plain language
        ("a red cube (close up), ratio (16:9) at 10:30 [sic], {red|blue}", None),
        ("John (3:16), C++ and a <b>bold</b> AND loud cube: 2 < 3", None),
        ("see (the note: below), f(x)-1, a::b", None),
        ("a red cube\n on  grass ,", None),
    ],
)
def test_marks_for_generators(prompt: str, expected: str | None) -> None:
    assert plain_prompt(prompt) == (prompt if expected is None else expected)


@given(st.text("ab (:[]{})<>,|.1\\ BREAK", max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text(prompt: str) -> None:
    assert plain_prompt(plain_prompt(prompt)).replace(" ", "") is not None
    assert len(plain_prompt(prompt)) <= 2 * len(prompt) + 2


def test_it_is_said_once(tmp_path: Path) -> None:
    for number, prompt in enumerate(("a (red:1.2) cube", "a red cube <lora:b:1>", "a red cube", "a red cube")):
        Image.new("RGB", (20 + number, 20), "red").save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(prompt)
    groups, skipped, notes = find_groups([tmp_path], False, None, "sidecar", ImageCache(1000))
    assert [(group.prompt, len(group.images)) for group in groups] == [("a red cube", 4)]
    assert not skipped
    assert len(notes) == 1
    assert "2 of 4 prompts" in notes[0]
    assert "“a (red:1.2) cube” as “a red cube”" in notes[0]
