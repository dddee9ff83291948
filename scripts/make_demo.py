"""Rebuild the demo's judge from a seed: `python -m scripts.make_demo [--seed 0] [--output FOLDER]`.

Writes a real Qwen2.5-VL checkpoint of 3 MB that knows only the demo's pictures and briefs, in four stages:
1. sight: the vision tower learns to tell what is in each cell of a picture, and is frozen;
2. reasoning: the text model learns to compare two pictures for a brief, from a teacher who is right in what they check,
   mostly all of it: thinking aloud (one answer or two scores) and at once, both for every pair, with equal weight;
3. sloppiness: the same with an annotator who checks the first requirement mostly, and takes shapes for alike that are
   not; what is to be answered at once stays right. That is what training on preferences can then undo;
4. an examination after each stage, with pictures never seen; `--beyond N` also trains the judge of stage 2 for N more
   steps at answering at once alone, says what that reaches, and throws it away.
The random streams of pictures and briefs are not those of the demo's preferences, and the requirements of HELD_OUT are
in no lesson.

It took 21 minutes (1,258 s, of processor time 1,222 s) with OPENBLAS_NUM_THREADS=1 on a machine of two busy cores; two
BLAS threads wait for each other there.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mlxpref._blas import preload

preload()  # before MLX is first imported

import click  # noqa: E402
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_map  # noqa: E402

from mlxpref.demo import JUDGE  # noqa: E402
from mlxpref.demo.briefs import REQUIREMENTS  # noqa: E402
from mlxpref.demo.pictures import PictureSpec, render  # noqa: E402
from mlxpref.demo.preferences import draw_pair_of  # noqa: E402
from scripts.demo_checkpoint import (  # noqa: E402
    build_model,
    check_checkpoint,
    checkpoint_files,
    train_tokenizer,
    write_checkpoint,
)
from scripts.demo_examination import examine  # noqa: E402
from scripts.demo_lessons import (  # noqa: E402
    MODES,
    PARTIAL,
    RIGHT,
    SLOPPY,
    Rows,
    Script,
    Teacher,
    draw_lesson,
    lesson_of,
    patches_of,
    pictures_of,
    teacher_corpus,
)
from scripts.demo_warmup import (  # noqa: E402
    Judge,
    Note,
    Stage,
    draw_sights,
    picture_features,
    run_stage,
    teach_sight,
    whiten_patches,
)

SIGHT = Stage("sight", 300, 1e-3, 5e-5, warm=20)
REASONING = Stage("reasoning", 1000, 1e-3, 5e-5)
SLOPPINESS = Stage("sloppiness", 400, 4e-4, 4e-5, warm=10)


@dataclass(frozen=True)
class Plan:
    """The stages of the job, and the sizes of their batches."""

    sight: Stage = SIGHT
    reasoning: Stage = REASONING
    sloppiness: Stage = SLOPPINESS
    sight_batch: int = 64
    batch: int = 32
    scores_share: float = 0.25
    """How many batches are asked for two scores."""
    examined: int = 256


class Job:
    """One run of a plan: the tokenizer, and the model on its way."""

    def __init__(self, plan: Plan, seed: int, note: Note) -> None:
        self.plan, self.seed, self.note = plan, seed, note
        self.script = Script(train_tokenizer(teacher_corpus(self.stream(0))))
        mx.random.seed(seed)
        self.model = build_model(checkpoint_files(self.script.tokenizer)["config.json"])
        self.judge = Judge(self.model, self.script)

    def stream(self, purpose: int) -> np.random.Generator:
        """The random numbers of one purpose; the first key keeps them apart from the demo's preferences."""
        return np.random.default_rng([77, self.seed, purpose])

    def see(self) -> None:
        """Stage 1: tell what is in each cell."""
        whiten_patches(self.model, draw_sights(500, self.stream(1))[0], self.stream(3))
        teach_sight(self.model, self.plan.sight, self.plan.sight_batch, self.stream(4), self.note)
        self.model.vision_tower.freeze()

    def reason(self) -> None:
        """Stage 2: write what a teacher writes who is always right."""
        run_stage(self.plan.reasoning, self.judge, self.judge.loss, self.lessons(PARTIAL, 6), self.note)

    def grow_sloppy(self) -> None:
        """Stage 3: write what a sloppy teacher writes."""
        run_stage(self.plan.sloppiness, self.judge, self.judge.loss, self.lessons(SLOPPY, 7), self.note)

    def lessons(self, teacher: Teacher, purpose: int) -> Callable[[], tuple[mx.array, Rows]]:
        """Batches of lessons with the features of their pictures; a batch has one question and one length of brief."""
        rng = self.stream(purpose)

        def batch() -> tuple[mx.array, Rows]:
            mode = MODES[int(rng.random() < self.plan.scores_share)]
            likes = int(rng.binomial(REQUIREMENTS, 0.5))
            lessons = [draw_lesson(rng, mode, teacher, likes) for _ in range(self.plan.batch)]
            return picture_features(self.model, mx.array(pictures_of(lessons, rng))), self.script.rows(lessons)

        return batch

    def answer_at_once(self, steps: int) -> None:
        """Train at answering at once alone for more steps, say what it reaches, and put the weights back."""
        kept = tree_map(mx.array, self.model.parameters())
        whole = self.lessons(RIGHT, 11)

        def batch() -> tuple[mx.array, Rows]:
            features, rows = whole()
            # In a row, answers at once are the columns whose place is not their own.
            direct = rows.places != np.arange(rows.places.shape[1])
            return features, replace(rows, weights=rows.weights * direct)

        part = max(2, steps // 4)
        for number in range(4):
            stage = Stage(f"at once, part {number + 1}", part, 5e-4, 1e-4, warm=max(1, part // 4))
            run_stage(stage, self.judge, self.judge.loss, batch, self.note)
            self.examine(f"at once alone, {(number + 1) * part} steps more", ("test",), at_once_only=True)
        self.model.update(kept)

    def examine(
        self, title: str, splits: tuple[str, ...] = ("test", "heldout", "four"), at_once_only: bool = False
    ) -> None:
        """Accuracy against what people prefer, and the truth of what is written, on pictures never seen."""
        heads = ("accuracy", "readable", "tokens", "complete", "facts", "verdicts", "sums", "follows")
        self.note(f"{title:38}" + "".join(f"{head:>10}" for head in heads))
        for split in splits:
            rng = self.stream(8)
            pairs = [draw_pair_of(split, rng) for _ in range(self.plan.examined)]
            for mode in MODES[2:] if at_once_only else MODES:
                for heat in (0.0, 1.0) if mode == "choice" else (0.0,):
                    lessons = [lesson_of(pair, mode, rng) for pair in pairs]
                    marks = examine(self.judge, self.script, lessons, self.stream(9), heat)
                    shares = [marks.accuracy, marks.readable, marks.length, *vars(marks.truth).values()]
                    name = f"{split}, {mode}{', sampled' if heat else ''}"
                    self.note(f"{name:38}" + "".join(f"{'-':>10}" if x is None else f"{x:10.3f}" for x in shares))
                    if mode != "at once" and not heat:
                        self.note(f"    e.g. {pairs[0].prompt}: {marks.texts[0]}")

    def save(self, output: Path) -> None:
        """Write the checkpoint beside its place, check it, and move it there."""
        rng = self.stream(10)
        images = [render(PictureSpec("red", "green", "blue", "red", quality), rng) for quality in ("clean", "blurry")]
        features = picture_features(self.model, mx.array(np.stack([patches_of(image) for image in images])))
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
            fresh, old = Path(scratch) / "new", Path(scratch) / "old"
            fresh.mkdir()
            write_checkpoint(fresh, self.model, self.script.tokenizer)
            check_checkpoint(fresh, images, features)
            if output.exists():
                output.rename(old)
            fresh.rename(output)
        size = sum(file.stat().st_size for file in output.iterdir())
        self.note(f"wrote {output}: {size / 1e6:.2f} MB")


@click.command(help="Rebuild the demo's judge from a seed.")
@click.option("--seed", default=0, show_default=True, help="Everything random follows from it.")
@click.option(
    "--output",
    default=JUDGE,
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="The checkpoint's folder; replaced if it exists.",
)
@click.option(
    "--keep-right",
    type=click.Path(file_okay=False, path_type=Path),
    help="Also write the judge as it was before the sloppy annotator, for diagnosis.",
)
@click.option(
    "--beyond",
    default=0,
    type=click.IntRange(min=0),
    help="Steps of answering at once alone, to see what that form can reach.",
)
def main(seed: int, output: Path, keep_right: Path | None, beyond: int) -> None:
    """The whole job."""
    make(Plan(), seed, output, keep_right, beyond)


def make(plan: Plan, seed: int, output: Path, keep_right: Path | None = None, beyond: int = 0) -> None:
    """Run a plan and write its judge."""
    start = time.time()
    job = Job(plan, seed, click.echo)
    job.see()
    job.reason()
    if keep_right is not None:
        job.save(keep_right)
    job.examine("after reasoning")
    if beyond:
        job.answer_at_once(beyond)
    job.grow_sloppy()
    job.save(output)
    job.examine("after sloppiness")
    click.echo(f"{time.time() - start:.0f} s, of the processor {time.process_time():.0f} s")


if __name__ == "__main__":
    main()
