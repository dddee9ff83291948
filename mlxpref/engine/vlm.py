"""The seam to mlx-vlm: a checkpoint as a stateless function from comparisons to logits.

Everything that mlx-vlm's models remember between calls (positions, rope deltas) is bypassed: images are encoded
once and cached, embeddings are put together here, positions are explicit, and the language model's layers run on
caches of our own.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.checks import check_folder, check_model, check_processor
from mlxpref.checkpoints.hf_config import FAMILIES
from mlxpref.engine.decoder import Block, RotaryTables, rotary_tables, run_block, run_step
from mlxpref.engine.image_features import Features, FeatureStore
from mlxpref.engine.kv_cache import BranchedKVCache, image_positions, owners_of
from mlxpref.engine.template import Form
from mlxpref.engine.tokenizer import ComparisonTokenizer
from mlxpref.errors import DataError, MlxprefError, ModelError
from mlxpref.preferences import ImageLike
from mlxpref.text import one_line

__all__ = ["FAMILIES", "VLM", "ComparisonInput", "TokenSegment", "check_folder", "check_model", "load_vlm"]


@dataclass(frozen=True, eq=False)
class TokenSegment:
    """Token ids (L,) in a row, their positions (3, L), and the features of the images among them."""

    ids: np.ndarray
    positions: np.ndarray
    images: tuple[Features, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class ComparisonInput(TokenSegment):
    """One comparison, ready to run: `following` is the position after it.

    `cuts` are where its first image begins and where its second one does: what stands before the first is the same for
    all comparisons of a prompt, what stands before the second is the same for all opponents of a first image.
    """

    following: int
    cuts: tuple[int, int] = (0, 0)

    @property
    def parts(self) -> tuple[TokenSegment, TokenSegment, TokenSegment]:
        """The instruction and the prompt, the first image, and the second image with the question."""
        start, second = self.cuts
        return (
            TokenSegment(self.ids[:start], self.positions[:, :start], ()),
            TokenSegment(self.ids[start:second], self.positions[:, start:second], self.images[:1]),
            TokenSegment(self.ids[second:], self.positions[:, second:], self.images[1:]),
        )


class VLM:
    """A loaded vision-language model: words and images in, logits out; no state but cached image features."""

    def __init__(self, model: nn.Module, processor: Any, checkpoint: Checkpoint, max_pixels: int) -> None:
        self.model: Any = model
        self.checkpoint = checkpoint
        config = self.model.config
        self.image_token_id = int(
            config.image_token_index if config.model_type == "qwen3_vl" else config.image_token_id
        )
        self.words = ComparisonTokenizer(processor.tokenizer, self.image_token_id)
        self.features = FeatureStore(self.model.vision_tower, processor.image_processor, max_pixels)
        self.ends = _end_ids(config, processor.tokenizer)
        self.silent = self._silent_ids()
        self._silence = self._silencing()

    @property
    def language(self) -> Any:
        """The language model: its trunk in `.model`, its head beside it or tied."""
        return self.model.language_model

    @property
    def context(self) -> int:
        """How many tokens the model can read."""
        return int(self.language.args.max_position_embeddings)

    @property
    def layer_count(self) -> int:
        """How many layers the language model has."""
        return len(self.language.model.layers)

    def prompt(self, first: ImageLike, second: ImageLike, prompt: str, form: Form, think: bool) -> ComparisonInput:
        """A comparison of two images as they are shown, ready to run."""
        return self.prompt_of((self.features.get(first), self.features.get(second)), prompt, form, think)

    def prompt_of(self, images: tuple[Features, Features], prompt: str, form: Form, think: bool) -> ComparisonInput:
        """As `prompt`, of images that were encoded before."""
        tokens = self.words.comparison(prompt, form, think)
        pads = [[self.image_token_id] * image.tokens for image in images]
        ids = [*tokens.before_first, *pads[0], *tokens.before_second, *pads[1], *tokens.after]
        if len(ids) > self.context:
            sizes = f"{len(ids)} tokens, {images[0].tokens} and {images[1].tokens} of them for the images"
            raise DataError(
                f"a comparison takes {sizes}; the model reads at most {self.context}: "
                "give a smaller --max-pixels or a shorter prompt"
            )
        texts = len(tokens.before_first), len(tokens.before_second), len(tokens.after)
        positions = image_positions([texts[0], images[0].grid, texts[1], images[1].grid, texts[2]])
        cuts = texts[0], texts[0] + images[0].tokens + texts[1]
        return ComparisonInput(np.array(ids, np.int32), positions.ids, images, positions.following, cuts)

    def prefill(self, prompts: Sequence[ComparisonInput]) -> tuple[BranchedKVCache, mx.array]:
        """Run B prompts; returns their keys and values, and the logits (B, V) after each row's last token."""
        block = self.block(prompts)
        ends = np.array([len(prompt) - 1 for prompt in prompts])
        states, kept = run_block(self.language.model, block, recompute=False, ends=ends, in_turn=True)
        return BranchedKVCache.of(block.owners, kept), self.head(states)

    def hidden(self, prompts: Sequence[ComparisonInput]) -> tuple[BranchedKVCache, mx.array]:
        """Run B prompts of any lengths as right-padded rows; returns keys and values, and hidden states (B, L, D)."""
        block = self.block(prompts)
        hidden, kept = run_block(self.language.model, block, recompute=False)
        return BranchedKVCache.of(block.owners, kept), hidden

    def block(self, segments: Sequence[TokenSegment]) -> Block:
        """B segments as right-padded rows, with the images' features in their places."""
        ids, positions = _padded(segments)
        embeddings = self.language.model.embed_tokens(mx.array(ids))
        owners = owners_of([len(segment) for segment in segments], ids.shape[1])
        images = [image for segment in segments for image in segment.images]
        if not images:
            return Block(embeddings, mx.array(positions), owners)
        distinct = list({id(image): image for image in images}.values())
        starts = dict(zip(map(id, distinct), np.cumsum([0] + [x.tokens for x in distinct]).tolist(), strict=False))
        is_image = ids == self.image_token_id
        index = np.zeros(ids.shape, np.int32)
        index[is_image] = np.concatenate([starts[id(image)] + np.arange(image.tokens) for image in images])
        place, here = mx.array(index), mx.array(is_image)[..., None]

        def placed(features: Sequence[mx.array], elsewhere: mx.array | int) -> mx.array:
            return mx.where(here, mx.concatenate(list(features)).astype(embeddings.dtype)[place], elsewhere)

        return Block(
            placed([image.merged for image in distinct], embeddings),
            mx.array(positions),
            owners,
            [placed(level, 0) for level in zip(*(image.deepstack for image in distinct), strict=True)],
        )

    def extend(
        self, rows: BranchedKVCache, ids: mx.array, positions: mx.array, turning: RotaryTables = None
    ) -> mx.array:
        """Run a block of text tokens (B, N) that was announced to the rows, at positions (B, N): states (B, N, D).

        `turning` is what `turning` gives for these positions, for who made it before.
        """
        trunk = self.language.model
        turning = turning or self.turning(positions)
        places = mx.broadcast_to(positions, (3, *ids.shape))
        return run_step(trunk, trunk.embed_tokens(ids), places, turning, rows.layers, rows.next_mask(ids.shape[1]))

    def turning(self, positions: mx.array) -> RotaryTables:
        """Cosines and sines (B, N, width) of text at positions (B, N), in the type of the model's states."""
        like = self.language.model.embed_tokens(mx.array([[0]]))
        return rotary_tables(self.language.model, like, mx.broadcast_to(positions, (3, *positions.shape)))

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (..., V) in float32 of hidden states (..., D); the silent tokens can never be chosen."""
        language = self.language
        tied = language.args.tie_word_embeddings
        output = language.model.embed_tokens.as_linear if tied else language.lm_head
        logits: mx.array = output(hidden).astype(mx.float32) + self._silence
        if hidden.dtype == mx.float32:
            return logits
        # Half precision puts a logit of 10 on a grid of 1/16: what judges answer with is computed again, in float32.
        ids, rows = self._answers
        return mx.put_along_axis(
            logits, mx.broadcast_to(ids, (*logits.shape[:-1], ids.size)), hidden.astype(mx.float32) @ rows.T, axis=-1
        )

    @cached_property
    def _answers(self) -> tuple[mx.array, mx.array]:
        """The ids of all variants of the labels, and their rows of the head in float32."""
        ids = mx.array([i for variants in self.words.label_ids for i in variants])
        language = self.language
        tied = language.args.tie_word_embeddings
        rows = language.model.embed_tokens(ids) if tied else _rows(language.lm_head, ids)
        rows = rows.astype(mx.float32)
        mx.eval(rows)
        return ids, rows

    def _silent_ids(self) -> list[int]:
        """What no completion may hold: placeholders of images and videos, and rows of the head that are no token."""
        config = self.model.config
        names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
        vision = {int(i) for name in names if (i := getattr(config, name, None)) is not None}
        rows = int(self.language.model.embed_tokens.weight.shape[0])
        pieces = self.words.pieces
        unused = {i for i in range(rows) if i >= len(pieces) or not pieces[i]}
        return sorted(vision | unused)

    def _silencing(self) -> mx.array:
        """What is added to logits (V,): minus infinity for the silent tokens, else 0."""
        added = np.zeros(int(self.language.model.embed_tokens.weight.shape[0]), np.float32)
        added[self.silent] = -np.inf
        return mx.array(added)


def _rows(layer: nn.Module, ids: mx.array) -> mx.array:
    """Rows of a linear layer's weight, quantized or not."""
    if not isinstance(layer, nn.QuantizedLinear):
        return layer.weight[ids]  # type: ignore[no-any-return]
    held: Any = layer
    biases = held.biases[ids] if held.get("biases") is not None else None
    return mx.dequantize(
        held.weight[ids], held.scales[ids], biases, group_size=layer.group_size, bits=layer.bits, mode=layer.mode
    )


def _padded(segments: Sequence[TokenSegment]) -> tuple[np.ndarray, np.ndarray]:
    """The ids (B, L) and positions (3, B, L) of segments, padded on the right to the longest."""
    columns = max(len(segment) for segment in segments)
    ids = np.zeros((len(segments), columns), np.int32)
    positions = np.zeros((3, len(segments), columns), np.int32)
    for row, segment in enumerate(segments):
        ids[row, : len(segment)] = segment.ids
        positions[:, row, : len(segment)] = segment.positions
    return ids, positions


def load_vlm(folder: Path | Checkpoint, max_pixels: int, dtype: mx.Dtype | None = None) -> VLM:
    """Load a checkpoint in the Hugging Face or the MLX layout; ModelError where it cannot be loaded.

    `dtype` is the type of every unquantized weight; None keeps the checkpoint's own on a GPU and takes float32 on
    a CPU, where half precision is some forty times slower.
    """
    checkpoint = Checkpoint.open(folder)
    path = checkpoint.folder
    check_folder(checkpoint)
    from mlx_vlm.utils import load

    try:
        with checkpoint.readable() as view, _random_state_kept():
            # Lazily, so that weights are converted one by one while they are read.
            model, processor = load(str(view), lazy=True, trust_remote_code=False)
        check_model(path, model)
        check_processor(path, model, processor)
        if dtype is None and mx.default_device().type == mx.DeviceType.cpu:
            dtype = mx.float32
        if dtype is not None:
            model.update(tree_map(lambda x: x.astype(dtype) if _is_float(x) else x, model.parameters()))
        model.eval()
        mx.eval(model.parameters())
        return VLM(model, processor, checkpoint, max_pixels)
    except MlxprefError:
        raise
    except Exception as error:  # mlx-vlm raises anything from KeyError to RuntimeError for a damaged folder
        raise ModelError(f"{path}: cannot be loaded: {one_line(error)}") from error


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Leave the caller's generators as they were: new layers draw weights, which those of the file replace at once."""
    state, (high, low) = random.getstate(), mx.random.state[0].tolist()
    try:
        yield
    finally:
        random.setstate(state)
        mx.random.seed(high << 32 | low)  # the two halves of a seed are MLX's state


def _end_ids(config: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a completion, as config, generation config and tokenizer name them."""
    named = getattr(config, "eos_token_id", None)
    ids = named if isinstance(named, list | tuple) else [named]
    return frozenset(int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None)


def _is_float(x: mx.array) -> bool:
    return bool(mx.issubdtype(x.dtype, mx.floating))
