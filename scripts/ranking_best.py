"""The probability to be the best, as it is said and as it is true: `python -m scripts.ranking_best`.

Said and true: rankings at the default budget by simulated judges (`ranking_judges.Judge`) of 2 to 100 images, strengths
of deviation 1, 4, 6 and 8: what is said of the first image, and how often it truly is the strongest. `known`: with the
noise that an earlier ranking of 20 images by the same judge showed. `resolved`: the share of other images that the
first is not tied with. Of two images: the largest difference between what is said and the preference of `compare`.

Draws: `best_probabilities` beside 200,000 draws from the same posterior, for posteriors of rankings of 2 to 100 images.
"""

import math
from collections.abc import Mapping

import click
import numpy as np

from mlxpref.cli.output import show_on_stderr
from mlxpref.log import track
from mlxpref.ranking.noise import Noise, without_prior
from mlxpref.ranking.posterior import best_probabilities
from scripts.ranking_judges import Judge, Row, fit_of, means, print_results, ranked, repeated, stderr, table
from scripts.ranking_orders import numbers_of

COUNTS = (2, 3, 4, 12, 100)
JUDGES = {
    "soft": Judge(),
    "soft, pair 1": Judge(pair=1),
    "bias sd 2": Judge(bias_deviation=2),
    "sure 4": Judge(deviation=4, pair=2, order=2, bias=2, bias_deviation=2),
    "sure 6": Judge(deviation=6, pair=1.8, order=0.6, bias=3),
    "sure 8": Judge(deviation=8, pair=8, order=4, bias=4, bias_deviation=4),
}
EARLIER = 20
"""The images of the earlier ranking that shows the judge's noise."""
DRAWS = 200_000


def shown_noise(judge: Judge, rng: np.random.Generator, seed: int) -> Mapping[bool, Noise]:
    """What an earlier ranking of other images by the same judge showed of its noise."""
    answers = judge.answers(judge.strengths(EARLIER, rng), rng)
    fit = ranked(EARLIER, answers, seed, orders="both").strengths.fit
    return {False: without_prior(fit.reference.noise)}


def said_and_true(count: int, name: str, known: bool, repeats: int) -> Row:
    """What is said of the first image of rankings by a judge, and how often it is true."""
    judge = JUDGES[name]

    def run(repeat: int) -> dict[str, float]:
        rng = np.random.default_rng([count, repeat, list(JUDGES).index(name)])
        truth = judge.strengths(count, rng)
        answers = judge.answers(truth, rng)
        earlier = shown_noise(judge, rng, repeat) if known else None
        first, *others = ranked(count, answers, repeat, known=earlier).strengths.images
        numbers = {"said": first.p_best, "true": float(first.index == np.argmax(truth))}
        numbers["difference"] = numbers["said"] - numbers["true"]
        numbers["resolved"] = 1 - len(first.tied_with) / len(others)
        if count == 2:
            p_a = answers[0, 1].p_a or 0.0
            numbers["from_compare"] = abs(first.p_best - max(p_a, 1 - p_a))
        return numbers

    columns = repeated(repeats, f"{count} images, {name}{', known' if known else ''}", run)
    row = {"images": count, "judge": name, "known": "yes" if known else ""} | means(columns)
    row["from_compare"] = round(float(columns["from_compare"].max()), 4) if count == 2 else ""
    return row | {"stderr": stderr(columns["difference"])}


def together(rows: list[Row]) -> list[Row]:
    """The mean over judges, and the judge that is farthest off, for every number of images."""
    summary: list[Row] = []
    for key in dict.fromkeys((row["images"], row["known"]) for row in rows):
        own = [row for row in rows if (row["images"], row["known"]) == key]
        worst = max(own, key=lambda row: abs(row["difference"]))
        mean = round(float(np.mean([row["difference"] for row in own])), 4)
        error = round(math.hypot(*(row["stderr"] for row in own)) / len(own), 4)
        summary.append(
            {"images": key[0], "known": key[1], "difference": mean, "stderr": error}
            | {"farthest": worst["judge"], "its_difference": worst["difference"], "its_stderr": worst["stderr"]}
        )
    return summary


def by_draws(count: int, repeats: int) -> Row:
    """The largest error of `best_probabilities` over posteriors of rankings of `count` images."""

    def run(repeat: int) -> dict[str, float]:
        rng = np.random.default_rng([count, repeat, 3])
        judge = Judge(deviation=float(rng.choice([0.1, 0.5, 1, 2])), pair=1)
        answers = judge.answers(judge.strengths(count, rng), rng)
        asked = [(pair.a, pair.b) for pair in ranked(count, answers, repeat).pairs]
        fit = fit_of(count, answers, asked)
        covariance, freedom = fit.covariance.scaled(fit.widening**-2.0), fit.degrees_of_freedom
        wins = np.zeros(count)
        for _ in track(range(20), 20, f"draws, {count} images"):
            error = rng.multivariate_normal(np.zeros(count), covariance.block(), DRAWS // 20, method="eigh")
            if math.isfinite(freedom):
                error /= np.sqrt(rng.chisquare(freedom, (len(error), 1)) / freedom)
            wins += np.bincount((fit.strengths + error).argmax(axis=1), minlength=count)
        error_of_all = np.abs(best_probabilities(fit.strengths, covariance, freedom) - wins / wins.sum())
        return {"error": float(error_of_all.max()), "likeliest": float(wins.max() / wins.sum())}

    columns = repeated(repeats, f"draws, {count} images", run)
    return {"images": count, "largest_error": round(float(columns["error"].max()), 4)} | means(columns)


@click.command(help=__doc__)
@click.option("--repeats", default=150, show_default=True, help="Repetitions of every row, but for draws.")
@click.option("--images", default=",".join(map(str, COUNTS)), show_default=True, help="Numbers of images.")
@click.option("--draw-repeats", default=8, show_default=True, help="Posteriors of every number of images.")
@show_on_stderr()
def main(repeats: int, images: str, draw_repeats: int) -> None:
    counts = numbers_of(images)
    cases = [(count, False) for count in counts] + [(count, True) for count in counts if count == 3]
    rows = [said_and_true(count, name, known, repeats) for count, known in cases for name in JUDGES]
    table(rows, "P(best) of the first image, said and true")
    summary = together(rows)
    table(summary, "Over all judges")
    draws = [by_draws(count, draw_repeats) for count in sorted({*counts, 8, 32})]
    table(draws, f"p_best beside {DRAWS:,} draws")
    print_results({"best": rows, "together": summary, "draws": draws})


if __name__ == "__main__":
    main()
