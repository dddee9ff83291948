"""The memory that a run will take, from shapes and settings alone, and what to change where it is too much.

A phase takes what stays (weights, adapter, image features), what it builds up, and the arrays that MLX holds while one
stretch of a layer is at work. How many those are was counted on MLX 0.32.4 on a CPU, which hands out some fifty
operations before the first of them is done (`_Held`); scripts/memory_table.py --check sets the result beside what MLX
measures. Two choices are for safety, as nothing was measured on Metal: attention counts with all of its scores, which
Metal's fused kernel does not hold (where there is a gradient MLX does not use it there either, see `use_fallback` in
mlx/backend/metal/scaled_dot_product_attention.cpp), and as many operations are taken to be under way there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mlxpref.checkpoints.model_shapes import Shapes
from mlxpref.config import JudgeSettings, TrainSettings
from mlxpref.training.rewards import reward_mix

__all__ = ["TEXT_TOKENS", "ModelSize", "Plan", "judging_plan", "training_plan"]

TEXT_TOKENS = 192
"""Tokens of a comparison beside its images: some 110 of ours, and room for a prompt of 80."""
_QUESTION = 40
"""How many of them stand behind the second image."""
# What the engine itself goes by; a test holds them equal.
_TOGETHER, _LEAST, _MOST = 512, 128, 8192
_HEAD_VALUES = 1 << 25
_BATCH_TOKENS, _FEATURES = 1024, 2 << 30
_TREE, _PREFILL_TOKENS = 2 << 30, 16384
_GROWTH, _ANSWER_TOKENS = 32, 8


class _Held(NamedTuple):
    """Arrays that exist at once: of tokens' hidden and inner width, of scores, and of the keys that all rows see."""

    hidden: float
    inner: float
    scores: float
    keys: float = 0.0


# Around attention, and around the MLP.
_FORWARD = _Held(12.5, 0.7, 1.1, 4.0), _Held(8.9, 4.4, 0.65)
_BACKWARD = _Held(19.4, 9.8, 2.4, 5.7), _Held(12.1, 19.0, 0.7)
_KEPT = _Held(6.7, 5.1, 1.0, 1.3)
"""Of each layer that is not recomputed, until the backward pass has been through it."""
_SEEING = _Held(14.9, 4.2, 1.0), _Held(18.8, 4.6, 0.0)
_OVERLAP = 0.4
"""The share of the smaller of two stretches that is under way beside the larger: of completions and of prompts."""
_HEAD, _HEAD_FORWARD = (2.1, 6.0), (1.1, 4.0)
"""Logits that exist at once in an update, and where there is no gradient: of all positions, or so many chunks."""


class ModelSize(NamedTuple):
    """A model on a device: its weights take `weights` bytes, its numbers `float_bytes` each.

    `max_pixels` is what its own processor shrinks images to.
    """

    shapes: Shapes
    weights: int
    float_bytes: int = 4
    max_pixels: int = 1 << 30

    def tokens(self, max_pixels: int) -> int:
        """Tokens of an image under a pixel budget, at most."""
        return max(1, min(max_pixels, self.max_pixels) // self.shapes.vision.pixels_a_token)


@dataclass(frozen=True)
class Plan:
    """Bytes of a run at its peak, by what takes them.

    All the time: `weights`, `adapter` with the optimizer's state, image `features`, and the prefix `tree` of a judge.
    In turn: the `vision` tower at work; the `prefill` of prompts; `keys_values` of prompts and completions with the
    `logits` and scores of a step; `reference`; and an update: what is `saved` for the backward pass (layer inputs,
    keys, values and their gradients) with either the `layer` at work or the `head`; `evaluation` with held-out
    preferences.
    """

    weights: int
    features: int
    vision: int
    prefill: int
    keys_values: int
    logits: int
    adapter: int = 0
    tree: int = 0
    reference: int = 0
    saved: int = 0
    layer: int = 0
    head: int = 0
    evaluation: int = 0

    @property
    def resident(self) -> int:
        """What stays all the time."""
        return self.weights + self.adapter + self.features + self.tree

    @property
    def phases(self) -> dict[str, int]:
        """What each phase takes beside what stays."""
        return {
            "vision": self.vision,
            "prefill": self.prefill,
            "rollout": self.keys_values + self.logits,
            "reference": self.reference,
            "update": self.saved + max(self.layer, self.head),
            "evaluation": self.evaluation,
        }

    @property
    def peak(self) -> int:
        """The most that exists at once."""
        return self.resident + max(self.phases.values())


@dataclass(frozen=True)
class _Block:
    """Rows that run through the layers together, each with `columns` new tokens behind `before` others."""

    rows: int
    columns: int
    before: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    @property
    def piece(self) -> "_Block":
        """What runs last where a block runs in pieces: it sees all others."""
        columns = min(self.columns, max(min(_LEAST, _MOST // self.rows), _TOGETHER // self.rows, 1))
        return _Block(self.rows, columns, self.before + self.columns - columns)


@dataclass(frozen=True)
class _Work:
    """What blocks take on a checkpoint."""

    model: ModelSize

    def held(self, held: _Held, block: _Block) -> int:
        """The arrays of one stretch of work."""
        shapes, seen = self.model.shapes, block.before + block.columns
        values = (
            block.tokens * (held.hidden * shapes.hidden + held.inner * shapes.inner)
            + block.tokens * held.scores * shapes.heads * seen
            + block.rows * held.keys * seen * shapes.key_width
        )
        return int(values * self.model.float_bytes)

    def most(self, stretches: Sequence[_Held], block: _Block) -> int:
        """The most that a piece of a block takes in any of some stretches."""
        return max(self.held(held, block.piece) for held in stretches)

    def keys_values(self, tokens: int) -> int:
        """Keys and values of tokens through all layers."""
        return 2 * tokens * self.model.shapes.layers * self.model.shapes.key_width * self.model.float_bytes

    def states(self, tokens: int) -> int:
        """Hidden states of tokens, once."""
        return tokens * self.model.shapes.hidden * self.model.float_bytes

    def logits(self, positions: int) -> int:
        """Logits of positions, once, in float32."""
        return 4 * positions * self.model.shapes.vocabulary

    def head(self, positions: int, share: float, chunks: float) -> int:
        """A share of the logits of positions, or some chunks of them."""
        return int(min(share * self.logits(positions), 4 * chunks * _HEAD_VALUES))

    def vision(self, tokens: int, images: int) -> int:
        """The vision tower on images of up to `tokens` each: smaller ones may fill a batch further."""
        tower, size = self.model.shapes.vision, tokens * self.model.shapes.vision.merge**2
        fullest = max(tokens, _BATCH_TOKENS - 1 + min(tokens, _BATCH_TOKENS - 1))
        patches = tower.merge**2 * min(images * tokens, fullest)
        wide = (h.hidden * tower.hidden + h.inner * tower.inner + h.scores * tower.heads * size for h in _SEEING)
        return patches * int(max(wide) * self.model.float_bytes + 4 * tower.patch_values)

    def features(self, tokens: int, images: int) -> int:
        """What is kept of images."""
        tower = self.model.shapes.vision
        return min(_FEATURES, images * tokens * tower.out * (1 + tower.levels) * self.model.float_bytes)

    def writing(self, prompts: int, prompt: int, samples: int, completion: int) -> tuple[int, int]:
        """Completions: keys and values with the room that they grow into, and a step's logits and scores."""
        shapes = self.model.shapes
        copies = -(-samples // max(1, min(samples, prompt // completion)))
        rows, branches = prompts * copies, -(-samples // copies)
        columns = prompt + branches * _GROWTH * math.ceil(completion / _GROWTH)
        kept = self.keys_values(rows * columns)
        step = _Block(rows, branches, columns - branches)
        scores = 3.4 * step.tokens * shapes.heads * columns * self.model.float_bytes
        return kept + kept // (2 * shapes.layers), int(2.6 * self.logits(step.tokens) + scores)


def training_plan(model: ModelSize, settings: TrainSettings, images: int, text: int = TEXT_TOKENS) -> Plan:
    """The plan of a training run that sees `images` images; `text` are a comparison's other tokens.

    Images are taken to reach `max_pixels` and completions `max_tokens`.
    """
    work, shapes = _Work(model), model.shapes
    tokens = model.tokens(settings.max_pixels)
    prompt = 2 * tokens + text
    thinks = settings.think or not reward_mix(settings.reward).exact
    longest = max(1, min(settings.max_tokens, shapes.context - prompt))  # beyond its context a model is refused anyway
    samples, completion = (settings.group, longest) if thinks else (1, 0)
    together = min(settings.comparisons, max(1, settings.rows // samples))
    kept, logits = work.writing(together, prompt, samples, max(completion, 1))
    saved, layer, head = _update(work, settings, prompt, samples, completion)
    adapter = shapes.adapter_bytes(settings.rank)
    held_out = min(images, 2 * settings.held_out_limit) if settings.held_out else 0
    judged = judging_plan(model, settings.judging, held_out, text) if held_out else None
    return Plan(
        weights=model.weights,
        adapter=3 * adapter,
        features=work.features(tokens, images),
        vision=work.vision(tokens, 1),  # what an image is encoded beside would move its last bits (`write_groups`)
        prefill=_prefill(work, _Block(together, prompt)),
        keys_values=kept,
        logits=logits,
        reference=_reference(work, settings, prompt, samples, completion) if settings.kl else 0,
        saved=saved + 2 * adapter,
        layer=max(layer, 3 * adapter),
        head=head,
        evaluation=judged.tree + max(judged.phases.values()) if judged else 0,
    )


def _prefill(work: _Work, block: _Block) -> int:
    return work.keys_values(block.tokens) + work.states(block.tokens) + work.most(_FORWARD, block)


def _reference(work: _Work, settings: TrainSettings, prompt: int, samples: int, completion: int) -> int:
    """The log-probabilities of completions without a gradient."""
    rows, groups = _batch(settings, samples)
    prompts, written = _Block(groups, prompt), _Block(rows, completion, prompt)
    head = work.head(written.tokens + rows, *_HEAD_FORWARD)
    return work.keys_values(prompts.tokens) + max(work.most(_FORWARD, prompts), work.most(_FORWARD, written), head)


def _batch(settings: TrainSettings, samples: int) -> tuple[int, int]:
    """Completions that are learned from together, and of how many groups."""
    if samples > settings.micro_batch:
        return settings.micro_batch, 1
    groups = min(settings.comparisons, settings.micro_batch // samples)
    return groups * samples, groups


def _update(work: _Work, settings: TrainSettings, prompt: int, samples: int, completion: int) -> tuple[int, int, int]:
    """What an update keeps for the backward pass, its layer at work, and its head."""
    rows, groups = _batch(settings, samples)
    prompts, written = _Block(groups, prompt), _Block(rows, completion, prompt)
    head = work.head(written.tokens + rows, *_HEAD)
    layers = work.model.shapes.layers
    blocks = [prompts, written] if completion else [prompts]
    if not settings.recompute:
        # Of the prompts, the last layer keeps next to nothing: it says their ends only.
        kept = (layers - 1) * work.held(_KEPT, prompts) + layers * work.held(_KEPT, written)
        return kept, max(work.most(_BACKWARD, block) - work.held(_KEPT, block.piece) for block in blocks), head
    largest = sorted((work.most(_BACKWARD, block) for block in blocks), reverse=True)
    together, at_once = sum(block.tokens for block in blocks), len(blocks)
    if samples > settings.micro_batch:  # the completions first, and then the prompt
        together, at_once = max(block.tokens for block in blocks), 1
    saved = layers * work.states(together) + work.keys_values(2 * prompts.tokens + written.tokens)
    return saved, largest[0] + int(_OVERLAP * sum(largest[1:at_once])), head


def judging_plan(model: ModelSize, settings: JudgeSettings, images: int, text: int = TEXT_TOKENS) -> Plan:
    """The plan of judging comparisons of `images` images for one prompt; see `training_plan` for the rest."""
    work = _Work(model)
    tokens = model.tokens(settings.max_pixels)
    prompt = 2 * tokens + text
    samples = settings.samples if settings.think else 1
    together = min(settings.rows // samples, _PREFILL_TOKENS // (2 * tokens), images * (images - 1))
    new = _Block(max(1, together), tokens + _QUESTION, tokens + text - _QUESTION)
    kept, logits = work.writing(new.rows, prompt, samples, settings.max_tokens + _ANSWER_TOKENS)
    begun = min(new.rows, images) * new.before
    return Plan(
        weights=model.weights,
        features=work.features(tokens, images),
        tree=min(_TREE, work.keys_values(images * new.before)),
        vision=work.vision(tokens, min(images, 2 * new.rows)),
        prefill=work.keys_values(begun + new.tokens) + work.most(_FORWARD, new),
        keys_values=kept if settings.think else 0,
        logits=logits if settings.think else 0,
    )
