"""`mlxpref label`: pictures in, a page to click on, preferences out."""

import os
import shlex
import sys
import tempfile
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import click

from mlxpref.cli.common import INTERRUPTED, check_output, image_cache, load_image_groups, note_skipped
from mlxpref.cli.options import (
    FILE,
    HelpCommand,
    ImageOptions,
    json_option,
    option_group,
    pairs_option,
    settings_options,
)
from mlxpref.cli.output import note, print_json, print_text
from mlxpref.config import LabelSettings, settings_from
from mlxpref.data.find_images import Skipped
from mlxpref.data.label_file import LabelFile
from mlxpref.data.prompts import PromptGroup
from mlxpref.errors import ConfigError, DataError
from mlxpref.label.prompt_task import prompt_tasks
from mlxpref.label.server import LabelServer
from mlxpref.label.session import LabelSession


@click.command(
    cls=HelpCommand,
    examples=(
        'mlxpref label ./images --prompt "a red fox in the snow"',
        "mlxpref label ./images --prompt-from sidecar --output mine.jsonl",
    ),
)
@click.argument("folder", type=FILE)
@option_group(ImageOptions, "source")
@click.option(
    "--output",
    type=FILE,
    default=Path("preferences.jsonl"),
    show_default=True,
    help="File of answers; an existing file is continued.",
)
@pairs_option
@click.option("--browser/--no-browser", default=True, show_default=True, help="Open the page in a browser.")
@settings_options(LabelSettings)
@json_option
def label(
    folder: Path,
    source: ImageOptions,
    output: Path,
    pairs: int | Literal["all"] | None,
    browser: bool,
    settings: dict[str, Any],
    as_json: bool,
) -> None:
    """State which of two pictures you prefer, on a page that only this machine can open.

    It saves every click at once; the same command continues where the last one ended. Without --pairs it plans two
    pairs an image, and more if training needs them. `mlxpref train --data FILE` learns from the answers that are not
    held out, `mlxpref eval --data FILE` measures with the others.
    """
    source.check()
    check_output("--output", output)
    if output.suffix.lower() != ".jsonl":
        raise ConfigError(f"--output {output}: `train` and `eval` know answers by .jsonl; give a name that ends in it")
    label_settings = settings_from(LabelSettings, settings)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the one that holds the images")
    groups = _shown_groups(load_image_groups([folder], source, image_cache({}))[0], folder)
    with LabelFile(output) as file:
        tasks = prompt_tasks(groups, output.absolute().parent, pairs, label_settings.held_out, file.records)
        session = LabelSession(file, tasks, label_settings)
        _note_progress(session)
        server = LabelServer(session, label_settings.port)
        note(f"the page, for this machine only; it ends with Ctrl-C: {server.address}")
        with _open_page(server.address) if browser else nullcontext():
            is_finished = server.run()
        if as_json:
            print_json(session.to_json())
        else:
            _print_result(session)
    if not is_finished:
        raise SystemExit(INTERRUPTED)


def _shown_groups(groups: Sequence[PromptGroup], folder: Path) -> list[PromptGroup]:
    """The images for the page: in the folder, with a UTF-8 name, two or more of a prompt.

    It names the others on stderr; DataError if nothing is left.
    """
    readable_groups: list[PromptGroup] = []
    left_out: list[Skipped] = []
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
            readable_groups.append(PromptGroup(group.prompt, tuple(images)))
        else:
            left_out += [Skipped(image, "has nothing left to be compared with") for image in images]
    if not readable_groups:
        raise DataError(f"{folder}: no two images of a prompt can be shown: {left_out[0].path} {left_out[0].error}")
    note_skipped(left_out)
    return readable_groups


def _note_progress(session: LabelSession) -> None:
    """Print the planned pairs, and the answers in an existing file."""
    progress = session.progress()
    images, prompts = len(session.pictures.images), len(session.tasks)
    of = f" of {prompts} prompts" if prompts > 1 else ""
    note(f"{images} images{of}, {progress['planned']} pairs planned of {progress['every']}")
    if lines := len(session.file.records):
        active = len(session.questions.active)
        note(f"{session.file.path}: {lines} lines are there, {active} of them stand and are about these images")


def _print_result(session: LabelSession) -> None:
    """Print the answers and the next commands."""
    progress, path = session.progress(), shlex.quote(str(session.file.path))
    enough = progress["enough"]
    print_text(
        f"{progress['answers']} answers about {progress['asked']} pairs ({progress['ties']} ties, "
        f"{progress['skips']} skipped) in {session.file.path}"
    )
    target = f" of {enough['needed']} wanted" if enough["needed"] else ""
    print_text(f"{'enough' if enough['reached'] else 'not yet enough'} to train: {enough['decided']} pairs{target}")
    print_text(enough["why"])
    print_text(f"learn them:   mlxpref train --data {path} --output runs/taste")
    print_text(f"measure that: mlxpref eval --data {path} --adapter runs/taste")


@contextmanager
def _open_page(address: str) -> Iterator[None]:
    """Open the page in a browser, unless there is no screen: a browser in the terminal would disturb.

    The address is in a file that only this user can read, since all users see a process's arguments.
    """
    if sys.platform != "darwin" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="mlxpref-label-") as folder:
        redirect = Path(folder) / "index.html"
        redirect.write_text(f'<!doctype html><meta http-equiv="refresh" content="0; url={address}">', encoding="utf-8")
        webbrowser.open(redirect.as_uri())
        yield
