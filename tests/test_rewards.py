"""Rewards as design.md defines them, and what their gradients push."""

import mlx.core as mx
import numpy as np
import pytest

from mlxpref.rewards import brier_reward, hard_reward, score_reward, soft_reward


def test_soft_is_the_expected_agreement_and_is_not_normalised() -> None:
    assert soft_reward(0.6, 0.3, 1.0) == pytest.approx(0.6)
    assert soft_reward(0.6, 0.3, 0.0) == pytest.approx(0.3)
    assert soft_reward(0.6, 0.3, 0.8, 0.2) == pytest.approx(0.2 * 0.9 + 0.6 * 0.8 + 0.3 * 0.2)
    assert soft_reward(0.06, 0.03, 1.0, 0.2) < soft_reward(0.6, 0.3, 1.0, 0.2)


def test_brier_is_best_at_the_share_of_people_and_loses_with_mass() -> None:
    shares = np.linspace(0.01, 0.99, 99)
    for y in (0.0, 0.3, 0.7, 1.0):
        best = shares[np.argmax(brier_reward(shares, 1 - shares, np.float64(y), 0.2))]
        assert best == pytest.approx(np.clip(y, 0.01, 0.99), abs=0.011)
    assert brier_reward(0.9, 0.1, 1.0, 0.2) == pytest.approx(0.2 + 1 - 0.01)
    assert brier_reward(0.45, 0.05, 1.0, 0.2) == pytest.approx(0.5 * (0.2 + 1 - 0.01))


def test_hard_and_score_reward_the_majority_and_the_form() -> None:
    y = np.array([1.0, 0.9, 0.2, 0.2, 0.8, 0.8])
    formed = np.array([True, False, True, True, True, True])
    assert hard_reward(np.array([1, 1, 2, 1, 0, 2]), y, formed, 0.2).tolist() == [1.2, 1.0, 1.2, 0.2, 0.0, 0.2]
    margin = np.array([3.0, 1.0, -2.0, 0.0, np.nan, -1.0])
    assert score_reward(margin, y, formed, 0.2).tolist() == [1.2, 1.0, 1.2, 0.2, 0.0, 0.2]


@pytest.mark.parametrize("reward", [soft_reward, brier_reward])
@pytest.mark.parametrize("y", [0.0, 0.5, 1.0])
def test_mass_outside_the_labels_is_pushed_down(reward: object, y: float) -> None:
    def earned(logits: mx.array) -> mx.array:
        p = mx.softmax(logits)
        return reward(p[0], p[1], y, 0.2)  # type: ignore[operator, no-any-return]

    gradient = mx.grad(earned)(mx.array([0.2, -0.1, 0.5, 0.0]))
    assert (gradient[2:] < 0).all().item()
    assert gradient[:2].max().item() > 0
