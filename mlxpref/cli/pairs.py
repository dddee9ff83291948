"""`mlxpref pairs`: preference pairs from rankings, stores and files of preferences, for other training."""

import shlex
from pathlib import Path
from typing import get_args

import click

from mlxpref.cli.options import FILE, HelpCommand, json_option
from mlxpref.cli.output import print_json, print_text
from mlxpref.reward.pair_files import write_pairs
from mlxpref.reward.pair_formats import PARQUET, Format
from mlxpref.reward.pairs import Choose
from mlxpref.text import counted, format_bytes


@click.command(
    cls=HelpCommand,
    examples=(
        "mlxpref pairs ranking.json --output ./pairs --to diffusion-dpo",
        "mlxpref pairs ranking.json --output ./pairs --to hpsv3 --choose resolved",
        "mlxpref pairs comparisons.sqlite labels.jsonl --output ./pairs --to trl --margin 1",
    ),
)
@click.argument("sources", nargs=-1, required=True, type=FILE, metavar="RANKING...")
@click.option("--output", type=FILE, required=True, help="New folder for the pairs; the same command goes on in it.")
@click.option(
    "--to",
    required=True,
    type=click.Choice(get_args(Format)),
    help="Parquet with JPEGs for Diffusion-DPO's scripts, or for TRL's vision DPO of a judge; JSON rows with paths for "
    "HPSv3's script, or as `mlxpref train --data` reads them.",
)
@click.option(
    "--choose",
    type=click.Choice(get_args(Choose)),
    help="Of each ranking the best image against the worst, all pairs that the judge can tell apart, or all above "
    "--margin; of people's preferences always all that are no ties.  [default: best-worst]",
)
@click.option(
    "--margin",
    type=click.FloatRange(min=0),
    metavar="X",
    help="Take pairs whose strengths differ by at least X nats: 1 is a preference of 73 %, 2 of 88 %.",
)
@click.option(
    "--split", help="Which rows of a file of preferences.  [default: train; all rows of files without splits]"
)
@json_option
def pairs(
    sources: tuple[Path, ...],
    output: Path,
    to: Format,
    choose: Choose | None,
    margin: float | None,
    split: str | None,
    as_json: bool,
) -> None:
    """Write preference pairs, to train other models by, from RANKING files into the folder of --output.

    A RANKING is the JSON of `mlxpref rank --json`, a store of comparisons (`--store`), or a file of preferences that
    `--data` reads, such as one of `mlxpref label`. A pair that the judge cannot tell apart is none.
    """
    if choose and (choose == "margin") != (margin is not None):
        raise click.UsageError("--choose margin goes with --margin X, and no other --choose does")
    result = write_pairs(sources, output, to, choose=choose, margin=margin, split=split)
    if as_json:
        print_json(result.to_json())
        return
    size = format_bytes(sum(file["bytes"] for file in result.files))
    print_text(f"{counted(result.pairs, 'pair')} in {output}: {counted(len(result.files), 'file')}, {size}")
    data = (
        f"{shlex.quote(str(output))} --split train"
        if to in PARQUET
        else shlex.quote(str(output / result.files[0]["path"]))
    )
    print_text(f"they are preferences, too: mlxpref eval --data {data}")
