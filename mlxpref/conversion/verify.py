"""Verification of a converted folder: it loads, matches the plan, and has its source's files.

It checks the files on the disk after loading them again, nothing from the conversion's memory. The record next to the
weights, mlxpref.json, holds their source and the measurements.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.files import RECORD, SIDE_FILES, read_json_object
from mlxpref.conversion.fidelity import MAX_PIXELS
from mlxpref.conversion.keep_profile import check_written
from mlxpref.conversion.quantize import LayerQuantization, quantized_layers
from mlxpref.engine.profile import Profile
from mlxpref.engine.vlm import VLM, load_vlm
from mlxpref.errors import DataError, ModelError
from mlxpref.files import sha256_of, write_file

_REMOTE_CODE = ("auto_map", "custom_pipelines")
_OF_STORAGE = (
    *_REMOTE_CODE, "quantization", "quantization_config", "dtype", "torch_dtype", "transformers_version",
    "_name_or_path", "architectures",
)  # fmt: skip
"""Keys of a config about storage, not about the model."""
_SPECIAL = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
_ADDED_EOS = {248046}
"""Qwen3.5's own end of a turn, which mlx-vlm adds to its configs whatever tokenizer they come with."""
_SNAPSHOT = re.compile(r"models--.+/snapshots/([0-9a-f]{40})")


def verify(
    folder: Path,
    source: Checkpoint,
    plan: Mapping[str, LayerQuantization],
    shapes: Mapping[str, tuple[int, ...]],
    profile: Profile | None = None,
) -> VLM:
    """Check the converted folder of a source, and return the model loaded from it.

    `plan` is the storage of each quantized layer, `shapes` those of the written tensors by name, `profile` how it is
    asked, None in our own way. ModelError for any difference.
    """
    checkpoint = Checkpoint.open(folder)
    _check_files(folder, source.folder)
    _check_config(checkpoint, source)
    vlm = load_vlm(checkpoint, MAX_PIXELS, profile=profile)
    check_written(folder, vlm.profile)
    _check_layers(vlm, plan, shapes)
    _check_tokens(vlm)
    return vlm


@contextmanager
def naming_source(source: Path, folder: Path) -> Iterator[None]:
    """Let errors about a temporary folder name the folder's source instead."""
    try:
        yield
    except (ModelError, DataError) as error:  # DataError for a comparison that is too long for the model
        reason = str(error).removeprefix(f"{folder}: ").replace(f"{folder}/", "")
        raise ModelError(f"{source}: what was made of it cannot be used: {reason}; nothing was kept") from error


def _check_files(folder: Path, source: Path) -> None:
    """Tokenizer, chat template and processors are those of the source; remote code is not."""
    for name in SIDE_FILES:
        if (source / name).is_file() != (folder / name).is_file():
            raise ModelError(f"{name} is {'missing' if (source / name).is_file() else 'not in its source'}")
        if (source / name).is_file() and _content(source / name) != _content(folder / name):
            raise ModelError(f"{name} differs from its source's")
    if code := sorted(file.name for file in folder.rglob("*.py")):
        raise ModelError(f"it holds code, {code[0]}")


def _content(file: Path) -> object:
    """The content of a file without keys that name code."""
    if file.suffix != ".json":
        return file.read_bytes()
    return {key: value for key, value in read_json_object(file).items() if key not in _REMOTE_CODE}


def _check_config(checkpoint: Checkpoint, source: Checkpoint) -> None:
    """The config describes the same model as the source's; keys about storage may differ."""
    _check_same(_described(source.config), _described(checkpoint.config), "keys of config.json")


def _described(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The keys of a config that describe the model, those of its parts as `part.key`."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if key in _OF_STORAGE:
            continue
        values |= _described(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return values


def _check_layers(vlm: VLM, plan: Mapping[str, LayerQuantization], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The loaded model has exactly the written tensors, and its layers are quantized as planned."""
    weights: dict[str, mx.array] = dict(tree_flatten(vlm.model.parameters()))
    model_shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    _check_same(shapes, model_shapes, "weights")
    _check_same(plan, quantized_layers(vlm.model), "quantized layers")


def _check_tokens(vlm: VLM) -> None:
    """The answer's labels can be read, and the tokens around images and at the end of completions exist."""
    _ = vlm.tokenizer.label_ids  # raises
    pieces, config = vlm.tokenizer.vocabulary, vlm.model.config
    special = {name: getattr(config, name, None) for name in _SPECIAL} | {"image token": vlm.image_token_id}
    for name, token in special.items():
        if token is not None and token not in vlm.tokenizer.added_ids:
            raise ModelError(f"{name} {token} is no special token of its tokenizer")
    ends = vlm.eos_ids - _ADDED_EOS
    if not vlm.eos_ids or any(not 0 <= token < len(pieces) or not pieces[token] for token in ends):
        raise ModelError(f"completions end with {sorted(vlm.eos_ids) or 'no token'}, which its tokenizer does not have")


def _check_same(expected: Mapping[str, Any], actual: Mapping[str, Any], what: str) -> None:
    """Raise ModelError with the first difference."""
    counts = f"({len(actual)} there, {len(expected)} expected)"
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual:
            raise ModelError(f"{what}: {name} is missing {counts}")
        if name not in expected:
            raise ModelError(f"{what}: {name} was not expected {counts}")
        if expected[name] != actual[name]:
            raise ModelError(f"{what}: {name} is {actual[name]}, not {expected[name]}")


def revision_of(folder: Path) -> str | None:
    """The commit of a folder in the Hugging Face cache; None for any other."""
    match = _SNAPSHOT.search(folder.resolve().as_posix())
    return match[1] if match else None


def public_name(name: object) -> str:
    """A name for others: of a local path only its last part, which says nothing about this machine."""
    path = Path(str(name)).expanduser()
    return path.resolve().name if path.is_absolute() or str(name).startswith(".") or path.exists() else str(name)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write mlxpref.json: a record, versions of the software, and the checksum of every file in the folder.

    Write it last: later files have no checksum.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    checksums = {name: sha256_of(path) for name, path in files.items() if name != RECORD}
    versions = {name: version(name) for name in ("mlxpref", "mlx", "mlx-vlm", "transformers")}
    text = json.dumps({**record, "versions": versions, "sha256": checksums}, indent=2)
    write_file(folder / RECORD, text + "\n")
