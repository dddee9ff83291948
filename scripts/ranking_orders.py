"""`rank --orders auto` beside both and one, at equal comparisons: `python -m scripts.ranking_orders`.

The default budget of four comparisons an image (of four images all twelve, of which one order takes six), strengths of
deviation 1, simulated judges (`ranking_judges.Judge`) with a noise of the pair of 0.3 and a position bias that is
constant (0, 1, 3, 6) or varies from pair to pair (0.5, with a deviation of 0.5, 1, 2). `both`, `one`, `auto`: Kendall's
tau against the truth. `auto_less_better`: what auto has over the better of the two, and its standard error; `one_order`
the share of comparisons in pairs that auto asked in one order only.
"""

from collections.abc import Sequence

import click
import numpy as np

from mlxpref.cli.output import show_on_stderr
from scripts.ranking_judges import (
    Judge,
    Row,
    best_is,
    held,
    means,
    print_results,
    ranked,
    repeated,
    stderr,
    table,
)

COUNTS = (4, 8, 20, 32, 100)
BIASES = ((0.0, 0.0), (1.0, 0.0), (3.0, 0.0), (6.0, 0.0), (0.5, 0.0), (0.5, 0.5), (0.5, 1.0), (0.5, 2.0))
"""The bias of all pairs, and the deviation of a pair's own."""
ORDERS = ("both", "one", "auto")


def beside(count: int, judge: Judge, repeats: int) -> Row:
    """The three ways of asking, on the same answers."""

    def run(repeat: int) -> dict[str, float]:
        rng = np.random.default_rng([count, repeat])
        truth = judge.strengths(count, rng)
        answers = judge.answers(truth, rng)
        numbers: dict[str, float] = {}
        for orders in ORDERS:
            ranking = ranked(count, answers, repeat, orders=orders)
            fit = ranking.strengths.fit
            numbers[orders] = held(fit, truth)["tau"]
            numbers[f"first_{orders}"] = best_is(fit.strengths, truth)
            single = [pair for pair in ranking.pairs if len(pair.verdict.verdicts) == 1]
            numbers["one_order"] = len(single) / ranking.comparisons
        return numbers

    what = f"{count} images, bias {judge.bias}, its sd {judge.bias_deviation}, pair {judge.pair}"
    columns = repeated(repeats, what, run)
    better = max(ORDERS[:2], key=lambda orders: columns[orders].mean())
    gain = columns["auto"] - columns[better]
    return (
        {"images": count, "pair": judge.pair, "bias": judge.bias, "bias_sd": judge.bias_deviation}
        | means(columns)
        | {"auto_less_better": round(float(gain.mean()), 4), "stderr": stderr(gain)}
    )


def numbers_of(text: str) -> list[int]:
    """Whole numbers between commas."""
    return [int(part) for part in text.split(",")]


@click.command(help=__doc__)
@click.option("--repeats", default=25, show_default=True, help="Repetitions of every row.")
@click.option("--images", default=",".join(map(str, COUNTS)), show_default=True, help="Numbers of images.")
@click.option("--pair", "pairs", default=(0.3,), multiple=True, show_default=True, help="Noise of a pair, in nats.")
@show_on_stderr()
def main(repeats: int, images: str, pairs: Sequence[float]) -> None:
    rows = [
        beside(count, Judge(pair=pair, bias=bias, bias_deviation=deviation), repeats)
        for count in numbers_of(images)
        for pair in pairs
        for bias, deviation in BIASES
    ]
    table(rows, "Orders, at equal comparisons")
    print_results({"orders": rows})


if __name__ == "__main__":
    main()
