"""`POST /v1/chat/completions`: one comparison, or one image, in the judge's profile, with the answer's probabilities.

The text of the user's message is the prompt of the images. Of the profile's own question, and of the questions of
UnifiedReward's clients, it is what stands in the prompt's place; any other question is taken for a prompt. The images
are shown in the order of the message, once: who wants both orders asks twice, or `/rank`.
"""

import math
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxpref.data.inputs import check_prompt
from mlxpref.engine.completion import Rollout, Sampling
from mlxpref.engine.profile import Profile
from mlxpref.engine.rollout import roll_out
from mlxpref.errors import DataError
from mlxpref.judge.judge import Judge
from mlxpref.judge.verdict_source import random_key
from mlxpref.log import track
from mlxpref.serve.body import decode, get_content, get_text
from mlxpref.serve.device_queue import Work
from mlxpref.serve.limits import COMPLETIONS

_QUOTED = (
    (re.compile(r"caption[^「」]{0,80}「(.*)」", re.DOTALL | re.IGNORECASE), "image 1"),
    (re.compile(r"\*\*Prompt:\*\* \[(.*)\]", re.DOTALL), "image 1"),
    (re.compile(r"Text Caption: \[(.*)\]\s*$", re.DOTALL), "final score"),
)
"""The prompt in the questions that clients of UnifiedReward ask, and what they look for in the answer.

Pref-GRPO's two, and that about a single image. Without these words a client silently takes a number of its own.
"""
_IN_PARTS = 'give each as a part {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
_COLD = 1e-4
"""Below this temperature only the likeliest token is taken: logits are divided by it."""
_LABELS = {1.0: 0, 0.0: 1, 0.5: 2}
"""The number of the label by the preference for the first image that it writes; the last is a tie."""
_LEAST = 1e-38
"""A probability whose logarithm is finite."""


@dataclass(frozen=True)
class _Chat:
    """What a request asks for; the judge's settings bound `max_tokens`, too."""

    text: str
    images: tuple[bytes, ...]
    temperature: float
    max_tokens: float
    completions: int
    seed: int
    top_logprobs: int | None


def read_chat(body: Mapping[str, Any]) -> Work:
    """The work for a chat of OpenAI's form: a `chat.completion`; DataError for what is no such chat."""
    if body.get("stream"):
        raise DataError('"stream" is not offered: an answer comes whole')
    text, images = _last_message(body.get("messages"))
    chat = _Chat(
        text=text,
        images=tuple(get_content(url, f"image {number}") for number, url in enumerate(images)),
        temperature=_number(body, "temperature", 0, 0, 100),
        max_tokens=min(_number(body, name, math.inf, 1) for name in ("max_completion_tokens", "max_tokens")),
        completions=_whole(body, "n", 1, 1, COMPLETIONS),
        seed=_whole(body, "seed", 0, 0, 2**64),
        top_logprobs=_whole(body, "top_logprobs", 0, 0) if body.get("logprobs") else None,
    )
    return lambda judge: _complete(judge, chat)


def _last_message(messages: Any) -> tuple[str, list[Any]]:
    """The text and the images' addresses of the user's last message; other messages say nothing to a judge."""
    own = [m for m in messages if isinstance(m, dict) and m.get("role") == "user"] if isinstance(messages, list) else []
    if not own:
        raise DataError('"messages" must be a list with a message of the role "user"')
    content = own[-1].get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise DataError('"content" must be text, or a list of {"type": "text"} and {"type": "image_url"}')
    texts, images = list[str](), list[Any]()
    for part in parts:
        match part.get("type"):
            case "text":
                texts.append(get_text(part.get("text"), '"text"'))
            case "image_url":
                url = part.get("image_url")
                images.append(url.get("url") if isinstance(url, dict) else url)
            case other:
                raise DataError(f'a part of the type {other!r:.40}: give "text" and "image_url"')
    return get_text("\n".join(texts).replace("<image>", "").strip(), '"text"'), images


def _number(body: Mapping[str, Any], name: str, default: float, least: float, most: float = 2**31) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise DataError(f'"{name}" is {value!r:.40}: give a number from {least:g} to {most:g}')
    return value


def _whole(body: Mapping[str, Any], name: str, default: int, least: int, most: int = 2**31) -> int:
    value = _number(body, name, default, least, most)
    if value != int(value):
        raise DataError(f'"{name}" is {value!r:.40}: give a whole number')
    return int(value)


def _complete(judge: Judge, chat: _Chat) -> dict[str, Any]:
    """The answer of the judge."""
    profile, vlm = judge.profile, judge.vlm
    if len(chat.images) != profile.images:
        wanted = "two images" if profile.images == 2 else "one image"
        raise DataError(f"this judge (profile {profile.name}) looks at {wanted}, not {len(chat.images)}: {_IN_PARTS}")
    prompt = _prompt_in(chat.text, profile)
    check_prompt(prompt, judge.settings.criterion)
    pictures = [decode(image, f"image {i}", vlm.features.max_pixels) for i, image in enumerate(chat.images)]
    features = vlm.features.get_all(pictures)
    most = int(min(chat.max_tokens, judge.settings.max_tokens))
    # One token is room for an answer, not for reasons.
    think = judge.settings.think and most > 1
    question = vlm.input_of(features, prompt, "choice", think, judge.settings.criterion)
    temperature = chat.temperature if chat.temperature >= _COLD else 0.0
    sampling = Sampling(chat.completions, temperature, most, chat.seed, until="end")
    questions = list(track([question], 1, "answering"))  # it counts
    (rollouts,) = roll_out(vlm, questions, sampling, [random_key(features, prompt)])
    written = sum(rollout.verdict.tokens for rollout in rollouts)
    usage = {"prompt_tokens": len(question), "completion_tokens": written, "total_tokens": len(question) + written}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": judge.name,
        "choices": [_choice(i, rollout, profile, chat.top_logprobs) for i, rollout in enumerate(rollouts)],
        "usage": usage,
    }


def _prompt_in(text: str, profile: Profile) -> str:
    """The prompt in the profile's own question, or in one of UnifiedReward's clients; else the text itself."""
    question = profile.question.replace("{image}", "").strip()
    before, _, after = question.partition("{prompt}")
    whole = text.strip()
    is_question = len(whole) > len(before) + len(after) and whole.startswith(before) and whole.endswith(after)
    if is_question and (before or after):
        return whole[len(before) : len(whole) - len(after)].strip()
    for pattern, sought in _QUOTED:
        if found := pattern.search(whole):
            answer = profile.lead + ("" if profile.is_point else profile.first[0])
            if sought not in answer.lower():
                raise DataError(
                    f"this is the question of a client that looks for “{sought}” in the answer, and the profile "
                    f"{profile.name} answers {answer!r}: serve a judge with a profile of UnifiedReward"
                )
            return found[1].strip()
    return whole


def _choice(number: int, rollout: Rollout, profile: Profile, top: int | None) -> dict[str, Any]:
    """One completion; with `top` labels and their log-probabilities, at each of its answers."""
    verdict = rollout.verdict
    label = None if verdict.written is None else _LABELS.get(verdict.written)
    logprobs = None if top is None else {"content": [_at_answer(each, profile, top, label) for each in rollout.labels]}
    return {
        "index": number,
        "message": {"role": "assistant", "content": verdict.text},
        "logprobs": logprobs,
        "finish_reason": "length" if verdict.closed else "stop",
    }


def _at_answer(probabilities: Sequence[float], profile: Profile, top: int, written: int | None) -> dict[str, Any]:
    """The label that is written at an answer's position, or the likeliest where that is not known, and the `top` ones.

    A label stands for all tokens that write it.
    """
    names = [label[0] for label in profile.labels]
    labels = [
        {"token": name, "logprob": math.log(max(p, _LEAST)), "bytes": list(name.encode())}
        for name, p in zip(names, probabilities, strict=False)
    ]
    likeliest = [label for label, _ in sorted(zip(labels, probabilities, strict=False), key=lambda each: -each[1])]
    own = labels[written : written + 1] if written is not None else []  # empty: a tie is written in other words
    return {**(own or likeliest)[0], "top_logprobs": likeliest[:top]}
