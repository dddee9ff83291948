"""The files of a model folder by name, and a reader of untrusted JSON."""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxpref.errors import ModelError

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
INDEX = "model.safetensors.index.json"
"""The index: the file of each tensor, if there are several files."""
RECORD = "mlxpref.json"
"""The record of a converted folder: its source and its measurements."""
PROFILE_FILE = "judge.toml"
"""The profile in a folder of a model or an adapter: how the judge is asked."""
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Settings of the image processor; a model has one of these."""
SIDE_FILES = (
    *PROCESSORS, "video_preprocessor_config.json", "generation_config.json", TOKENIZER, "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.json",
    "chat_template.jinja",
)  # fmt: skip
"""A model's files besides its config and its weights."""
DOWNLOAD_AGAIN = "download the checkpoint again"
ADAPTER_CONFIG = "adapter_config.json"
SECOND_COPIES = ("consolidated", "adapter")
"""Beginnings of names of weights in another layout, or of an adapter: never a judge's own."""
_SECOND = re.compile(
    r".*\.safetensors(\.index.*\.json)?|adapter_config\.json|(pytorch_model|adapter_model|value_head|non_lora).*\.bin"
)
"""Files beside those that are read, which say that the weights are others, or more."""
_OTHERS = {
    (".gguf",): "weights in GGUF, for llama.cpp",
    ("model_index.json",): "a pipeline of diffusers, which makes images and judges none",
    (".bin", ".pt", ".pth", ".ckpt"): "pickled weights, which may run code",
    (".npz", ".h5", ".msgpack", ".onnx"): "weights in a format that mlxpref does not read",
}
"""By how a name ends: what it is, if it is no checkpoint of ours."""
_WEIGHTS = re.compile(r"\w[\w.+ -]{0,200}\.safetensors")


def check_complete(folder: Path) -> None:
    """ModelError, with the name and the remedy, for a folder without a necessary file."""
    if not folder.is_dir():
        what = f"is {_other([folder.name]) or 'a file'}" if folder.is_file() else "no such model folder"
        raise ModelError(f"{folder}: {what}; give a folder, a Hugging Face id or `demo`")
    names = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
    other = _other(names)
    if CONFIG not in names and ADAPTER_CONFIG in names:
        raise ModelError(f"{folder}: an adapter, no model; give its base with --model and this folder with --adapter")
    if CONFIG not in names:
        hint = f"but {other}: give" if other else "a model folder holds config, tokenizer and weights: give"
        raise ModelError(f"{folder}: no config.json there, {hint} the original checkpoint")
    # Without these mlx-vlm silently uses defaults, and the judge sees badly scaled images.
    for needed in (PROCESSORS, (TOKENIZER,)):
        if not any((folder / name).is_file() for name in needed):
            raise ModelError(f"{folder}: no {needed[0]} there; copy it from the original checkpoint")
    weights = weight_files(folder, read_index(folder))
    if not weights:
        raise ModelError(f"{folder}: no .safetensors weights there{other and ', but ' + other}; {DOWNLOAD_AGAIN}")
    if absent := [name for name in weights if not (folder / name).is_file()]:
        raise ModelError(f"{folder / absent[0]}: no such file, though weights belong there; {DOWNLOAD_AGAIN}")


def check_single(folder: Path) -> None:
    """ModelError, which names both, for a complete folder with a second set of weights, or an adapter, or a part."""
    names = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
    weights = weight_files(folder, read_index(folder))
    if second := sorted(name for name in names - {*weights, INDEX} if _SECOND.fullmatch(name)):
        first = INDEX if INDEX in names else weights[0]
        raise ModelError(
            f"{folder}: two sets of weights, or parts of one, {first} and {second[0]}; keep what you mean, and move "
            "the other away (an adapter into a folder of its own, for --adapter)"
        )


def _other(names: Iterable[str]) -> str:
    """What the first known of some files is that is no checkpoint of ours; empty for none."""
    endings = (
        (f"{words} ({name})", name.lower().endswith(ends)) for ends, words in _OTHERS.items() for name in sorted(names)
    )
    return next((words for words, is_one in endings if is_one), "")


def weight_files(folder: Path, index: Mapping[str, str]) -> list[str]:
    """The names of a folder's files of weights: those of the index, or else all but second sets."""
    if index:
        return sorted(set(index.values()))
    names = (file.name for file in folder.glob("*.safetensors"))
    return sorted(name for name in names if not name.startswith((".", *SECOND_COPIES)))


def read_index(folder: Path) -> dict[str, str]:
    """The name of the file that holds each tensor, from the index of a folder; empty for a folder without an index.

    ModelError for an index that is damaged, or names files outside this folder.
    """
    index = folder / INDEX
    if not index.exists() and not index.is_symlink():
        return {}
    file_of = read_json_object(index).get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise ModelError(f"{index}: no weight_map that says which tensor is in which file; {DOWNLOAD_AGAIN}")
    for tensor, name in file_of.items():
        if not isinstance(name, str) or not _WEIGHTS.fullmatch(name):
            entry = f"{index}: puts {tensor!r:.120} into {name!r:.120}"
            raise ModelError(f"{entry}, which is no safetensors file of this folder; {DOWNLOAD_AGAIN}")
    return file_of


def source_of(folder: Path) -> str:
    """The name of what a folder was converted from, as its record says; empty without a readable one."""
    with suppress(ModelError):
        return str(read_json_object(folder / RECORD).get("source") or "") if (folder / RECORD).is_file() else ""
    return ""


def read_json_object(file: Path, limit: int = 64 << 20, remedy: str = DOWNLOAD_AGAIN) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes. ModelError, ending with `remedy`, for others."""
    try:
        if not file.is_file():
            raise ValueError("no such file")
        with file.open("rb") as stream:
            content = stream.read(limit + 1)
        if len(content) > limit:
            raise ValueError(f"larger than {limit} bytes")
        value = json.loads(content.decode("utf-8"))
        if b"\\ud" in content.lower():  # Python reads half a surrogate pair, but cannot write it
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        if not isinstance(value, dict):
            raise ValueError("no object at its top")
    except RecursionError as error:
        raise ModelError(f"{file}: not readable as JSON: nested too deeply; {remedy}") from error
    except (OSError, ValueError, MemoryError) as error:
        raise ModelError(f"{file}: not readable as JSON: {printable(error)}; {remedy}") from error
    return value


def printable(text: object) -> str:
    """Text from a file on one line of at most 300 printable characters."""
    line = " ".join(str(text).split())[:300]
    return "".join(character if character.isprintable() else "?" for character in line)
