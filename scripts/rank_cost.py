"""What a ranking costs as images become more: `python -m scripts.rank_cost`.

The demo judge reads pictures of its own world at the default budget of pairs. A ranking without thinking, from the
first picture to the order, with nothing known before; every size has pictures of its own.
"""

import time

from mlxpref._blas import preload

preload()  # before MLX is first imported

import click  # noqa: E402

from mlxpref.cli.output import note  # noqa: E402
from mlxpref.demo import JUDGE  # noqa: E402
from mlxpref.engine.vlm import load_vlm  # noqa: E402
from mlxpref.judge.judge import Judge  # noqa: E402
from scripts.bench_common import TEXT, pictures, report  # noqa: E402


@click.command()
@click.option("--images", multiple=True, type=click.IntRange(min=2), default=(25, 50, 100, 200, 400), show_default=True)
@click.option("--pixels", default=84, show_default=True, help="Side of the pictures.")
def main(images: tuple[int, ...], pixels: int) -> None:
    """Time rankings of more and more images."""
    judge = Judge(load_vlm(JUDGE, pixels**2))
    judge.rank(pictures(4, pixels, 1), TEXT, "none")  # the first one loads libraries
    cases = []
    for count in images:
        note(f"{count} images")
        shown = pictures(count, pixels, count)
        started = time.perf_counter()
        ranking = judge.rank(shown, TEXT, "none")
        seconds = time.perf_counter() - started
        cases.append(
            {
                "images": count,
                "pairs": len(ranking.pairs),
                "comparisons": 2 * len(ranking.pairs),
                "vision_runs": ranking.vision_runs,
                "seconds": round(seconds, 3),
                "milliseconds_an_image": round(1000 * seconds / count, 2),
            }
        )
    columns = (">images", ">pairs", ">comparisons", ">vision runs", ">seconds", ">ms an image")
    report("rank_cost", {"pixels": pixels, "think": "none"}, cases, (columns, [list(case.values()) for case in cases]))


if __name__ == "__main__":
    main()
