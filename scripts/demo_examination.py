"""The greedy examination of the demo judge: what it prefers, and what it writes, of pictures it has never seen."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_vlm.models.cache import KVCache

from mlxpref.demo.reasons import Truth, truth_of
from scripts.demo_lessons import Lesson, Mode, Script, pictures_of
from scripts.demo_warmup import Judge, picture_features

__all__ = ["Marks", "examine"]

_LONGEST, _AT_ONCE = 80, 64
_CHOICE = re.compile(r"</think><answer>([12])</answer>")
_SCORES = re.compile(r"</think><answer>(\d+) (\d+)</answer>")


@dataclass(frozen=True)
class Marks:
    """What an examination of one mode found: shares from 0 to 1, the mean length in tokens, and the texts."""

    accuracy: float
    readable: float
    length: float
    truth: Truth
    texts: list[str]


def write(judge: Judge, script: Script, features: mx.array, prompts: np.ndarray[Any, Any], heat: float) -> list[str]:
    """What the judge writes behind prompts of one length: greedily, or sampled at a temperature."""
    text, length = judge.model.language_model.model, len(script.beginning)
    count, width = len(prompts), length + prompts.shape[1]
    beginning = text.embed_tokens(mx.array([script.beginning]))
    beginning = mx.broadcast_to(beginning, (count, *beginning.shape[1:]))
    block = mx.concatenate([beginning, judge.embed(prompts, features)], axis=1)
    cache, alive = [KVCache() for _ in text.layers], np.ones(count, bool)
    written: list[np.ndarray[Any, Any]] = []
    for step in range(_LONGEST):
        columns = np.arange(width) if step == 0 else np.array([width + step - 1])
        positions = judge.positions(prompts, np.tile(columns, (count, 1)))
        hidden = text(None, inputs_embeds=block, cache=cache, position_ids=positions)[:, -1]
        logits = text.embed_tokens.as_linear(hidden)
        chosen = np.array(mx.random.categorical(logits / heat) if heat else mx.argmax(logits, axis=-1))
        written.append(np.where(alive, chosen, script.pad_id))
        alive &= chosen != script.end_id
        if not alive.any():
            break
        block = text.embed_tokens(mx.array(chosen)[:, None])
    return [script.tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in np.stack(written, axis=1)]


def examine(
    judge: Judge, script: Script, lessons: Sequence[Lesson], rng: np.random.Generator, heat: float = 0.0
) -> Marks:
    """Answers to lessons of one mode, marked by what people prefer and by what the pictures show."""
    texts = [""] * len(lessons)
    for part in script.by_length(lessons, _AT_ONCE):
        some = [lessons[i] for i in part]
        features = picture_features(judge.model, mx.array(pictures_of(some, rng)))
        prompts = np.array([script.prompt(each.prompt, each.mode) for each in some], np.int32)
        for i, text in zip(part, write(judge, script, features, prompts, heat), strict=True):
            texts[i] = text
    better = np.array([1 if lesson.pair.better == "a" else 2 for lesson in lessons])
    answers = np.array([_answer(text, lesson.mode) for text, lesson in zip(texts, lessons, strict=True)])
    truth = truth_of(
        (lesson.pair, text, None if answer == 0 else answer == 1)
        for lesson, text, answer in zip(lessons, texts, answers, strict=True)
    )
    lengths = [len(script.tokenizer.encode(text).ids) for text in texts]
    return Marks(float((answers == better).mean()), float((answers > 0).mean()), float(np.mean(lengths)), truth, texts)


def _answer(text: str, mode: Mode) -> int:
    """The image that a completion prefers, 1 or 2; 0 where it cannot be read."""
    if mode == "at once":
        return int(text[0]) if text[:1] in ("1", "2") else 0
    found = _SCORES.search(text) if mode == "scores" else _CHOICE.search(text)
    if not found:
        return 0
    if mode == "choice":
        return int(found[1])
    first, second = int(found[1]), int(found[2])
    return 0 if first == second else 1 if first > second else 2
