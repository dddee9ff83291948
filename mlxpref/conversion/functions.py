"""The work of the commands `convert` and `export` as functions, with the same results."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from mlxpref.checkpoints.resolve import find_source
from mlxpref.conversion.convert import convert as convert_folder
from mlxpref.conversion.export import export_adapter
from mlxpref.conversion.fidelity import built_in_comparisons, comparisons_of
from mlxpref.conversion.quantize import DTYPES, Recipe
from mlxpref.data.load import load_preferences
from mlxpref.engine.adapters import find_base
from mlxpref.engine.profile import profile_named
from mlxpref.errors import ConfigError
from mlxpref.files import expand

_SHARD = 5 * 10**9


def convert(
    source: str | Path,
    output: str | Path,
    bits: int | None = 4,
    *,
    recipe: str | None = None,
    group_size: int = 64,
    vision_bits: int | None = None,
    dtype: str = "bfloat16",
    revision: str | None = None,
    requantize: bool = False,
    overwrite: bool = False,
    fidelity: bool = True,
    preferences: str | Path | None = None,
    shard_size: int = _SHARD,
    profile: str | Path | None = None,
) -> dict[str, Any]:
    """Convert a checkpoint into a quantized MLX folder, check it and compare it with its source; the command's JSON.

    `bits` None quantizes nothing; `recipe` takes its place: "mxfp4", or one like "mixed_4_8". `preferences` is a file
    whose images are compared, instead of built-in pictures. `profile` is how the judge is asked, by name or as a file,
    by default the source's own; it stays in the folder. ModelError for a source that cannot be converted,
    ConfigError for an output that exists, unless `overwrite`; both leave nothing behind.
    """
    _check("dtype", dtype, DTYPES)
    quantization = Recipe.named(str(recipe or ("none" if bits is None else bits)), group_size, vision_bits)
    given = profile_named(expand(profile)) if profile is not None else None
    comparisons = built_in_comparisons()
    if preferences is not None:
        comparisons = comparisons_of(load_preferences(expand(preferences), "test"))
    name, folder = find_source(expand(source), revision)
    return convert_folder(
        folder, Path(expand(output)), quantization, dtype=dtype, shard_size=shard_size, name=name,
        requantize=requantize, overwrite=overwrite, comparisons=comparisons if fidelity else (),
        profile=given,
    )  # fmt: skip


def export(
    adapter: str | Path,
    output: str | Path,
    to: Literal["peft", "fused", "hf"],
    *,
    model: str | Path | None = None,
    recipe: str | int | None = None,
    group_size: int = 64,
    dtype: str | None = None,
    overwrite: bool = False,
    any_base: bool = False,
    shard_size: int = _SHARD,
    agree: Callable[[str], bool] = lambda question: False,
) -> dict[str, Any]:
    """Write an adapter for PEFT ("peft"), as one MLX model ("fused") or for transformers ("hf"); the command's JSON.

    `model` is by default the one that the adapter names, which `agree` must return True to download; `recipe` quantizes
    a fused one as `convert` does. ModelError for an adapter of another model, unless `any_base`; ConfigError for an
    output that exists, unless `overwrite`.
    """
    _check("to", to, ("peft", "fused", "hf"))
    _check("dtype", dtype, (None, *DTYPES))
    if recipe is not None and to != "fused":
        raise ConfigError('a recipe goes with to="fused"')
    quantization = Recipe.named(str(recipe), group_size) if recipe is not None else None
    folder = Path(expand(adapter))
    name, base = find_base(folder, expand(model) if model else None, agree)
    return export_adapter(
        folder, Path(expand(output)), to, base, name, quantization, dtype, shard_size, overwrite, any_base
    )


def _check(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} {value!r}: give {', '.join(map(repr, choices))}")
