"""When `rank --top 5` ends, and whether it is right: `python -m scripts.ranking_top`.

32 images, 992 comparisons in all, simulated judges (`ranking_judges.Judge`): `soft`, with a position bias of 0.5, a
noise of the pair of 0.3 and of the comparison of 0.1, and `votes`, shares of 3. `limit`: the budget, as a share of all
comparisons. `asked`: the share that was asked; `settled`: how often it ended by itself. Of those runs, `found`: the
five are those that all pairs give; `true`: the truly strongest; `all_true`: so are those of all pairs. `found_anyway`:
of all runs.
"""

import click
import numpy as np

from mlxpref.cli.output import show_on_stderr
from scripts.ranking_judges import Array, Judge, Row, fit_of_all, means, people, print_results, ranked, repeated, table

JUDGES = {"soft": Judge(), "soft, wide": Judge(deviation=3), "votes": people(3), "votes, wide": people(3, deviation=3)}
TOP, COUNT = 5, 32
EVERY = COUNT * (COUNT - 1)
LIMITS = (0.25, 1 / 3, 0.6, 1.0)
"""Budgets, as shares of all comparisons."""


def top_of(strengths: Array, top: int) -> set[int]:
    """The strongest images."""
    return set(np.argsort(-strengths, kind="stable")[:top].tolist())


def top_found(name: str, limit: float, repeats: int) -> Row:
    """Rankings of images by a judge until the top is settled or the limit is reached. See the module."""
    judge = JUDGES[name]

    def run(repeat: int) -> dict[str, float]:
        rng = np.random.default_rng([COUNT, repeat])
        truth = judge.strengths(COUNT, rng)
        answers = judge.answers(truth, rng)
        pairs = "all" if limit == 1 else round(limit * EVERY / 2)
        ranking = ranked(COUNT, answers, repeat, top=TOP, pairs=pairs)
        five = top_of(ranking.strengths.fit.strengths, TOP)
        full = top_of(fit_of_all(COUNT, answers).strengths, TOP)
        settled = ranking.ending == "settled"
        of_settled = {"found": five == full, "true": five == top_of(truth, TOP), "all_true": full == top_of(truth, TOP)}
        return (
            {"asked": ranking.comparisons / EVERY, "settled": float(settled)}
            | {key: float(right) if settled else np.nan for key, right in of_settled.items()}
            | {"found_anyway": float(five == full)}
        )

    columns = repeated(repeats, f"top {TOP}, {name}, limit {limit:.2f}", run)
    settled = {key: values if not np.isnan(values).all() else np.zeros(1) for key, values in columns.items()}
    return {"judge": name, "deviation": judge.deviation, "limit": round(limit, 2)} | means(settled)


@click.command(help=__doc__)
@click.option("--repeats", default=25, show_default=True, help="Repetitions of every row.")
@show_on_stderr()
def main(repeats: int) -> None:
    rows = [top_found(name, limit, repeats) for name in JUDGES for limit in LIMITS]
    table(rows, f"Top {TOP} of {COUNT} images")
    print_results({"top": rows})


if __name__ == "__main__":
    main()
