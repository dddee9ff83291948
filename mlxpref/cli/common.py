"""What several commands do before their work: find the images, load the judge, open its store."""

import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from PIL import Image

from mlxpref.cli.options import ImageOptions, JudgeOptions
from mlxpref.cli.output import note
from mlxpref.config import JudgeSettings
from mlxpref.data.find_images import Skipped
from mlxpref.data.image_cache import ImageCache
from mlxpref.data.prompts import PromptGroup, find_groups
from mlxpref.demo.pictures import SIZE
from mlxpref.distributed import process_group
from mlxpref.errors import ConfigError, DataError
from mlxpref.judge.judge import Judge
from mlxpref.judge.loading import calibrated, load_judge
from mlxpref.judge.store import BroadcastStore, Store, default_store_path
from mlxpref.power import keep_awake
from mlxpref.preferences import ImageLike

__all__ = [
    "INTERRUPTED",
    "agree",
    "check_output",
    "exit_on_sigterm",
    "image_cache",
    "load_image_groups",
    "load_judge_for",
    "open_judge",
]

INTERRUPTED = 130
"""The exit code of a command that was interrupted and printed a result nevertheless."""


def image_cache(settings: Mapping[str, Any]) -> ImageCache:
    """A memory of decoded images for a judge with these settings."""
    return ImageCache(settings.get("max_pixels", JudgeSettings().max_pixels))


def load_image_groups(
    places: Sequence[Path], options: ImageOptions, decoded: ImageCache
) -> tuple[list[PromptGroup], list[Skipped], list[str]]:
    """The images of each prompt, those that were left out, and notes; all that is left out is named on stderr."""
    groups, skipped, notes = find_groups(places, options.recursive, options.prompt, options.prompt_from, decoded)
    for line in [*(f"skipped: {each.path}: {each.error}" for each in skipped), *notes]:
        note(line)
    return groups, skipped, notes


def load_judge_for(
    images: Sequence[ImageLike],
    options: JudgeOptions,
    settings: Mapping[str, Any],
    decoded: ImageCache,
    together: int | None = None,
) -> Judge:
    """The judge that the options name, calibrated, to judge `images`, of which `together` are one ranking (all)."""
    consent = (lambda question: True) if options.yes else agree
    judge = load_judge(options.model, options.adapter, settings, consent, together or len(images), options.any_base)
    judge = replace(judge, processes=process_group())
    judge.vlm.features.images = decoded
    if judge.processes.size > 1:
        judge.processes.check_same({"fingerprint of the judge": judge.conditions().judge})
    judge = calibrated(judge, options.calibration or not options.no_calibration)
    _warn_of_the_demo(judge, images)
    return judge


@contextmanager
def open_judge(
    images: Sequence[ImageLike],
    options: JudgeOptions,
    settings: Mapping[str, Any],
    decoded: ImageCache,
    together: int | None = None,
) -> Iterator[Judge]:
    """The same judge with its store open, while the machine is kept awake."""
    judge = load_judge_for(images, options, settings, decoded, together)
    processes = judge.processes
    with keep_awake():
        if options.no_store:
            yield judge
            return
        with Store(options.store or default_store_path()) if processes.is_main else nullcontext() as store:
            yield replace(judge, store=store if processes.size == 1 else BroadcastStore(store, processes))


def check_output(option: str, path: Path) -> None:
    """Refuse now a file that could not be written when the work is done."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {path}: is a folder, or in a folder that does not exist; give another file")


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, as Ctrl-C raises KeyboardInterrupt: what is done is saved first."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def agree(question: str) -> bool:
    """Ask on the terminal; without one, nobody agrees."""
    return sys.stdin.isatty() and click.confirm(question, err=True)


def _warn_of_the_demo(judge: Judge, images: Iterable[ImageLike]) -> None:
    """Say that the demo judge knows only coloured shapes, where it is shown anything else."""
    if judge.name != "demo":
        return
    for image in images:
        with suppress(DataError):
            size = image.size if isinstance(image, Image.Image) else judge.vlm.features.images.size(image)
            if size != (SIZE, SIZE):
                note("the demo judge knows only its own coloured shapes: its answers about other pictures mean nothing")
                return
