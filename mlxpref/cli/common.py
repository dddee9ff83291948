"""Shared preparations of commands: find the images, check the outputs, ask the user."""

import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from mlxpref.checkpoints.first_use import check_disks
from mlxpref.checkpoints.recommended import Work
from mlxpref.checkpoints.resolve import missing_judge
from mlxpref.cli.options import DataOptions, ImageOptions, JudgeOptions
from mlxpref.cli.output import note
from mlxpref.config import JudgeSettings
from mlxpref.data.find_images import Skipped, file_identity
from mlxpref.data.image_cache import ImageCache
from mlxpref.data.load import Preferences, load_preferences
from mlxpref.data.prompts import PromptGroup, find_groups
from mlxpref.engine.adapters import base_name
from mlxpref.errors import ConfigError
from mlxpref.hub import Question, check_room
from mlxpref.judge.store import features_beside

INTERRUPTED = 130
"""The exit code of an interrupted command that still printed a result."""
_NAMED = 10
"""The number of left out images that a note names."""


def image_cache(
    settings: Mapping[str, Any], judge: JudgeOptions | None = None, kind: type[ImageCache] = ImageCache
) -> ImageCache:
    """A cache of decoded images for a judge with these settings; with options of a store, on disk beside it, too."""
    cache = kind(settings.get("max_pixels", JudgeSettings().max_pixels))
    cache.disk = features_beside(judge.store, waits=True) if judge and not judge.no_store else None
    return cache


def load_image_groups(
    places: Sequence[Path], options: ImageOptions, cache: ImageCache
) -> tuple[list[PromptGroup], list[Skipped], list[str]]:
    """The images of each prompt, those that were left out, and notes; both are said on stderr."""
    groups, skipped, notes = find_groups(places, options.recursive, options.prompt, options.prompt_from, cache)
    note_skipped(skipped)
    for line in notes:
        note(line)
    return groups, skipped, notes


def note_skipped(skipped: Sequence[Skipped]) -> None:
    """Name the first images that were left out on stderr, and count the others."""
    for each in skipped[:_NAMED]:
        note(f"skipped: {each.path}: {each.error}")
    if len(skipped) > _NAMED:
        note(f"skipped: {len(skipped) - _NAMED} more")


class Consent:
    """Asks once for all that a command has to download: with the data's question it names the judge, too.

    It checks that both fit on the disk together, before it asks. ConfigError, which names both, if the answer is no or
    there is no terminal to ask on; without data to download the judge has a question of its own.
    """

    def __init__(
        self, yes: bool, model: str | None = None, adapter: str | Path | None = None, work: Work = "judging"
    ) -> None:
        self.agreed, self._model, self._adapter, self._work = yes, model, adapter, work

    def __call__(self, question: str) -> bool:
        if not isinstance(question, Question):
            return self.agreed or agree(question)
        base = base_name(Path(self._adapter)) if self._adapter and not self._model else self._model
        judge, what = missing_judge(base, self._work), question.what
        if judge:
            what, place = f"{judge[0]} and {what}", question.place.root
            check_disks({**judge[1], place: question.bytes + judge[1].get(place, 0)})
        else:
            check_room(question.place, question.bytes)
        if self.agreed:
            note(f"to be downloaded: {what}")
        elif not agree(f"Not here: {what}. Download {'both' if judge else 'it'}?"):
            raise ConfigError(f"{what}: nothing was downloaded; agree with --yes")
        self.agreed = True
        return True


def load_data(
    options: DataOptions, consent: Consent, default_split: str = "test", needs_images: bool = True
) -> Preferences:
    """The preferences of the options, with the name of their split; errors as of `load_preferences`."""
    return load_preferences(
        options.data,
        options.split or default_split,
        options.limit,
        data_dir=options.data_dir,
        needs_split=options.split is not None,
        needs_images=needs_images,
        agree=consent,
    )


def check_output(option: str, path: Path, suffixes: Sequence[str] = ()) -> None:
    """ConfigError, before the work, for a file that could not be written after it, or without one of `suffixes`."""
    if (path.exists() and not path.is_file()) or not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {path}: is no file, or in a folder that does not exist; give another file")
    if suffixes and path.suffix.lower() not in suffixes:
        raise ConfigError(f"{option} {path}: give a name that ends with {' or '.join(suffixes)}")
    check_writable(option, path.absolute().parent)


def check_apart(outputs: Mapping[str, Path | None], inputs: Iterable[object]) -> None:
    """ConfigError, before the work, for an output that would overwrite an input (some are mere names) or another."""
    wanted = {option: path for option, path in outputs.items() if path is not None}
    taken: dict[tuple[str, int], str] = {}
    for each in inputs if wanted else ():
        if isinstance(each, str | Path):
            with suppress(OSError, ValueError):  # no name of a file
                taken[file_identity(Path(each))] = "an input of this command"
    for option, path in wanted.items():
        place = file_identity(path)
        if place in taken:
            raise ConfigError(f"{option} {path}: is {taken[place]}, which it would overwrite; give another file")
        taken[place] = f"the file of {option}, too"


def check_writable(option: str, folder: Path, advice: str = "give another place") -> None:
    """ConfigError for a folder, perhaps one to be made, where no file can be made."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigError(f"{option} {folder}: cannot be written ({error.strerror}); {advice}") from error


def software_versions() -> dict[str, str]:
    """The versions of what a result depends on."""
    return {name: version(name) for name in ("mlxpref", "mlx", "mlx-vlm", "transformers")}


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, as Ctrl-C raises KeyboardInterrupt, so that finished work is saved."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def agree(question: str) -> bool:
    """Ask on the terminal; False without one."""
    return sys.stdin.isatty() and click.confirm(question, err=True)
