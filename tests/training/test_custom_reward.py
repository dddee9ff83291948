"""Custom rewards: what their functions are given, what is refused, and what they leave behind."""

import os
import sys
from pathlib import Path

import pytest

from mlxpref.errors import MlxprefError
from mlxpref.preferences import Preference
from mlxpref.training.custom_reward import load_reward, load_rewards
from mlxpref.training.sampler import TrainingComparison
from mlxpref.verdict import Verdict
from tests.conftest import picture

VERDICTS = [Verdict("<think>one", 0.6, 0.2, tokens=3), Verdict("<think>other", tokens=7)]


def rewards_of(program: str, folder: Path) -> list[float]:
    (folder / "own.py").write_text(program)
    a, b = picture(1, (84, 56)), picture(2, (56, 84))
    comparison = TrainingComparison(b, a, "a hat", Preference("a hat", a, b, 0.8, votes=5), 0.2, (3, 1))
    return load_reward(f"{folder}/own.py:own")(comparison, VERDICTS)


def test_function_sees_the_shown_order(tmp_path: Path) -> None:
    program = (
        "def own(texts, p_first, prompt, images, y):\n"
        "    assert texts == ['<think>one', '<think>other'] and prompt == 'a hat' and y == 0.2\n"
        "    assert abs(p_first[0] - 0.75) < 1e-9 and p_first[1] is None\n"
        "    assert [image.size for image in images] == [(56, 84), (84, 56)]\n"
        "    return [1, 2]\n"
    )
    assert rewards_of(program, tmp_path) == [1.0, 2.0]


@pytest.mark.parametrize(
    "program",
    [
        "def own(texts, p_first, prompt, images, y, tokens, preference):\n"
        "    assert preference.p_people == 0.8 and preference.votes == 5 and preference.a.size == (84, 56)\n"
        "    return tokens\n",
        "def own(**given):\n    assert given['preference'].p_people == 0.8\n    return given['tokens']\n",
        "def own(texts, p_first, prompt, images, y, tokens=None):\n    return tokens\n",
        "class Own:\n    def __call__(self, texts, tokens, **rest):\n        return tokens\nown = Own()\n",
    ],
)
def test_optional_arguments(program: str, tmp_path: Path) -> None:
    assert rewards_of(program, tmp_path) == [3.0, 7.0]


def test_nothing_is_left_in_the_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a file prints goes to stderr, as stdout is for results; no module of it stays."""
    modules, arguments, folder = set(sys.modules), list(sys.argv), Path.cwd()
    program = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nprint('loaded')\n"
        "@dataclass\nclass Two:\n    values: list[float]\n"
        "def own(texts, **rest):\n    print('called')\n    return Two([1, 2]).values\n"
    )
    assert rewards_of(program, tmp_path) == [1.0, 2.0]
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "loaded\ncalled\n")
    assert {name for name in set(sys.modules) - modules if "own" in name or "reward" in name} == set()
    assert (sys.argv, Path(os.getcwd())) == (arguments, folder)  # noqa: PTH109


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("def own(**_):\n    x = 1\n    return [1 / 0]\n", "own.py:3: the reward raised ZeroDivisionError"),
        ("def own(**_):\n    return [1]\n", "must return 2 finite numbers"),
        ("def own(texts, **_):\n    return [float('nan') for _ in texts]\n", "must return 2 finite numbers"),
        ("def own(**_):\n    return None\n", "must return 2 numbers"),
        ("def other(**_):\n    return None\n", "has no function own"),
        ("def own(:\n", "own.py:1: cannot be run: SyntaxError"),
        ("x = 1\nprint(1 / 0)\n", "own.py:2: cannot be run: ZeroDivisionError"),
    ],
)
def test_a_failure_names_its_line(program: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(MlxprefError) as caught:
        rewards_of(program, tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [("nice", "'nice': neither soft, brier, hard or score nor a file"), ("none.py:own", "no such file none.py")],
)
def test_an_unknown_reward_is_refused(name: str, words: str) -> None:
    with pytest.raises(MlxprefError, match=words):
        load_rewards(name)
