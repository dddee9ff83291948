"""Rebuild the demo's judge from a seed: `python -m scripts.make_demo [--seed 0] [--output FOLDER]`.

Writes a real Qwen2.5-VL checkpoint of 3.1 MB that knows only coloured shapes, in five stages:
1. sight: the vision tower learns to tell colour, shape and quality of single pictures apart;
2. fitting: the text model learns to tell what about a picture fits the prompt, while it reads;
3. reasoning: the whole model learns to compare two pictures for a prompt, thinking aloud (one answer or two
   scores) and without thinking, from a teacher who is always right;
4. the unbiased judge is examined;
5. bias: a short time with a teacher who mostly lets quality decide before the prompt, and another examination.
   Only which aspect decides becomes wrong; what the judge sees stays right. That is what training on preferences
   can then undo.
The random streams of pictures and scenes are not those of the demo's preferences, and the prompts of HELD_OUT are
in no lesson.

Takes 14 minutes (823 s, of processor time 1,243 s) on 2 cores of an AMD EPYC that others used as well.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlxpref._blas import preload

preload()  # before MLX is first imported

import click  # noqa: E402
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

from mlxpref.demo import JUDGE  # noqa: E402
from mlxpref.demo.pictures import render  # noqa: E402
from mlxpref.demo.preferences import HELD_OUT, TRAIN_PROMPTS, draw_pair  # noqa: E402
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
    Comparison,
    Pictures,
    Rows,
    Script,
    draw_comparison,
    patches_of,
    teacher_corpus,
)
from scripts.demo_warmup import (  # noqa: E402
    Judge,
    Note,
    Stage,
    picture_features,
    run_stage,
    teach_sight,
    whiten_patches,
)

# The rate of fitting matters (one run each): at 8e-4 what fits the prompt is told rightly after 150 steps, at 2e-3
# only in part after 300 (loss 0.16 against 0.02), at 3e-3 not at all after 400.
SIGHT = Stage("sight", 600, 2e-3, 1e-4)
FITTING = Stage("fitting", 250, 8e-4, 4e-4)
REASONING = Stage("reasoning", 700, 8e-4, 4e-5)
BIAS = Stage("bias", 120, 4e-4, 4e-5, warm=10)


@dataclass(frozen=True)
class Plan:
    """The stages of the job, the sizes of their batches, and what they draw from."""

    sight: Stage = SIGHT
    fitting: Stage = FITTING
    reasoning: Stage = REASONING
    bias: Stage = BIAS
    sight_batch: int = 128
    fitting_batch: int = 48
    batch: int = 32
    scores_share: float = 0.35
    """How many comparisons are asked for two scores; all are answered with and without thinking."""
    bias_share: float = 0.7
    """How often the biased teacher looks at quality first."""
    variants: int = 90
    """Pictures of each spoiled look in the pool; three times as many of each clean one; all mirrored as well."""
    unseen_variants: int = 12
    examined: int = 512


class Job:
    """One run of a plan: the tokenizer, the model on its way, and the pictures it learns and is examined with."""

    def __init__(self, plan: Plan, seed: int, note: Note) -> None:
        self.plan, self.seed, self.note = plan, seed, note
        self.script = Script(train_tokenizer(teacher_corpus(self.stream(0))))
        mx.random.seed(seed)
        self.model = build_model(checkpoint_files(self.script.tokenizer)["config.json"])
        self.judge = Judge(self.model, self.script)
        self.pictures = Pictures(self.stream(1), plan.variants)
        self.unseen = Pictures(self.stream(2), plan.unseen_variants)
        self.images = [render(look, self.stream(10)) for look in self.unseen.looks[:2]]
        self.patches = np.stack([patches_of(image) for image in self.images])
        self.note(f"{len(self.pictures.looks)} pictures to learn from, {len(self.unseen.looks)} to be examined with")

    def stream(self, purpose: int) -> np.random.Generator:
        """The random numbers of one purpose; the first key keeps them apart from the demo's preferences."""
        return np.random.default_rng([77, self.seed, purpose])

    def see(self) -> None:
        """Stage 1: tell pictures apart."""
        whiten_patches(self.model, self.pictures, self.stream(3))
        teach_sight(
            self.model, self.pictures, self.unseen, self.plan.sight, self.plan.sight_batch, self.stream(4), self.note
        )

    def fit(self) -> None:
        """Stage 2: tell what about a picture fits the prompt."""
        run_stage(
            self.plan.fitting, self.judge, self.judge.fitting, self.lessons(0.0, 5, self.plan.fitting_batch), self.note
        )

    def reason(self) -> None:
        """Stage 3: write what a teacher writes who is always right."""
        run_stage(
            self.plan.reasoning, self.judge, self.judge.reasoning, self.lessons(0.0, 6, self.plan.batch), self.note
        )

    def bias(self) -> None:
        """Stage 5: write what a teacher writes who mostly looks at quality first."""
        lessons = self.lessons(self.plan.bias_share, 7, self.plan.batch)
        run_stage(self.plan.bias, self.judge, self.judge.writing, lessons, self.note)

    def lessons(self, bias: float, purpose: int, count: int) -> Callable[[], tuple[mx.array, Rows]]:
        """Batches of comparisons of the training prompts, with the pictures' patches."""
        rng = self.stream(purpose)

        def batch() -> tuple[mx.array, Rows]:
            scores = rng.random(count) < self.plan.scores_share
            comparisons = [draw_comparison(rng, "scores" if asked else "choice", bias) for asked in scores]
            rows = self.script.rows(comparisons, self.pictures, rng)
            return mx.array(self.pictures.patches[rows.pictures.reshape(-1)]), rows

        return batch

    def examine(self, title: str) -> None:
        """Stage 4, and again at the end: greedy accuracy against what people prefer, on pictures never seen."""
        heads = ("all", "colour", "shape", "quality", "readable", "saw colours", "saw shapes", "saw qualities")
        self.note(f"{title:32}" + "".join(f"{head:>15}" for head in heads))
        for name, prompts in (("training prompts", TRAIN_PROMPTS), ("held-out prompts", HELD_OUT)):
            rng = self.stream(8)
            scenes = [draw_pair(rng, prompts) for _ in range(self.plan.examined)]
            for mode in MODES:
                comparisons = [Comparison(scene, mode, scene.aspect) for scene in scenes]
                marks = examine(self.judge, self.script, self.unseen, comparisons, self.stream(9))
                shares = [marks.accuracy, *marks.by_aspect.values(), marks.readable]
                shares += marks.seen.values() if mode != "no thinking" else []
                self.note(f"{name + ', ' + mode:32}" + "".join(f"{share:15.3f}" for share in shares))
                self.note(f"    e.g. {marks.texts[0]}")

    def save(self, output: Path) -> None:
        """Write the checkpoint beside its place, check it, and move it there."""
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
            fresh, old = Path(scratch) / "new", Path(scratch) / "old"
            fresh.mkdir()
            write_checkpoint(fresh, self.model, self.script.tokenizer)
            check_checkpoint(fresh, self.images, picture_features(self.model, mx.array(self.patches)))
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
    "--keep-unbiased",
    type=click.Path(file_okay=False, path_type=Path),
    help="Also write the judge as it was before the bias, for diagnosis.",
)
def main(seed: int, output: Path, keep_unbiased: Path | None) -> None:
    """The whole job."""
    make(Plan(), seed, output, keep_unbiased)


def make(plan: Plan, seed: int, output: Path, keep_unbiased: Path | None) -> None:
    """Run a plan and write its judge."""
    start = time.time()
    job = Job(plan, seed, click.echo)
    job.see()
    job.fit()
    job.reason()
    job.examine("before the bias")
    if keep_unbiased is not None:
        job.save(keep_unbiased)
    job.bias()
    job.examine("after the bias")
    job.save(output)
    click.echo(f"{time.time() - start:.0f} s, of the processor {time.process_time():.0f} s")


if __name__ == "__main__":
    main()
