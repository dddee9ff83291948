"""`GET /rewards` and `POST /score`, UniRL's reward service: named rewards of requests, and errors of those that fail.

The rewards are `strength` and `wins`. Requests of one `group_id`, where they have one, and of one prompt are a group.
"""

from collections.abc import Mapping
from typing import Any, get_args

from mlxpref.errors import DataError
from mlxpref.judge.judge import Judge
from mlxpref.reward.group import ImageReward, RewardSettings, Value, reward_images
from mlxpref.serve.body import decode_all, get_content, get_list, get_text
from mlxpref.serve.device_queue import Work

REWARDS: tuple[str, ...] = get_args(Value)
PROTOCOL_VERSION = "1"
_IDENTITY = ("request_id", "sample_id", "group_id", "source_rank", "policy_version", "idempotency_key")


def read_score(body: Mapping[str, Any], settings: RewardSettings) -> Work:
    """The work for `{"requests": [{"history": [{"text", "image_b64"}], "required_rewards": [name]}]}`.

    Its answer is `{"results": [{name: {sub: number}}], "errors": [{name: text}]}`, each list with one entry a request.
    Of a history the last turn counts. A single request that is wrong has an error, the others are answered.
    """
    version = body.get("protocol_version")
    if version not in (None, PROTOCOL_VERSION):
        raise DataError(f'"protocol_version" is {version!r:.20}; this server speaks {PROTOCOL_VERSION}')
    requests = get_list(body, "requests") if body.get("requests") != [] else []
    prompts: list[str] = []
    contents: list[bytes | DataError] = []
    for request in requests:
        try:
            prompt, content = _turn(request)
            prompts.append(prompt)
            contents.append(content)
        except DataError as error:
            prompts.append("")
            contents.append(error)
    groups = [repr(request.get("group_id")) if isinstance(request, dict) else "" for request in requests]

    def work(judge: Judge) -> dict[str, Any]:
        images = decode_all(contents, judge.vlm.features.max_pixels)
        rewards = reward_images(judge, images, prompts, settings, groups)
        pairs = [_answer(request, reward) for request, reward in zip(requests, rewards, strict=True)]
        answer = {
            "protocol_version": PROTOCOL_VERSION,
            "results": [results for results, _ in pairs],
            "errors": [errors for _, errors in pairs],
        }
        identities = [_identity(request) for request in requests]
        return answer | ({"identities": identities} if identities and all(identities) else {})

    return work


def _turn(request: Any) -> tuple[str, bytes]:
    """The prompt and the image's bytes of a request; DataError for one that is wrong."""
    history = request.get("history") if isinstance(request, dict) else None
    if not isinstance(history, list) or not history or not isinstance(history[-1], dict):
        raise DataError('"history" must be a list of turns {"text", "image_b64"}')
    turn = history[-1]
    if "image_b64" not in turn:
        raise DataError('the last turn has no "image_b64": this judge sees images alone')
    return get_text(turn.get("text"), '"text"'), get_content(turn["image_b64"], '"image_b64"')


def _answer(request: Any, reward: ImageReward | DataError) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """The results and the errors of one request, by the names of its rewards."""
    names = request.get("required_rewards") if isinstance(request, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return {}, dict.fromkeys(REWARDS, '"required_rewards" must be a list of names')
    offered = f"unknown reward: this server has {' and '.join(REWARDS)}"
    unknown = {name: offered for name in names if name not in REWARDS}
    known = [name for name in names if name in REWARDS]
    if isinstance(reward, DataError):
        return {}, unknown | dict.fromkeys(known, str(reward))
    # One number a reward: clients take the first, and some refuse more.
    return {name: {name: getattr(reward, name)} for name in known}, unknown


def _identity(request: Any) -> dict[str, Any]:
    """What names a request, to be sent back; empty if it has no id."""
    if not isinstance(request, dict) or not request.get("request_id"):
        return {}
    names = (*_IDENTITY, *(["scorer_version"] if "scorer_version" in request else []))
    return {name: value for name in names if isinstance(value := request.get(name), str | int | None)}
