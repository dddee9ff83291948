"""Completions in each judge's form, written by a script: the labels are read where the answer that counts stands."""

import pytest

from mlxpref.checkpoints import bounds
from mlxpref.engine.completion import Rollout, Sampling
from mlxpref.engine.profile import Profile, built_in_profiles
from mlxpref.engine.rollout import roll_out
from tests.conftest import tiny_model
from tests.engine.profile_models import NAMES, TIE_WORD, asked_by, count, follow, masses, model, question, write
from tests.engine.profile_texts import FLEX, THINK

THINKING = [name for name in NAMES if built_in_profiles()[name].thinks]
UNTIL = pytest.mark.parametrize("until", ["answer", "end"])


def assert_read(rollout: Rollout, first: float, second: float, tie: float = 0.0) -> None:
    verdict = rollout.verdict
    found = verdict.p_label_first, verdict.p_label_second, verdict.p_label_tie
    assert found == pytest.approx((first, second, tie), rel=1e-5)
    assert verdict.score is None
    assert verdict.p_first("soft") == pytest.approx((first + tie / 2) / (first + second + tie), rel=1e-5)


WRITTEN = {
    "mlxpref": ("<think>It is sharp.</think>\n<answer>\n", "1</answer>"),
    "unifiedreward-think": (THINK, "2 is better</answer>"),
    "unifiedreward-flex": (FLEX, '1"\n}\n```'),
    "plain": ("The first has the hat.\nAnswer: ", "2."),
}
"""What is written before the answer that counts, and from it on."""


@UNTIL
@pytest.mark.parametrize("profile", WRITTEN)
def test_labels_are_read_where_the_judge_answers(profile: str, until: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, (before, answer) = model(profile), WRITTEN[profile]
    p = follow(vlm, monkeypatch, [before, answer])
    rollout = write(vlm, until=until)
    place = count(vlm, before)
    assert_read(rollout, *masses(vlm, p(place)))
    verdict = rollout.verdict
    assert not verdict.closed
    assert verdict.well_formed
    assert verdict.answer_tokens == place
    assert len(rollout.tokens) == len(rollout.logprobs)
    if until == "answer":
        assert verdict.text == before
        assert len(rollout.tokens) == place
    else:
        assert verdict.text.startswith(before + answer[:1])
        assert verdict.answer_start == len(before)
        assert verdict.p_first("select") == (1.0 if answer[0] == "1" else 0.0)
    assert verdict.reasoning == vlm.tokenizer.reader.reasoning(before + answer)
    assert "sharp" in verdict.reasoning or "Light" in verdict.reasoning or "hat" in verdict.reasoning


@UNTIL
@pytest.mark.parametrize("profile", ["mlxpref", "unifiedreward-think"])
def test_the_first_of_two_answers_counts(profile: str, until: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, (before, answer) = model(profile), WRITTEN[profile]
    p = follow(vlm, monkeypatch, [before, answer, " or ", vlm.profile.lead, "1", vlm.profile.end])
    rollout = write(vlm, until=until)
    assert_read(rollout, *masses(vlm, p(count(vlm, before))))
    # The answer is written to its end at most: what comes behind it is not.
    assert len(rollout.tokens) <= count(vlm, before, answer)


@UNTIL
@pytest.mark.parametrize("profile", ["unifiedreward-flex", "plain"])
def test_the_last_of_two_answers_counts(profile: str, until: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, (before, _) = model(profile), WRITTEN[profile]
    lead = vlm.profile.lead
    script = [before, "2", vlm.profile.end, "\nNo: ", lead, "1", vlm.profile.end, "\nThat is it."]
    p = follow(vlm, monkeypatch, script)
    rollout = write(vlm, until=until)
    place = count(vlm, *(each for each in script[:5]))
    assert_read(rollout, *masses(vlm, p(place)))
    verdict = rollout.verdict
    assert verdict.answer_tokens == place
    assert verdict.tokens == count(vlm, *script) + 1, "the end token, too, was written"
    if until == "answer":
        assert verdict.text == "".join(script[:5])
        assert len(rollout.tokens) == len(rollout.logprobs) == place
        assert rollout.tokens == tuple(t for text in script[:5] for t in vlm.tokenizer.encode_template_text(text))
    else:
        assert verdict.text == "".join(script)
        assert len(rollout.tokens) == verdict.tokens
        assert verdict.p_first("select") == 1


def test_an_answer_of_which_a_last_one_may_come_does_not_count_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of tokens behind a first answer: it is led to the one that counts, or without that has none."""
    vlm = model("plain")
    script = ["Answer: 1, but", " a a", "2"]
    limit = count(vlm, *script[:2])
    p = follow(vlm, monkeypatch, [*script[:2], 5, *script[2:]])  # token 5 is never written: closing takes its place
    closed = write(vlm, max_tokens=limit)
    assert_read(closed, *masses(vlm, p(limit + 1)))
    assert closed.verdict.closed
    assert closed.verdict.text == "Answer: 1, but a a\nAnswer: "
    follow(vlm, monkeypatch, script)
    open_end = write(vlm, max_tokens=limit, close=False).verdict
    assert open_end.label_mass == 0
    assert open_end.p_first("soft") is None


@UNTIL
@pytest.mark.parametrize("profile", THINKING)
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_reasons_out_of_tokens_are_led_to_an_answer(
    profile: str, tokens: int, until: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = model(profile)
    if vlm.profile.is_point:
        return  # below
    blank = vlm.tokenizer.encode_template_text("a")[0]
    p = follow(vlm, monkeypatch, [*[blank] * tokens, 5, "1", vlm.profile.end or "."])
    rollout = write(vlm, max_tokens=tokens, until=until)
    assert_read(rollout, *masses(vlm, p(tokens + 1)))
    verdict = rollout.verdict
    led = "a" * tokens + vlm.profile.closing
    assert verdict.text.startswith(led)
    assert verdict.closed
    assert rollout.tokens[:tokens] == (blank,) * tokens
    if until == "answer":
        assert (verdict.text, len(rollout.tokens)) == (led, tokens)
    else:
        assert verdict.p_first("select") == 1
        assert verdict.answer_start == len(led)


@pytest.mark.parametrize("profile", ["mlxpref", "unifiedreward-think"])
def test_ended_reasons_are_not_ended_again(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = model(profile)
    before = "<think>a</think>\nSo "
    p = follow(vlm, monkeypatch, [before, 5, "2"])
    rollout = write(vlm, max_tokens=count(vlm, before))
    assert_read(rollout, *masses(vlm, p(count(vlm, before) + 1)))
    assert rollout.verdict.text == before + vlm.profile.closing.partition("</think>")[2]


@pytest.mark.parametrize("profile", [name for name in THINKING if name != "rationalrewards"])
def test_at_once_the_answer_is_read_behind_the_question(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = model(profile)
    p = follow(vlm, monkeypatch, ["2"])
    rollout = write(vlm, think=False)
    assert rollout.tokens == ()
    assert_read(rollout, *masses(vlm, p(0)))
    assert rollout.verdict.text.endswith(vlm.profile.at_once)
    assert not rollout.verdict.closed


def test_a_completion_without_an_answer_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for profile in NAMES:
        vlm = model(profile)
        if vlm.profile.tie_opening:
            continue  # it is led to its answer at once
        follow(vlm, monkeypatch, ["I like both."])
        verdict = write(vlm).verdict
        assert verdict.label_mass == 0
        assert (verdict.p_first("soft"), verdict.p_first("select"), verdict.score) == (None, None, None)
        assert not verdict.well_formed
        assert verdict.answer_start is None


@pytest.mark.parametrize("profile", NAMES)
def test_sampled_readings_at_once_are_equal(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever follows the lead, nothing is written: in training, tokens would be taken for such before the lead."""
    vlm = model(profile)
    blank = vlm.tokenizer.encode_template_text("\n")[0]
    follow(vlm, monkeypatch, [blank] * 12)
    inputs = [question(vlm, (0, 1), think=False)]
    rollouts = roll_out(vlm, inputs, Sampling(samples=4, temperature=1.0), [(0,)])[0]
    assert {rollout.tokens for rollout in rollouts} == {()}
    assert len({rollout.verdict for rollout in rollouts}) == 1
    assert rollouts[0].verdict.label_mass > 0


# ties


@UNTIL
@pytest.mark.parametrize("label", ["1", "2", "0"])
def test_a_tie_is_read_beside_the_labels(label: str, until: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = model("plain", tie=("0", "3"))
    p = follow(vlm, monkeypatch, ["So. Answer: ", label, "."])
    rollout = write(vlm, until=until)
    first, second, tie = masses(vlm, p(count(vlm, "So. Answer: ")))
    assert len(vlm.tokenizer.label_ids[2]) >= 2
    assert_read(rollout, first, second, tie)
    if until == "end":
        assert rollout.verdict.p_first("select") == {"1": 1, "2": 0, "0": 0.5}[label]


def test_a_tie_is_read_at_once_beside_the_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = model("plain", tie=("0",))
    p = follow(vlm, monkeypatch, ["0"])
    assert_read(write(vlm, think=False), *masses(vlm, p(0)))


@UNTIL
@pytest.mark.parametrize("says_tie", [True, False])
def test_a_tie_is_read_before_the_lead(says_tie: bool, until: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels are read behind the lead, and share what the tie leaves."""
    vlm = model("unifiedreward-pair")
    p = follow(vlm, monkeypatch, [TIE_WORD if says_tie else "Image ", "2", " is better"])
    rollout = write(vlm, until=until)
    tie = float(p(0)[list(vlm.tokenizer.tie_opening_ids)].sum())
    assert (tie > 0.5) is says_tie
    lead = vlm.tokenizer.encode_template_text("Image ")
    if not says_tie:  # its tokens stand in the script, each with a call; the lead is appended with one
        p = follow(vlm, monkeypatch, ["x", "2", " is better"])
        rollout = write(vlm, until=until)
        tie = float(p(0)[list(vlm.tokenizer.tie_opening_ids)].sum())
    first, second = masses(vlm, p(1))
    assert_read(rollout, first * (1 - tie), second * (1 - tie), tie)
    assert len(lead) > 1
    verdict = rollout.verdict
    assert not verdict.closed
    assert verdict.well_formed
    if until == "answer":
        assert rollout.tokens == ()
        assert verdict.text == "Image "
    elif says_tie:
        assert verdict.text == TIE_WORD
        assert rollout.tokens == (), "nothing is written behind a tie"
        assert verdict.p_first("select") == 0.5
    else:
        assert verdict.text.startswith("Image 2")
        assert verdict.p_first("select") == 0
        assert verdict.answer_start == len("Image ")


def test_an_answer_takes_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that never ends is cut, as in our own form."""
    profile: Profile = built_in_profiles()["unifiedreward-think"]
    vlm = asked_by(tiny_model("qwen3_vl"), profile)
    follow(vlm, monkeypatch, ["a", 5, *["1 "] * 99])
    rollout = write(vlm, max_tokens=1, until="end")
    assert len(rollout.tokens) <= 1 + bounds.ANSWER_TOKENS
