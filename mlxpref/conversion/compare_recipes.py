"""Recipes side by side: what each makes of a model, size against fidelity."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.conversion.convert import convert
from mlxpref.conversion.fidelity import Comparison, Fidelity
from mlxpref.conversion.quantize import Recipe
from mlxpref.conversion.verify import Check, source_answers
from mlxpref.engine.vlm import check_folder
from mlxpref.errors import ConfigError

__all__ = ["compare_recipes"]

_KEPT = ("recipe", "bits", "group_size", "mode", "bytes", "bits_per_weight", "quantized_layers", "seconds")
"""What a row has of the result of a conversion, beside the numbers of its fidelity."""


def compare_recipes(
    source: Path | Checkpoint,
    recipes: Sequence[Recipe],
    output: Path | None = None,
    *,
    dtype: str = "bfloat16",
    comparisons: Sequence[Comparison],
    name: str | None = None,
    requantize: bool = False,
    shard_size: int = 5 * 10**9,
) -> list[dict[str, Any]]:
    """Convert a checkpoint by each recipe and measure it: a row a recipe, in their order.

    Folders are kept as `output`/<recipe>; without an output each is removed before the next is made. The source is
    asked once. A row has `recipe`, `bytes`, `bits_per_weight`, `quantized_layers` and the numbers of `Fidelity`, which
    are None, with a reason in `fidelity_skipped`, where the source does not fit in memory. ConfigError for a folder
    that is in the way, before anything is made.
    """
    source = Checkpoint.open(source)
    check_folder(source)
    names = [recipe.name for recipe in recipes]
    if len(set(names)) < len(names):
        raise ConfigError(f"a recipe is given twice: {', '.join(names)}; give each once")
    for folder in (output / each for each in names) if output else ():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder}: is there already; give another output, or remove it")
    check = Check(comparisons)
    reference, skipped = source_answers(source, check)
    check = Check(comparisons, reference is not None, check.max_pixels, reference)
    rows = []
    for recipe in recipes:
        with _place(output, recipe.name) as folder:
            written = convert(
                source,
                folder,
                recipe,
                dtype=dtype,
                shard_size=shard_size,
                name=name,
                requantize=requantize,
                check=check,
            )
        rows.append(_row(written, skipped))
    return rows


@contextmanager
def _place(output: Path | None, name: str) -> Iterator[Path]:
    """Where a recipe's folder goes: into the output, or to a place that is removed afterwards."""
    if output is not None:
        yield output / name
        return
    with TemporaryDirectory(prefix="mlxpref-") as place:
        yield Path(place) / name


def _row(written: dict[str, Any], skipped: str | None) -> dict[str, Any]:
    """A row of a conversion's result."""
    numbers = written["fidelity"] or dict.fromkeys(Fidelity.__dataclass_fields__)
    return {
        **{key: written[key] for key in _KEPT},
        "left": len(written["left"]),
        **numbers,
        "fidelity_skipped": skipped,
    }
