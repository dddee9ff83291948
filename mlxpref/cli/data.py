"""`mlxpref data`: download a split of a public data set, after its size and licence."""

import shlex
from pathlib import Path
from typing import Any

import click
from huggingface_hub.constants import is_offline_mode

from mlxpref.cli.common import agree
from mlxpref.cli.options import FILE, HelpCommand, json_option
from mlxpref.cli.output import note, print_json, print_text
from mlxpref.data.catalog import CATALOG, DataSet, Split, folder_of, snapshot_of
from mlxpref.data.public_files import download_split
from mlxpref.errors import ConfigError
from mlxpref.hub import Destination, ask_hub
from mlxpref.text import counted, format_bytes


@click.command(
    cls=HelpCommand,
    examples=("mlxpref data imagereward --split train --limit 200", "mlxpref data hpdv2 --output ./hpdv2"),
)
@click.argument("name", type=click.Choice(list(CATALOG)), metavar="NAME")
@click.option("--split", help="Which part.  [default: the test]")
@click.option("--limit", type=click.IntRange(min=1), help="Only the archives that this many preferences need.")
@click.option("--output", type=FILE, help="Folder for the files.  [default: the Hugging Face cache]")
@click.option("--yes", is_flag=True, help="Agree to the download.")
@json_option
def data(name: str, split: str | None, limit: int | None, output: Path | None, yes: bool, as_json: bool) -> None:
    """Download a split of the public data set NAME.

    They are imagereward, hpdv2, pickapic (v2), pickapic_v1, hpdv3, mmrb2 (text-to-image) and genai_bench. It shows size
    and licence first, resumes an interrupted download, and checks every file against the hub's checksum.
    """
    data_set = CATALOG[name]
    part = data_set.split(split) if split else data_set.splits[-1]
    if output is not None and output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output}: is no folder; give another one")
    if is_offline_mode():
        result = _offline_result(data_set, part, output)
    else:
        destination = Destination(ask_hub(data_set.hub_id), output)
        if not _agreed(data_set, part, destination, limit, yes):
            raise ConfigError(f"{data_set.name}: nothing was downloaded; agree with --yes")
        done = download_split(part, destination, limit)
        paths, size = [file.path for file in done.files], sum(file.size for file in done.files)
        result = _result(destination.snapshot, paths, size, done.downloaded, checked=True)
    result |= {"next": _next_command(data_set.name, part.name, limit, output)}
    if as_json:
        print_json({"data": data_set.name, "split": part.name, "limit": limit, **result})
        return
    print_text(f"{counted(len(result['files']), 'file')}, {format_bytes(result['bytes'])}, in {result['folder']}")
    print_text(f"use them with: {result['next']}")
    if part.beside:
        to = f" --output {shlex.quote(str(output))}" if output else ""
        note(f"its protocol reads {part.beside}, too: mlxpref data {data_set.name} --split {part.beside}{to}")
    if not result["checked"]:
        note("HF_HUB_OFFLINE is set: the hub was not asked, so these files were not checked")


def _offline_result(data_set: DataSet, split: Split, output: Path | None) -> dict[str, Any]:
    """The files of a split on this disk, without the hub; ConfigError if a kind of them is missing."""
    if output is None and not any(map(snapshot_of, (data_set.hub_id, *data_set.aliases))):
        raise ConfigError(
            f"{data_set.name}: its files are not here, and HF_HUB_OFFLINE is set; unset it to download them"
        )
    folder = folder_of(data_set.name, output, split.name)
    files = {pattern: sorted(folder.glob(pattern)) for pattern in split.lists + split.images}
    if missing := [pattern for pattern, paths in files.items() if not paths]:
        raise ConfigError(
            f"{folder}: has no {' and no '.join(missing)}, and HF_HUB_OFFLINE is set; unset it to download them"
        )
    paths = [path for each in files.values() for path in each]
    names = [path.relative_to(folder).as_posix() for path in paths]
    return _result(folder, names, sum(path.stat().st_size for path in paths), downloaded=0, checked=False)


def _agreed(data_set: DataSet, split: Split, destination: Destination, limit: int | None, yes: bool) -> bool:
    """Show the size and the licence; returns whether the user agrees, without a question if there is no download."""
    repository = destination.repository
    files = repository.matching(split.lists + split.images)
    whole, rest = sum(file.size for file in files), destination.bytes_left(files)
    licence, size_here = repository.licence or data_set.licence, format_bytes(whole - rest)
    note(f"{data_set.name}, split {split.name}: {repository.hub_id} on the hub, licence: {licence}")
    note(
        f"{counted(len(files), 'file')}, {format_bytes(whole)}, of which {size_here} are here; into {destination.root}"
    )
    if split.together:
        note("the images that are used are unpacked into the user's cache: if all are, that takes as much room again")
    if limit is not None and split.together:
        note(f"--limit {limit}: the images are in one archive, which has to be downloaded whole")
    elif limit is not None:
        note(f"--limit {limit}: of these, only the archives that so many preferences need")
    return rest == 0 or yes or agree("Download it?")


def _result(folder: Path, files: list[str], size: int, downloaded: int, checked: bool) -> dict[str, Any]:
    return {"folder": str(folder), "files": files, "bytes": size, "downloaded": downloaded, "checked": checked}


def _next_command(name: str, split: str, limit: int | None, output: Path | None) -> str:
    """The command that uses the downloaded files."""
    where = f" --data-dir {shlex.quote(str(output))}" if output else ""
    part = f" --limit {limit}" if limit else ""
    verb = "train" if split == "train" else f"eval --split {split}"
    return f"mlxpref {verb} --data {name}{where}{part}"
