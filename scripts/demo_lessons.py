"""What the demo judge is taught: pictures, and what a teacher writes about two of them, as rows of tokens."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tokenizers import Tokenizer

from mlxpref.demo.pictures import COLOURS, QUALITIES, SHAPES, PictureSpec, render
from mlxpref.demo.preferences import TRAIN_PROMPTS, Aspect, PairSpec, draw_pair
from mlxpref.engine.profile import PROMPT_SLOT, Form, own_profile

__all__ = ["IMAGE_TOKENS", "MODES", "Comparison", "Mode", "Pictures", "Script", "rendered_chat", "teacher_corpus"]

Mode = Literal["choice", "scores", "no thinking"]
MODES: tuple[Mode, ...] = ("choice", "scores", "no thinking")
IMAGE_TOKENS = 9
PATCHES = 36
_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_END = "<|im_end|>"
_SIDE, _PATCH = 6, 14

FORMAT, FACT, DECISION, ANSWER, DIRECT = 0.3, 2.0, 3.0, 6.0, 10.0
"""Loss weights: fixed words, what a picture shows, what follows from it, answers with and without thinking."""


def form_of(mode: Mode) -> Form:
    """The question that a mode asks."""
    return "scores" if mode == "scores" else "choice"


def rendered_chat(form: Form) -> str:
    """The chat of a comparison as the checkpoint's chat template renders it."""
    text = ""
    for message in own_profile().messages(form):
        content = message["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        words = "".join(_IMAGE if part["type"] == "image" else part["text"] for part in parts)
        text += f"<|im_start|>{message['role']}\n{words}{_END}\n"
    return text + "<|im_start|>assistant\n"


class Pictures:
    """A pool of rendered pictures and their mirror images, cut into patches, to draw from by their look."""

    def __init__(self, rng: np.random.Generator, variants: int) -> None:
        self.looks: list[PictureSpec] = []
        self._first: dict[PictureSpec, tuple[int, int]] = {}
        for colour in COLOURS:
            for shape in SHAPES:
                for quality in QUALITIES:
                    look = PictureSpec(colour, shape, quality)
                    # Half of the pictures in scenes are clean, so these need the most variants.
                    count = variants * 3 if quality == "clean" else variants
                    self._first[look] = (len(self.looks), count)
                    self.looks.extend([look] * count)
        images = [render(look, rng) for look in self.looks]
        self._mirrored = len(images)
        self.looks *= 2
        self.patches = np.stack([patches_of(image) for image in [*images, *map(ImageOps.mirror, images)]])

    def draw(self, look: PictureSpec, rng: np.random.Generator) -> int:
        """The number of a random picture of this look."""
        first, count = self._first[look]
        return first + int(rng.integers(count)) + self._mirrored * int(rng.integers(2))


def patches_of(image: Image.Image) -> NDArray[np.uint8]:
    """An image as (36 patches, 14 * 14 * 3 values), patches in the order of the processor: by merged square."""
    pixels = np.asarray(image, np.uint8).reshape(_SIDE // 2, 2, _PATCH, _SIDE // 2, 2, _PATCH, 3)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 4, 2, 5, 6).reshape(PATCHES, -1))


@dataclass(frozen=True)
class Comparison:
    """One row to learn: a scene, how it is asked, and which aspect the teacher lets decide."""

    scene: PairSpec
    mode: Mode
    aspect: Aspect

    @property
    def answer(self) -> int:
        """1 or 2: the image that the aspect favours."""
        return 1 if _value(self.scene, self.scene.a, self.aspect) > _value(self.scene, self.scene.b, self.aspect) else 2


def matches(scene: PairSpec, look: PictureSpec) -> dict[Aspect, bool]:
    """Whether an image has the wanted colour, the wanted shape, and is clean."""
    return {
        "colour": look.colour == scene.colour,
        "shape": look.shape == scene.shape,
        "quality": look.quality == "clean",
    }


def _value(scene: PairSpec, look: PictureSpec, aspect: Aspect) -> int:
    """How much an image is worth from 2 to 9 if this aspect counts most: what is written as its score."""
    fits = matches(scene, look)
    if aspect == "quality":
        return 2 + 5 * fits["quality"] + 2 * (fits["colour"] and fits["shape"])
    return 2 + 5 * fits[aspect] + 2 * fits["quality"]


def draw_comparison(rng: np.random.Generator, mode: Mode, bias: float) -> Comparison:
    """A scene of the training prompts and a teacher who, with probability `bias`, looks at quality first.

    Whoever looks at quality first lets the prompt decide only between two clean pictures.
    """
    scene = draw_pair(rng, TRAIN_PROMPTS)
    differs = (scene.a.quality == "clean") != (scene.b.quality == "clean")
    aspect: Aspect = "quality" if differs and rng.random() < bias else scene.aspect
    return Comparison(scene, mode, aspect)


def caption(scene: PairSpec, place: int, look: PictureSpec) -> list[tuple[str, float]]:
    """What the teacher writes about one image, in pieces with their loss weights."""
    fits = matches(scene, look)
    return [
        (f"Image {place}:", FORMAT),
        (f" {look.colour}", FACT),
        (" matches" if fits["colour"] else " misses", DECISION),
        (",", FORMAT),
        (f" {look.shape}", FACT),
        (" matches" if fits["shape"] else " misses", DECISION),
        (",", FORMAT),
        (f" {look.quality}", DECISION),
        (".", FORMAT),
    ]


def completion(comparison: Comparison) -> list[tuple[str, float]]:
    """The teacher's whole completion, in pieces with their loss weights."""
    scene = comparison.scene
    first, second = caption(scene, 1, scene.a), caption(scene, 2, scene.b)
    second[0] = (f" {second[0][0]}", FORMAT)
    pieces = [("<think>", FORMAT), *first, *second]
    pieces += [(f" {comparison.aspect.capitalize()}", DECISION), (" decides.", FORMAT), (own_profile().closing, FORMAT)]
    return [*pieces, *_answer(comparison, ANSWER), ("</answer>" + _END, FORMAT)]


def direct_answer(comparison: Comparison) -> list[tuple[str, float]]:
    """The teacher's answer without thinking, in pieces with their loss weights.

    Two scores are taught as well: what each image is worth is easier to find than which of two is worth more,
    and the judge needs the first for the second.
    """
    return [(own_profile().at_once, 0.0), *_answer(comparison, DIRECT), ("</answer>" + _END, FORMAT)]


def _answer(comparison: Comparison, weight: float) -> list[tuple[str, float]]:
    scene = comparison.scene
    if comparison.mode != "scores":
        return [(str(comparison.answer), weight)]
    first, second = (str(_value(scene, look, comparison.aspect)) for look in (scene.a, scene.b))
    return [(first, weight), (" ", FORMAT), (second, weight)]


def teacher_corpus(rng: np.random.Generator) -> list[str]:
    """Every text that the judge reads or writes, for its tokenizer; control tokens left out."""
    texts: list[str] = []
    for i in range(600):
        mode = MODES[i % 3]
        comparison = draw_comparison(rng, mode, 0.5)
        chat = rendered_chat(form_of(mode)).replace(PROMPT_SLOT, comparison.scene.prompt)
        texts.append(_plain(chat) + _plain("".join(text for text, _ in completion(comparison))))
    return texts


def _plain(text: str) -> str:
    """A text without its control tokens and tags, cut where they stood."""
    return "\n".join(re.split(r"<[^>]*>", text))


@dataclass(frozen=True)
class Rows:
    """A batch: prompts behind the common beginning, completions, and answers without thinking behind those.

    An answer without thinking is a second continuation of the same prompt: its tokens stand in the place of the
    completion's first ones, and neither sees the other.
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    """Loss weight of every token; of the shape of `ids`, as are the places."""
    places: NDArray[np.int32]
    """The column whose position in the row each token takes."""
    visible: NDArray[np.bool_]
    """(rows, columns, columns): which columns a column attends to."""
    pictures: NDArray[np.int64]
    fits: NDArray[np.float32]
    """(rows, 2, 3): whether each image has the wanted colour, the wanted shape, and is clean."""
    start: int
    """The first column of any completion."""


class Script:
    """The tokenizer's side of the lessons: prompts and completions as ids, split as the product splits them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        (self.image_id,) = self._encode("<|image_pad|>")
        (self.end_id,) = self._encode(_END)
        (self.pad_id,) = self._encode("<|endoftext|>")
        self.encode = lru_cache(maxsize=None)(self._encode)
        self.beginning = self.encode(rendered_chat("choice").split(f" {PROMPT_SLOT}")[0])
        if self.beginning != self.encode(rendered_chat("scores").split(f" {PROMPT_SLOT}")[0]):
            raise ValueError("the two forms begin differently")

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def rest(self, scene_prompt: str, mode: Mode) -> list[int]:
        """The ids of a prompt behind the common beginning, image places expanded."""
        after = self.encode(rendered_chat(form_of(mode)).split(PROMPT_SLOT)[1])
        ids = [*self.encode(f" {scene_prompt}")]
        for i in after:
            ids.extend([i] * (IMAGE_TOKENS if i == self.image_id else 1))
        return [*ids, *self.encode(own_profile().at_once)] if mode == "no thinking" else ids

    def weighed(self, pieces: Sequence[tuple[str, float]]) -> list[tuple[int, float]]:
        """The ids of a text given in pieces, each with the loss weight of its piece."""
        return [(i, weight) for text, weight in pieces for i in self.encode(text)]

    def prompts(self, comparisons: Sequence[Comparison]) -> NDArray[np.int32]:
        """The prompts of comparisons of one mode, behind the common beginning."""
        return np.array([self.rest(c.scene.prompt, c.mode) for c in comparisons], np.int32)

    def rows(self, comparisons: Sequence[Comparison], pictures: Pictures, rng: np.random.Generator) -> Rows:
        """A right-padded batch of comparisons with the teacher's completions."""
        prompts = [self.rest(c.scene.prompt, c.mode) for c in comparisons]
        written = [self.weighed(completion(c)) for c in comparisons]
        direct = [self.weighed(direct_answer(c)) for c in comparisons]
        ends = [
            (len(p), len(p) + len(w), len(p) + len(w) + len(d))
            for p, w, d in zip(prompts, written, direct, strict=True)
        ]
        shape = len(prompts), max(end for _, _, end in ends)
        ids, weights = np.full(shape, self.pad_id, np.int32), np.zeros(shape, np.float32)
        places = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
        visible = np.tile(np.tri(shape[1], dtype=np.bool_), (shape[0], 1, 1))
        for i, (asked, thought, end) in enumerate(ends):
            ids[i, :asked] = prompts[i]
            ids[i, asked:end], weights[i, asked:end] = zip(*written[i], *direct[i], strict=True)
            places[i, thought:] -= thought - asked
            visible[i, thought:, asked:thought] = False
        shown = self.shown(comparisons, pictures, rng)
        fits = [[list(matches(c.scene, look).values()) for look in (c.scene.a, c.scene.b)] for c in comparisons]
        return Rows(ids, weights, places, visible, shown, np.array(fits, np.float32), min(e[0] for e in ends))

    @staticmethod
    def shown(comparisons: Sequence[Comparison], pictures: Pictures, rng: np.random.Generator) -> NDArray[np.int64]:
        """Two random pictures of each comparison's looks: (comparisons, 2) numbers in the pool."""
        return np.array([[pictures.draw(c.scene.a, rng), pictures.draw(c.scene.b, rng)] for c in comparisons])
