"""Rewards as design.md defines them, and what their gradients push."""

import mlx.core as mx
import numpy as np
import pytest

from mlxpref.errors import ConfigError
from mlxpref.training.rewards import (
    RewardMix,
    RewardPart,
    agreement_reward,
    brier_reward,
    length_reward,
    soft_reward,
)


def test_soft() -> None:
    assert soft_reward(0.9, 2 / 3, 1.0, 0.0) == pytest.approx(0.6)
    assert soft_reward(0.9, 2 / 3, 0.0, 0.0) == pytest.approx(0.3)
    assert soft_reward(0.9, 2 / 3, 0.8, 0.2) == pytest.approx(0.2 * 0.9 + 0.6 * 0.8 + 0.3 * 0.2)
    assert soft_reward(0.09, 2 / 3, 1.0, 0.2) < soft_reward(0.9, 2 / 3, 1.0, 0.2)


def test_brier_is_a_proper_score() -> None:
    shares = np.linspace(0.01, 0.99, 99)
    for y in (0.0, 0.3, 0.7, 1.0):
        best = shares[np.argmax(brier_reward(1.0, shares, y, 0.2))]
        assert best == pytest.approx(np.clip(y, 0.01, 0.99), abs=0.011)
    assert brier_reward(1.0, 0.9, 1.0, 0.2) == pytest.approx(0.2 + 1 - 0.01)
    assert brier_reward(0.5, 0.9, 1.0, 0.2) == pytest.approx(0.5 * (0.2 + 1 - 0.01))


def test_agreement_with_the_majority_and_the_form() -> None:
    y = np.array([1.0, 0.9, 0.2, 0.2, 0.8, 0.8])
    formed = np.array([True, False, True, True, True, True])
    lean = np.array([3.0, 0.5, -0.5, 0.0, np.nan, -1.0])
    assert agreement_reward(lean, y, 0.2 * formed).tolist() == [1.2, 1.0, 1.2, 0.2, 0.0, 0.2]


@pytest.mark.parametrize("reward", [soft_reward, brier_reward])
@pytest.mark.parametrize("y", [0.0, 0.5, 1.0])
def test_mass_outside_the_labels(reward: object, y: float) -> None:
    def earned(logits: mx.array) -> mx.array:
        p = mx.softmax(logits)
        return reward(p[0] + p[1], p[0] / (p[0] + p[1]), y, 0.2)  # type: ignore[operator, no-any-return]

    gradient = mx.grad(earned)(mx.array([0.2, -0.1, 0.5, 0.0]))
    assert (gradient[2:] < 0).all().item()
    assert gradient[:2].max().item() > 0


def test_a_mix_is_parsed() -> None:
    assert RewardMix.parse("soft").parts == (RewardPart("soft", 1.0),)
    mix = RewardMix.parse("soft=0.5, brier=2 ,my files/own.py:kind=1e-1,a=b/own.py:f=3")
    assert [(part.name, part.weight) for part in mix.parts] == [
        ("soft", 0.5),
        ("brier", 2.0),
        ("my files/own.py:kind", 0.1),
        ("a=b/own.py:f", 3.0),
    ]
    assert mix.custom == ("my files/own.py:kind", "a=b/own.py:f")
    assert mix.exact
    assert not RewardMix.parse("hard,own.py:f").exact
    assert not RewardMix.parse("own.py:f").exact


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "'' is not a name or name=weight"),
        ("soft,", "'' is not a name or name=weight"),
        ("soft=", "'soft=' is not a name or name=weight"),
        ("soft=much", "'soft=much' is not a name"),
        ("soft=0", "with a weight above 0"),
        ("soft=-1", "with a weight above 0"),
        ("soft=nan", "with a weight above 0"),
        ("soft=inf", "with a weight above 0"),
        ("soft,soft=2", "named twice"),
        ("soft,hard", "take one of the three kinds"),
        ("hard,score", "take one of the three kinds"),
        ("brier=1,own.py:f,score", "take one of the three kinds"),
    ],
)
def test_an_impossible_mix_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        RewardMix.parse(text)


def test_the_exact_part_of_a_mix() -> None:
    mix = RewardMix.parse("soft=0.5,own.py:f=7,brier=2")
    arguments = [np.array([0.9, 0.7]), np.array([0.6, 0.1]), np.array([1.0, 0.3]), np.array([0.2, 0.0])]
    expected = 0.5 * soft_reward(*arguments) + 2 * brier_reward(*arguments)
    assert mix.integrated(*arguments) == pytest.approx(expected)
    assert (RewardMix.parse("brier").integrated(*arguments) == brier_reward(*arguments)).all()


@pytest.mark.parametrize(
    ("reward", "read"),
    [
        ("soft", "soft"),
        ("brier=2,own.py:f", "brier=2"),
        ("soft=0.5,brier", "soft=0.5,brier"),
        ("hard=3,own.py:f", "soft=3"),
        ("score", None),
        ("own.py:f", None),
    ],
)
def test_what_the_answer_read_at_once_earns(reward: str, read: str | None) -> None:
    """A reward that writes answers asks for the same side; what is no question of two labels teaches no reading."""
    assert RewardMix.parse(reward).reading == (RewardMix.parse(read) if read else None)


def test_length() -> None:
    tokens = np.array([0, 63, 64, 112, 256, 264])
    assert length_reward(tokens, 64, 256).tolist() == [0, 0, 0, -0.25, -1, -1]
