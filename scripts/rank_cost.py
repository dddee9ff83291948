"""What a ranking costs as images become more, and what is made of it: `python -m scripts.rank_cost`.

The demo judge reads pictures of its own world at the default budget of pairs. A ranking without thinking, from the
first picture to the order, with nothing known before; every size has pictures of its own. Then its page, its table and
its JSON.
"""

import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

from mlxpref._blas import preload

preload()  # before MLX is first imported

import click  # noqa: E402

from mlxpref.cli.output import note, print_json  # noqa: E402
from mlxpref.demo import JUDGE  # noqa: E402
from mlxpref.engine.vlm import load_vlm  # noqa: E402
from mlxpref.judge.judge import Judge  # noqa: E402
from mlxpref.judge.ranking_result import Ranking  # noqa: E402
from mlxpref.report.ranking_files import write_ranking_csv  # noqa: E402
from mlxpref.report.ranking_page import write_ranking_page  # noqa: E402
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
                **outputs(ranking),
            }
        )
    columns = (
        ">images", ">pairs", ">comparisons", ">vision runs", ">seconds", ">ms an image", ">page, s", ">page, MB",
        ">table, s", ">JSON, s",
    )  # fmt: skip
    report("rank_cost", {"pixels": pixels, "think": "none"}, cases, (columns, [list(case.values()) for case in cases]))


def outputs(ranking: Ranking) -> dict[str, float]:
    """The seconds of a ranking's page, table and JSON, and the page's megabytes."""

    def seconds(work: Callable[[], None]) -> float:
        started = time.perf_counter()
        work()
        return round(time.perf_counter() - started, 2)

    def write_json() -> None:
        with (folder / "ranking.json").open("w", encoding="utf-8") as file, redirect_stdout(file):
            print_json(ranking.lazy_json())

    with TemporaryDirectory() as name:
        folder = Path(name)
        page = folder / "page.html"
        return {
            "page_seconds": seconds(lambda: write_ranking_page(page, [ranking])),
            "page_megabytes": round(page.stat().st_size / 1e6, 1),
            "table_seconds": seconds(lambda: write_ranking_csv(folder / "ranking.csv", [ranking])),
            "json_seconds": seconds(write_json),
        }


if __name__ == "__main__":
    main()
