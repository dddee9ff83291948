"""Is it better to read probabilities than answers or scores? `python -m scripts.strategies_by_training`.

The demo judge is trained for each strategy with the same budget: reward `soft` for strategy soft, `hard` for select,
`score` for score; with the same steps, comparisons, rollouts, pictures and seeds, thinking, otherwise as `mlxpref demo`
does. Then every judge is read by all three strategies, greedily, in both orders, on 1,000 pairs of test pictures and
400 of prompts that it did not see, and so is the judge before training.

It writes `strategies_by_training.json` beside this file, or where `--output` says, after every run, and prints the
table of judges that are read as they were trained, and how far `soft` is from the others with the same seed and steps;
`--all` prints every reading, `--table` trains nothing. Runs that the file has are not made again:
to measure anew, give an empty folder. Two run at a time, each with one thread, so seconds are of one core of two that
are busy.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import click

from mlxpref.cli.output import note, print_text
from scripts.kept_runs import make_runs, markdown, read_runs, spread

__all__ = ["READ_BY", "SEEDS", "STEPS", "gains_of", "main", "make_run", "plans", "rows_of", "table_of"]

READ_BY = {"soft": "soft", "hard": "select", "score": "score"}
"""Rewards, and the strategy that each trains for."""
UNTRAINED = "none"
STEPS = (6, 20)
SEEDS = (0, 1, 2)
SIZES = (1000, 400)
"""Pairs of test pictures, and of prompts that no judge was trained with."""
_TEST_SEED = 6
_SHARES = ("accuracy", "held_out_prompts", "position_consistency", "ece")
_COLUMNS = (
    "reward", "steps", "read by", "accuracy", "held-out prompts", "both orders agree", "calibration error",
    "unreadable", "tokens a pair", "seconds of training",
)  # fmt: skip


def plans(steps: Iterable[int] = STEPS) -> list[dict[str, Any]]:
    """Every run, the longest first, so that the processes end together."""
    trained = product(sorted(steps, reverse=True), READ_BY, SEEDS)
    return [
        *({"reward": reward, "steps": count, "seed": seed} for count, reward, seed in trained),
        {"reward": UNTRAINED, "steps": 0, "seed": 0},
    ]


def make_run(plan: Mapping[str, Any], sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """Train the demo judge as planned and read it by every strategy, in a process of its own."""
    from mlxpref.config import JudgeSettings
    from mlxpref.demo import JUDGE
    from mlxpref.engine.vlm import load_vlm
    from mlxpref.judge.evaluation import EvaluationSpec
    from mlxpref.judge.judge import Judge
    from mlxpref.judge.strategies import compare_strategies, strategy_variants
    from mlxpref.training.trainer import Trainer
    from mlxpref.verdict import STRATEGIES
    from scripts.learning_runs import Plan, preferences_of, settings_of

    reward, seed, steps = plan["reward"], plan["seed"], plan["steps"]
    settings = settings_of(Plan("soft" if reward == UNTRAINED else reward, "labels", True, seed, steps))
    vlm = load_vlm(JUDGE, settings.max_pixels)
    seconds = 0.0
    if steps:
        # Every seed has pictures of its own, the same for every reward.
        trainer = Trainer(vlm, preferences_of("labels", "train", settings.limit, seed), settings)
        seconds = sum(report.seconds for report in trainer.steps())
    judge = Judge(
        vlm, JudgeSettings(max_tokens=settings.max_tokens, max_pixels=settings.max_pixels, rows=settings.rows)
    )
    test, held_out = (
        compare_strategies(
            judge,
            preferences_of("labels", split, count, _TEST_SEED),
            EvaluationSpec("demo", split),
            strategy_variants(STRATEGIES, [1], [True]),
        ).rows
        for split, count in zip(("test", "heldout"), sizes, strict=True)
    )
    return {
        **plan,
        "seconds": round(seconds, 1),
        "read": [_reading(*both) for both in zip(test, held_out, strict=True)],
    }


def _reading(test: Any, held_out: Any) -> dict[str, Any]:
    """What one strategy reads."""
    found, unseen = test.evaluation, held_out.evaluation
    return {
        "strategy": test.variant.strategy,
        "accuracy": found.metrics.accuracy,
        "held_out_prompts": unseen.metrics.accuracy,
        "position_consistency": found.metrics.position_consistency,
        "ece": found.metrics.ece,
        "held_out_ece": unseen.metrics.ece,
        "brier": found.metrics.brier,
        "unreadable": found.unreadable,
        "tokens_per_pair": found.tokens_per_pair,
    }


def rows_of(runs: Iterable[Mapping[str, Any]], every: bool = False) -> list[dict[str, Any]]:
    """Mean, least and largest over the seeds, a row for each reward, number of steps and strategy that reads.

    Of trained judges only the strategy that they were trained for, unless `every` one is asked for.
    """
    found: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for run in runs:
        for reading in run["read"]:
            if every or READ_BY.get(run["reward"], reading["strategy"]) == reading["strategy"]:
                group_of = run["reward"], run["steps"], reading["strategy"]
                found.setdefault(group_of, []).append({"seconds": run["seconds"], **reading})
    rewards = [UNTRAINED, *READ_BY]
    order = {strategy: place for place, strategy in enumerate(READ_BY.values())}
    rows = []
    for (reward, steps, strategy), group in sorted(
        found.items(), key=lambda item: (item[0][1], rewards.index(item[0][0]), order[item[0][2]])
    ):
        row: dict[str, Any] = {"reward": reward, "steps": steps, "strategy": strategy, "seeds": len(group)}
        for key in (*_SHARES, "unreadable", "tokens_per_pair", "seconds"):
            row[key] = spread([each[key] for each in group])
        rows.append(row)
    return rows


def table_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as a table in Markdown; in brackets the least and the largest of the seeds."""
    lines = []
    for row in rows:
        cells = [row["reward"], str(row["steps"]), row["strategy"]]
        span = "{:.3f}" if row["seeds"] == 1 else "{:.3f} ({:.3f} to {:.3f})"
        cells += [span.format(*row[key]) for key in _SHARES]
        cells += [f"{row['unreadable'][0]:.3f}", f"{row['tokens_per_pair'][0]:.1f}", f"{row['seconds'][0]:.0f}"]
        lines.append(cells)
    return markdown(_COLUMNS, lines)


def gains_of(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """How far judges trained for and read by `soft` are from the others, of the same seed and steps, in words."""
    own = {
        (run["steps"], run["reward"], run["seed"]): reading
        for run in runs
        for reading in run["read"]
        if reading["strategy"] == READ_BY.get(run["reward"])
    }
    lines = []
    for steps, other in product(sorted({steps for steps, _, _ in own}), ("hard", "score")):
        both = [
            (own[steps, "soft", seed], own[steps, other, seed])
            for seed in SEEDS
            if (steps, "soft", seed) in own and (steps, other, seed) in own
        ]
        if not both:
            continue
        told = []
        for name, key in (("accuracy", "accuracy"), ("on held-out prompts", "held_out_prompts")):
            mean, least, largest = spread([100 * (soft[key] - rest[key]) for soft, rest in both])
            told.append(f"{name} {mean:+.1f} points ({least:+.1f} to {largest:+.1f})")
        mean, least, largest = spread([soft["ece"] - rest["ece"] for soft, rest in both])
        told.append(f"calibration error {mean:+.3f} ({least:+.3f} to {largest:+.3f})")
        lines.append(f"soft - {READ_BY[other]}, steps {steps}, seeds {len(both)}: {', '.join(told)}")
    return lines


@click.command()
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), help="Folder of the file; beside this one.")
@click.option("--steps", multiple=True, type=click.IntRange(min=1), help="Steps of training; once or more.")
@click.option("--processes", default=2, show_default=True, help="Runs at a time, each with its share of the cores.")
@click.option("--all", "every", is_flag=True, help="Show every strategy of every judge.")
@click.option("--table", is_flag=True, help="Train nothing: print the table from the file.")
def main(output: Path | None, steps: tuple[int, ...], processes: int, every: bool, table: bool) -> None:
    """Train the demo judge for every strategy, and say which is best."""
    file = (output or Path(__file__).parent) / "strategies_by_training.json"
    runs = read_runs(file)
    if not table:
        for done, _ in make_runs(
            plans(steps or STEPS),
            make_run,
            runs,
            file,
            processes,
            lambda run: (run["steps"], run["reward"], run["seed"]),
        ):
            note(done)
    for line in [*table_of(rows_of(runs, every)).splitlines(), *gains_of(runs)]:
        print_text(line)


if __name__ == "__main__":
    main()
