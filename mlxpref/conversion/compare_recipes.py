"""Compares recipes: the size and the fidelity of each one's model."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.checks import check_folder
from mlxpref.conversion.convert import convert
from mlxpref.conversion.fidelity import Fidelity, ask_source
from mlxpref.conversion.keep_profile import check_profile, profile_to_keep
from mlxpref.conversion.quantize import Recipe
from mlxpref.engine.profile import Profile
from mlxpref.errors import ConfigError
from mlxpref.preferences import Comparison

_OF_CONVERSION = ("recipe", "bits", "group_size", "mode", "bytes", "bits_per_weight", "quantized_layers", "seconds")
"""A row's fields from the conversion's result, next to its fidelity."""


def compare_recipes(
    source: Path | Checkpoint,
    recipes: Sequence[Recipe],
    comparisons: Sequence[Comparison],
    profile: Profile | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Convert a checkpoint by each recipe, measure it and delete it; returns a row a recipe, in their order.

    `profile` and the other `options` are those of `convert`. The source answers once. A row has `recipe`, `bytes`,
    `bits_per_weight`, `quantized_layers` and the numbers of `Fidelity`, which are None, with a reason in
    `fidelity_skipped`, if the source does not fit in memory. Errors as in `convert`, and ConfigError for a repeated
    recipe.
    """
    source = Checkpoint.open(source)
    check_folder(source)
    names = [recipe.name for recipe in recipes]
    if len(set(names)) < len(names):
        raise ConfigError(f"a recipe is given twice: {', '.join(names)}; give each once")
    profile = profile_to_keep(profile, options.get("name") or str(source.folder), source.folder)
    if profile is not None:
        check_profile(source, profile)
    reference, skipped = ask_source(source, comparisons, profile=profile)
    rows = []
    for recipe in recipes:
        with TemporaryDirectory(prefix="mlxpref-") as place:
            result = convert(
                source,
                Path(place) / recipe.name,
                recipe,
                reference=reference,
                comparisons=comparisons if reference else (),
                profile=profile,
                **options,
            )
        numbers = result["fidelity"] or dict.fromkeys(Fidelity.__dataclass_fields__)
        row = {key: result[key] for key in _OF_CONVERSION} | {"left": len(result["left"])}
        rows.append(row | numbers | {"fidelity_skipped": skipped})
    return rows
