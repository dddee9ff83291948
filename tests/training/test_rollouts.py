"""Groups: which completions ran out of tokens."""

from typing import Any

import pytest

from mlxpref.engine.rollout import Rollout, Sampling
from mlxpref.training.rollouts import _ran_out
from mlxpref.verdict import Verdict
from tests.conftest import tiny_model

END = 7
THOUGHT = "<think>so</think><answer>"


@pytest.mark.parametrize(
    ("until", "tokens", "text", "mass", "expected"),
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
def test_a_completion_ran_out_where_it_neither_said_its_answer_nor_ended(
    until: Any, tokens: int, text: str, mass: float, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = tiny_model("qwen2_5_vl")
    monkeypatch.setattr(vlm, "ends", frozenset({END}))
    written = (1, 1, 1, 1, END)[:tokens]
    rollout = Rollout(written, (0.0,) * tokens, Verdict(text, mass, 0.0, tokens=tokens))
    assert _ran_out(vlm, rollout, Sampling(max_tokens=4, until=until, close=False)) is expected
