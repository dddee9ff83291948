"""`rank --think top` by judges whose reading is unlike their thinking: `python -m scripts.ranking_instruments`.

Strengths of deviation 1 in nats of neither; both modes answer with a scale, a noise of the pair and a position bias of
their own: log-odds = scale * (difference + noise + 0.1 of the comparison) +- bias. All are read, the ten best thought
about, as the product does. With `--unlike` reading sees each image otherwise, in all its pairs. `top`: Kendall's tau of
all images; `reading`: that of `--think none`. `ten`: that of the ten alone; `thinking`: that of a fit to the answers
with thinking alone; `ten_reading`: of the ten as reading had them. `first` and `thinking_first`: how often the best is
the truly best. `warned`: how often the ranking says that reading contradicts thinking. `scale`: what the fit finds of
reading's, over the true one.
"""

import click
import numpy as np

from mlxpref.cli.output import show_on_stderr
from mlxpref.judge.mode_fit import is_contradicted
from mlxpref.ranking.bradley_terry import fit_strengths
from scripts.ranking_judges import Judge, Row, best_is, means, print_results, ranked, repeated, stderr, table, tau_a
from scripts.ranking_orders import numbers_of

MODES = (
    (1.0, 0.7, 0.0),
    (0.3, 0.7, 0.0),
    (0.25, 0.3, 0.0),
    (0.05, 0.3, 0.0),
    (0.01, 0.3, 0.0),
    (4.0, 0.7, 0.0),
    (1.0, 0.7, 2.0),
)
"""Scale, noise and bias of reading."""
SETTINGS = (
    *((mode, (1.0, 0.3, 0.0)) for mode in MODES),
    ((0.3, 0.7, 0.0), (3.0, 0.3, 0.0)),
    ((0.3, 0.7, 0.0), (6.0, 0.3, 0.0)),
    ((1.0, 0.7, 0.0), (4.0, 0.3, 0.0)),
    ((4.0, 0.7, 0.0), (0.3, 0.3, 0.0)),
    ((1.0, 0.7, 2.0), (1.0, 0.3, -2.0)),
    ((1.0, 0.3, 0.0), (3.0, 1.5, 0.0)),
)
"""Reading and thinking: scale, noise, bias."""


def both_modes(
    count: int, reading: tuple[float, float, float], thinking: tuple[float, float, float], n: int, unlike: float = 0.0
) -> Row:
    """`--think top` beside each mode alone, over `n` runs; `unlike`: by how much reading sees each image otherwise."""

    def run(repeat: int) -> dict[str, float]:
        rng = np.random.default_rng([count, repeat])
        truth = rng.normal(0, 1, count)
        seen = truth + unlike * np.random.default_rng([count, repeat, 1]).normal(0, 1, count)
        read, thought = (
            Judge(pair=scale * noise, order=0.1 * scale, bias=bias).answers(scale * strengths, rng)
            for strengths, (scale, noise, bias) in ((seen, reading), (truth, thinking))
        )
        top = ranked(count, read, repeat, thinking=thought)
        alone = ranked(count, read, repeat).strengths.fit.strengths
        pairs = [pair for pair in top.pairs if pair.think]
        ten = sorted({image for pair in pairs for image in (pair.a, pair.b)})
        place = {image: i for i, image in enumerate(ten)}
        by_thinking = fit_strengths(len(ten), [p.verdict.outcome(place[p.a], place[p.b]) for p in pairs]).strengths
        fit = top.strengths.fit
        return {
            "top": tau_a(fit.strengths, -truth),
            "reading": tau_a(alone, -truth),
            "ten": tau_a(fit.strengths[ten], -truth[ten]),
            "thinking": tau_a(by_thinking, -truth[ten]),
            "ten_reading": tau_a(alone[ten], -truth[ten]),
            "first": best_is(fit.strengths, truth),
            "thinking_first": float(ten[int(np.argmax(by_thinking))] == np.argmax(truth)),
            "warned": float(is_contradicted(top)),
            "scale": fit.instruments[0].scale * thinking[0] / reading[0],
        }

    says = ["/".join(f"{x:g}" for x in mode) for mode in (reading, thinking)]
    columns = repeated(n, f"{count} images, reading {says[0]}, thinking {says[1]}", run)
    row = {"images": count, "read": says[0], "think": says[1], "unlike": unlike} | means(columns)
    row["top_stderr"] = stderr(columns["top"] - columns["reading"])
    return row | {"ten_stderr": stderr(columns["ten"] - columns["thinking"])}


@click.command(help=__doc__)
@click.option("--repeats", default=30, show_default=True, help="Repetitions of every row.")
@click.option("--images", default="30,100", show_default=True, help="Numbers of images, more than ten.")
@click.option("--unlike", type=float, multiple=True, help="Only reading that sees each image otherwise, by so much.")
@show_on_stderr()
def main(repeats: int, images: str, unlike: tuple[float, ...]) -> None:
    counts, alike = numbers_of(images), (1.0, 0.3, 0.0)
    rows = [both_modes(count, alike, alike, repeats, each) for count in counts for each in unlike]
    rows = rows or [both_modes(count, *setting, repeats) for count in counts for setting in SETTINGS]
    table(rows, "Reading and thinking: scale/noise/bias of each, tau of --think top and of each alone")
    print_results({"instruments": rows})


if __name__ == "__main__":
    main()
