"""Conversion: a Hugging Face checkpoint becomes a quantized MLX folder, a weight at a time, and is checked by its own.

mlx-vlm maps names and layouts; its weights are lazy here, so that each is read, quantized and written when its turn
comes. What mlx-vlm's own conversion does in silence (nothing quantized, recipes ignored, vision left out, a truncated
file under its final name) is an error or does not happen.
"""

import gc
import re
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.checks import check_folder, check_model
from mlxpref.conversion.quantize import LayerQuantization, Recipe, plan_layers
from mlxpref.conversion.verify import Check, revision_of, verify, write_record
from mlxpref.conversion.writer import (
    check_space,
    copy_side_files,
    folder_bytes,
    new_folder,
    stream_weights,
    write_config,
)
from mlxpref.engine.adapters import read_adapter
from mlxpref.engine.lora import fuse_adapter
from mlxpref.errors import MlxprefError, ModelError
from mlxpref.text import one_line

__all__ = ["KEEP", "cast", "convert", "dequantize", "lazy_model", "plain_config", "quantized_layers"]

KEEP = Recipe(None)
"""Stands for: every layer as it is stored now. It is told from others by identity."""
_DTYPES = ("dtype", "torch_dtype")
_UNUSED = re.compile(r"(position_ids|rotary_emb\.inv_freq)$")
"""What some checkpoints hold that is computed, not learned."""
_PREFIXES = re.compile(r"^(model\.)?(language_model\.)?(model\.)?")
_VISION = re.compile(r"^(model\.)?(visual|vision_tower)\.")


def convert(
    source: Path | Checkpoint,
    output: Path,
    recipe: Recipe = Recipe(),  # noqa: B008  it is frozen
    *,
    dtype: str | None = "bfloat16",
    shard_size: int = 5 * 10**9,
    name: str | None = None,
    requantize: bool = False,
    adapter: Path | None = None,
    overwrite: bool = False,
    check: Check | None = None,
    finish: Callable[[Path], None] = lambda folder: None,
) -> dict[str, Any]:
    """Convert a checkpoint folder and return what was written, in design.md's terms.

    `dtype` is that of what is not quantized, None its own. `name` is what the source is called elsewhere. A quantized
    source is refused unless `requantize`, which goes through what its weights stand for. An `adapter` is put into the
    weights first; with the recipe KEEP, layers are quantized as they were. `check` says what the result is compared
    with its source on; None loads it and asks it once. `finish` may add files to the folder. ModelError for a source
    that cannot be converted, ConfigError for an output that is in the way; both leave nothing behind.
    """
    started = time.perf_counter()
    source = Checkpoint.open(source)
    check_folder(source)
    check = check or _one_comparison()
    with new_folder(output, overwrite, [source.folder, *([adapter] if adapter else [])]) as folder:
        model = lazy_model(source)
        before = quantized_layers(model)
        if before and not requantize and recipe is not KEEP:
            bits = sorted({layer.bits for layer in before.values()})
            raise ModelError(
                f"{source.folder}: is already quantized to {' and '.join(map(str, bits))} bit; convert the original "
                "checkpoint instead, or agree to a second loss with --requantize"
            )
        plan, left = _prepare(model, recipe, before, adapter, dtype, source.folder)
        weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
        del model
        gc.collect()  # the layers hold weights, and each other
        shapes = {key: tuple(weight.shape) for key, weight in weights.items()}
        count = _weight_count(weights, plan)
        stored = sum(int(weight.nbytes) for weight in weights.values())
        check_space(output, stored)
        write_config(folder, _config(source, recipe, plan, dtype))
        copy_side_files(source.folder, folder)
        _stream(source.folder, folder, weights, shard_size)
        mx.clear_cache()
        fidelity, skipped = verify(folder, source, plan, shapes, check, adapter)
        made = {
            "recipe": "kept" if recipe is KEEP else recipe.name,
            "bits": recipe.bits,
            "group_size": recipe.group_size,
            "mode": recipe.mode,
            "quantized_layers": len(plan),
            "left": left,
            "bits_per_weight": round(8 * stored / count, 4),
            "fidelity": fidelity.to_json() if fidelity else None,
            "fidelity_skipped": skipped,
        }
        finish(folder)
        origin = {
            "source": name or str(source.folder),
            "revision": revision_of(source.folder),
            "identity": source.identity.to_json(),
        }
        write_record(folder, origin | {"adapter": str(adapter) if adapter else None, "dtype": dtype} | made)
    seconds = round(time.perf_counter() - started, 2)
    return {
        "path": str(output),
        "source": name or str(source.folder),
        **made,
        "bytes": folder_bytes(output),
        "seconds": seconds,
    }


def lazy_model(source: Checkpoint) -> nn.Module:
    """mlx-vlm's model with weights that are read when they are needed.

    Every tensor of the source is accounted for: it is in the model, or is known not to be needed. ModelError otherwise.
    """
    from mlx_vlm.utils import load_model

    try:
        with source.readable() as folder:
            model: nn.Module = load_model(folder, lazy=True, trust_remote_code=False)
        check_model(source.folder, model)
    except MlxprefError:
        raise
    except Exception as error:  # mlx-vlm raises anything from KeyError to RuntimeError for a damaged folder
        raise ModelError(f"{source.folder}: cannot be converted: {one_line(error)}") from error
    _account(source, model)
    return model


def quantized_layers(model: nn.Module) -> dict[str, LayerQuantization]:
    """How each quantized layer of a model is stored, by module path."""
    return {
        path: LayerQuantization(layer.bits, layer.group_size, layer.mode)
        for path, layer in model.named_modules()
        if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding)
    }


def dequantize(model: nn.Module, paths: Mapping[str, LayerQuantization]) -> None:
    """Put the weights that quantized layers stand for in their place, lazily."""
    layers = dict(model.named_modules())
    plain = []
    for path in paths:
        layer: Any = layers[path]
        weight = mx.dequantize(
            layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, mode=layer.mode
        )
        outputs, inputs = weight.shape
        if isinstance(layer, nn.QuantizedEmbedding):
            made: Any = nn.Embedding(outputs, inputs)
        else:
            made = nn.Linear(inputs, outputs, bias="bias" in layer)
            if "bias" in layer:
                made.bias = layer.bias
        made.weight = weight
        plain.append((path, made))
    model.update_modules(tree_unflatten(plain))


def cast(model: nn.Module, dtype: mx.Dtype, apart_from: Collection[str] = ()) -> None:
    """Make every floating point weight of a type, lazily, but for those of some layers."""
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    changed = [
        (key, weight.astype(dtype))
        for key, weight in weights.items()
        if mx.issubdtype(weight.dtype, mx.floating) and key.rpartition(".")[0] not in apart_from
    ]
    model.update(tree_unflatten(changed))


def _prepare(
    model: nn.Module,
    recipe: Recipe,
    before: Mapping[str, LayerQuantization],
    adapter: Path | None,
    dtype: str | None,
    source: Path,
) -> tuple[dict[str, LayerQuantization], list[str]]:
    """Make a lazy model what is asked for; the plan of its quantized layers, and the layers that were left."""
    plan, left = dict(before), list[str]()
    touched = {} if recipe is KEEP else dict(before)
    fitted = read_adapter(adapter, model) if adapter else None
    if fitted:
        layers = {key.rpartition(".")[0] for key in fitted[2]}
        touched |= {path: layer for path, layer in before.items() if path in layers}
    dequantize(model, touched)
    if dtype is not None:
        cast(model, getattr(mx, dtype), apart_from=set(before) - set(touched))
    if fitted:
        fuse_adapter(model, fitted[1], fitted[2])
    if recipe is not KEEP:
        plan, left = plan_layers(model, recipe)
        _refuse_nothing(source, model, recipe, plan)
        touched = plan
    _quantize(model, {path: plan[path] for path in touched})
    return plan, left


def _quantize(model: nn.Module, plan: Mapping[str, LayerQuantization]) -> None:
    """Quantize layers as planned, lazily."""

    def wanted(path: str, _: nn.Module) -> bool | dict[str, Any]:
        layer = plan.get(path)
        return {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode} if layer else False

    nn.quantize(model, class_predicate=wanted)


def _refuse_nothing(source: Path, model: Any, recipe: Recipe, plan: Mapping[str, LayerQuantization]) -> None:
    """Refuse a recipe that would change no layer of a part that it is for."""
    parts = {"language_model.": recipe.bits, "vision_tower.": recipe.vision_bits}
    for part, bits in parts.items():
        if bits and not any(path.startswith(part) for path in plan):
            width = model.language_model.model.embed_tokens.weight.shape[-1]
            raise ModelError(
                f"{source}: no layer of the {part[:-1]} could be quantized: group size {recipe.group_size} divides "
                f"none (hidden size {width}); give a smaller --group-size"
            )


def _config(
    source: Checkpoint, recipe: Recipe, plan: Mapping[str, LayerQuantization], dtype: str | None
) -> dict[str, Any]:
    """The config of the new folder, in the layout that mlx-vlm and the hub read."""
    config = plain_config(source.config, dtype)
    if plan:
        usual = recipe.layer if recipe is not KEEP and recipe.layer else _commonest(plan)
        entries = {path: vars(layer) for path, layer in sorted(plan.items()) if layer != usual}
        quantization = {**vars(usual), **entries}
        # The second name is what the hub's pages look for.
        config |= {"quantization": quantization, "quantization_config": quantization}
    return config


def plain_config(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """A config of weights that are not quantized, of a type; None leaves the type as it is."""
    plain = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    for name in ("text_config", "vision_config"):
        if dtype is not None and isinstance(plain.get(name), dict):
            plain[name] = {key: dtype if key in _DTYPES else value for key, value in plain[name].items()}
    if dtype is not None:
        plain |= {key: dtype for key in _DTYPES if key in plain}
    if dtype is not None and not set(_DTYPES) & set(plain):
        plain["torch_dtype"] = dtype
    return plain


def _commonest(plan: Mapping[str, LayerQuantization]) -> LayerQuantization:
    found = list(plan.values())
    return max(sorted(set(found), key=lambda layer: (layer.bits, layer.group_size)), key=found.count)


def _account(source: Checkpoint, model: nn.Module) -> None:
    """Refuse a source of which a tensor would be dropped, or that lacks one."""
    stored = {_bare(name) for name in source.tensors if not _UNUSED.search(name)}
    if source.config.get("tie_word_embeddings"):
        stored = {name for name in stored if not name.startswith("lm_head.")}
    loaded = {_bare(name) for name in dict(tree_flatten(model.parameters()))}
    if unknown := sorted(stored - loaded):
        raise ModelError(
            f"{source.folder}: {len(unknown)} of its tensors have no place in the model, {unknown[0]} for one; nothing "
            "is converted that would be lost"
        )
    if missing := sorted(loaded - stored):
        raise ModelError(
            f"{source.folder}: {len(missing)} tensors are missing, {missing[0]} for one; download it again"
        )


def _bare(name: str) -> str:
    """A tensor's name without what differs between layouts."""
    vision = _VISION.match(name)
    return f"vision.{name[vision.end() :]}" if vision else _PREFIXES.sub("", name)


def _weight_count(weights: Mapping[str, mx.array], plan: Mapping[str, LayerQuantization]) -> int:
    """How many numbers the weights stand for; scales and biases of quantization are none."""
    total = 0
    for name, weight in weights.items():
        path, _, key = name.rpartition(".")
        if path not in plan:
            total += weight.size
        elif key == "weight":
            total += weight.size * 32 // plan[path].bits
        elif key == "bias":
            total += weight.size
    return total


def _stream(source: Path, folder: Path, weights: dict[str, mx.array], shard_size: int) -> None:
    try:
        stream_weights(folder, weights, shard_size)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from error


def _one_comparison() -> Check:
    """A check that asks the result once, and its source nothing."""
    from mlxpref.conversion.fidelity import built_in_comparisons

    return Check(built_in_comparisons()[:1], fidelity=False)
