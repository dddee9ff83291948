"""What a hopeless temperature of reading does to a ranking that reads all and thinks about the best ten.

python -m scripts.reading_temperature                      the demo judge as it comes
python -m scripts.reading_temperature --adapter FOLDER     or trained

Pictures of the demo with known places: by the requirements of a brief that they meet, of equals by their quality. What
the demo judge reads at once is a guess, whatever it was trained for, so `top` has to live with a bad choice of the ten.
The log-odds of answers that are read at once are divided by a temperature, as a calibration does that finds nothing in
them. Kendall's tau-b against the places: of `--no-think`, of `top`, of thinking about all; and on the ten that `top`
thought about, by `top` and by their thinking alone.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from mlxpref._blas import preload

preload()  # before MLX is first imported

import click  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from scipy.stats import kendalltau  # noqa: E402

import mlxpref  # noqa: E402
from mlxpref.cli.output import note, show_on_stderr  # noqa: E402
from mlxpref.demo.briefs import Brief, draw_brief, prompt_text  # noqa: E402
from mlxpref.demo.pictures import render  # noqa: E402
from mlxpref.demo.preferences import value_of  # noqa: E402
from mlxpref.judge.judge import Judge  # noqa: E402
from mlxpref.judge.pair_budget import ThinkAbout  # noqa: E402
from mlxpref.judge.pair_verdict import PairVerdict  # noqa: E402
from mlxpref.judge.rank import rank_pairs  # noqa: E402
from mlxpref.judge.ranking_result import Ranking  # noqa: E402
from mlxpref.preferences import Pair  # noqa: E402
from mlxpref.ranking.bradley_terry import fit_strengths  # noqa: E402
from mlxpref.ranking.temperature import TemperatureScaling  # noqa: E402
from scripts.bench_common import looks_for, report  # noqa: E402

TEMPERATURES = (1.0, 4.0, 20.0, 100.0)


def pictures_of(brief: Brief, count: int, rng: np.random.Generator) -> tuple[list[Image.Image], list[int]]:
    """Pictures for a brief, and their places: a larger number is better."""
    looks = looks_for(brief, count, rng)
    return [render(look, rng) for look in looks], [value_of(brief, look) for look in looks]


def ranked(judge: Judge, images: list[Image.Image], prompt: str, about: ThinkAbout, temperature: float) -> Ranking:
    """The ranking with the log-odds of reading divided by a temperature."""
    session = judge.session()

    def compare(pairs: Iterable[Pair], think: bool, orders: int) -> Iterator[PairVerdict]:
        for verdict in judge.pairs(pairs, think=think, session=session, both_orders=orders == 2):
            yield verdict if think else replace(verdict, rescaling=TemperatureScaling(temperature))

    return rank_pairs(images, prompt, compare, about, seed=judge.settings.seed)


def agreement(strengths: np.ndarray, places: list[int], among: list[int] | None = None) -> float:
    """Kendall's tau-b, of all images or of some."""
    index = list(range(len(places))) if among is None else among
    return float(kendalltau(np.round(strengths[index], 6), np.array(places)[index])[0])


def thinking_alone(ranking: Ranking) -> tuple[list[int], np.ndarray]:
    """The images that were thought about, and the strengths (N,) by these answers alone; 0 of all others."""
    pairs = [pair for pair in ranking.pairs if pair.think]
    members = sorted({image for pair in pairs for image in (pair.a, pair.b)})
    place = {image: at for at, image in enumerate(members)}
    fit = fit_strengths(len(members), [pair.verdict.outcome(place[pair.a], place[pair.b]) for pair in pairs])
    strengths = np.zeros(len(ranking))
    strengths[members] = fit.strengths
    return members, strengths


@click.command(help=__doc__)
@click.option("--adapter", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--images", default=28, show_default=True)
@click.option("--sets", default=6, show_default=True, help="Sets of pictures, each for a prompt of its own.")
@show_on_stderr()
def main(adapter: Path | None, images: int, sets: int) -> None:
    judge = mlxpref.load("demo", adapter)
    rows: dict[float, list[list[float]]] = {temperature: [] for temperature in TEMPERATURES}
    for number in range(sets):
        rng = np.random.default_rng([20, number])
        brief = draw_brief(rng)
        pictures, places = pictures_of(brief, images, rng)
        text = prompt_text(brief)
        whole = agreement(ranked(judge, pictures, text, "all", 1.0).strengths.fit.strengths, places)
        for temperature in TEMPERATURES:
            note(f"set {number + 1} of {sets}, temperature {temperature:g}")
            read = ranked(judge, pictures, text, "none", temperature).strengths.fit.strengths
            top = ranked(judge, pictures, text, "top", temperature)
            ten, alone = thinking_alone(top)
            strengths = top.strengths.fit.strengths
            on_ten = [agreement(each, places, ten) for each in (strengths, alone)]
            rows[temperature].append([agreement(read, places), agreement(strengths, places), whole, *on_ten])
    names = ("reading", "top", "thinking about all", "top, the ten", "thinking alone, the ten")
    means = {temperature: np.nanmean(values, axis=0).round(3).tolist() for temperature, values in rows.items()}
    cases = [{"temperature": t} | dict(zip(names, mean, strict=True)) for t, mean in means.items()]
    columns = (">temperature", *(f">{name}" for name in names))
    settings = {"images": images, "sets": sets, "adapter": str(adapter) if adapter else None}
    report("reading_temperature", settings, cases, (columns, [list(case.values()) for case in cases]))


if __name__ == "__main__":
    main()
