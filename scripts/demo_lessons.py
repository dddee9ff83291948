"""What the demo judge is taught: pairs of pictures, and what a teacher writes about them, as rows of tokens."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from mlxpref.demo.briefs import REQUIREMENTS
from mlxpref.demo.pictures import QUALITIES, render
from mlxpref.demo.preferences import PairSpec, draw_pair
from mlxpref.demo.reasons import COUNTS, VERDICTS, Account, reasons_text, true_account
from mlxpref.engine.profile import PROMPT_SLOT, Form, own_profile

__all__ = [
    "IMAGE_TOKENS", "MODES", "PARTIAL", "SLOPPY", "Lesson", "Mode", "Rows", "Script", "Teacher", "image_columns",
    "patches_of", "pictures_of", "teacher_corpus",
]  # fmt: skip

Mode = Literal["choice", "scores", "at once"]
MODES: tuple[Mode, ...] = ("choice", "scores", "at once")
IMAGE_TOKENS = 9
PATCHES = 36
_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_END = "<|im_end|>"
_SIDE, _PATCH = 6, 14
_DECISION = 3.0
"""Loss weight of verdicts, sums, qualities and answers; all other tokens weigh 1."""
_PARTS = np.array([1.0, 0.5, 1.0], np.float32)
"""Loss weights of a batch's completions, of their answers once more, and of the answers at once."""
_ANSWER_END = 0.1
"""Loss weight of what stands behind an answer, beside 1 of the answer."""
_MOST = 10
"""The highest score."""


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


def patches_of(image: Image.Image) -> NDArray[np.uint8]:
    """An image as (36 patches, 14 * 14 * 3 values), patches in the order of the processor: by merged square."""
    pixels = np.asarray(image, np.uint8).reshape(_SIDE // 2, 2, _PATCH, _SIDE // 2, 2, _PATCH, 3)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 4, 2, 5, 6).reshape(PATCHES, -1))


@dataclass(frozen=True)
class Teacher:
    """How a teacher checks requirements.

    `checked` are the chances of checking 1, 2, 3 ... of them, `nods` the chance to say that two shapes are alike where
    they are not. Answers go by what was written, a coin where that is equal.
    """

    checked: tuple[float, ...] = (0.0,) * (REQUIREMENTS - 1) + (1.0,)
    nods: float = 0.0


RIGHT = Teacher()
PARTIAL = Teacher((0.2, 0.2, 0.6))
"""Who is right in what they check, but not always checks all: so what is written of the second image does not depend on
how much was written of the first. After lessons by RIGHT alone, those of SLOPPY left one colour in ten of the second
image wrong."""
SLOPPY = Teacher((0.6, 0.2, 0.2), 0.6)
"""The annotator who teaches last: looks at the first requirement mostly, and takes shapes for alike."""


@dataclass(frozen=True)
class Lesson:
    """A pair with a shown first, how it is asked, what the teacher writes about both images, and the answers."""

    pair: PairSpec
    mode: Mode
    accounts: tuple[Account, Account]
    answer: str
    at_once: str
    """The right answer: the teacher who errs in words does not in it."""

    @property
    def prompt(self) -> str:
        """The prompt of both pictures."""
        return self.pair.prompt


def draw_lesson(rng: np.random.Generator, mode: Mode, teacher: Teacher = RIGHT, likes: int | None = None) -> Lesson:
    """A random lesson with a brief of the taught requirements, `likes` of which compare two shapes."""
    return lesson_of(draw_pair(rng, likes=likes), mode, rng, teacher)


def lesson_of(pair: PairSpec, mode: Mode, rng: np.random.Generator, teacher: Teacher = RIGHT) -> Lesson:
    """What a teacher makes of a pair."""
    count = int(rng.choice(len(teacher.checked), p=teacher.checked)) + 1
    pictures = pair.a, pair.b
    true = [true_account(pair.brief, picture) for picture in pictures]
    first, second = (_look(account, count, teacher.nods, rng) for account in true)
    return Lesson(pair, mode, (first, second), _answer(mode, first, second, rng), _answer(mode, true[0], true[1], rng))


def _look(account: Account, count: int, nods: float, rng: np.random.Generator) -> Account:
    """What a teacher writes who checks `count` requirements."""
    checks = tuple(
        check._replace(fits=check.fits or (check.requirement.is_like and bool(rng.random() < nods)))
        for check in account.checks[:count]
    )
    return Account(checks, sum(check.fits for check in checks), account.quality)


def _answer(mode: Mode, first: Account, second: Account, rng: np.random.Generator) -> str:
    """1 or 2, or two scores from 0 to 10."""
    if mode == "scores":
        return " ".join(str(min(max(account.value - 1, 0), _MOST)) for account in (first, second))
    if first.value == second.value:
        return str(int(rng.integers(1, 3)))
    return "1" if first.value > second.value else "2"


def pictures_of(lessons: Sequence[Lesson], rng: np.random.Generator) -> NDArray[np.uint8]:
    """The pictures of lessons, two a lesson, as patches: (lessons * 2, 36, 588)."""
    return np.stack([patches_of(render(each, rng)) for lesson in lessons for each in (lesson.pair.a, lesson.pair.b)])


def completion(lesson: Lesson) -> str:
    """The teacher's whole completion."""
    profile = own_profile()
    reasons = reasons_text(*lesson.accounts)
    return f"{profile.think_begin}{reasons}{profile.closing}{lesson.answer}{profile.end}{_END}"


def direct_answer(lesson: Lesson) -> str:
    """The teacher's answer without reasons, behind what is not learned."""
    return f"{lesson.at_once}{own_profile().end}{_END}"


def teacher_corpus(rng: np.random.Generator) -> list[str]:
    """Every text that the judge reads or writes, for its tokenizer; control tokens left out."""
    texts: list[str] = [" ".join(COUNTS)]
    for i in range(600):
        lesson = draw_lesson(rng, MODES[i % 3])
        chat = rendered_chat(form_of(lesson.mode)).replace(PROMPT_SLOT, lesson.prompt)
        texts.append(_plain(chat) + _plain(completion(lesson)))
    return texts


def _plain(text: str) -> str:
    """A text without its control tokens and tags, cut where they stood."""
    return "\n".join(re.split(r"<[^>]*>", text))


@dataclass(frozen=True)
class Rows:
    """A batch: prompts behind the common beginning, completions, and answers at once behind those.

    An answer at once is a second continuation of the same prompt: its tokens stand in the place of the completion's
    first ones, and neither sees the other. All prompts of a batch have one length.
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    """Loss weight of every token, of the shape of `ids`, as are the places."""
    places: NDArray[np.int32]
    """The column whose position in the row each token takes."""
    visible: NDArray[np.bool_]
    """(rows, columns, columns): which columns a column attends to."""
    start: int
    """The first column of the completions."""


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
        words = [f" {word}" for word in (*VERDICTS, *COUNTS, *QUALITIES)]
        self._decisions = {self.encode(word)[0] for word in words} | {self.encode(str(i))[0] for i in range(10)}

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def prompt(self, text: str, mode: Mode) -> list[int]:
        """The ids of a prompt behind the common beginning, image places expanded."""
        ids = [*self.encode(f" {text}")]
        for i in self.encode(rendered_chat(form_of(mode)).split(PROMPT_SLOT)[1]):
            ids.extend([i] * (IMAGE_TOKENS if i == self.image_id else 1))
        return [*ids, *self.encode(own_profile().at_once)] if mode == "at once" else ids

    def rows(self, lessons: Sequence[Lesson]) -> Rows:
        """A right-padded batch of lessons whose prompts have one length."""
        prompts = [self.prompt(each.prompt, each.mode) for each in lessons]
        written = [self.encode(completion(each)) for each in lessons]
        lead, direct = self.encode(own_profile().at_once), [self.encode(direct_answer(each)) for each in lessons]
        start = len(prompts[0])
        ends = [start + len(text) for text in written]
        width = max(end + len(lead) + len(answer) for end, answer in zip(ends, direct, strict=True))
        shape = len(lessons), width
        ids, weights = np.full(shape, self.pad_id, np.int32), np.zeros((3, *shape), np.float32)
        places = np.tile(np.arange(width, dtype=np.int32), (len(lessons), 1))
        visible = np.tile(np.tri(width, dtype=np.bool_), (len(lessons), 1, 1))
        for i, end in enumerate(ends):
            row = [*prompts[i], *written[i], *lead, *direct[i]]
            ids[i, : len(row)] = row
            weights[0, i, start:end] = [_DECISION if each in self._decisions else 1.0 for each in written[i]]
            for part, last in enumerate((end, len(row)), start=1):  # the last two tokens end the answer
                first = last - 2 - len(self.encode(lessons[i].answer if part == 1 else lessons[i].at_once))
                weights[part, i, first : last - 2], weights[part, i, last - 2 : last] = 1.0, _ANSWER_END
            places[i, end:] -= end - start
            visible[i, end:, start:end] = False
        weights /= weights.sum(axis=(1, 2), keepdims=True)  # part, rows, columns
        return Rows(ids, np.einsum("prc,p->rc", weights, _PARTS), places, visible, start)

    def by_length(self, lessons: Sequence[Lesson], at_once: int) -> Iterator[list[int]]:
        """The numbers of lessons in parts of at most `at_once` whose prompts have one length."""
        lengths = np.array([len(self.prompt(each.prompt, each.mode)) for each in lessons])
        for length in np.unique(lengths):
            same = np.flatnonzero(lengths == length)
            for part in np.split(same, range(at_once, len(same), at_once)):
                yield part.tolist()


def image_columns(ids: Sequence[int], image_id: int) -> tuple[int, ...]:
    """Where each image's block of placeholders begins."""
    return tuple(i for i, (a, b) in enumerate(zip([-1, *ids], ids, strict=False)) if b == image_id and a != image_id)
