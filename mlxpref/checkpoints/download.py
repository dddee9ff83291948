"""Models of the Hugging Face hub: a judge's files, from the cache or downloaded."""

from pathlib import Path

from mlxpref.checkpoints.files import (
    CONFIG,
    INDEX,
    PROCESSORS,
    PROFILE_FILE,
    RECORD,
    SECOND_COPIES,
    SIDE_FILES,
    TOKENIZER,
    check_complete,
    read_index,
    read_json_object,
)
from mlxpref.checkpoints.hf_config import check_kind
from mlxpref.errors import DataError, ModelError
from mlxpref.files import LEARNED
from mlxpref.hub import Destination, HubFile, HubRepository, ask_hub, check_space, download_snapshot
from mlxpref.log import logger
from mlxpref.text import format_bytes

_NEEDED = (CONFIG, INDEX, RECORD, LEARNED, PROFILE_FILE, *SIDE_FILES)
"""Files to download besides the weights: no code, no pickles, nothing of other programs."""


def ask_model(hub_id: str, revision: str | None = None) -> HubRepository:
    """The hub's entry of a model, at a branch, tag or commit; ModelError where the hub cannot be asked."""
    try:
        return ask_hub(hub_id, "model", revision)
    except DataError as error:
        name = f"{hub_id}@{revision}" if revision else hub_id
        reason = str(error).removeprefix(f"{name}: ")
        raise ModelError(
            f"{name}: no such folder, not in the local cache, and it cannot be downloaded: {reason}"
        ) from error


def cached_model(hub_id: str, revision: str | None = None) -> Path | None:
    """The folder of a model in the Hugging Face cache, or None if one of a judge's files is missing."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(hub_id, CONFIG, revision=revision)
        folder = Path(config).parent if isinstance(config, str) else None
        if folder:
            check_complete(folder)
    except (OSError, ValueError, ModelError):
        return None
    return folder


def needed_bytes(repository: HubRepository) -> int:
    """The bytes of a model to download."""
    return sum(file.size for file in (*_side_files(repository), *_all_weights(repository)))


def bytes_left(repository: HubRepository) -> int:
    """Those that are not here yet."""
    return Destination(repository).bytes_left([*_side_files(repository), *_all_weights(repository)])


def download_model(repository: HubRepository) -> Path:
    """Download a model into the Hugging Face cache and return its folder; ModelError, one line, where that fails.

    It skips files in the cache. The weights come last, so a folder with all of them is complete, and none of another
    architecture or quantization are downloaded.
    """
    destination = Destination(repository)
    side_files = _side_files(repository)
    try:
        _check_complete(repository)
        check_space(destination, [*side_files, *_all_weights(repository)])
        download_snapshot(repository, side_files)
        check_kind(read_json_object(destination.snapshot / CONFIG), Path(repository.hub_id) / CONFIG)
        weights = _weights(repository, destination.snapshot)
        if rest := destination.bytes_left(weights):
            logger.info(f"{repository.hub_id}: {format_bytes(rest)} of weights to download into {destination.root}")
        return download_snapshot(repository, weights)
    except DataError as error:
        reason = str(error).removeprefix(f"{repository.hub_id}: ")
        raise ModelError(f"{repository.hub_id}: {reason}") from error


def _side_files(repository: HubRepository) -> list[HubFile]:
    return [file for file in repository.files if file.path in _NEEDED]


def _all_weights(repository: HubRepository) -> list[HubFile]:
    """All safetensors in the repository's main folder, before the index is read."""
    top = (file for file in repository.files if file.path.endswith(".safetensors") and "/" not in file.path)
    files = [file for file in top if not file.path.startswith(SECOND_COPIES)]
    if any(file.path == INDEX for file in repository.files):
        return [file for file in files if "-of-" in file.path] or files
    return [file for file in files if file.path == "model.safetensors"] or files


def _weights(repository: HubRepository, folder: Path) -> list[HubFile]:
    """The weights that the index in a folder names, if there is one."""
    try:
        by_index = set(read_index(folder).values())
    except ModelError as error:
        raise ModelError(f"{repository.hub_id}: {INDEX} is damaged on the hub; choose another --revision") from error
    if not by_index:
        return _all_weights(repository)
    by_path = {file.path: file for file in repository.files}
    if absent := sorted(by_index - by_path.keys()):
        raise ModelError(
            f"{repository.hub_id}: {INDEX} names {absent[0]!r}, which the hub does not have; choose another --revision"
        )
    return [by_path[name] for name in sorted(by_index)]


def _check_complete(repository: HubRepository) -> None:
    """ModelError, before any download, for a repository that is no model for mlxpref."""
    paths = {file.path for file in repository.files}
    if not _all_weights(repository):
        others = sorted({Path(path).suffix for path in paths} & {".bin", ".pt", ".pth", ".gguf"})
        content = f"only {', '.join(others)}, which mlxpref does not read" if others else "no weights"
        raise ModelError(f"{repository.hub_id}: no .safetensors on the hub, {content}; choose another model")
    for names in ((CONFIG,), (TOKENIZER,), PROCESSORS):
        if not paths & set(names):
            raise ModelError(f"{repository.hub_id}: no {names[0]} on the hub; choose the original of this model")
