"""Which completions ran out of tokens."""

from typing import Any

import pytest

from mlxpref.engine.completion import Rollout, Sampling
from mlxpref.training.rollouts import is_truncated
from tests.conftest import read_verdict, tiny_model

THOUGHT = "<think>so</think><answer>"


@pytest.mark.parametrize(
    ("until", "count", "text", "mass", "expected"),
    [
        ("answer", 3, "<think>so", 0.0, False),
        ("answer", 4, "<think>so", 0.0, True),
        ("answer", 4, THOUGHT, 0.9, False),  # its last token brought it there
        ("answer", 5, "<think>so", 0.0, False),  # as the end token stands last
        ("end", 4, THOUGHT, 0.9, True),
        ("end", 4, "</answer>", 0.0, True),
        ("end", 4, f"{THOUGHT}1</answer>", 0.9, False),
        ("end", 5, THOUGHT, 0.9, False),
    ],
)
def test_truncated(until: Any, count: int, text: str, mass: float, expected: bool) -> None:
    vlm = tiny_model("qwen3_vl")
    end = min(vlm.eos_ids)
    rollout = Rollout((1, 1, 1, 1, end)[:count], (0.0,) * count, read_verdict(text, mass, 0.0, tokens=count))
    sampling = Sampling(max_tokens=4, until=until, close=False)
    assert is_truncated(vlm, rollout, sampling) is expected
