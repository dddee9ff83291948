"""The warm-up of the demo judge: its batched forward pass, its losses and its optimiser."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_vlm.models.qwen2_5_vl import Model
from mlx_vlm.models.qwen2_5_vl.vision import apply_rotary_pos_emb_vision

from mlxpref.demo.pictures import COLOURS, GRID, QUALITIES, SHAPES, PictureSpec, draw, place_shapes
from scripts.demo_lessons import IMAGE_TOKENS, PATCHES, Rows, Script, image_columns, patches_of

__all__ = ["Judge", "Note", "Stage", "picture_features", "run_stage", "teach_sight", "whiten_patches"]

Note = Callable[[str], None]
"""Where progress goes."""
_GRID = (1, 6, 6)
_EMPTY = "none"
_WORDS = ((_EMPTY, *COLOURS), (_EMPTY, *SHAPES), QUALITIES)
"""What sight is asked of a cell: its colour, its shape, and the quality of the whole picture."""
_NOISE_FLOOR = 0.003
"""Added to the power of every direction before whitening, so that the weakest are not blown up."""
_MUON_FACTOR = 10.0
"""Muon's learning rate against AdamW's: the length of its steps does not depend on the gradient's."""
_NOTED_STEPS = 50


def picture_features(model: Model, patches: mx.array) -> mx.array:
    """What the vision tower says about N pictures of one size at once: (N, 36, 588) bytes -> (N, 9, hidden).

    The same numbers as `model.vision_tower`, which takes its images one after another: every block attends to
    the whole image, and a still image fills both time steps of a patch, so their weights can be added first.
    """
    tower = model.vision_tower
    count, width = patches.shape[0], tower.patch_embed.hidden_size
    kernel = tower.patch_embed.proj.weight.sum(axis=1).reshape(width, -1)
    hidden = (patches.astype(mx.float32) / 127.5 - 1.0) @ kernel.T
    angles = tower.rot_pos_emb(mx.array([_GRID]))
    for block in tower.blocks:
        attention = block.attn
        joined = attention.qkv(block.norm1(hidden)).reshape(count, PATCHES, 3, attention.num_heads, -1)
        queries = apply_rotary_pos_emb_vision(joined[:, :, 0], angles).transpose(0, 2, 1, 3)
        keys = apply_rotary_pos_emb_vision(joined[:, :, 1], angles).transpose(0, 2, 1, 3)
        values = joined[:, :, 2].transpose(0, 2, 1, 3)
        mixed = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=attention.scale)
        hidden = hidden + attention.proj(mixed.transpose(0, 2, 1, 3).reshape(count, PATCHES, -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    features: mx.array = tower.merger(hidden).reshape(count, IMAGE_TOKENS, -1)
    return features


class Beginning:
    """One layer's keys and values of the common beginning, given to every row of a batch."""

    def __init__(self, mask: mx.array) -> None:
        self.offset = 0
        self._mask = mask
        self._kept: tuple[mx.array, mx.array] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keep the first block, put it before the second one."""
        if self._kept is None:
            self._kept = keys, values
            return keys, values
        before = [mx.broadcast_to(kept, (keys.shape[0], *kept.shape[1:])) for kept in self._kept]
        return mx.concatenate([before[0], keys], axis=2), mx.concatenate([before[1], values], axis=2)

    def make_mask(self, columns: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str:
        """Causal for the beginning, the batch's own mask behind it."""
        return "causal" if self._kept is None else self._mask


class Judge(nn.Module):
    """The model with what a batch needs to run through it: the common beginning and positions.

    The vision tower is frozen: what an image shows is learned before, and the text model learns what to make of it.
    """

    def __init__(self, model: Model, script: Script) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self._script = script

    def embed(self, ids: np.ndarray[Any, Any], features: mx.array) -> mx.array:
        """Embeddings of rows behind the beginning; `features` are two pictures a row, (B * 2, 9, hidden)."""
        words = self.model.language_model.model.embed_tokens(mx.array(ids))
        pictures = features.reshape(len(ids), 2, IMAGE_TOKENS, -1)  # rows, places, tokens, hidden
        first, second = image_columns(ids[0].tolist(), self._script.image_id)
        parts = [words[:, :first], pictures[:, 0], words[:, first + IMAGE_TOKENS : second], pictures[:, 1]]
        return mx.concatenate([*parts, words[:, second + IMAGE_TOKENS :]], axis=1)

    def positions(self, ids: np.ndarray[Any, Any], columns: np.ndarray[Any, Any]) -> mx.array:
        """Position ids (3, rows, columns) of columns counted from the very beginning of rows like `ids`."""
        starts = image_columns([*self._script.beginning, *ids[0].tolist()], self._script.image_id)
        return mx.array(_positions(starts)[:, columns])

    def loss(self, features: mx.array, rows: Rows) -> mx.array:
        """Weighted mean negative log-likelihood of completions, plus that of answers at once."""
        text = self.model.language_model.model
        hidden = self._run(features, rows, rows.ids.shape[1] - 1)
        ids, weights = mx.array(rows.ids[:, rows.start :]), mx.array(rows.weights[:, rows.start :])
        logits = text.embed_tokens.as_linear(hidden[:, rows.start - 1 :])
        loss: mx.array = (nn.losses.cross_entropy(logits, ids) * weights).sum()
        return loss

    def _run(self, features: mx.array, rows: Rows, width: int) -> mx.array:
        """Hidden states of the first columns; the common beginning runs once, with gradient."""
        text = self.model.language_model.model
        length = len(self._script.beginning)
        visible = np.pad(rows.visible[:, :width, :width], ((0, 0), (0, 0), (length, 0)), constant_values=True)
        mask = mx.array(visible[:, None])
        cache = [Beginning(mask) for _ in text.layers]
        ids = rows.ids[:, :width]
        text(
            mx.array([self._script.beginning]),
            cache=cache,
            position_ids=self.positions(ids, np.arange(length)[None]),
        )
        hidden = self.embed(ids, features)
        places = self.positions(ids, rows.places[:, :width] + length)
        for layer, kept in zip(text.layers, cache, strict=True):
            hidden = layer(hidden, mask, kept, places)
        out: mx.array = text.norm(hidden)
        return out


@lru_cache
def _positions(starts: tuple[int, ...], length: int = 384) -> np.ndarray[Any, Any]:
    """Qwen's rotary positions (3, length) of rows whose 3 x 3 image tokens begin in columns `starts`."""
    grid = np.stack([np.zeros(IMAGE_TOKENS, int), *np.divmod(np.arange(IMAGE_TOKENS), GRID)])
    positions = np.tile(np.arange(length, dtype=np.int32), (3, 1))
    for column in starts:
        end = column + IMAGE_TOKENS
        positions[:, end:] -= IMAGE_TOKENS - GRID
        positions[:, column:end] = positions[:, column : column + 1] + grid
    return positions


def whiten_patches(model: Model, patches: np.ndarray[Any, Any], rng: np.random.Generator) -> None:
    """Begin the patch embedding with filters whose answers to real patches are uncorrelated and equally strong.

    Brightness makes up nearly all of a patch, so behind random filters the first norm leaves next to nothing of
    the fine detail that tells clean from noisy, blurry and blocky; training then finds quality very slowly. Half
    of the filters are the leading principal components, half are random mixtures of the others.
    """
    kernel = model.vision_tower.patch_embed.proj.weight
    width, half = kernel.shape[0], kernel.shape[0] // 2
    values = patches.reshape(-1, patches.shape[-1]).astype(np.float32) / 127.5 - 1.0
    power, directions = np.linalg.eigh((values.T @ values / len(values)).astype(np.float64))
    white = (directions / np.sqrt(power + _NOISE_FLOOR))[:, ::-1]
    fine = white[:, half:]
    mixed = fine @ rng.normal(size=(fine.shape[1], width - half)) / np.sqrt(fine.shape[1])
    filters = np.concatenate([white[:, :half], mixed], axis=1).T.astype(np.float32)
    # A still image fills both time steps of a patch: each gets half.
    one = filters.reshape(width, 1, *kernel.shape[2:]) / 2
    model.vision_tower.patch_embed.proj.weight = mx.array(np.repeat(one, 2, axis=1))


class Sight(nn.Module):
    """The vision tower under three questions of every cell's feature: colour, shape, and the picture's quality."""

    def __init__(self, model: Model) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.answers = nn.Linear(model.config.text_config.hidden_size, sum(map(len, _WORDS)))

    def __call__(self, patches: mx.array) -> list[mx.array]:
        """Logits (N, 9, words) of each question for N pictures."""
        joined = self.answers(picture_features(self.model, patches))
        ends = np.cumsum([len(words) for words in _WORDS]).tolist()
        return [joined[..., end - len(words) : end] for end, words in zip(ends, _WORDS, strict=True)]

    def loss(self, patches: mx.array, labels: mx.array) -> mx.array:
        """The sum of the three questions' cross-entropies; labels (N, 9, 3)."""
        losses = [nn.losses.cross_entropy(logits, labels[..., i]).mean() for i, logits in enumerate(self(patches))]
        return sum(losses, mx.array(0.0))


def draw_sights(count: int, rng: np.random.Generator) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Random pictures as patches (count, 36, 588), and for each of their cells the answers to sight's questions."""
    patches, labels = [], np.zeros((count, IMAGE_TOKENS, len(_WORDS)), np.int32)
    for number in range(count):
        colours = rng.integers(0, len(COLOURS), len(SHAPES))
        quality = int(rng.integers(len(QUALITIES)))
        names, cells = [list(COLOURS)[int(i)] for i in colours], place_shapes(rng)
        spec = PictureSpec(*names)._replace(quality=QUALITIES[quality])
        patches.append(patches_of(draw(spec, cells, rng)))
        labels[number, :, 2] = quality
        labels[number, list(cells), 0] = colours + 1
        labels[number, list(cells), 1] = np.arange(len(SHAPES)) + 1
    return np.stack(patches), labels


@dataclass(frozen=True)
class Stage:
    """How long and how fast one part of the warm-up runs."""

    name: str
    steps: int
    rate: float
    end_rate: float
    warm: int = 50
    muon_factor: float = _MUON_FACTOR


def run_stage(
    stage: Stage,
    module: nn.Module,
    loss: Callable[..., mx.array],
    batch: Callable[[], tuple[Any, ...]],
    note: Note,
) -> None:
    """Minimise `loss(*batch())`: Muon moves the matrices inside the blocks, AdamW everything else.

    Measured once on reasoning: loss 0.51 after 400 steps of AdamW alone, 0.21 after 200 steps of this.
    """
    optimizer = optim.MultiOptimizer(
        [
            optim.Muon(learning_rate=_schedule(stage, stage.muon_factor), weight_decay=0.0),
            optim.AdamW(learning_rate=_schedule(stage, 1.0), betas=[0.9, 0.98], weight_decay=0.01),
        ],
        [_is_hidden_matrix],
    )
    loss_and_gradient = nn.value_and_grad(module, loss)
    start, recent = time.time(), []
    for step in range(1, stage.steps + 1):
        value, gradient = loss_and_gradient(*batch())
        gradient, _ = optim.clip_grad_norm(gradient, 1.0)
        optimizer.update(module, gradient)
        mx.eval(value, module.parameters(), optimizer.state)
        recent.append(value.item())
        if step % _NOTED_STEPS == 0 or step == stage.steps:
            note(f"{stage.name}: step {step}/{stage.steps}, loss {np.mean(recent):.4f}, {time.time() - start:.0f} s")
            recent = []


def _schedule(stage: Stage, factor: float) -> Callable[[mx.array], mx.array]:
    """A short linear rise and a cosine fall."""
    rise = optim.linear_schedule(stage.rate * factor * 0.02, stage.rate * factor, stage.warm)
    fall = optim.cosine_decay(stage.rate * factor, stage.steps - stage.warm, stage.end_rate * factor)
    return optim.join_schedules([rise, fall], [stage.warm])


def _is_hidden_matrix(name: str, value: mx.array) -> bool:
    """Whether Muon moves this weight: the matrices inside the blocks, not what reads patches or words."""
    return value.ndim == 2 and (".layers." in name or ".blocks." in name or ".merger." in name)


def teach_sight(model: Model, stage: Stage, count: int, rng: np.random.Generator, note: Note) -> None:
    """Teach the vision tower to tell what is in each cell, by cheap questions about single pictures."""
    sight = Sight(model)

    def batch() -> tuple[mx.array, mx.array]:
        patches, labels = draw_sights(count, rng)
        return mx.array(patches), mx.array(labels)

    run_stage(stage, sight, sight.loss, batch, note)
    patches, truth = draw_sights(512, rng)
    said = np.stack([np.array(mx.argmax(logits, -1)) for logits in sight(mx.array(patches))], axis=-1)
    right = (said == truth)[truth[..., 1] > 0].mean(axis=0)
    note(f"{stage.name}: unseen cells right: colour {right[0]:.4f}, shape {right[1]:.4f}, quality {right[2]:.4f}")
