"""Profiles as files: what is wrong with one is said, which one a judge has, and what makes it another."""

import tomllib
from pathlib import Path

import pytest

from mlxpref.checkpoints.files import PROFILE_FILE
from mlxpref.engine.find_profile import find_profile
from mlxpref.engine.profile import (
    CRITERION_SLOT,
    PROMPT_SLOT,
    built_in_profiles,
    own_profile,
    profile_named,
    read_profile,
)
from mlxpref.errors import ConfigError

NAMES = ("mlxpref", "plain", "rationalrewards", "unifiedreward-flex", "unifiedreward-pair", "unifiedreward-think")
PAIR = """
kind = "pair"
question = "{image}{image}[{prompt}]"
lead = "Answer: "
first = "A"
second = "B"
"""
POINT = """
kind = "point"
question = "{image}[{prompt}]"
lead = "Score: "
levels = ["1", "2"]
aspects = ["all"]
"""


def write(folder: Path, text: str, name: str = "own.toml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def with_key(text: str, line: str) -> str:
    """A profile with a line in place of that of the same key, or behind all."""
    key = line.partition("=")[0].strip()
    kept = [each for each in text.splitlines() if each.partition("=")[0].strip() != key]
    return "\n".join([*kept, line])


def test_built_in_profiles_are_known_by_name() -> None:
    assert tuple(built_in_profiles()) == NAMES
    for name, profile in built_in_profiles().items():
        assert profile_named(name) is profile
        assert profile.name == name
    assert own_profile() is built_in_profiles()["mlxpref"]
    assert [name for name, each in built_in_profiles().items() if each.is_point] == ["rationalrewards"]


def test_judges_of_others_are_asked_in_our_words_and_say_so() -> None:
    for name in NAMES[2:]:
        profile = built_in_profiles()[name]
        assert "own words" in profile.note
        assert str(profile.path) in profile.place
        assert "copy" in profile.place
        assert "MLXPREF'S OWN" in " ".join(profile.text().replace("#", " ").split())
    assert not any(built_in_profiles()[name].note for name in NAMES[:2])


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        profile_named("unifiedreward")
    assert str(error.value) == (
        f"unknown profile 'unifiedreward': known are {', '.join(NAMES)}, or give a TOML file of your own"
    )


def test_a_file_in_the_folder_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, PAIR, "words")
    assert profile_named("words").name == "words"
    assert profile_named(str(write(tmp_path / "a-judge", PAIR, PROFILE_FILE))).name == "a-judge"
    assert profile_named(str(write(tmp_path, f'name = "mine"{PAIR}'))).name == "mine"


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("kind = ", ["not readable as TOML: "]),
        ("\ud800", ["not readable as TOML: "]),
        ("", ["kind is missing", "lead is missing", "question is missing"]),
        (
            PAIR + 'sytem = "s"\nfisrt = "1"',
            ["unknown key 'fisrt'", "unknown key 'sytem'", "known are kind, question, "],
        ),
        (with_key(PAIR, 'kind = "triple"'), ["kind is 'triple', not pair or point"]),
        (PAIR + 'counts = "middle"', ["counts is 'middle', not first or last"]),
        (PAIR + 'thinks = "yes"', ["thinks must be true or false, not 'yes'"]),
        (PAIR + "thinks = 1", ["thinks must be true or false, not 1"]),
        (PAIR + "max_tokens = -1", ["max_tokens must be a whole number from 0, not -1"]),
        (PAIR + "max_tokens = true", ["max_tokens must be a whole number from 0, not True"]),
        (PAIR + "max_tokens = 1.5", ["max_tokens must be a whole number from 0, not 1.5"]),
        (PAIR + "system = 3", ["system must be a text, not 3"]),
        (PAIR + 'chat_template = "off"', ["chat_template must be a table, not 'off'"]),
        (with_key(PAIR, "first = 1"), ["first must be a text, or a list of texts"]),
        (with_key(PAIR, 'first = ["A", ""]'), ["first must be a text, or a list of texts"]),
        (with_key(POINT, "levels = [1, 2]"), ["levels must be a text, or a list of texts"]),
        (
            PAIR + 'max_tokens = "9"\nend = 1\nnow = 2',
            ["end must be", "max_tokens must be", "unknown key 'now'", "known are"],
        ),
        # labels
        (with_key(PAIR, "first = []"), ["a pair judge needs the labels first and second"]),
        (with_key(POINT, "levels = []"), ["a point judge needs levels, such as 1, 2, 3, 4"]),
        (with_key(POINT, 'levels = ["good", "bad"]'), ["levels must be numbers"]),
        (with_key(POINT, "aspects = []"), ["a point judge needs aspects"]),
        (with_key(PAIR, 'second = "A"'), ["a label stands for two answers"]),
        (with_key(PAIR, 'second = ["B", "B"]'), ["a label stands for two answers"]),
        (with_key(POINT, 'levels = ["1", "1"]'), ["a label stands for two answers"]),
        (PAIR + 'tie = "A"', ["a label stands for two answers"]),
        (PAIR + 'levels = ["1"]', ["levels and aspects are for a point judge"]),
        (POINT + 'first = "1"', ["first, second, tie and scores_question are for a pair judge"]),
        (
            POINT + 'scores_question = "{image}{prompt}"',
            ["first, second, tie and scores_question are for a pair judge"],
        ),
        # places
        (
            with_key(POINT, 'question = "{image}{image}{prompt}"'),
            ["question has 2 places {image}, a point judge needs 1"],
        ),
        (with_key(PAIR, 'question = "{image}{prompt}"'), ["question has 1 places {image}, a pair judge needs 2"]),
        (with_key(PAIR, 'question = "{image}{image}"'), ["question has no place {prompt}"]),
        (
            PAIR + 'scores_question = "{image}"',
            ["scores_question has 1 places {image}", "scores_question has no place {prompt}"],
        ),
        (PAIR + 'criterion = "sharp"', ["{criterion} in question and criterion go together"]),
        (
            with_key(PAIR, 'question = "{criterion}{image}{image}\\n{prompt}"'),
            ["{criterion} in question and criterion go together"],
        ),
        (
            with_key(PAIR, 'question = "{criterion}{image}{image}{prompt}"') + '\ncriterion = "sharp"',
            ["question has an {image} in the line of {prompt}, which is left out where there is no prompt"],
        ),
        (PAIR + f'system = "{PROMPT_SLOT}"', ["it holds a character that stands for the prompt here"]),
        # the way to an answer
        (with_key(PAIR, 'lead = " "'), ["lead is empty"]),
        (
            PAIR + 'closing = "So"',
            ["closing does not end with lead, so no answer would follow it", "at_once does not end"],
        ),
        (PAIR + 'at_once = "So"', ["at_once does not end with lead, so no answer would follow it"]),
        (PAIR + 'think_begin = "<t>"', ["think_begin needs think_end"]),
        (PAIR + 'think_end = "</t>"\nclosing = "Answer: "', ["closing does not hold think_end"]),
        (PAIR + 'thinks = false\nthink_end = "</t>"', ["think_begin and think_end are for a judge that thinks"]),
        (PAIR + "thinks = false\nmax_tokens = 9", ["max_tokens is for a judge that thinks"]),
        (PAIR + 'tie_opening = "Both"', ["tie_opening is for a judge that does not think"]),
        (
            PAIR + 'thinks = false\ntie_opening = "Both"\ntie = "0"',
            ["a tie is a label (tie) or begins the answer (tie_opening), not both"],
        ),
        (with_key(PAIR, 'lead = ""') + '\ncriterion = "x"', ["criterion go together", "lead is empty"]),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path: Path, text: str, problems: list[str]) -> None:
    path = tmp_path / "own.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError) as error:
        profile_named(str(path))
    message = str(error.value)
    assert message.startswith(f"profile {path}: ")
    assert "\n" not in message
    for problem in problems:
        assert problem in message
    if "not readable" not in message:
        assert message.count("; ") == len(problems) - 1, "nothing else is wrong"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"profile .*nowhere\.toml: no such file.*mlxpref, plain"):
        profile_named(str(tmp_path / "nowhere.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ConfigError, match=r"profile .*folder\.toml: not readable"):
        profile_named(str(tmp_path / "folder.toml"))


def test_what_is_left_out_has_defaults(tmp_path: Path) -> None:
    plain = read_profile(write(tmp_path, PAIR))
    assert (plain.closing, plain.at_once, plain.thinks, plain.counts) == ("Answer: ", "Answer: ", True, "first")
    tagged = read_profile(write(tmp_path, PAIR + 'think_begin = "<t>"\nthink_end = "</t>"'))
    assert (tagged.closing, tagged.at_once) == ("</t>Answer: ", "<t></t>Answer: ")
    assert (plain.first, plain.labels, plain.images) == (("A",), (("A",), ("B",)), 2)


def test_a_judge_of_single_images_is_led_from_aspect_to_aspect(tmp_path: Path) -> None:
    text = (
        with_key(POINT, 'aspects = ["light", "form"]')
        + '\nclosing = "; {aspect} Score: "\nat_once = "{aspect} Score: "'
    )
    profile = read_profile(write(tmp_path, text))
    assert profile.closings() == ["; light Score: ", "; form Score: "]
    assert profile.closings(at_once=True) == ["light Score: ", "; form Score: "]
    assert own_profile().closings(at_once=True) == ["<think></think><answer>"]


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_in_a_folder_is_the_same_profile(tmp_path: Path, name: str) -> None:
    """Also under its own name, and copied once more."""
    profile, folder = built_in_profiles()[name], tmp_path / "model"
    for _ in range(2):
        write(folder, profile.text(), PROFILE_FILE)
        profile = find_profile("", (folder,), ())
        assert profile == built_in_profiles()[name]
        assert profile.version() == built_in_profiles()[name].version()
        folder = tmp_path / "again"
    assert profile.text().count("\nname = ") + profile.text().startswith("name = ") == 1


def test_messages_keep_texts_and_images_in_their_order(tmp_path: Path) -> None:
    profile = read_profile(write(tmp_path, with_key(PAIR, 'question = "One {image} two{image}[{prompt}] {other}"')))
    texts = {"type": "text", "text": "One "}, {"type": "text", "text": " two"}
    image, last = {"type": "image"}, {"type": "text", "text": f"[{PROMPT_SLOT}] {{other}}"}
    assert profile.messages() == [{"role": "user", "content": [texts[0], image, texts[1], image, last]}]
    (system, user) = built_in_profiles()["rationalrewards"].messages()
    assert system["role"] == "system"
    assert [each["type"] for each in user["content"]] == ["text", "image", "text"]
    for name in NAMES[3:]:
        (message,) = built_in_profiles()[name].messages()
        assert [each["type"] for each in message["content"]] == ["image", "image", "text"]


def test_lines_of_a_prompt_are_left_out_where_there_is_none() -> None:
    whole, without = (
        own_profile().messages(own_criterion=True, has_prompt=each)[1]["content"] for each in (True, False)
    )
    assert whole[0]["text"] == f"Criterion: {CRITERION_SLOT}\nPrompt: {PROMPT_SLOT}\nImage 1: "
    assert without[0]["text"] == f"Criterion: {CRITERION_SLOT}\nImage 1: "
    assert whole[1:] == without[1:]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_profile_has_no_place_for_is_an_error(name: str) -> None:
    profile = built_in_profiles()[name]
    profile.check_criterion("")
    profile.check_form("choice")
    if name == "mlxpref":
        profile.check_criterion("sharp eyes")
        profile.check_form("scores")
        return
    with pytest.raises(ConfigError, match=f"--criterion: the profile {name} has no place for it.*--profile mlxpref"):
        profile.check_criterion("sharp eyes")
    with pytest.raises(ConfigError, match=f"the profile {name} has no question for two scores"):
        profile.check_form("scores")


@pytest.mark.parametrize("name", NAMES)
def test_files_hold_only_what_is_read(name: str) -> None:
    """Every key of a built-in file is in the profile as it stands there."""
    profile = built_in_profiles()[name]
    for key, value in tomllib.loads(profile.text()).items():
        found = getattr(profile, key)
        assert found == (tuple(value) if isinstance(value, list) else (value,) if isinstance(found, tuple) else value)
