"""How many images get each number of stars, and how many others they truly beat: `python -m scripts.star_shares`.

Strengths are normal with a deviation of 0.3 (all nearly equal) or 1.5; random pairs are judged in both orders with a
position bias of 0.5 and a noise of 0.8 for the pair and 0.3 for each order. For each number of stars: the share of
images with it, and the mean share of the others that these truly beat.
"""

import click
import numpy as np

from mlxpref.cli.output import print_table
from mlxpref.judge.ranking_result import Ranking
from mlxpref.ranking.outcomes import PairOutcome, all_pairs
from mlxpref.ranking.strength_ranking import rank_images
from mlxpref.report.xmp import stars_of
from scripts.ranking_judges import logistic


def stars_and_shares(
    count: int, deviation: float, pairs: int, rng: np.random.Generator
) -> tuple[list[int], list[float]]:
    """The stars of simulated images, and the share of the others that each truly beats."""
    strengths = rng.normal(0, deviation, count)
    asked = rng.permutation(list(all_pairs(count)))[:pairs].tolist()
    outcomes = []
    for a, b in asked:
        lead = strengths[a] - strengths[b] + rng.normal(0, 0.8)
        first, second = (logistic(lead + place + rng.normal(0, 0.3)) for place in (0.5, -0.5))
        outcomes.append(PairOutcome(a, b, first, second))
    ranking = Ranking("", (), rank_images(count, outcomes), (), 0.0)
    beaten = (strengths[:, None] > strengths).sum(axis=1) / (count - 1)
    return stars_of(ranking), beaten.tolist()


@click.command(help=__doc__)
@click.option("--images", default=4000, show_default=True, help="The number of images of each line.")
def main(images: int) -> None:
    rows = []
    rng = np.random.default_rng(0)
    for count in (4, 12, 32, 100):
        for deviation, pairs_per_image in ((1.5, 2), (1.5, 6), (1.5, 20), (0.3, 6)):
            runs = [
                stars_and_shares(count, deviation, count * pairs_per_image // 2, rng) for _ in range(images // count)
            ]
            stars, beaten = (np.concatenate(each) for each in zip(*runs, strict=True))
            cells = []
            for number in range(1, 6):
                chosen = beaten[stars == number]
                cells.append(f"{len(chosen) / len(stars):.2f}" + (f" {chosen.mean():.2f}" if len(chosen) else ""))
            rows.append((count, deviation, pairs_per_image, *cells))
    print_table((">images", ">deviation", ">pairs an image", *(f">{n} stars" for n in range(1, 6))), rows)


if __name__ == "__main__":
    main()
