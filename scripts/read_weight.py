"""Train the demo judge with one weight of the answer read at once, and measure both ways of judging.

One line a seed: accuracy on test pairs and on pairs of held-out prompts, thinking and read at once; and for six sets of
40 pictures, how many of the 12 that match a prompt are the first 12 of the default ranking.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from PIL import Image

import mlxpref
from mlxpref.cli.demo import demo_settings
from mlxpref.cli.output import print_text
from mlxpref.demo.pictures import COLOURS, QUALITIES, SHAPES, PictureSpec, render
from mlxpref.demo.preferences import demo_preferences, prompt_text
from mlxpref.judge.evaluation import EvaluationSpec, evaluate
from mlxpref.judge.judge import Judge
from mlxpref.training.run import start_run

PICTURES, MATCHING = 40, 12
_WANTED = (
    ("purple", "triangle"), ("red", "triangle"), ("blue", "square"), ("orange", "circle"), ("green", "cross"),
    ("yellow", "circle"),
)  # fmt: skip
_SEED = 6
"""Seed of pairs that neither training nor the demo's own measurements use."""


def picture_set(number: int) -> tuple[list[Image.Image], list[bool], str]:
    """40 pictures in random order, for each whether it matches, and the prompt that 12 of them match.

    In every second set the others share the colour or the shape that is asked for.
    """
    colour, shape = _WANTED[number]
    rng = np.random.default_rng([99, number])
    others = [
        (c, s)
        for c in COLOURS
        for s in SHAPES
        if (c, s) != (colour, shape) and (number % 2 == 0 or c == colour or s == shape)
    ]
    chosen = [(colour, shape)] * MATCHING
    chosen += [others[int(rng.integers(len(others)))] for _ in range(PICTURES - MATCHING)]
    pictures = [render(PictureSpec(c, s, QUALITIES[int(rng.integers(len(QUALITIES)))]), rng) for c, s in chosen]
    order = rng.permutation(PICTURES)
    return [pictures[i] for i in order], [int(i) < MATCHING for i in order], prompt_text(colour, shape)


def found(judge: Judge, number: int) -> int:
    """How many of the matching pictures of a set are among as many best by the default ranking."""
    pictures, matches, prompt = picture_set(number)
    return sum(matches[entry.index] for entry in judge.rank(pictures, prompt)[:MATCHING])


def accuracy(judge: Judge, split: str, pairs: int, think: bool) -> float:
    """The judge's accuracy on pairs of a split of the demo, thinking or read at once."""
    judge = replace(judge, settings=replace(judge.settings, think=think))
    return evaluate(judge, demo_preferences(split, pairs, _SEED), EvaluationSpec("demo", split)).metrics.accuracy


@click.command()
@click.option("--read-weight", type=float, default=1.0, show_default=True)
@click.option("--kl", type=float, default=0.02, show_default=True)
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2), show_default=True)
@click.option("--steps", type=int, default=40, show_default=True)
@click.option("--pairs", type=int, default=200, show_default=True, help="Pairs of a split and way of judging.")
@click.option("--sets", type=click.IntRange(0, len(_WANTED)), default=len(_WANTED), show_default=True)
def main(read_weight: float, kl: float, seeds: tuple[int, ...], steps: int, pairs: int, sets: int) -> None:
    """Train and measure the demo judge, one line a seed."""
    print_text("read weight  kl    seed  thinking: test, held-out  read at once: test, held-out  of 12  CPU seconds")
    for seed in seeds:
        judge = mlxpref.load("demo", think=True)
        settings = demo_settings(read_weight=read_weight, kl=kl, seed=seed, steps=steps)
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            for _ in start_run(settings, Path(folder) / "run", vlm=judge.vlm).reports():
                pass
        seconds = time.process_time() - start
        rates = [accuracy(judge, split, pairs, think) for think in (True, False) for split in ("test", "heldout")]
        counts = [found(judge, number) for number in range(sets)]
        columns = "".join(f"{rate:14.3f}" for rate in rates)
        print_text(f"{read_weight:11g} {kl:5g} {seed:5d} {columns}  {counts}  {seconds:.0f}")


if __name__ == "__main__":
    main()
