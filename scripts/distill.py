"""Teach the demo judge to answer at once what it says with thinking, and measure both ways.

For each seed: the judge is trained with thinking alone; its soft preferences on new pairs, whose labels nobody looks
at, are distilled; the judge learns them without thinking, from its thinking adapter or from the base. Lines are means
over seeds, on test pairs and on pairs of requirements that no training saw: accuracy against people's labels, agreement
with the thinking judge, mean distance of both preferences, and CPU milliseconds a pair (both orders) without encoding
the images: of pairs of different images, and of all pairs of the same 24 images.

The demo's pairs are made so that a model of this size must check one requirement after another in words. So expect that
it does not learn to answer at once: this measures where distilling ends, not how well it can go.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

import mlxpref
from mlxpref.cli.demo import SAMPLE_PROMPT, demo_settings
from mlxpref.cli.output import print_table
from mlxpref.demo.preferences import demo_preferences
from mlxpref.judge.judge import Judge
from mlxpref.preferences import Pair, Preference
from mlxpref.training.run import start_run

SPLITS = ("test", "heldout")
_UNLABELLED, _SEED, _IMAGES = 100, 6, 24
"""Seeds of pairs to distill (plus the run's own) and of pairs to measure with, and images of a ranking."""
Rows = dict[str, list[float]]


def preferences_of(judge: Judge, pairs: Sequence[Preference], think: bool) -> tuple[NDArray[np.float64], float]:
    """The judge's preferences for a (N,), and its CPU seconds a pair, without encoding."""
    judge.vlm.features.get_all([image for pair in pairs for image in (pair.a, pair.b)])
    start = time.process_time()
    verdicts = list(judge.pairs((Pair(p.a, p.b, p.prompt) for p in pairs), think=think))
    return np.array([verdict.p_a for verdict in verdicts]), (time.process_time() - start) / len(pairs)


def seconds_of_all_pairs(judge: Judge, think: bool) -> float:
    """CPU seconds a pair of all pairs of the same images, without encoding."""
    images = [p.a for p in demo_preferences("test", _IMAGES, _SEED + 1)]
    judge.vlm.features.get_all(images)
    start = time.process_time()
    count = len(list(judge.pairs((Pair(a, b, SAMPLE_PROMPT) for a, b in combinations(images, 2)), think=think)))
    return (time.process_time() - start) / count


def measured(judge: Judge, think: bool, count: int, thinking: Mapping[str, NDArray[np.float64]]) -> list[float]:
    """A line's numbers: of each split accuracy, agreement and distance; then both kinds of CPU seconds a pair."""
    row, seconds = list[float](), list[float]()
    for split in SPLITS:
        pairs = demo_preferences(split, count, _SEED)
        p, taken = preferences_of(judge, pairs, think)
        people = np.array([pair.p_people for pair in pairs])
        teacher = thinking.get(split, p)
        numbers = (p > 0.5) == (people > 0.5), (p > 0.5) == (teacher > 0.5), abs(p - teacher)
        row += [float(np.mean(each)) for each in numbers]
        seconds.append(taken)
    return [*row, float(np.mean(seconds)), seconds_of_all_pairs(judge, think)]


def one_seed(seed: int, folder: Path, pairs: int, samples: int, steps: int, count: int, rows: Rows) -> None:
    """Train, distill, train again from both starts, and measure."""
    judge = mlxpref.load("demo", think=True)
    for _ in start_run(demo_settings(read_weight=0.0, seed=seed), folder / "thinking", vlm=judge.vlm).reports():
        pass
    judge = replace(mlxpref.load(adapter=folder / "thinking"), name="demo")
    thinking = {s: preferences_of(judge, demo_preferences(s, count, _SEED), True)[0] for s in SPLITS}
    rows["thinking"] += measured(judge, True, count, thinking)
    rows["read at once, before"] += measured(judge, False, count, thinking)
    data = folder / "soft.jsonl"
    result = mlxpref.distill(judge, demo_preferences("train", pairs, _UNLABELLED + seed), data, samples=samples)
    for start, adapter in (("the thinking adapter", str(folder / "thinking")), ("the base", "")):
        output = folder / start.replace(" ", "-")
        began = time.process_time()
        for _ in mlxpref.train(
            data, "demo", output, think=False, reward="brier", steps=steps, seed=seed, adapter=adapter
        ):
            pass
        began = time.process_time() - began
        learned = mlxpref.load(adapter=output)
        rows[f"read at once, from {start}"] += measured(learned, False, count, thinking)
        agreement = mlxpref.evaluate(learned, data, split="test").metrics.accuracy
        pairs_again = demo_preferences("test", count, _SEED)
        again = preferences_of(learned, pairs_again, True)[0] > 0.5
        right = np.mean(again == [p.p_people > 0.5 for p in pairs_again])
        print(
            f"seed {seed}, {result.train} pairs, from {start}: agrees on {agreement:.3f} of {result.test} held-out "
            f"pairs of the file; {began:.0f} CPU seconds; if it thinks all the same, right in {right:.3f}",
            flush=True,
        )


@click.command()
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2), show_default=True)
@click.option("--pairs", type=int, default=640, show_default=True, help="Pairs that are distilled.")
@click.option("--samples", type=int, default=1, show_default=True, help="Completions per order of the thinking judge.")
@click.option("--steps", type=int, default=40, show_default=True, help="Steps of learning to answer at once.")
@click.option("--measured", "count", type=int, default=400, show_default=True, help="Pairs of each split.")
def main(seeds: tuple[int, ...], pairs: int, samples: int, steps: int, count: int) -> None:
    """Distill the demo judge, once a seed, and print a table of means."""
    rows: Rows = defaultdict(list)
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            one_seed(seed, Path(folder), pairs, samples, steps, count, rows)
    means = {name: np.mean(np.reshape(values, (len(seeds), -1)), axis=0) for name, values in rows.items()}
    columns = [f">{split}: {what}" for split in SPLITS for what in ("right", "agrees", "differs by")]
    print_table(
        ("judge", *columns, ">CPU ms a pair", ">of 24 images"),
        [
            (name, *(f"{x:.3f}" for x in row[:-2]), *(f"{1000 * x:.1f}" for x in row[-2:]))
            for name, row in means.items()
        ],
    )


if __name__ == "__main__":
    main()
