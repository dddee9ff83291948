"""The greedy examination of the demo judge: what it prefers and what it sees, on pictures it has never seen."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_vlm.models.cache import KVCache

from mlxpref.demo.preferences import ASPECTS
from scripts.demo_lessons import Comparison, Mode, Pictures, Script, completion
from scripts.demo_warmup import Judge, picture_features

__all__ = ["Marks", "examine"]

_LONGEST, _AT_ONCE = 48, 64
_CHOICE = re.compile(r"</think><answer>([12])</answer>")
_SCORES = re.compile(r"</think><answer>(\d) (\d)</answer>")
_CAPTION = re.compile(r"Image [12]: (\w+ \w+), (\w+ \w+), (\w+)\.")


@dataclass(frozen=True)
class Marks:
    """What a greedy examination of one mode found: shares from 0 to 1."""

    accuracy: float
    by_aspect: dict[str, float]
    seen: dict[str, float]
    """Comparisons whose reasoning tells an aspect of both images rightly (empty without thinking)."""
    readable: float
    texts: list[str]


def write(judge: Judge, script: Script, patches: mx.array, prompts: np.ndarray[Any, Any]) -> list[str]:
    """What the judge writes, greedily, behind prompts of one length."""
    text, length = judge.model.language_model.model, len(script.beginning)
    count, width = len(prompts), length + prompts.shape[1]
    beginning = text.embed_tokens(mx.array([script.beginning]))
    beginning = mx.broadcast_to(beginning, (count, *beginning.shape[1:]))
    features = picture_features(judge.model, patches)
    block = mx.concatenate([beginning, judge.embed(mx.array(prompts), features)], axis=1)
    cache, alive = [KVCache() for _ in text.layers], np.ones(count, bool)
    written: list[np.ndarray[Any, Any]] = []
    for step in range(_LONGEST):
        columns = np.arange(width) if step == 0 else np.array([width + step - 1])
        positions = judge.positions(np.tile(columns, (count, 1)))
        hidden = text(None, inputs_embeds=block, cache=cache, position_ids=positions)[:, -1]
        chosen = np.array(mx.argmax(text.embed_tokens.as_linear(hidden), axis=-1))
        written.append(np.where(alive, chosen, script.pad_id))
        alive &= chosen != script.end_id
        if not alive.any():
            break
        block = text.embed_tokens(mx.array(chosen)[:, None])
    return [script.tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in np.stack(written, axis=1)]


def examine(
    judge: Judge, script: Script, pictures: Pictures, comparisons: Sequence[Comparison], rng: np.random.Generator
) -> Marks:
    """Greedy answers to comparisons of one mode, marked by what people prefer and by what the pictures show."""
    texts: list[str] = []
    shown = script.shown(comparisons, pictures, rng)
    for begin in range(0, len(comparisons), _AT_ONCE):
        part = slice(begin, begin + _AT_ONCE)
        patches = mx.array(pictures.patches[shown[part].reshape(-1)])
        texts += write(judge, script, patches, script.prompts(comparisons[part]))
    better = np.array([1 if c.scene.better == "a" else 2 for c in comparisons])
    answers = np.array([_answer(text, c.mode) for text, c in zip(texts, comparisons, strict=True)])
    aspects = np.array([c.scene.aspect for c in comparisons])
    told = [_told(text) for text in texts]
    truth = [_told("".join(piece for piece, _ in completion(c))) for c in comparisons]
    return Marks(
        float((answers == better).mean()),
        {name: float((answers == better)[aspects == name].mean()) for name in ASPECTS},
        {
            name: float(np.mean([said[i] == fact[i] for said, fact in zip(told, truth, strict=True)]))
            for i, name in enumerate(ASPECTS)
        },
        float((answers > 0).mean()),
        texts,
    )


def _answer(text: str, mode: Mode) -> int:
    """The image that a completion prefers, 1 or 2; 0 where it cannot be read."""
    if mode == "no thinking":
        return int(text[0]) if text[:1] in ("1", "2") else 0
    found = _SCORES.search(text) if mode == "scores" else _CHOICE.search(text)
    if not found:
        return 0
    if mode == "choice":
        return int(found[1])
    first, second = int(found[1]), int(found[2])
    return 0 if first == second else 1 if first > second else 2


def _told(text: str) -> list[list[str]]:
    """What a reasoning says of both images: colours and whether they match, shapes likewise, qualities."""
    found = _CAPTION.findall(text)
    return [[caption[i] for caption in found] for i in range(3)]
