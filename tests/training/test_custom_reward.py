"""Rewards of one's own: what they are given, old functions included."""

from pathlib import Path

import pytest

from mlxpref.preferences import Comparison, Preference
from mlxpref.training.custom_reward import load_reward
from mlxpref.training.sampler import TrainingComparison
from mlxpref.verdict import Verdict
from tests.conftest import picture

VERDICTS = [Verdict("<think>one", 0.6, 0.2, tokens=3), Verdict("<think>other", tokens=7)]


def rewards_of(program: str, folder: Path) -> list[float]:
    (folder / "own.py").write_text(program)
    a, b = picture(1, (84, 56)), picture(2, (56, 84))
    lesson = TrainingComparison(Preference("a hat", a, b, 0.8, votes=5), Comparison(b, a, "a hat"), 0.2, (3, 1))
    return load_reward(f"{folder}/own.py:own")(lesson, VERDICTS)


def test_a_function_sees_the_comparison_as_it_was_shown(tmp_path: Path) -> None:
    program = (
        "def own(texts, p_first, prompt, images, y):\n"
        "    assert texts == ['<think>one', '<think>other'] and prompt == 'a hat' and y == 0.2\n"
        "    assert abs(p_first[0] - 0.75) < 1e-9 and p_first[1] is None\n"
        "    assert [image.size for image in images] == [(56, 84), (84, 56)]\n"
        "    return [1, 2]\n"
    )
    assert rewards_of(program, tmp_path) == [1.0, 2.0]


@pytest.mark.parametrize("ending", ["tokens, preference", "**rest"])
def test_what_came_later_is_given_to_who_takes_it(tmp_path: Path, ending: str) -> None:
    taken = "tokens, preference = rest['tokens'], rest['preference']" if ending == "**rest" else "pass"
    program = (
        f"def own(texts, p_first, prompt, images, y, {ending}):\n"
        f"    {taken}\n"
        "    assert preference.p_a == 0.8 and preference.votes == 5 and preference.a.size == (84, 56)\n"
        "    return tokens\n"
    )
    assert rewards_of(program, tmp_path) == [3.0, 7.0]


def test_one_of_the_later_ones_alone_is_enough(tmp_path: Path) -> None:
    assert rewards_of("def own(texts, p_first, prompt, images, y, tokens=None):\n    return tokens\n", tmp_path) == [
        3,
        7,
    ]


def test_a_callable_object_is_a_reward_too(tmp_path: Path) -> None:
    program = "class Own:\n    def __call__(self, texts, tokens, **rest):\n        return tokens\nown = Own()\n"
    assert rewards_of(program, tmp_path) == [3, 7]
