"""The command that asks a person: pictures in, a page to click on, preferences out."""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from mlxpref.cli.common import check_output, image_cache
from mlxpref.cli.options import (
    check_prompt_source,
    chosen,
    json_option,
    pairs_option,
    prompt_source_options,
    settings_options,
)
from mlxpref.config import LabelSettings
from mlxpref.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mlxpref.data.find_images import Skipped
    from mlxpref.data.prompts import PromptGroup
    from mlxpref.label.session import LabelSession

__all__ = ["label"]

_INTERRUPTED = 130


@click.command(short_help="State your own preferences on a local page.")
@click.argument("folder", type=click.Path(path_type=Path))
@prompt_source_options
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("preferences.jsonl"),
    show_default=True,
    help="File of the answers; one that is there is gone on with.",
)
@pairs_option
@click.option("--recursive", is_flag=True, help="Look into the folder's folders too.")
@click.option("--browser/--no-browser", default=True, show_default=True, help="Open the page in a browser.")
@settings_options(LabelSettings)
@json_option
def label(
    folder: Path,
    prompt: str | None,
    prompt_from: str | None,
    output: Path,
    pairs: int | Literal["all"] | None,
    recursive: bool,
    browser: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """State which of two pictures you prefer, on a page that only this machine can open.

    Every click is kept at once; the same command goes on where the last one ended. Without --pairs two pairs an image
    are planned, and as many as are wanted to train. `mlxpref train --data FILE` learns
    the answers that are not held out, `mlxpref eval --data FILE` measures with those that are.
    """
    from mlxpref.cli.output import note, print_json
    from mlxpref.config import settings_from
    from mlxpref.data.label_file import LabelFile
    from mlxpref.data.prompts import find_groups
    from mlxpref.label.prompt_task import prompt_tasks
    from mlxpref.label.server import LabelServer
    from mlxpref.label.session import LabelSession

    check_prompt_source(prompt, prompt_from)
    check_output("--output", output)
    if output.suffix.lower() != ".jsonl":
        raise ConfigError(f"--output {output}: `train` and `eval` know answers by .jsonl; give a name that ends in it")
    settings = settings_from(LabelSettings, chosen(options))
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the one that holds the images")
    groups, skipped, notes = find_groups([folder], recursive, prompt, prompt_from, image_cache({}))
    groups, outside = _inside(groups, folder)
    for line in [*(f"skipped: {each.path}: {each.error}" for each in [*skipped, *outside]), *notes]:
        note(line)
    with LabelFile(output) as file:
        tasks = prompt_tasks(groups, output.absolute().parent, pairs, settings.held_out, file.records)
        session = LabelSession(file, tasks, settings)
        _say_what_is_there(session)
        server = LabelServer(session, settings.port)
        note(f"the page, for this machine only; it ends with Ctrl-C: {server.address}")
        with _opened(server.address) if browser else nullcontext():
            finished = server.run()
        if as_json:
            print_json(session.to_json())
        else:
            _print_end(session)
    if not finished:
        raise SystemExit(_INTERRUPTED)


def _inside(groups: Sequence["PromptGroup"], folder: Path) -> tuple[list["PromptGroup"], list["Skipped"]]:
    """The images that are in the folder and have a name that can be written, and those that are not."""
    from mlxpref.data.find_images import Skipped
    from mlxpref.data.prompts import PromptGroup

    kept, left_out = [], []
    top = Path(os.path.realpath(folder))
    for group in groups:
        images = []
        for image in group.images:
            if not Path(os.path.realpath(image)).is_relative_to(top):
                left_out.append(Skipped(image, "is a link that leads out of the folder; copy the file instead"))
            elif any("\ud800" <= character <= "\udfff" for character in str(image)):
                left_out.append(Skipped(image, "has a name that is not UTF-8 text; rename it"))
            else:
                images.append(image)
        if len(images) > 1:
            kept.append(PromptGroup(group.prompt, tuple(images)))
        else:
            left_out += [Skipped(image, "has nothing left to be compared with") for image in images]
    if not kept:
        raise DataError(f"{folder}: no two images of a prompt can be shown: {left_out[0].path} {left_out[0].error}")
    return kept, left_out


def _say_what_is_there(session: "LabelSession") -> None:
    from mlxpref.cli.output import note

    found = session.progress()
    images, prompts = len(session.pictures.images), len(session.tasks)
    of = f" of {prompts} prompts" if prompts > 1 else ""
    note(f"{images} images{of}, {found['planned']} pairs planned of {found['every']}")
    if session.file.records:
        here = len(session.questions.active)
        lines = len(session.file.records)
        note(f"{session.file.path}: {lines} lines are there, {here} of them stand and are about these images")


def _print_end(session: "LabelSession") -> None:
    """What came of it, and what to do with it."""
    from mlxpref.cli.output import print_text

    found, path = session.progress(), shlex.quote(str(session.file.path))
    enough = found["enough"]
    print_text(
        f"{found['answers']} answers about {found['asked']} pairs ({found['ties']} ties, {found['skips']} skipped) "
        f"in {session.file.path}"
    )
    wanted = f" of {enough['needed']} wanted" if enough["needed"] else ""
    print_text(f"{'enough' if enough['reached'] else 'not yet enough'} to train: {enough['decided']} pairs{wanted}")
    print_text(enough["why"])
    print_text(f"learn them:   mlxpref train --data {path} --output runs/taste")
    print_text(f"measure that: mlxpref eval --data {path} --adapter runs/taste")


@contextmanager
def _opened(address: str) -> Iterator[None]:
    """Open the page, where there is a screen: a browser in the terminal would be in the way.

    By a file that only this user can read: the arguments of a browser's process are seen by all, token included.
    """
    import tempfile
    import webbrowser

    if sys.platform != "darwin" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="mlxpref-label-") as folder:
        way = Path(folder) / "index.html"
        way.write_text(f'<!doctype html><meta http-equiv="refresh" content="0; url={address}">', encoding="utf-8")
        webbrowser.open(way.as_uri())
        yield
