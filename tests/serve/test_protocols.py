"""What each protocol asks of the judge, and what it answers: the judge's own numbers, an error for what has none."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from mlxpref.engine.profile import built_in_profiles, own_profile
from mlxpref.errors import DataError
from mlxpref.judge.judge import Judge
from mlxpref.reward.group import RewardSettings, reward_images
from mlxpref.serve import limits
from mlxpref.serve.chat import _prompt_in, read_chat
from mlxpref.serve.compute import read_compute
from mlxpref.serve.rank import read_rank
from mlxpref.serve.score import read_score
from tests.serve.requests import BEST, OTHER_PROMPT, PROMPT, chat, encoded, pictures, turns
from tests.tolerance import PROBABILITY

MakeJudge = Callable[..., Judge]
SETTINGS = RewardSettings()


@pytest.fixture
def judge(demo_judge: MakeJudge) -> Judge:
    return demo_judge(think=False)


@pytest.fixture
def thinking(demo_judge: MakeJudge) -> Judge:
    return demo_judge(max_tokens=80)


def sent(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body as a client sends it."""
    decoded: dict[str, Any] = json.loads(json.dumps(body))
    return decoded


def compute(judge: Judge, **body: Any) -> Any:
    return read_compute(sent(body), SETTINGS)(judge)


def test_compute_gives_the_rewards_of_groups(thinking: Judge) -> None:
    images, others = pictures(), pictures(seed=1)
    prompts = [PROMPT, OTHER_PROMPT] * len(images)
    mixed = [image for both in zip(images, others, strict=True) for image in both]
    values = compute(thinking, prompt=prompts, image=[encoded(image) for image in mixed], video=None)["rewards"]
    expected = reward_images(thinking, mixed, prompts)
    assert values == pytest.approx([each.reward for each in expected if not isinstance(each, DataError)], abs=1e-3)
    assert max(values[::2]) == values[2 * BEST]
    assert sum(values[::2]) == pytest.approx(0, abs=1e-6)
    assert sum(values[1::2]) == pytest.approx(0, abs=1e-6)


def test_compute_takes_the_names_of_the_example_server(judge: Judge) -> None:
    images = [encoded(image) for image in pictures()]
    body = {"prompts": [PROMPT] * len(images), "images": images}
    assert compute(judge, **body) == compute(judge, prompt=body["prompts"], image=images)


def test_compute_of_an_unreadable_image_is_an_error_that_names_it(judge: Judge) -> None:
    images = [encoded(image) for image in pictures()]
    answer = compute(judge, prompt=[PROMPT] * 6, image=[*images[:5], "AAAA"])
    assert set(answer) == {"error"}
    assert "image 5: it is damaged" in answer["error"]


def test_a_lone_image_has_no_reward(judge: Judge) -> None:
    images = [encoded(image) for image in pictures()[:3]]
    answer = compute(judge, prompt=[PROMPT, PROMPT, "a hat"], image=images)
    assert "image 2" in answer["error"]
    assert "“a hat”" in answer["error"]


def test_score_of_nothing_is_nothing(judge: Judge) -> None:
    answer = read_score({"requests": []}, SETTINGS)(judge)
    assert answer == {"protocol_version": "1", "results": [], "errors": []}


@pytest.mark.parametrize("name", ["strength", "wins"])
def test_score_gives_named_rewards(thinking: Judge, name: str) -> None:
    images = pictures()
    requests = turns([encoded(image, "PNG") for image in images], [PROMPT] * 6, [name])
    answer = read_score(sent({"requests": requests}), SETTINGS)(thinking)
    expected = [getattr(each, name) for each in reward_images(thinking, images, [PROMPT] * 6)]
    assert [each[name].pop(name) for each in answer["results"]] == pytest.approx(expected, abs=1e-3)
    assert not any(each[name] for each in answer["results"])  # some clients refuse a second number
    assert answer["errors"] == [{}] * 6


def test_score_keeps_groups_apart_and_sends_identities_back(judge: Judge) -> None:
    images = [encoded(image) for image in pictures()]
    requests = turns(images[:3], [PROMPT] * 3, ["strength"], group_id="a", request_id="1", sample_id="s")
    requests += turns(images[3:], [PROMPT] * 3, ["strength"], group_id="b", request_id="2", idempotency_key="k")
    answer = read_score(sent({"protocol_version": "1", "requests": requests}), SETTINGS)(judge)
    values = [each["strength"]["strength"] for each in answer["results"]]
    assert sum(values[:3]) == pytest.approx(0, abs=1e-6)
    assert sum(values[3:]) == pytest.approx(0, abs=1e-6)
    assert answer["identities"][0] == {
        "request_id": "1", "sample_id": "s", "group_id": "a", "source_rank": None, "policy_version": None,
        "idempotency_key": None,
    }  # fmt: skip
    assert answer["identities"][5]["idempotency_key"] == "k"


def test_score_fails_item_by_item(judge: Judge) -> None:
    images = [encoded(image) for image in pictures()[:4]]
    requests: list[Any] = turns(images, [PROMPT] * 4, ["strength"])
    requests[3]["required_rewards"] = ["strength", "clip"]
    requests += [*turns(["AAAA"], [PROMPT], ["strength"]), {"history": []}, "no request"]
    answer = read_score(sent({"requests": requests}), SETTINGS)(judge)
    alone = read_score(sent({"requests": requests[:4]}), SETTINGS)(judge)
    assert answer["results"][:4] == alone["results"]
    assert answer["results"][4:] == [{}, {}, {}]
    assert answer["errors"][:3] == [{}] * 3
    assert "strength and wins" in answer["errors"][3]["clip"]
    assert "damaged" in answer["errors"][4]["strength"]
    assert all(answer["errors"][5:])


def test_rank_answers_by_the_numbers_that_were_sent(thinking: Judge) -> None:
    images = [encoded(image) for image in pictures()]
    with_damage = ["AAAA", *images[:2], "AAAA", *images[2:]]
    answer = read_rank(sent({"prompt": PROMPT, "images": with_damage, "pairs": "all"}))(thinking)
    ranking = thinking.rank(pictures(), PROMPT, pairs="all")
    place = {0: 1, 1: 2, 2: 4, 3: 5, 4: 6, 5: 7}
    assert [each["index"] for each in answer["images"]] == [place[entry.index] for entry in ranking]
    assert answer["images"][0]["index"] == place[BEST]
    assert [each["strength"] for each in answer["images"]] == pytest.approx([e.strength for e in ranking], abs=1e-3)
    assert [each["tied_with"] for each in answer["images"]] == [[place[i] for i in e.tied_with] for e in ranking]
    assert [each["index"] for each in answer["skipped"]] == [0, 3]
    assert {(each["a"], each["b"]) for each in answer["pairs"]} == {
        (place[pair.a], place[pair.b]) for pair in ranking.pairs
    }
    first = ranking.reason(ranking[0])
    assert first is not None
    other = first.second if first.first == BEST else first.first
    assert answer["images"][0]["reason"].startswith(
        f"as image {1 + (first.second == BEST)} beside number {place[other]}:"
    )


def test_chat_reads_the_answer_position(judge: Judge) -> None:
    a, b = pictures()[:2]
    body = chat([a, b], logprobs=True, top_logprobs=20, max_completion_tokens=1, temperature=0.0)
    answer = read_chat(sent(body))(judge)
    (position,) = answer["choices"][0]["logprobs"]["content"]
    verdict = judge.compare(a, b, PROMPT).a_shown_first[0]
    labels = {each["token"]: math.exp(each["logprob"]) for each in position["top_logprobs"]}
    assert labels == pytest.approx({"1": verdict.p_label_first, "2": verdict.p_label_second}, abs=PROBABILITY)
    assert position["token"] == max(labels, key=lambda label: labels[label])
    assert answer["choices"][0]["message"]["content"] == f"<think></think><answer>{position['token']}</answer>"
    assert answer["usage"]["total_tokens"] > answer["usage"]["prompt_tokens"] > 50


def test_chat_has_the_label_that_was_written(judge: Judge) -> None:
    options = {"logprobs": True, "top_logprobs": 2, "max_tokens": 1, "n": 16, "temperature": 1.0}
    choices = read_chat(sent(chat(pictures()[:2], **options)))(judge)["choices"]
    written = [choice["message"]["content"].partition("<answer>")[2][0] for choice in choices]
    assert set(written) == {"1", "2"}
    for choice, label in zip(choices, written, strict=True):
        (position,) = choice["logprobs"]["content"]
        own = {each["token"]: each["logprob"] for each in position["top_logprobs"]}
        assert (position["token"], position["logprob"]) == (label, own[label])
        assert position["top_logprobs"][0]["logprob"] == max(own.values())


def test_chat_thinks_where_there_is_room(thinking: Judge) -> None:
    answer = read_chat(sent(chat(pictures()[:2], max_tokens=4096, n=3, temperature=1.0, seed=5)))(thinking)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert all(text.startswith("<think>Image 1:") and text.endswith("</answer>") for text in texts)
    assert answer["choices"][0]["logprobs"] is None
    again = read_chat(sent(chat(pictures()[:2], max_tokens=4096, n=3, temperature=1.0, seed=5)))(thinking)
    assert [choice["message"]["content"] for choice in again["choices"]] == texts


def test_chat_takes_the_profiles_own_question_apart(judge: Judge) -> None:
    question = own_profile().question.replace("{image}", "").replace("{prompt}", PROMPT)
    options = {"logprobs": True, "top_logprobs": 2, "max_tokens": 1}
    whole, short = (read_chat(sent(chat(pictures()[:2], text, **options)))(judge) for text in (question, PROMPT))
    assert whole["choices"] == short["choices"]


THINK = f"Which is better? The caption for the generated images is: 「{PROMPT}」.\nThink first."
FLEX = f"You compare two images.\n**Prompt:** [{PROMPT} [wide]]\nAnswer in JSON."
POINT = f"<image>\nRate the image from 1 to 5.\nText Caption: [{PROMPT}]"


@pytest.mark.parametrize(
    ("profile", "question", "prompt"),
    [
        ("unifiedreward-think", THINK, PROMPT),
        ("unifiedreward-pair", THINK, PROMPT),
        ("unifiedreward-flex", FLEX, f"{PROMPT} [wide]"),
        ("mlxpref", "猫が「こんにちは」と言う", "猫が「こんにちは」と言う"),
        ("mlxpref", "a sign that says [open]", "a sign that says [open]"),
    ],
)
def test_the_prompt_in_known_questions(profile: str, question: str, prompt: str) -> None:
    assert _prompt_in(question, built_in_profiles()[profile]) == prompt


@pytest.mark.parametrize(("profile", "question"), [("mlxpref", THINK), ("plain", FLEX), ("rationalrewards", POINT)])
def test_a_question_whose_answer_would_not_be_found_is_refused(profile: str, question: str) -> None:
    with pytest.raises(DataError, match="a profile of UnifiedReward"):
        _prompt_in(question, built_in_profiles()[profile])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (chat(pictures()[:1]), "two images, not 1"),
        (chat(pictures()[:3]), "two images, not 3"),
        (chat(pictures()[:2], ""), "the prompt is empty"),
    ],
)
def test_chat_of_another_kind_is_refused_by_the_judge(judge: Judge, body: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_chat(sent(body))(judge)


BROKEN = [
    (read_chat, {}, '"messages"'),
    (read_chat, {"messages": [{"role": "system", "content": "x"}]}, '"messages"'),
    (read_chat, {"messages": [{"role": "user", "content": 5}]}, '"content"'),
    (read_chat, chat(pictures()[:2], stream=True), '"stream"'),
    (read_chat, chat(pictures()[:2], n=99), '"n" is 99'),
    (read_chat, chat(pictures()[:2], n=1.5), '"n" is 1.5: give a whole number'),
    (read_chat, chat(pictures()[:2], temperature="warm"), '"temperature"'),
    (read_chat, chat(pictures()[:2], max_tokens=0), '"max_tokens"'),
    (read_rank, {"prompt": PROMPT}, '"images" must be a list'),
    (read_rank, {"prompt": PROMPT, "images": ["http://example.org/1.png"]}, "opens none"),
    (read_rank, {"prompt": PROMPT, "images": ["/etc/passwd"]}, "opens none"),
    (read_rank, {"prompt": PROMPT, "images": ["ä"]}, "base64"),
    (read_rank, {"prompt": 5, "images": ["AAAA"]}, '"prompt" must be text'),
    (read_rank, {"prompt": PROMPT, "images": ["AAAA"], "paris": 3}, '"paris"'),
    (read_rank, {"prompt": PROMPT, "images": ["AAAA"] * (limits.IMAGES + 1)}, f"more than {limits.IMAGES}"),
    (read_rank, {"prompt": "x" * (limits.PROMPT_CHARACTERS + 1), "images": ["AAAA"]}, "characters"),
]


@pytest.mark.parametrize(("read", "body", "reason"), BROKEN)
def test_a_broken_request_is_refused_before_the_judge_sees_it(
    read: Callable[[Mapping[str, Any]], Any], body: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DataError, match=reason.replace("(", r"\(")) as caught:
        read(sent(body))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"prompt": [PROMPT], "image": ["AAAA", "AAAA"]}, "1 entries"),
        ({"prompt": [PROMPT], "image": None}, '"image" must be a list'),
        ({"prompt": PROMPT, "image": ["AAAA"]}, '"prompt" must be a list'),
        ({"prompt": [PROMPT], "image": ["AAAA"], "video": [["AAAA"]]}, '"video"'),
        ({"prompt": [None], "image": ["AAAA"]}, "prompt 0 must be text"),
        ({"prompt": [PROMPT], "image": [None]}, "image 0 must be text"),
    ],
)
def test_a_broken_group_is_refused(body: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_compute(sent(body), SETTINGS)


def test_a_small_file_of_many_pixels_is_not_decoded(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxpref.serve.body.PIXELS", 84 * 84 - 1)
    answer = compute(judge, prompt=[PROMPT] * 2, image=[encoded(image) for image in pictures()[:2]])
    assert "84 x 84 pixels" in answer["error"]
