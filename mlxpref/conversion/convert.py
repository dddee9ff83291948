"""Conversion: a Hugging Face checkpoint becomes a quantized MLX folder, which is checked and compared with its source.

mlx-vlm maps names and layouts. Its weights are lazy here: they are read, quantized and written one by one. Silent
failures of mlx-vlm's own conversion (nothing quantized, recipes ignored, vision left out, a truncated file under its
final name) are errors or impossible here.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mode
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.checks import check_folder
from mlxpref.conversion.fidelity import Answers, ask_source, compare_with_source
from mlxpref.conversion.keep_profile import check_profile, profile_to_keep, write_profile
from mlxpref.conversion.quantize import (
    LayerQuantization,
    Recipe,
    cast,
    dequantize,
    plan_layers,
    quantize,
    quantized_layers,
    stored_types,
)
from mlxpref.conversion.verify import naming_source, public_name, revision_of, verify, write_record
from mlxpref.conversion.writer import check_space, folder_bytes, new_folder, write_model
from mlxpref.data.learned import keep_learned
from mlxpref.engine.adapters import read_adapter, trained_settings
from mlxpref.engine.experts import ROUTER
from mlxpref.engine.lora import fuse_adapter
from mlxpref.engine.mlx_model import lazy_model
from mlxpref.engine.profile import Profile, own_profile
from mlxpref.errors import ModelError
from mlxpref.log import logger
from mlxpref.preferences import Comparison

Plan = Mapping[str, LayerQuantization]
_DTYPES = ("dtype", "torch_dtype")


def convert(
    source: Path | Checkpoint,
    output: Path,
    recipe: Recipe | None = Recipe(),  # noqa: B008  it is frozen
    *,
    dtype: str | None = "bfloat16",
    shard_size: int = 5 * 10**9,
    name: str | None = None,
    requantize: bool = False,
    adapter: Path | None = None,
    overwrite: bool = False,
    comparisons: Sequence[Comparison] = (),
    reference: Answers | None = None,
    profile: Profile | None = None,
    finish: Callable[[Path], None] = lambda folder: None,
) -> dict[str, Any]:
    """Convert a checkpoint folder and return the result as JSON of `convert`.

    `recipe` None keeps the quantization of each layer, `dtype` None the type of unquantized weights. `name` is the
    source's public name. A quantized source needs `requantize`, which dequantizes its weights first. An `adapter` is
    fused into the weights first. `comparisons`, if any, compare the result with its source; `reference` are the
    source's answers to them, if known. `profile` is how the judge is asked, by default the source's own; it stays in
    the folder. `finish` may add files to the folder. ModelError for a source that cannot be converted, ConfigError for
    an existing output, or a profile that the source's tokenizer cannot read; all leave nothing behind.
    """
    start = time.perf_counter()
    source = Checkpoint.open(source)
    check_folder(source)
    full_name = name or str(source.folder)
    kept = profile_to_keep(profile, full_name, source.folder, adapter)
    if kept is not None:
        check_profile(source, kept)
    profile = kept or own_profile()
    with new_folder(output, overwrite, [source.folder, *([adapter] if adapter else [])]) as folder:
        model = lazy_model(source)
        _check_quantized_source(source.folder, model, recipe, requantize)
        plan, unquantized = _apply(source, model, recipe, adapter, dtype)
        weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
        del model
        gc.collect()  # the layers hold weights in reference cycles
        shapes = {key: tuple(weight.shape) for key, weight in weights.items()}
        weight_bytes, count = sum(int(weight.nbytes) for weight in weights.values()), _weight_count(weights, plan)
        check_space(output, weight_bytes)
        write_model(folder, source.folder, _config(source, recipe, plan, dtype), weights, shard_size)
        write_profile(folder, kept)
        mx.clear_cache()
        # Never holds source and result in memory together.
        answers, skipped = (reference, None) if reference else ask_source(source, comparisons, adapter, profile)
        with naming_source(source.folder, folder):
            vlm = verify(folder, source, plan, shapes, profile)
            fidelity = compare_with_source(vlm, comparisons, answers)
        if fidelity and fidelity.doubt:
            logger.warning(f"{recipe.name if recipe else output}: {fidelity.doubt}")
        settings = recipe or Recipe(None)
        result = {
            "recipe": recipe.name if recipe else "kept",
            **{name: getattr(settings, name) for name in ("bits", "group_size", "mode")},
            "quantized_layers": len(plan),
            "left": unquantized,
            "bits_per_weight": round(8 * weight_bytes / count, 4),
            "fidelity": fidelity.to_json() if fidelity else None,
            "fidelity_skipped": skipped,
        }
        keep_learned(folder, [adapter, source.folder])
        finish(folder)
        fused = public_name(adapter) if adapter else None
        origin: dict[str, Any] = {"source": public_name(full_name), "revision": revision_of(source.folder)}
        origin |= {"identity": source.identity.to_json(), "adapter": fused, "dtype": dtype}
        origin |= {"profile": {"name": profile.name, "version": profile.version()}}
        write_record(folder, origin | result | {"trained": trained_settings(adapter or source.folder)})
    summary = {"path": str(output), "source": full_name, "profile": profile.name, **result}
    summary |= {"bytes": folder_bytes(output)}
    return summary | {"seconds": round(time.perf_counter() - start, 2)}


def _check_quantized_source(source: Path, model: nn.Module, recipe: Recipe | None, requantize: bool) -> None:
    """ModelError for a second loss of precision without `requantize`."""
    bits = sorted({layer.bits for layer in quantized_layers(model).values()})
    if bits and recipe and not requantize:
        raise ModelError(
            f"{source}: is already quantized to {' and '.join(map(str, bits))} bit; convert the original "
            "checkpoint instead, or agree to a second loss with --requantize"
        )


def _apply(
    source: Checkpoint, model: nn.Module, recipe: Recipe | None, adapter: Path | None, dtype: str | None
) -> tuple[Plan, list[str]]:
    """Put an adapter into a lazy model, and change its type and quantization.

    Returns the plan of its quantized layers, and the layers of the recipe that stay unquantized.
    """
    before = quantized_layers(model)
    layers = dict(before) if recipe else {}
    _, scale, lora = read_adapter(adapter, model) if adapter else (0, 0.0, {})
    layers |= {path: before[path] for path in {name.rpartition(".")[0] for name in lora} & before.keys()}
    dequantize(model, layers)
    cast(model, getattr(mx, dtype) if dtype else None, stored_types(source), apart_from=set(before) - set(layers))
    if lora:
        fuse_adapter(model, scale, lora)
    if recipe is None:
        quantize(model, layers)
        return before, []
    plan, unquantized = plan_layers(model, recipe)
    _check_any_quantized(source.folder, model, recipe, plan)
    quantize(model, plan)
    return plan, unquantized


def _check_any_quantized(source: Path, model: Any, recipe: Recipe, plan: Plan) -> None:
    """Raise an error if a recipe quantizes no layer of a part that it has bits for."""
    parts = {"language_model.": recipe.bits, "vision_tower.": recipe.vision_bits}
    for part, bits in parts.items():
        if bits and not any(path.startswith(part) and not path.endswith(ROUTER) for path in plan):
            width = model.language_model.model.embed_tokens.weight.shape[-1]
            raise ModelError(
                f"{source}: no layer of the {part[:-1]} could be quantized: group size {recipe.group_size} divides "
                f"none (hidden size {width}); give a smaller --group-size"
            )


def _config(source: Checkpoint, recipe: Recipe | None, plan: Plan, dtype: str | None) -> dict[str, Any]:
    """The config of the new folder, in the layout that mlx-vlm and the hub read."""
    config = plain_config(source.config, dtype)
    if plan:
        usual = (recipe.default_layer if recipe else None) or mode(plan.values())
        entries = {path: vars(layer) for path, layer in sorted(plan.items()) if layer != usual}
        quantization = {**vars(usual), **entries}
        # The hub's pages read the second name.
        config |= {"quantization": quantization, "quantization_config": quantization}
    return config


def plain_config(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """A config without quantization, for weights of a type; None keeps the type."""
    plain = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    for name in ("text_config", "vision_config"):
        if dtype is not None and isinstance(plain.get(name), dict):
            plain[name] = {key: dtype if key in _DTYPES else value for key, value in plain[name].items()}
    if dtype is not None:
        plain |= {key: dtype for key in _DTYPES if key in plain}
    if dtype is not None and not set(_DTYPES) & set(plain):
        plain["torch_dtype"] = dtype
    return plain


def _weight_count(weights: Mapping[str, mx.array], plan: Plan) -> int:
    """The number of weights before quantization, without scales and biases."""
    total = 0
    for name, weight in weights.items():
        path, _, key = name.rpartition(".")
        layer = plan.get(path)
        if layer is None or key == "bias":
            total += weight.size
        elif key == "weight":
            total += weight.size * 32 // layer.bits
    return total
