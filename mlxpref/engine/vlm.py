"""The seam to mlx-vlm: a checkpoint as a stateless function from comparisons to logits.

This file bypasses the state of mlx-vlm's models (positions, rope deltas): it encodes images once, builds embeddings,
passes explicit positions, and runs the language model's layers on our own caches.

Axes: B rows, L columns, N new columns, D width of a hidden state, V tokens of the vocabulary.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from numpy.typing import NDArray

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.checks import check_folder, check_processor
from mlxpref.engine.branched_cache import BranchedCache, row_branch_ids
from mlxpref.engine.decoder import cache_of, run_block, run_step
from mlxpref.engine.image_features import Features, FeatureStore
from mlxpref.engine.layers import Block, RotaryTables, StepContext, rotary_tables
from mlxpref.engine.mlx_model import lazy_model
from mlxpref.engine.positions import image_positions
from mlxpref.engine.profile import Form, Profile, own_profile
from mlxpref.engine.tokenizer import ComparisonTokenizer
from mlxpref.errors import DataError, MlxprefError, ModelError
from mlxpref.preferences import ImageLike
from mlxpref.text import one_line


@dataclass(frozen=True, eq=False)
class TokenSegment:
    """Token ids (L,) in a row, their positions (3, L), and the features of the images among them."""

    ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    images: tuple[Features, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class ComparisonInput(TokenSegment):
    """One comparison, ready to run: `next_position` is the position after it, `opening` the completion's text in it.

    `cuts` are the starts of its first image and of what follows on that: the second image, or the end of the question
    about a single one. Comparisons with the same tokens before the first cut share them; so do all opponents of a first
    image with those before the second, and all prompts, where the profile puts the prompt behind the images. `form` and
    `think` are the question that it asks.
    """

    next_position: int
    cuts: tuple[int, int] = (0, 0)
    opening: str = ""
    form: Form = "choice"
    think: bool = True

    @property
    def parts(self) -> tuple[TokenSegment, TokenSegment, TokenSegment]:
        """What comes before the first image, that image, and the rest."""
        first, second = self.cuts
        return (
            TokenSegment(self.ids[:first], self.positions[:, :first], ()),
            TokenSegment(self.ids[first:second], self.positions[:, first:second], self.images[:1]),
            TokenSegment(self.ids[second:], self.positions[:, second:], self.images[1:]),
        )


class VLM:
    """A loaded vision-language model: text and images in, logits out; no state but cached image features.

    `eos_ids` end a completion; completions never contain `suppressed_ids`: placeholders of images and videos, and rows
    of the head that are no token. `is_unreadable` is set once its user was told that it comes to no answer.
    """

    def __init__(
        self, model: nn.Module, processor: Any, checkpoint: Checkpoint, max_pixels: int, profile: Profile | None = None
    ) -> None:
        self.model: Any = model
        self.checkpoint, self.profile = checkpoint, profile or own_profile()
        self.is_unreadable = False
        config = self.model.config
        self.image_token_id = int(config.image_token_id)
        self.tokenizer = ComparisonTokenizer(processor.tokenizer, self.image_token_id, self.profile)
        self.features = FeatureStore(self.model.vision_tower, processor.image_processor, max_pixels)
        self.eos_ids = _eos_ids(config, processor.tokenizer)
        rows = int(self.decoder.embed_tokens.weight.shape[0])  # V
        self.suppressed_ids = _suppressed_ids(config, self.tokenizer.vocabulary, rows)
        suppression = np.zeros(rows, np.float32)
        suppression[self.suppressed_ids] = -np.inf
        self._suppression = mx.array(suppression)  # (V,), added to logits

    @property
    def language_model(self) -> Any:
        """The language model: its layers in `.model`, its head next to them or tied."""
        return self.model.language_model

    @property
    def decoder(self) -> Any:
        """The language model's embedding, layers and norm."""
        return self.model.language_model.model

    @property
    def context(self) -> int:
        """How many tokens the model can read."""
        return int(self.language_model.args.max_position_embeddings)

    def input(self, first: ImageLike, second: ImageLike, prompt: str, form: Form, think: bool) -> ComparisonInput:
        """A comparison of two images in the order shown; DataError for an unreadable image, and as in `input_of`."""
        return self.input_of((self.features.get(first), self.features.get(second)), prompt, form, think)

    def input_of(
        self, images: Sequence[Features], prompt: str, form: Form, think: bool, criterion: str = ""
    ) -> ComparisonInput:
        """The comparison of two encoded images, or the question about one, by the user's own `criterion`, if any.

        DataError where it is too long for the model.
        """
        tokens = self.tokenizer.comparison(prompt, form, think, criterion)
        ids, layout = list(tokens.texts[0]), list[Any]([len(tokens.texts[0])])
        starts = []
        for image, text in zip(images, tokens.texts[1:], strict=True):
            starts.append(len(ids))
            ids += [*[self.image_token_id] * image.tokens, *text]
            layout += [image.grid, len(text)]
        if len(ids) > self.context:
            sizes = f"{len(ids)} tokens, {' and '.join(str(image.tokens) for image in images)} of them for the images"
            raise DataError(
                f"a comparison takes {sizes}; the model reads at most {self.context}: "
                f"give a smaller --max-pixels or a shorter {'criterion or ' if criterion else ''}prompt"
            )
        positions, following = image_positions(layout)
        cuts = starts[0], starts[1] if len(starts) > 1 else starts[0] + images[0].tokens
        array = np.array(ids, np.int32)
        return ComparisonInput(array, positions, tuple(images), following, cuts, tokens.opening, form, think)

    def prefill(self, comparisons: Sequence[ComparisonInput]) -> tuple[BranchedCache, mx.array]:
        """Run B comparisons; returns what the layers remember, and the logits (B, V) after each row's last token."""
        block = self.block(comparisons)
        last = np.array([len(comparison) - 1 for comparison in comparisons])
        states, layers = run_block(self.decoder, block, recompute=False, last_positions=last, eval_each_piece=True)
        return cache_of(self.decoder, block.branch_ids, layers), self.head(states)

    def block(self, segments: Sequence[TokenSegment]) -> Block:
        """B segments as right-padded rows, with the images' features in their places."""
        ids, positions = _pad(segments)
        embeddings = self.embed(mx.array(ids))  # (B, L, D)
        branch_ids = row_branch_ids([len(segment) for segment in segments], ids.shape[1])
        images = [image for segment in segments for image in segment.images]
        if not images:
            return Block(embeddings, mx.array(positions), branch_ids)
        distinct = list({id(image): image for image in images}.values())
        starts = dict(zip(map(id, distinct), np.cumsum([0] + [x.tokens for x in distinct]).tolist(), strict=False))
        is_image = ids == self.image_token_id
        index = np.zeros(ids.shape, np.int32)  # (B, L): the row of an image token among all images' tokens
        index[is_image] = np.concatenate([starts[id(image)] + np.arange(image.tokens) for image in images])
        rows, image_mask = mx.array(index), mx.array(is_image)[..., None]  # (B, L), (B, L, 1)

        def place(features: Sequence[mx.array], elsewhere: mx.array | int) -> mx.array:
            tokens = mx.concatenate(list(features)).astype(embeddings.dtype)  # (all images' tokens, D)
            return mx.where(image_mask, tokens[rows], elsewhere)  # (B, L, D)

        return Block(
            place([image.merged for image in distinct], embeddings),
            mx.array(positions),
            branch_ids,
            [place(level, 0) for level in zip(*(image.deepstack for image in distinct), strict=True)],
        )

    def embed(self, ids: mx.array) -> mx.array:
        """The embeddings (..., D) of ids, in the type of the weights that are never quantized.

        An mxfp4 embedding gives bfloat16, whatever the others are in.
        """
        embeddings: mx.array = self.decoder.embed_tokens(ids)
        return embeddings.astype(self.model.vision_tower.patch_embed.proj.weight.dtype)

    def extend(
        self,
        cache: BranchedCache,
        ids: mx.array,
        positions: mx.array,
        rotary: RotaryTables = None,
        experts: list[mx.array] | None = None,
    ) -> mx.array:
        """Run text tokens (B, N) at positions (B, N), for which the cache has reserved room: states (B, N, D).

        `rotary` are the tables of these positions, if the caller has them; `experts` receives those of the tokens, (B *
        N, K) for each layer with experts.
        """
        rotary = rotary or self.rotary_tables(positions)
        axes = mx.broadcast_to(positions, (3, *ids.shape))  # (3, B, N)
        embeddings = self.embed(ids)
        context = StepContext(axes, rotary, cache.next_mask(ids.shape[1]), cache.columns, experts)
        return run_step(self.decoder, embeddings, context, cache)

    def rotary_tables(self, positions: mx.array) -> RotaryTables:
        """Cosines and sines (B, N, width) of text at positions (B, N), in the type of the model's states."""
        like = self.embed(mx.array([[0]]))
        return rotary_tables(self.decoder, like, mx.broadcast_to(positions, (3, *positions.shape)))

    def head(self, states: mx.array) -> mx.array:
        """Logits (..., V) in float32 of hidden states (..., D), minus infinity for the suppressed tokens."""
        tied = self.language_model.args.tie_word_embeddings
        output = self.decoder.embed_tokens.as_linear if tied else self.language_model.lm_head
        logits: mx.array = output(states).astype(mx.float32) + self._suppression
        if states.dtype == mx.float32:
            return logits
        # Half precision rounds a logit of 10 to 1/16: compute the labels' logits again, in float32. A sum of products,
        # as CUDA multiplies matrices of float32 with ten bits of fraction (TF32).
        ids, rows = self._label_rows
        labels = (states.astype(mx.float32)[..., None, :] * rows).sum(axis=-1)  # (..., 1, D) * (labels, D)
        return mx.put_along_axis(logits, mx.broadcast_to(ids, labels.shape), labels, axis=-1)

    @cached_property
    def _label_rows(self) -> tuple[mx.array, mx.array]:
        """The ids (labels,) of all variants of labels and ties, and their rows of the head (labels, D) in float32."""
        ids = mx.array([*(i for ids in self.tokenizer.label_ids for i in ids), *self.tokenizer.tie_opening_ids])
        tied = self.language_model.args.tie_word_embeddings
        rows = self.decoder.embed_tokens(ids) if tied else _linear_rows(self.language_model.lm_head, ids)
        rows = rows.astype(mx.float32)
        mx.eval(rows)
        return ids, rows


def _linear_rows(layer: Any, ids: mx.array) -> mx.array:
    """Rows (ids, D) of a linear layer's weight, quantized or not."""
    if not isinstance(layer, nn.QuantizedLinear):
        return layer.weight[ids]  # type: ignore[no-any-return]
    layer = cast("Any", layer)
    biases = None if layer.get("biases") is None else layer.biases[ids]
    return mx.dequantize(
        layer.weight[ids], layer.scales[ids], biases, group_size=layer.group_size, bits=layer.bits, mode=layer.mode
    )


def _pad(segments: Sequence[TokenSegment]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The ids (B, L) and positions (3, B, L) of segments, padded on the right to the longest."""
    columns = max(len(segment) for segment in segments)
    ids = np.zeros((len(segments), columns), np.int32)
    positions = np.zeros((3, len(segments), columns), np.int32)
    for row, segment in enumerate(segments):
        ids[row, : len(segment)] = segment.ids
        positions[:, row, : len(segment)] = segment.positions
    return ids, positions


def load_vlm(
    folder: Path | Checkpoint, max_pixels: int, dtype: mx.Dtype | None = None, profile: Profile | None = None
) -> VLM:
    """Load a checkpoint in the Hugging Face or the MLX layout; ModelError where it cannot be loaded.

    `profile` is how it is asked, None in our own way.
    `dtype` is the type of every unquantized weight; None keeps the checkpoint's own on a GPU and takes float32 on
    a CPU, where half precision is some forty times slower.
    """
    checkpoint = Checkpoint.open(folder)
    path = checkpoint.folder
    check_folder(checkpoint)
    from mlx_vlm.utils import load_processor

    try:
        with _random_state_kept():
            model: Any = lazy_model(checkpoint)
        with checkpoint.readable() as view:
            processor = load_processor(view, eos_token_ids=model.config.eos_token_id, trust_remote_code=False)
        check_processor(path, model, processor)
        if dtype is None and mx.default_device().type == mx.DeviceType.cpu:
            dtype = mx.float32
        if dtype is not None:
            model.update(tree_map(lambda x: _as_type(x, dtype), model.parameters()))
        model.eval()
        vlm = VLM(model, processor, checkpoint, max_pixels, profile)
        _ = vlm.tokenizer.label_ids  # raises, before the weights are read, for labels that are no tokens
        mx.eval(model.parameters())
        return vlm
    except MlxprefError:
        raise
    except Exception as error:  # mlx-vlm raises anything from KeyError to RuntimeError for a damaged folder
        raise ModelError(f"{path}: cannot be loaded: {one_line(error)}") from error


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore the caller's generators: new layers draw random weights before the file's replace them."""
    state = random.getstate()
    high, low = mx.random.state[0].tolist()  # type: ignore[index]  # MLX's stubs call it an object
    try:
        yield
    finally:
        random.setstate(state)
        mx.random.seed(high << 32 | low)  # the two halves of a seed are MLX's state


def _as_type(x: mx.array, dtype: mx.Dtype) -> mx.array:
    return x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) else x


def _eos_ids(config: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a completion, from config, generation config and tokenizer."""
    value = getattr(config, "eos_token_id", None)
    ids = value if isinstance(value, list | tuple) else [value]
    return frozenset(int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None)


def _suppressed_ids(config: Any, vocabulary: Sequence[str], rows: int) -> list[int]:
    """The ids of placeholders, and those of a head's `rows` that are no token."""
    names = ("image_token_id", "video_token_id")
    placeholders = {int(i) for name in names if (i := getattr(config, name, None)) is not None}
    return sorted(placeholders | {i for i in range(rows) if i >= len(vocabulary) or not vocabulary[i]})
