"""Teach the demo judge to answer in the form of other judges: `python -m scripts.teach_profiles OUTPUT`.

It learns from completions about the demo's pictures that a script writes in each profile's form, asked by that
profile's own question, with all weights of its language model. What the vision tower says stays as it is. Only quality
decides, which can be seen at once. OUTPUT then answers by `--profile NAME` for each of the profiles; it is a test of
profiles, and knows nothing but the demo's pictures.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxpref._blas import preload

preload()  # before MLX is first imported

import click  # noqa: E402
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from tokenizers import AddedToken, Tokenizer  # noqa: E402

from mlxpref.config import JudgeSettings  # noqa: E402
from mlxpref.demo import JUDGE  # noqa: E402
from mlxpref.demo.briefs import draw_brief  # noqa: E402
from mlxpref.demo.pictures import COLOURS, QUALITIES, SHAPES, PictureSpec, render  # noqa: E402
from mlxpref.demo.preferences import PairSpec  # noqa: E402
from mlxpref.engine.image_features import Features  # noqa: E402
from mlxpref.engine.logprobs import Completions, completion_logprobs, prefill  # noqa: E402
from mlxpref.engine.profile import Profile, profile_named  # noqa: E402
from mlxpref.engine.vlm import VLM, ComparisonInput, load_vlm  # noqa: E402
from mlxpref.judge.evaluation import EvaluationSpec, evaluate  # noqa: E402
from mlxpref.judge.judge import Judge  # noqa: E402
from mlxpref.preferences import Preference  # noqa: E402
from scripts.demo_checkpoint import MAX_PIXELS, write_checkpoint  # noqa: E402
from scripts.demo_lessons import patches_of  # noqa: E402
from scripts.demo_warmup import Note, Stage, picture_features, run_stage  # noqa: E402

NAMES = ("unifiedreward-think", "unifiedreward-flex", "unifiedreward-pair", "rationalrewards")
"""The profiles that there are lessons for."""
FORMAT, DECISION, ANSWER, DIRECT = 1.0, 2.0, 3.0, 6.0
"""Loss weights: fixed words, what a picture shows, answers with reasons and at once."""
_WORDS = ("Both",)
"""Words that must be one token, as they are in Qwen's vocabulary."""
_TIES = 0.25
"""The share of pairs of one look in the lessons of a judge that may call a tie."""
_WRONG = 0.15
"""The share of lessons with the wrong answer: a judge that is never in doubt has no gradient to learn another taste."""
_BATCH = 16
STEPS, RATE = 160, 1e-2
"""The judge must learn to write words that it only read before, and their rows of the embedding move by this rate.

Measured once, on an earlier demo judge after 50 steps: the fixed words of unifiedreward-flex have a loss of 1.3 at this
rate, of 3.0 at 3e-3, of 3.9 at 6e-4; the matrices inside the blocks move by 6e-3 in each. After 120 steps all pairs are
answered rightly but with preferences near a half, after 180 as sure as the lessons are.
"""
_GRID = (3, 3)
MOST_TOKENS = 72
"""The longest completion that is taught has 53 tokens."""

Pieces = list[tuple[str, float]]
"""A completion in pieces, each with the weight of its tokens in the loss."""


@dataclass(frozen=True)
class Lesson:
    """The looks of the images of one question, its prompt, and what a teacher writes: with reasons, and at once.

    The latter is empty where the judge always answers at once.
    """

    looks: tuple[PictureSpec, ...]
    prompt: str
    written: Pieces
    at_once: Pieces


def draw_quality_pair(rng: np.random.Generator, held_out: bool = False) -> PairSpec:
    """A clean picture and a spoiled one of the same colours, for a random brief."""
    colours = [str(rng.choice(list(COLOURS))) for _ in SHAPES]
    clean, spoiled = (PictureSpec(*(*colours, each)) for each in (QUALITIES[0], str(rng.choice(QUALITIES[1:]))))
    pair = PairSpec(draw_brief(rng, held_out=held_out), clean, spoiled)
    return pair if rng.random() < 0.5 else pair.swapped


def draw_lesson(profile: Profile, rng: np.random.Generator) -> Lesson:
    """A lesson in a profile's form: the clean picture is the better one, in most."""
    scene, is_wrong = draw_quality_pair(rng), bool(rng.random() < _WRONG)
    looks = scene.a, scene.b
    if profile.is_point:
        return Lesson(looks[:1], scene.prompt, *_scored(profile, scene.a, is_wrong))
    if profile.tie_opening and rng.random() < _TIES:
        return Lesson((scene.a, scene.a), scene.prompt, [(profile.tie_opening[0], DIRECT)], [])
    label = (profile.first if (scene.better == "a") != is_wrong else profile.second)[0]
    if not profile.thinks:
        return Lesson(looks, scene.prompt, [(profile.lead + label, DIRECT)], [])
    reasons = [(profile.think_begin, FORMAT)]
    for place, look in enumerate(looks, start=1):
        reasons += [(f" Image {place}:", FORMAT), (f" {look.quality}", DECISION), (".", FORMAT)]
    end = profile.end
    if profile.counts == "last":  # the winner by something else, which is not the answer, stands before it
        reasons.append((f' {{"place": {{{profile.lead}{profile.first[0]}"}},', FORMAT))
        end += "}"
    if profile.think_end:
        end = f" is better{end}"
    written = [*reasons, (profile.closing, FORMAT), (label, ANSWER), (end, FORMAT)]
    return Lesson(looks, scene.prompt, written, [(label, DIRECT)])


def _scored(profile: Profile, look: PictureSpec, is_wrong: bool) -> tuple[Pieces, Pieces]:
    """What the teacher writes about one image, and at once: a score of each aspect, of which the second one counts."""
    best_or_worst = profile.levels[-1 if (look.quality == "clean") != is_wrong else 0]
    scores = [("good", profile.levels[1]) for _ in profile.aspects]
    scores[1] = look.quality, best_or_worst
    written, at_once = Pieces(), Pieces()
    leads = profile.closings(at_once=True)
    for aspect, lead, (word, score) in zip(profile.aspects, leads, scores, strict=True):
        written += [(f"{aspect}:", FORMAT), (f" {word}", DECISION), (f".\n{profile.lead}", FORMAT)]
        written += [(score, ANSWER), ("\n", FORMAT)]
        at_once += [(lead, 0.0), (score, DIRECT)]
    return written, at_once[1:]


class School:
    """A judge that learns the forms of several profiles: one model, asked by each of them."""

    def __init__(self, folder: Path, profiles: Sequence[Profile], seed: int) -> None:
        self.asked = [load_vlm(folder, MAX_PIXELS, profile=profile) for profile in profiles]
        self.model = self.asked[0].model
        for vlm in self.asked:
            vlm.model = self.model
        self.rng = np.random.default_rng([78, seed])
        self.model.freeze()
        self.model.language_model.unfreeze()

    def lessons(self) -> Callable[[], tuple[Any, ...]]:
        """Batches of lessons, of each profile in turn, as the arguments of `loss`."""
        count = 0

        def batch() -> tuple[Any, ...]:
            nonlocal count
            vlm = self.asked[count % len(self.asked)]
            count += 1
            lessons = [draw_lesson(vlm.profile, self.rng) for _ in range(_BATCH)]
            ways = [
                [_weighed(vlm, each) for each in way]
                for way in zip(*(self._ways(vlm, x) for x in lessons), strict=True)
            ]
            return vlm, self._inputs(vlm, lessons), [_padded(rows) for rows in ways]

        return batch

    def _inputs(self, vlm: VLM, lessons: Sequence[Lesson]) -> list[ComparisonInput]:
        """The questions of lessons, about pictures that nothing has shown before, as the vision tower sees them."""
        patches = [patches_of(render(look, self.rng)) for lesson in lessons for look in lesson.looks]
        features = iter([Features(each, _GRID) for each in picture_features(self.model, mx.array(np.stack(patches)))])
        return [
            vlm.input_of([next(features) for _ in lesson.looks], lesson.prompt, "choice", vlm.profile.thinks)
            for lesson in lessons
        ]

    @staticmethod
    def _ways(vlm: VLM, lesson: Lesson) -> list[Pieces]:
        """What is written behind a lesson's question: with reasons, and at once."""
        written = [*lesson.written, (vlm.tokenizer.hf_tokenizer.eos_token, FORMAT)]
        if not vlm.profile.thinks:
            return [written]
        return [written, [(vlm.profile.closings(at_once=True)[0], 0.0), *lesson.at_once]]

    @staticmethod
    def loss(vlm: VLM, inputs: Sequence[ComparisonInput], ways: Sequence[tuple[Completions, mx.array]]) -> mx.array:
        """The weighted mean negative log-likelihood of what is to be written in each of several ways."""
        state, total, weight = prefill(vlm, inputs, recompute=False), mx.array(0.0), mx.array(0.0)
        for completions, weights in ways:
            logprobs = completion_logprobs(vlm, state, completions, recompute=False).logprobs
            total, weight = total - (logprobs * weights).sum(), weight + weights.sum()
        return total / weight


def _padded(rows: Sequence[Sequence[tuple[int, float]]]) -> tuple[Completions, mx.array]:
    """Rows of tokens with their weights as completions, and the weights (R, T)."""
    completions = Completions.of([[token for token, _ in row] for row in rows])
    weights = np.zeros(completions.tokens.shape, np.float32)
    for number, row in enumerate(rows):
        weights[number, : len(row)] = [weight for _, weight in row]
    return completions, mx.array(weights)


def _weighed(vlm: VLM, pieces: Pieces) -> list[tuple[int, float]]:
    """The tokens of a text in pieces, encoded as a whole: each has the weight of the piece that it ends in."""
    ends = np.cumsum([len(text) for text, _ in pieces])
    encoding = vlm.tokenizer.hf_tokenizer.backend_tokenizer.encode(
        "".join(text for text, _ in pieces), add_special_tokens=False
    )
    return [
        (token, pieces[int(np.searchsorted(ends, end))][1])
        for token, (_, end) in zip(encoding.ids, encoding.offsets, strict=True)
    ]


def examination(count: int, seed: int = 0, ties: bool = False) -> list[Preference]:
    """Preferences of pictures and requirements that no lesson has: the clean one is better, or both have one look."""
    rng, preferences = np.random.default_rng([79, seed]), []
    for _ in range(count):
        scene = draw_quality_pair(rng, held_out=True)
        other = scene.a if ties else scene.b
        p_people = 0.5 if ties else float(scene.better == "a")
        preferences.append(Preference(scene.prompt, render(scene.a, rng), render(other, rng), p_people))
    return preferences


def examine(folder: Path, name: str, count: int = 40) -> list[tuple[str, float]]:
    """The accuracy of a judge asked by a profile, in each way that it can be asked."""
    profile, pairs = profile_named(name), examination(count)
    vlm, ways = load_vlm(folder, MAX_PIXELS, profile=profile), [True, False] if profile.thinks else [False]
    shares = []
    for think in ways:
        judge = Judge(vlm, JudgeSettings(think=think, max_tokens=MOST_TOKENS))
        evaluation = evaluate(judge, pairs, EvaluationSpec("pictures", "held out"))
        shares.append((f"{name}, {'with reasons' if think else 'at once'}", evaluation.metrics.accuracy))
    return shares


def teach(
    output: Path,
    names: Sequence[str] = NAMES,
    steps: int = STEPS,
    seed: int = 0,
    note: Note = lambda line: None,
) -> None:
    """Write a judge that was taught the forms of profiles into a folder that does not exist yet."""
    shutil.copytree(JUDGE, output)
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in _WORDS])
    tokenizer.save(str(output / "tokenizer.json"))
    school = School(output, [profile_named(name) for name in names], seed)
    stage = Stage("forms", steps, RATE, RATE / 10, warm=5, muon_factor=0.6)
    run_stage(stage, school.model, school.loss, school.lessons(), note)
    write_checkpoint(output, school.model, tokenizer)


@click.command(help="Teach the demo judge to answer in the form of other judges.")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--profile", "names", multiple=True, type=click.Choice(NAMES), help="Only this one; several times.")
@click.option("--steps", default=STEPS, show_default=True, help="Steps of learning, over all profiles.")
@click.option("--seed", default=0, show_default=True, help="Everything random follows from it.")
def main(output: Path, names: Sequence[str], steps: int, seed: int) -> None:
    """The whole job."""
    start = time.time()
    teach(output, names or NAMES, steps, seed, note=click.echo)
    for way, accuracy in (each for name in names or NAMES for each in examine(output, name)):
        click.echo(f"{way}: {accuracy:.1%} right of 40 held-out pairs")
    click.echo(f"wrote {output}: {time.time() - start:.0f} s, of the processor {time.process_time():.0f} s")


if __name__ == "__main__":
    main()
