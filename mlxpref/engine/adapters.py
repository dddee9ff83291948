"""Adapters: LoRA weights and their config in mlx-vlm's format, put on a model only if they fit it."""

import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.files import ADAPTER_CONFIG, PROFILE_FILE, RECORD, printable, read_json_object
from mlxpref.checkpoints.identity import Identity
from mlxpref.checkpoints.resolve import find_checkpoint, is_hub_id
from mlxpref.checkpoints.safetensors import read_file_tensor_infos
from mlxpref.engine.experts import ROUTER
from mlxpref.engine.lora import attach_lora, linear_layers, linear_shape
from mlxpref.engine.peft import AGAIN, MERGE, PEFT_WEIGHTS, peft_parameters, peft_weights
from mlxpref.engine.profile import Profile, own_profile
from mlxpref.errors import ModelError
from mlxpref.files import replacing, write_file
from mlxpref.log import logger
from mlxpref.text import first_ten

ADAPTER_WEIGHTS = "adapters.safetensors"
_WEIGHTS = (ADAPTER_WEIGHTS, "weights.safetensors", PEFT_WEIGHTS)
"""Names of an adapter's file of weights: mlx-vlm's, its older one, and PEFT's."""
_TENSORS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".gguf"}
_OF_TRAINING = re.compile(r"\d+_adapters\.|\.|(optimizer|scheduler|scaler|rng_state|random_states|training_args)")
"""Files of tensors that are no part of an adapter: earlier steps of it, and the state of its training."""
_PART = re.compile(r"vis|vit|proj|merger|connector|head|embed|non_lora|modules", re.IGNORECASE)
"""Folders in an adapter folder that may hold a part of it."""
_EARLIER = "4a964cd983c5"
"""The hash of our own words in adapters of versions before there were profiles."""
_OLD_PART = re.compile(r"\.([AB])$")
"""The matrices in mlx-vlm's older format, in the same layouts."""
_ELSEWHERE = {
    "vision_tower.merger.": "the connector of the vision tower",
    "vision_tower.deepstack_merger_list.": "the connector of the vision tower",
    "vision_tower.": "the vision tower",
    "language_model.lm_head.": "the head",
    "language_model.model.embed_tokens.": "the embedding",
}
"""By the beginning of a tensor's name: parts of a judge that its adapters leave as they are."""


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put a folder's adapter, in mlx-vlm's format or PEFT's, on a model in place.

    ModelError, before anything changes, for names or shapes of another model; mlx-vlm would silently load nothing.
    """
    rank, scale, weights = read_adapter(folder, model)
    attach_lora(model, sorted({name.rpartition(".")[0] for name in weights}), rank, scale)
    model.load_weights(list(weights.items()), strict=False)
    model.eval()
    mx.eval(model.parameters())


def read_adapter(folder: Path, model: nn.Module) -> tuple[int, float, dict[str, mx.array]]:
    """Rank, scale, and weights by full names, (in, r) and (r, out), of an adapter; ModelError where it does not fit."""
    config, file = _config(folder), _weights_file(folder)
    read_file_tensor_infos(file, AGAIN)  # refuses files that would crash MLX
    try:
        weights: Any = mx.load(str(file))
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{file}: damaged: {error}; {AGAIN}") from error
    if file.name == PEFT_WEIGHTS or "peft_type" in config:
        rank, scale, weights = peft_weights(file, config, weights)
    else:
        rank, scale = _parameters(folder, config)
        weights = {_OLD_PART.sub(lambda match: f".lora_{match[1].lower()}", name): w for name, w in weights.items()}
    if not weights:
        raise ModelError(f"{folder}: holds no weights; copy or train the adapter again")
    _check(folder, weights, linear_layers(model), rank)
    return rank, scale, weights


def base_of(checkpoint: Checkpoint, name: str, profile: Profile) -> dict[str, Any]:
    """The base of an adapter: the checkpoint's name and identity, and the profile by which it was asked.

    `name` is the user's name for it; a folder gets its whole path, as later commands may run elsewhere.
    """
    label = str(checkpoint.folder.resolve()) if not name or Path(name).expanduser().exists() else name
    asked = {"name": profile.name, "version": profile.version()}
    return {"base_model": label, "base": checkpoint.identity.to_json(), "profile": asked}


def profile_version(base: Mapping[str, Any]) -> str | None:
    """The version of the profile in a base of `base_of`; None where it says nothing."""
    if isinstance(base.get("profile"), dict):
        return str(base["profile"].get("version"))
    # Earlier versions of mlxpref had one profile, and another hash of the same words.
    return own_profile().version() if base.get("template") == _EARLIER else base.get("template")


def base_name(folder: Path) -> str:
    """The base model that an adapter names: a folder that is there, from here or from the adapter, or else a hub id.

    ModelError where the adapter does not say it, or it is gone.
    """
    config = _config(folder)
    name = config.get("base_model") or config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name.strip():
        raise ModelError(f"{folder}: it does not say which model it was trained on; name that with --model")
    for place in (Path(), folder, folder.resolve().parent):
        with suppress(RuntimeError, OSError, ValueError):  # no such user, or no name of a file
            if (base := place / Path(name).expanduser()).is_dir():
                return str(base)
    if name == "demo" or is_hub_id(name):
        revision = config.get("revision")
        return f"{name}@{revision}" if isinstance(revision, str) and revision and "@" not in name else name
    raise ModelError(f"{folder}: it was trained on {printable(name)}, which is not there; say where it is with --model")


def find_base(folder: Path, model: str | None, agree: Callable[[str], bool]) -> tuple[str, Path]:
    """The name and the folder of the model for an adapter: the given one, else its base; see `find_checkpoint`."""
    if model is not None:
        return find_checkpoint(model, agree)
    name = base_name(folder)
    logger.info(f"{folder} was trained on {name}, which judges with it; --model gives another")
    try:
        return find_checkpoint(name, agree, ask=f"{folder} needs its base")
    except ModelError as error:
        raise ModelError(f"{folder}: its base cannot be had; give it with --model ({error})") from error


def trained_settings(folder: Path) -> dict[str, Any]:
    """What an adapter, or a model with one in its weights, says of its training; empty where it says nothing.

    `think`, `max_pixels`, `max_tokens`, and `read_weight`, 0 where the answer that is read at once was not trained.
    """
    for name in (ADAPTER_CONFIG, RECORD):  # the latter of exports
        with suppress(ModelError):  # what cannot be read is refused when it is used
            trained = read_json_object(folder / name).get("trained") if (folder / name).is_file() else None
            if isinstance(trained, dict):
                return trained
    return {}


def check_base(folder: Path, checkpoint: Checkpoint, profile: Profile, any_base: bool = False) -> list[str]:
    """ModelError for an adapter that is not plain LoRA, or was trained on another model than this checkpoint.

    Its shapes may fit all the same.

    Returns warnings: an adapter without a base, another base that `any_base` allows, another profile.
    """
    config, lines = _config(folder), list[str]()
    if _weights_file(folder).name == PEFT_WEIGHTS or "peft_type" in config:  # before a large model is loaded
        peft_parameters(folder / ADAPTER_CONFIG, config)
    else:
        _parameters(folder, config)
    identity = Identity.from_json(config.get("base"))
    base = config.get("base_model") or config.get("base_model_name_or_path")
    if identity is None:
        lines.append(f"{folder}: it does not say by any fingerprint which model it was trained on (it names {base})")
    elif not identity.is_same_model(checkpoint.identity):
        what = f"{folder}: the adapter was trained on {base}, which this model is not"
        if not any_base:
            raise ModelError(f"{what}: give that with --model, or put it on all the same with --any-base")
        lines.append(what)
    if profile_version(config) not in (None, profile.version()):
        lines.append(f"{folder}: the adapter was trained with other words than those of the profile {profile.name}")
    return lines


def save_adapter(
    weights: Mapping[str, mx.array],
    folder: Path,
    rank: int,
    scale: float,
    base: Mapping[str, Any] | None = None,
    profile: Profile | None = None,
) -> None:
    """Write an adapter into a folder, in mlx-vlm's format; each file is replaced as a whole.

    `base` is the model it was trained on (see `base_of`), `profile` how it was asked; mlx-vlm ignores both.
    ModelError where it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keys = sorted({name.rpartition(".")[0] for name in weights})
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters, **(base or {})}
    try:
        with replacing(folder / ADAPTER_WEIGHTS) as temporary:
            mx.save_safetensors(str(temporary), dict(sorted(weights.items())), {"format": "mlx"})
    except (OSError, RuntimeError) as error:  # MLX raises the latter for a full disk
        raise ModelError(
            f"{folder / ADAPTER_WEIGHTS}: cannot be written ({error}); an adapter saved before is still there"
        ) from error
    write_file(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
    if profile is not None:
        write_file(folder / PROFILE_FILE, profile.text())


def _config(folder: Path) -> dict[str, Any]:
    """The config in an adapter folder."""
    if not folder.is_dir():
        hint = "; give the folder that it is in" if folder.is_file() else ""
        if not hint and is_hub_id(str(folder)):
            hint = f"; to get one from the hub: `hf download {folder} --local-dir {folder.name}`, and give that folder"
        raise ModelError(f"{folder}: no such adapter folder{hint}")
    if not (folder / ADAPTER_CONFIG).is_file():
        inner = [file.parent.name for file in sorted(folder.glob(f"*/{ADAPTER_CONFIG}"))]
        hint = f"adapters are in {first_ten(inner, ', ')}" if inner else "`mlxpref train` and PEFT write one"
        raise ModelError(f"{folder}: no {ADAPTER_CONFIG} there; {hint}: give the folder of an adapter")
    return read_json_object(folder / ADAPTER_CONFIG, remedy=AGAIN)


def _parameters(folder: Path, config: Mapping[str, Any]) -> tuple[int, float]:
    """Rank and scale of a config in mlx-vlm's format."""
    if config.get("fine_tune_type", "lora") != "lora":
        kind = str(config["fine_tune_type"])[:40]
        raise ModelError(f"{folder}: a {kind!r} adapter; only plain LoRA can be put on: fuse it into its base first")
    try:
        # mlx-vlm's older format has no such part; its own loader, too, takes alpha / rank and 0.1.
        parameters = config if "lora_parameters" not in config and "rank" in config else config["lora_parameters"]
        rank = int(parameters["rank"])
        scale = float(config.get("alpha", 0.1)) / rank if parameters is config else float(parameters["scale"])
        if rank < 1 or not math.isfinite(scale):
            raise ValueError(f"rank {rank}, scale {scale}")
    except (ArithmeticError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{folder / ADAPTER_CONFIG}: not in mlx-vlm's format, with `rank` and `scale` under `lora_parameters` "
            f"({type(error).__name__}: {str(error)[:80]}); train or convert the adapter again"
        ) from error
    return rank, scale


def _weights_file(folder: Path) -> Path:
    """The one file of weights in an adapter folder; ModelError for none, several, or a part in another one."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix in _TENSORS and not _OF_TRAINING.match(file.name)]
    parts = [each for each in folder.iterdir() if each.is_dir() and _PART.search(each.name)]
    files += [file for part in parts for file in sorted(part.iterdir()) if file.suffix in _TENSORS]
    own = [file for file in files if file.parent == folder and file.name in _WEIGHTS]
    if not own and folder / "adapter_model.bin" in files:
        raise ModelError(f"{folder}: its weights are pickled (adapter_model.bin), which may run code; save safetensors")
    if not own:
        raise ModelError(f"{folder}: no {ADAPTER_WEIGHTS} there; an adapter folder is what `mlxpref train` writes")
    if others := [str(file.relative_to(folder)) for file in files if file != own[0]]:
        raise ModelError(
            f"{folder}: beside {own[0].name} lies {first_ten(others, ', ')}, which may be a part of what was trained, "
            f"or another adapter; only one file of plain LoRA can be put on: move away what is not of it, or {MERGE}"
        )
    return own[0]


def _check(folder: Path, weights: Mapping[str, mx.array], layers: Mapping[str, nn.Module], rank: int) -> None:
    """ModelError for an adapter whose names or shapes are not those of a model's linear layers."""
    for name in sorted(weights):
        if part := next((part for start, part in _ELSEWHERE.items() if name.startswith(start)), None):
            others = sum(not other.startswith("language_model.model.layers.") for other in weights)
            raise ModelError(
                f"{folder}: it also changes {part} ({name[:120]}; {others} of {len(weights)} tensors are not of the "
                f"language layers, which alone mlxpref adapts): {MERGE}"
            )
    for name, weight in sorted(weights.items()):
        layer, _, part = name.rpartition(".")
        if part not in ("lora_a", "lora_b"):
            raise ModelError(f"{folder}: it holds {name[:120]!r}, which is more than plain LoRA: {MERGE}")
        if layer.endswith(ROUTER):
            raise ModelError(f"{folder}: it also changes the router of the experts ({name[:120]}): {MERGE}")
        if layer not in layers:
            raise ModelError(f"{folder}: adapter of another model: the judge has no place for {name[:120]!r}")
        outputs, inputs = linear_shape(layers[layer])
        shape = (inputs, rank) if part == "lora_a" else (rank, outputs)
        if not mx.issubdtype(weight.dtype, mx.floating):
            raise ModelError(f"{folder}: damaged adapter: {name} holds {weight.dtype}, no numbers with a point")
        if weight.shape != shape:
            raise ModelError(
                f"{folder}: adapter of another model: {name} is {weight.shape}, the judge's layer takes {shape}"
            )
        if f"{layer}.{'lora_b' if part == 'lora_a' else 'lora_a'}" not in weights:
            raise ModelError(f"{folder}: damaged adapter: {layer} has only one of lora_a and lora_b")
