"""`mlxpref export`: write an adapter for other tools."""

from pathlib import Path
from typing import Literal

import click

from mlxpref.cli.common import exit_on_sigterm
from mlxpref.cli.convert import DTYPE, GROUP_SIZE, WriteOptions
from mlxpref.cli.options import FILE, HelpCommand, json_option, option_group
from mlxpref.cli.output import print_json, print_text
from mlxpref.cli.tables import fidelity_line
from mlxpref.conversion.functions import export as export_adapter
from mlxpref.text import format_bytes


@click.command(
    cls=HelpCommand,
    examples=(
        "mlxpref export runs/taste taste-peft --to peft",
        "mlxpref export runs/taste taste-4bit --to fused --recipe 4",
    ),
)
@click.argument("adapter", type=FILE)
@click.argument("output", type=FILE)
@click.option(
    "--to",
    required=True,
    type=click.Choice(["peft", "fused", "hf"]),
    help="A PEFT adapter, one MLX model, or one model for transformers.",
)
@click.option("--model", help="The model it was trained on.  [default: the one the adapter names]")
@click.option("--recipe", help="With --to fused: quantize as `convert` does.  [default: each layer as it was]")
@click.option("--group-size", type=GROUP_SIZE, help="With --recipe.  [default: 64]")
@click.option("--dtype", type=DTYPE, help="Type of unquantized weights.  [default: the model's own; PEFT float32]")
@option_group(WriteOptions, "writing")
@click.option("--any-base", is_flag=True, help="Accept an adapter that was trained on another model.")
@json_option
def export(
    adapter: Path,
    output: Path,
    to: Literal["peft", "fused", "hf"],
    model: str | None,
    recipe: str | None,
    group_size: str | None,
    dtype: str | None,
    writing: WriteOptions,
    any_base: bool,
    as_json: bool,
) -> None:
    """Write ADAPTER (mlx-vlm's format or PEFT's) into the folder OUTPUT, in a form for other tools.

    `peft` is an adapter for PEFT, `fused` a full model for MLX, `hf` a full model for transformers. Each gets a model
    card that says how to load it.
    """
    if to != "fused" and (recipe or group_size):
        raise click.UsageError("--recipe and --group-size go with --to fused")
    if group_size and not recipe:
        raise click.UsageError("--group-size goes with --recipe")
    upload_kind = writing.check_upload()
    with exit_on_sigterm():
        result = export_adapter(
            adapter, output, to, model=model, recipe=recipe, group_size=int(group_size or 64), dtype=dtype,
            overwrite=writing.overwrite, any_base=any_base, shard_size=writing.shard_size, agree=writing.agree,
        )  # fmt: skip
    result |= writing.upload(output, upload_kind)
    if as_json:
        print_json(result)
    else:
        print_text(f"{result['path']}: {format_bytes(result['bytes'])}; {output / 'README.md'} says how to load it")
        if result.get("fidelity"):
            print_text(fidelity_line(result["fidelity"], "its base with the adapter on"))
