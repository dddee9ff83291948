"""The commands that turn one model into another: convert a checkpoint, export an adapter."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxpref.cli.common import agree, exit_on_sigterm
from mlxpref.cli.options import json_option
from mlxpref.text import format_bytes

if TYPE_CHECKING:
    from mlxpref.conversion.fidelity import Comparison
    from mlxpref.conversion.quantize import Recipe

__all__ = ["convert", "export"]

_BITS = click.Choice(["none", "2", "3", "4", "5", "6", "8"])
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(MB|GB)", re.IGNORECASE)


def _bytes(ctx: click.Context, parameter: click.Parameter, value: str) -> int:
    """A size such as 5GB or 200MB."""
    found = _SIZE.fullmatch(value.strip())
    if not found or float(found[1]) == 0:
        raise click.BadParameter(f"{value!r} is no size; give one like 5GB or 200MB")
    return int(float(found[1]) * (10**9 if found[2].upper() == "GB" else 10**6))


shard_option = click.option(
    "--shard-size", default="5GB", show_default=True, callback=_bytes, help="The most bytes of a file of weights."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it holds something.")


@click.command(short_help="Make a quantized folder of a checkpoint.")
@click.argument("source")
@click.argument("output", type=click.Path(path_type=Path), required=False)
@click.option("--bits", type=_BITS, help="Bits a weight of the language model.  [default: 4]")
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), help="Weights that share a scale.  [default: 64]")
@click.option("--mode", type=click.Choice(["affine", "mxfp4"]), help="How weights are quantized.  [default: affine]")
@click.option("--recipe", help="Instead of --bits: mixed_4_8 and the like give the layers that matter most more bits.")
@click.option(
    "--vision-bits", type=_BITS, default="none", help="Bits of the vision tower.  [default: its own precision]"
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Type of the weights that are not quantized.",
)
@shard_option
@click.option("--revision", help="Branch, tag or commit, where SOURCE is a Hugging Face id.")
@click.option("--requantize", is_flag=True, help="Take a SOURCE that is quantized, through what its weights stand for.")
@click.option("--preferences", help="Measure on the images of this file's preferences, not on built-in pictures.")
@click.option("--fidelity/--no-fidelity", default=True, show_default=True, help="Measure what quantization changes.")
@click.option("--compare", "names", help="Recipes side by side, as 4,8,mixed_4_8: size against fidelity.")
@overwrite_option
@json_option
def convert(
    source: str,
    output: Path | None,
    bits: str | None,
    group_size: str | None,
    mode: str | None,
    recipe: str | None,
    vision_bits: str,
    dtype: str,
    shard_size: int,
    revision: str | None,
    requantize: bool,
    preferences: str | None,
    fidelity: bool,
    names: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Convert the checkpoint SOURCE (a folder or a Hugging Face id) into a quantized MLX folder OUTPUT.

    What was written is loaded again and checked, and compared with SOURCE on pairs of pictures. With --compare, each
    recipe is measured; the folders are kept in OUTPUT if it is given.
    """
    from mlxpref.checkpoints.resolve import find_checkpoint
    from mlxpref.cli.output import print_json
    from mlxpref.cli.tables import print_recipes
    from mlxpref.conversion.compare_recipes import compare_recipes
    from mlxpref.conversion.convert import convert as convert_folder
    from mlxpref.conversion.verify import Check

    vision = None if vision_bits == "none" else int(vision_bits)
    wanted = _recipes(names, bits, group_size, mode, recipe, vision)
    if names is None and output is None:
        raise click.UsageError("Missing argument 'OUTPUT': the folder for the model")
    comparisons = _comparisons(preferences)
    name, path = find_checkpoint(source, agree, revision)
    common: dict[str, Any] = {"dtype": dtype, "shard_size": shard_size, "name": name, "requantize": requantize}
    with exit_on_sigterm():
        if names is not None:
            rows = compare_recipes(path, wanted, output, **common, comparisons=comparisons)
            print_json(rows) if as_json else print_recipes(rows)
            return
        assert output is not None
        check = Check(comparisons, fidelity)
        written = convert_folder(path, output, wanted[0], **common, overwrite=overwrite, check=check)
    if as_json:
        print_json(written)
    else:
        _print_written(written, f"use it with --model {output}")


def _recipes(
    names: str | None,
    bits: str | None,
    group_size: str | None,
    mode: str | None,
    recipe: str | None,
    vision_bits: int | None,
) -> "list[Recipe]":
    """The recipes that the options ask for: one, or those of --compare."""
    from mlxpref.conversion.quantize import Recipe

    if sum(option is not None for option in (names, recipe, bits or mode)) > 1:
        raise click.UsageError("--compare, --recipe, and --bits with --mode exclude each other")
    group = int(group_size or 64)
    if names is not None:
        asked = [name.strip() for name in names.split(",") if name.strip()]
        if not asked:
            raise click.UsageError("--compare: give recipes, as 4,8,mixed_4_8")
        return [Recipe.named(name, group, vision_bits) for name in dict.fromkeys(asked)]
    if mode == "mxfp4" or recipe == "mxfp4":
        if bits not in (None, "4") or group_size not in (None, "32"):
            raise click.UsageError("mxfp4 has 4 bits and groups of 32")
        return [Recipe.named("mxfp4", vision_bits=vision_bits)]
    return [Recipe.named(recipe or bits or "4", group, vision_bits)]


def _comparisons(preferences: str | None) -> "list[Comparison]":
    """What fidelity is measured on."""
    from mlxpref.conversion.fidelity import built_in_comparisons, comparisons_of

    if preferences is None:
        return built_in_comparisons()
    from mlxpref.data.load import load_preferences

    return comparisons_of(load_preferences(preferences, "test"))


def _print_written(written: dict[str, Any], use: str) -> None:
    """What was written, in two lines: the folder, and how true it is to its source."""
    from mlxpref.cli.output import note, print_text

    layers = written["quantized_layers"]
    recipe = f"{written['recipe']} bit" if str(written["recipe"]).isdigit() else written["recipe"]
    kind = f"{recipe}, {layers} layers quantized" if layers else "not quantized"
    size = f"{format_bytes(written['bytes'])}, {written['bits_per_weight']:.2f} bits a weight"
    print_text(f"{written['path']}: {kind}, {size}; {use}")
    if written["left"]:
        note(f"{len(written['left'])} layers were left as they were: the group size does not divide their width")
    if written["fidelity"]:
        _print_fidelity(written["fidelity"], "its source")
    elif written["fidelity_skipped"]:
        note(f"not compared with its source: {written['fidelity_skipped']}")


def _print_fidelity(found: dict[str, Any], source: str) -> None:
    """How far a model is from what it was made of, in a line."""
    from mlxpref.cli.output import print_text

    print_text(
        f"beside {source}, on {found['comparisons']} comparisons: the same verdict in {found['agreement']:.1%}, "
        f"KL of the answer {found['kl_answer']:.2g} nats, probability of the first image off by "
        f"{found['p_first_difference']:.2g}, log-probability of a written token by "
        f"{found['token_logprob_difference']:.2g}"
    )


@click.command(short_help="Take an adapter elsewhere: PEFT, one fused model, transformers.")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--to",
    required=True,
    type=click.Choice(["peft", "fused", "hf"]),
    help="A PEFT adapter, one MLX model, or one model for transformers.",
)
@click.option("--model", help="The model it was trained on.  [default: the one the adapter names]")
@click.option("--recipe", help="With --to fused: quantize as `convert` does.  [default: each layer as it was]")
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), help="With --recipe.  [default: 64]")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Type of the weights that are not quantized.  [default: the model's own; PEFT float32]",
)
@shard_option
@click.option("--any-base", is_flag=True, help="Also where the adapter was trained on another model.")
@overwrite_option
@json_option
def export(
    adapter: Path,
    output: Path,
    to: str,
    model: str | None,
    recipe: str | None,
    group_size: str | None,
    dtype: str | None,
    shard_size: int,
    any_base: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write ADAPTER (mlx-vlm's format or PEFT's) into the folder OUTPUT, in a form that others read.

    `peft` is an adapter for PEFT, `fused` a full model for MLX, `hf` a full model for transformers. Each gets a model
    card that says how to load it.
    """
    from mlxpref.checkpoints.resolve import find_checkpoint
    from mlxpref.cli.output import print_json, print_text
    from mlxpref.conversion.export import export_adapter
    from mlxpref.conversion.quantize import Recipe
    from mlxpref.engine.adapters import base_name

    if to != "fused" and (recipe or group_size):
        raise click.UsageError("--recipe and --group-size go with --to fused")
    if group_size and not recipe:
        raise click.UsageError("--group-size goes with --recipe")
    chosen = Recipe.named(recipe, int(group_size or 64)) if recipe else None
    name, base = find_checkpoint(model or base_name(adapter), agree)
    with exit_on_sigterm():
        written = export_adapter(
            adapter,
            output,
            to,
            base,
            name,
            chosen,
            dtype,
            shard_size,
            overwrite,
            any_base,
        )
    if as_json:
        print_json(written)
    else:
        print_text(f"{written['path']}: {format_bytes(written['bytes'])}; {output / 'README.md'} says how to load it")
        if written.get("fidelity"):
            _print_fidelity(written["fidelity"], "its base with the adapter on")
