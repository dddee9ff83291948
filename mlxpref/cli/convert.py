"""`mlxpref convert`: convert a checkpoint to a quantized MLX folder, check it, and compare it with its source."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from huggingface_hub import constants

from mlxpref.checkpoints.files import PROFILE_FILE
from mlxpref.checkpoints.resolve import find_source, is_hub_id
from mlxpref.cli.common import agree, exit_on_sigterm
from mlxpref.cli.options import (
    FILE,
    HelpCommand,
    check_profile,
    flag,
    grouped_option,
    json_option,
    option,
    option_group,
)
from mlxpref.cli.output import note, print_json, print_text
from mlxpref.cli.tables import fidelity_line, print_recipes
from mlxpref.conversion.compare_recipes import compare_recipes
from mlxpref.conversion.convert import convert as convert_folder
from mlxpref.conversion.fidelity import built_in_comparisons, comparisons_of
from mlxpref.conversion.quantize import DTYPES, GROUP_SIZES, Recipe
from mlxpref.data.load import load_preferences
from mlxpref.engine.profile import profile_named
from mlxpref.errors import ConfigError
from mlxpref.hub import upload_model, visibility_of
from mlxpref.text import format_bytes

_BITS = click.Choice(["none", "2", "3", "4", "5", "6", "8"])
DTYPE = click.Choice(DTYPES)
GROUP_SIZE = click.Choice(list(map(str, GROUP_SIZES)))
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(MB|GB)", re.IGNORECASE)


def _bytes(ctx: click.Context, parameter: click.Parameter, value: str) -> int:
    """A size such as 5GB or 200MB."""
    match = _SIZE.fullmatch(value.strip())
    if not match or float(match[1]) == 0:
        raise click.BadParameter(f"{value!r} is no size; give one like 5GB or 200MB")
    return int(float(match[1]) * (10**9 if match[2].upper() == "GB" else 10**6))


def _repository(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """A repository of the hub such as owner/name."""
    if value is not None and (not is_hub_id(value) or "@" in value):
        raise click.BadParameter(f"{value!r} is no repository; give one like owner/name")
    return value


@dataclass(frozen=True)
class WriteOptions:
    """The options of writing a model folder."""

    shard_size: int = option(
        "--shard-size", default="5GB", show_default=True, callback=_bytes, help="The most bytes of a file of weights."
    )
    overwrite: bool = flag("--overwrite", "Replace OUTPUT if it holds something.")
    upload_repo: str | None = option(
        "--upload-repo",
        metavar="OWNER/NAME",
        callback=_repository,
        help="Upload OUTPUT there, on the Hugging Face hub; asks first. A new repository is private.",
    )
    yes: bool = flag("--yes", "Agree to the upload, and to a download.")

    def agree(self, question: str) -> bool:
        """Whether the user agrees, by --yes or on the terminal."""
        return self.yes or agree(question)

    def check_upload(self) -> str:
        """The kind of repository of the upload, before the work; ConfigError if nobody can agree to it."""
        if self.upload_repo is None:
            return ""
        if not self.yes and not sys.stdin.isatty():
            raise ConfigError("--upload-repo: there is no terminal to ask on, and nothing is sent unasked; add --yes")
        visibility = visibility_of(self.upload_repo)
        return f"a {visibility} repository, whose weights it replaces" if visibility else "a new, private repository"

    def upload(self, folder: Path, kind: str) -> dict[str, str | None]:
        """Upload a finished folder if the user agrees; its address for the JSON, nothing if it was not asked for."""
        if self.upload_repo is None:
            return {}
        files = [file for file in folder.rglob("*") if file.is_file()]
        size = f"{len(files)} files, {format_bytes(sum(file.stat().st_size for file in files))}"
        target = f"{constants.ENDPOINT}/{self.upload_repo}, {kind}"
        if not self.agree(f"Upload {folder} ({size}) to {target}?"):
            note(f"not uploaded; {folder} stays as it is")
            return {"uploaded": None}
        note(f"uploading {folder} ({size}) to {target}")
        address = upload_model(folder, self.upload_repo)
        note(f"uploaded to {address}")
        return {"uploaded": address}


@dataclass(frozen=True)
class RecipeOptions:
    """The options of quantization: one recipe, or several to compare."""

    bits: str | None = option("--bits", type=_BITS, help="Bits a weight of the language model.  [default: 4]")
    group_size: str | None = option("--group-size", type=GROUP_SIZE, help="Weights that share a scale.  [default: 64]")
    mode: str | None = option(
        "--mode", type=click.Choice(["affine", "mxfp4"]), help="How weights are quantized.  [default: affine]"
    )
    recipe: str | None = option(
        "--recipe", help="Instead of --bits: mixed_4_8 and the like give the layers that matter most more bits."
    )
    vision_bits: str = option(
        "--vision-bits", type=_BITS, default="none", help="Bits of the vision tower.  [default: its own precision]"
    )
    compare: str | None = option("--compare", help="Recipes side by side, as 4,8,mixed_4_8: size against fidelity.")

    def recipes(self) -> list[Recipe]:
        """The recipes of the options: one, or those of --compare."""
        if sum(each is not None for each in (self.compare, self.recipe, self.bits or self.mode)) > 1:
            raise click.UsageError("--compare, --recipe, and --bits with --mode exclude each other")
        vision_bits = None if self.vision_bits == "none" else int(self.vision_bits)
        group_size = int(self.group_size or 64)
        if self.compare is not None:
            names = [name.strip() for name in self.compare.split(",") if name.strip()]
            if not names:
                raise click.UsageError("--compare: give recipes, as 4,8,mixed_4_8")
            return [Recipe.named(name, group_size, vision_bits) for name in dict.fromkeys(names)]
        if "mxfp4" in (self.mode, self.recipe):
            if self.bits not in (None, "4") or self.group_size not in (None, "32"):
                raise click.UsageError("mxfp4 has 4 bits and groups of 32")
            return [Recipe.named("mxfp4", vision_bits=vision_bits)]
        return [Recipe.named(self.recipe or self.bits or "4", group_size, vision_bits)]


@click.command(
    cls=HelpCommand,
    examples=(
        "mlxpref convert Qwen/Qwen2.5-VL-7B-Instruct judge-4bit --bits 4",
        "mlxpref convert ./checkpoint --compare 4,8,mixed_4_8",
        "mlxpref convert ./own-judge judge-8bit --bits 8 --profile unifiedreward-think",
    ),
)
@click.argument("source")
@click.argument("output", type=FILE, required=False)
@option_group(RecipeOptions, "recipe")
@click.option("--dtype", type=DTYPE, default="bfloat16", show_default=True, help="Type of unquantized weights.")
@option_group(WriteOptions, "writing")
@click.option("--revision", help="Branch, tag or commit, where SOURCE is a Hugging Face id.")
@click.option("--requantize", is_flag=True, help="Accept a quantized SOURCE; its weights are dequantized first.")
@click.option("--preferences", help="Measure on the images of this file's preferences, not on built-in pictures.")
@click.option("--fidelity/--no-fidelity", default=True, show_default=True, help="Measure what quantization changes.")
@grouped_option(
    "--profile",
    callback=check_profile,
    help="How the judge is asked: a built-in profile by name, or a TOML file; it stays in OUTPUT.  [default: SOURCE's "
    "own, by its folder or id]",
)
@json_option
def convert(
    source: str,
    output: Path | None,
    recipe: RecipeOptions,
    dtype: str,
    writing: WriteOptions,
    revision: str | None,
    requantize: bool,
    preferences: str | None,
    fidelity: bool,
    profile: str | None,
    as_json: bool,
) -> None:
    """Convert the checkpoint SOURCE (a folder or a Hugging Face id) into a quantized MLX folder OUTPUT.

    It loads and checks the new folder, and compares it with SOURCE on pairs of pictures. With --compare it measures
    each recipe and keeps nothing, so there is no OUTPUT.
    """
    recipes = recipe.recipes()
    if recipe.compare is None and output is None:
        raise click.UsageError("Missing argument 'OUTPUT': the folder for the model")
    if recipe.compare is not None and output is not None:
        raise click.UsageError("--compare measures recipes and keeps none: leave OUTPUT out, then convert by the best")
    if output is None and writing.upload_repo:
        raise click.UsageError("--compare keeps no model, so there is none for --upload-repo")
    upload_kind = writing.check_upload()
    given = profile_named(profile) if profile is not None else None
    comparisons = comparisons_of(load_preferences(preferences, "test")) if preferences else built_in_comparisons()
    name, path = find_source(source, revision)
    common: dict[str, Any] = {"dtype": dtype, "shard_size": writing.shard_size, "name": name, "requantize": requantize}
    common["profile"] = given
    with exit_on_sigterm():
        if output is None:
            rows = compare_recipes(path, recipes, comparisons, **common)
            print_json(rows) if as_json else print_recipes(rows)
            return
        result = convert_folder(
            path, output, recipes[0], **common, overwrite=writing.overwrite, comparisons=comparisons if fidelity else ()
        )
    result |= writing.upload(output, upload_kind)
    if as_json:
        print_json(result)
    else:
        _print_written(result, output)


def _print_written(result: dict[str, Any], output: Path) -> None:
    """Print the result in two lines: the folder, and its fidelity to its source."""
    layers = result["quantized_layers"]
    recipe = f"{result['recipe']} bit" if str(result["recipe"]).isdigit() else result["recipe"]
    kind = f"{recipe}, {layers} layers quantized" if layers else "not quantized"
    size = f"{format_bytes(result['bytes'])}, {result['bits_per_weight']:.2f} bits a weight"
    asked = f", which is asked by the profile {result['profile']}" if (output / PROFILE_FILE).is_file() else ""
    print_text(f"{result['path']}: {kind}, {size}; use it with --model {output}{asked}")
    if result["left"]:
        note(f"{len(result['left'])} layers were left as they were: the group size does not divide their width")
    if result["fidelity"]:
        print_text(fidelity_line(result["fidelity"], "its source"))
    elif result["fidelity_skipped"]:
        note(f"not compared with its source: {result['fidelity_skipped']}")
