"""Verification: a folder that was written is a model only if it loads, is what was asked for, and speaks as its source.

What is checked is what lies on the disk, loaded again: nothing that the conversion remembers. The record beside the
weights, mlxpref.json, says where they come from and what was measured.
"""

import gc
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.files import RECORD, SIDE_FILES, read_json_object
from mlxpref.checkpoints.memory import judging_plan, model_size
from mlxpref.checkpoints.resolve import device_working_set
from mlxpref.config import JudgeSettings
from mlxpref.conversion.fidelity import (
    COMPLETION_TOKENS,
    TOGETHER,
    Answers,
    Comparison,
    Fidelity,
    answers_of,
    fidelity_of,
)
from mlxpref.conversion.quantize import LayerQuantization
from mlxpref.engine.adapters import load_adapter
from mlxpref.engine.vlm import VLM, load_vlm
from mlxpref.errors import ModelError
from mlxpref.files import sha256_of, write_file
from mlxpref.log import logger
from mlxpref.text import format_bytes

__all__ = ["Check", "check_record", "revision_of", "source_answers", "verify", "write_record"]

_REMOTE_CODE = ("auto_map", "custom_pipelines")
_OF_STORAGE = (
    *_REMOTE_CODE, "quantization", "quantization_config", "dtype", "torch_dtype", "transformers_version",
    "_name_or_path", "architectures",
)  # fmt: skip
"""Keys of a config that say how it is stored, not what the model is."""
_SPECIAL = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
_SNAPSHOT = re.compile(r"models--.+/snapshots/([0-9a-f]{40})")


@dataclass(frozen=True, eq=False)
class Check:
    """What a written folder is asked, beside being whole.

    `comparisons`, at least one, are what it is compared with its source on, if `fidelity` is wanted; `reference` is
    what the source says of them, where that is known.
    """

    comparisons: Sequence[Comparison]
    fidelity: bool = True
    max_pixels: int = 512 * 512
    reference: Answers | None = None


def verify(
    folder: Path,
    source: Checkpoint,
    plan: Mapping[str, LayerQuantization],
    shapes: Mapping[str, tuple[int, ...]],
    check: Check,
    adapter: Path | None = None,
) -> tuple[Fidelity | None, str | None]:
    """Check a folder that was made of a source; its fidelity, or why that was not measured.

    `plan` says how each quantized layer is stored, `shapes` every tensor by name as it was written. The source speaks
    in its own precision, with the `adapter` if one was put into the weights, and is in memory before the folder is,
    never with it. Raises ModelError that names the source for a folder that is not what it should be.
    """
    try:
        written = Checkpoint.open(folder)
        _check_weights(written, shapes)
        _check_files(folder, source.folder)
        _check_config(written, source)
    except ModelError as error:
        raise _unusable(source.folder, folder, error) from error
    reference, skipped = check.reference, None
    if reference is None:
        reference, skipped = source_answers(source, check, adapter)
    try:
        vlm = load_vlm(written, check.max_pixels)
        _check_layers(vlm, plan, shapes)
        _check_words(vlm)
        asked = check.comparisons if reference else check.comparisons[:1]
        answers = answers_of(vlm, asked, reference.completions if reference else [()])
        if not answers.finite:
            raise ModelError("its log-probabilities are not finite: take another precision for what is not quantized")
        if reference and answers.prompts != reference.prompts:
            raise ModelError("it reads comparisons as other tokens than its source does")
    except ModelError as error:
        raise _unusable(source.folder, folder, error) from error
    return (fidelity_of(reference, answers), None) if reference else (None, skipped)


def source_answers(source: Checkpoint, check: Check, adapter: Path | None = None) -> tuple[Answers | None, str | None]:
    """What a source says of the comparisons of a check, or why it was not asked; it is out of memory afterwards."""
    if not check.fidelity:
        return None, "it was not asked for"
    settings = JudgeSettings(max_tokens=COMPLETION_TOKENS, max_pixels=check.max_pixels, rows=TOGETHER)
    needed, offered = judging_plan(model_size(source), settings, 2 * TOGETHER).peak, device_working_set()
    if needed > offered:
        sizes = f"it needs about {format_bytes(needed)}, this device recommends at most {format_bytes(offered)}"
        return None, f"the source does not fit in memory: {sizes}"
    logger.info(
        f"asking {source.folder} about {len(check.comparisons)} comparisons, to see what the conversion changes"
    )
    vlm = load_vlm(source, check.max_pixels)
    if adapter is not None:
        load_adapter(vlm.model, adapter)
    answers = answers_of(vlm, check.comparisons)
    del vlm
    gc.collect()
    mx.clear_cache()
    if not answers.finite:
        return None, "the source's own log-probabilities are not finite"
    return answers, None


def _unusable(source: Path, folder: Path, error: ModelError) -> ModelError:
    """A fault of a folder that is about to be removed, in words that name its source."""
    reason = str(error).removeprefix(f"{folder}: ").replace(f"{folder}/", "")
    return ModelError(f"{source}: what was made of it cannot be used: {reason}; nothing was kept")


def _check_weights(written: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor that was to be written is in the files, in its shape, and no other."""
    stored = {name: tensor.shape for name, tensor in written.tensors.items()}
    _check_same({name: tuple(shape) for name, shape in shapes.items()}, stored, "weights")


def _check_files(folder: Path, source: Path) -> None:
    """Tokenizer, chat template and processors are those of the source; remote code is not."""
    for name in SIDE_FILES:
        if (source / name).is_file() != (folder / name).is_file():
            raise ModelError(f"{name} is {'missing' if (source / name).is_file() else 'none of its source'}")
        if (source / name).is_file() and _content(source / name) != _content(folder / name):
            raise ModelError(f"{name} is not its source's")
    if found := sorted(file.name for file in folder.rglob("*.py")):
        raise ModelError(f"it holds code, {found[0]}")


def _content(file: Path) -> object:
    """What a file says, apart from code that it names."""
    if file.suffix != ".json":
        return file.read_bytes()
    return {key: value for key, value in read_json_object(file).items() if key not in _REMOTE_CODE}


def _check_config(written: Checkpoint, source: Checkpoint) -> None:
    """The config describes the model that the source's does, and only stores it in another way."""
    _check_same(_described(source.config), _described(written.config), "keys of config.json")


def _described(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What a config says of its model: a value for each key, those of parts after the part's name."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in _OF_STORAGE:
            continue
        found |= _described(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _check_layers(vlm: VLM, plan: Mapping[str, LayerQuantization], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The loaded model has the tensors that were written and no others, and its layers are quantized as planned."""
    weights: dict[str, mx.array] = dict(tree_flatten(vlm.model.parameters()))
    loaded = {name: tuple(weight.shape) for name, weight in weights.items()}
    _check_same({name: tuple(shape) for name, shape in shapes.items()}, loaded, "weights when it is loaded")
    wanted = {name: (layer.bits, layer.group_size, layer.mode) for name, layer in plan.items()}
    found = {
        name: (layer.bits, layer.group_size, layer.mode)
        for name, layer in vlm.model.named_modules()
        if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding)
    }
    _check_same(wanted, found, "quantized layers (bits, group size, mode)")


def _check_words(vlm: VLM) -> None:
    """The answer's labels can be read, and the tokens around images and at the end of completions exist."""
    _ = vlm.tokenizer.label_ids  # raises
    pieces, config = vlm.tokenizer.vocabulary, vlm.model.config
    special = {name: getattr(config, name, None) for name in _SPECIAL} | {"image token": vlm.image_token_id}
    for name, token in special.items():
        if token is not None and token not in vlm.tokenizer.added_ids:
            raise ModelError(f"{name} {token} is no special token of its tokenizer")
    if not vlm.eos_ids or any(not 0 <= token < len(pieces) or not pieces[token] for token in vlm.eos_ids):
        raise ModelError(f"completions end with {sorted(vlm.eos_ids) or 'no token'}, which its tokenizer does not have")


def _check_same(wanted: Mapping[str, Any], found: Mapping[str, Any], what: str) -> None:
    """Refuse what is not as wanted, with the first difference."""
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise ModelError(f"{what}: {name} is missing ({len(found)} there, {len(wanted)} expected)")
        if name not in wanted:
            raise ModelError(f"{what}: {name} was not expected ({len(found)} there, {len(wanted)} expected)")
        if wanted[name] != found[name]:
            raise ModelError(f"{what}: {name} is {found[name]}, not {wanted[name]}")


def revision_of(folder: Path) -> str | None:
    """The commit of a folder in the Hugging Face cache; None for any other."""
    match = _SNAPSHOT.search(folder.resolve().as_posix())
    return match[1] if match else None


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write mlxpref.json: a record, the versions of what made the folder, and the checksum of every file in it.

    The last thing that is written into a folder: what comes later is in no checksum.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    checksums = {name: sha256_of(path) for name, path in files.items() if name != RECORD}
    versions = {name: version(name) for name in ("mlxpref", "mlx", "mlx-vlm", "transformers")}
    text = json.dumps({**record, "versions": versions, "sha256": checksums}, indent=2)
    write_file(folder / RECORD, text + "\n")


def check_record(folder: Path) -> list[str]:
    """The files of a folder that are missing or no longer what mlxpref.json says; all of them are read.

    ModelError for a folder without such a record.
    """
    if not (folder / RECORD).is_file():
        raise ModelError(f"{folder}: no {RECORD} there; it was not written by mlxpref convert")
    files = read_json_object(folder / RECORD).get("sha256")
    if not isinstance(files, dict) or any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
        raise ModelError(f"{folder / RECORD}: states no checksums; convert the model again")
    places = {name: folder / name for name in files}
    return [name for name, file in places.items() if not file.is_file() or sha256_of(file) != files[name]]
