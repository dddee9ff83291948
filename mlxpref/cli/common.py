"""What several commands do before their work: load the judge, look at the images, say what must be said."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxpref.cli.options import chosen
from mlxpref.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mlxpref.data.image_cache import ImageCache
    from mlxpref.judge.judge import Judge
    from mlxpref.preferences import ImageLike

__all__ = [
    "agree",
    "calibrated",
    "check_output",
    "exit_on_sigterm",
    "image_cache",
    "load_from_options",
    "say_what_the_demo_knows",
    "storing",
]


def load_from_options(
    model: str | None,
    adapter: Path | None,
    yes: bool,
    settings: dict[str, Any],
    images: int | None = None,
    any_base: bool = False,
    decoded: "ImageCache | None" = None,
) -> "Judge":
    """The judge that the common options name, to judge pairs of `images` images; those in `decoded` are known to it."""
    from mlxpref.distributed import process_group
    from mlxpref.judge.loading import load_judge

    consent = (lambda question: True) if yes else agree
    judge = load_judge(model, adapter, chosen(settings), consent, images, any_base)
    judge = replace(judge, processes=process_group())
    if decoded is not None:
        judge.vlm.features.images = decoded
    if judge.processes.size > 1:
        judge.processes.check_same({"fingerprint of the judge": judge.conditions().judge})
    return judge


def image_cache(settings: dict[str, Any]) -> "ImageCache":
    """A memory of decoded images for a judge with these settings."""
    from mlxpref.config import JudgeSettings
    from mlxpref.data.image_cache import ImageCache

    return ImageCache(settings.get("max_pixels") or JudgeSettings().max_pixels)


def calibrated(judge: "Judge", calibration: Path | None, no_calibration: bool) -> "Judge":
    """Calibrate a judge as the options say, and say so."""
    from mlxpref.judge import loading

    if calibration is not None and no_calibration:
        raise click.UsageError("--calibration and --no-calibration exclude each other")
    return loading.calibrated(judge, calibration or not no_calibration)


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


@contextmanager
def storing(judge: "Judge", store: Path | None, no_store: bool) -> Iterator["Judge"]:
    """Let a judge keep and recall comparisons for a while, unless it must not."""
    from mlxpref.judge.store import BroadcastStore, Store, default_store_path

    if store is not None and no_store:
        raise click.UsageError("--store and --no-store exclude each other")
    if no_store:
        yield judge
        return
    processes = judge.processes
    with Store(store or default_store_path()) if processes.is_main else nullcontext() as opened:
        yield replace(judge, store=opened if processes.size == 1 else BroadcastStore(opened, processes))


def agree(question: str) -> bool:
    """Ask on the terminal; without one, nobody agrees."""
    return sys.stdin.isatty() and click.confirm(question, err=True)


def say_what_the_demo_knows(judge: "Judge", images: Sequence["ImageLike"]) -> None:
    """Say that the demo judge knows coloured shapes only, where it is shown anything else."""
    from PIL import Image

    from mlxpref.cli.output import note
    from mlxpref.demo.pictures import SIZE

    if judge.name != "demo":
        return
    for image in images:
        with suppress(DataError):
            size = image.size if isinstance(image, Image.Image) else judge.vlm.features.images.size(image)
            if size != (SIZE, SIZE):
                note("the demo judge knows only its own coloured shapes: what it says of other pictures means nothing")
                return
