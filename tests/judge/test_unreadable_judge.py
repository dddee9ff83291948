"""A judge that answers in another form than its profile's: it is said once, with what it wrote."""

from pathlib import Path

import pytest

import mlxpref
from mlxpref.config import JudgeSettings
from mlxpref.errors import ConfigError
from mlxpref.judge.judge import Judge
from mlxpref.preferences import Pair
from tests.conftest import picture, tiny_model
from tests.engine.profile_models import asked_by, follow

WRITTEN = "I like the first one."


@pytest.mark.parametrize("profile", ["unifiedreward-think", "plain", "mlxpref"])
def test_answers_that_are_never_found_are_said_once(
    profile: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = asked_by(tiny_model("qwen3_vl"), profile)
    judge = Judge(vlm, JudgeSettings(max_tokens=60))
    session = judge.session()
    for seed in (0, 2):
        follow(vlm, monkeypatch, [WRITTEN])
        (verdict,) = judge.pairs([Pair(picture(seed), picture(seed + 1), "a hat")], session=session)
        assert verdict.p_a_shown_first is None
    said = [record.message for record in caplog.records if "no answer was found" in record.message]
    assert len(said) == 1
    assert f"the profile {profile}" in said[0]
    assert repr(vlm.profile.lead) in said[0]
    assert repr(WRITTEN) in said[0]
    assert "--profile" in said[0]


def test_an_answer_that_is_found_says_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = asked_by(tiny_model("qwen3_vl"), "plain")
    judge = Judge(vlm, JudgeSettings(max_tokens=60))
    follow(vlm, monkeypatch, ["So. Answer: 1"])
    judge.compare(picture(0), picture(1), "a hat")
    assert "no answer was found" not in caplog.text


def test_scores_that_are_found_say_nothing(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no labels, whose probability would tell that they were found."""
    vlm = asked_by(tiny_model("qwen3_vl"), "mlxpref")
    judge = Judge(vlm, JudgeSettings(max_tokens=60))
    follow(vlm, monkeypatch, ["<think>So.</think><answer>9 4</answer>"])
    (verdict,) = judge.pairs([Pair(picture(0), picture(1), "a hat")], "score")
    assert verdict.p_a_shown_first == 1
    assert "no answer was found" not in caplog.text


def test_labels_that_the_judges_tokenizer_splits_are_an_error(tmp_path: Path) -> None:
    """The demo's vocabulary has no word `Both`; it is said before anything is judged."""
    with pytest.raises(ConfigError, match=r"profile unifiedreward-pair: 'Both' is no single token .* tokenizer"):
        mlxpref.load("demo", profile="unifiedreward-pair")
    own = tmp_path / "own.toml"
    own.write_text(
        'kind = "pair"\nquestion = "{image}{image}{prompt}"\nlead = "Answer: "\n'
        'first = "the left"\nsecond = "the right"\n'
    )
    with pytest.raises(ConfigError, match=r"profile own: 'the left', 'the right' is no single token"):
        mlxpref.load("demo", profile=str(own))


def test_an_unknown_profile_is_an_error_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown profile 'think': known are mlxpref, plain, rationalrewards"):
        mlxpref.load(str(tmp_path / "no model"), profile="think")
