"""What several commands do before their work: load the judge, look at the images, say what must be said."""

import signal
import sys
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxpref.cli.options import chosen
from mlxpref.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mlxpref.judge.judge import Judge
    from mlxpref.preferences import ImageLike, Preference

__all__ = [
    "agree",
    "calibrated",
    "check_images_of",
    "check_output",
    "exit_on_sigterm",
    "load_from_options",
    "say_what_the_demo_knows",
    "storing",
]

_SHOWN = 10
"""How many of the unreadable images are named."""
_DECODED, _RUN = 2000, 20
"""How many images are decoded before the work, and how many of them one after the other."""


def load_from_options(
    model: str | None,
    adapter: Path | None,
    yes: bool,
    settings: dict[str, Any],
    images: int | None = None,
    any_base: bool = False,
) -> "Judge":
    """The judge that the common options name, to judge pairs of `images` images."""
    from mlxpref.distributed import process_group
    from mlxpref.judge.loading import load_judge

    consent = (lambda question: True) if yes else agree
    judge = load_judge(model, adapter, chosen(settings), consent, images, any_base)
    judge.processes = process_group()
    if judge.processes.size > 1:
        judge.processes.check_same({"fingerprint of the judge": judge.conditions().judge})
    return judge


def calibrated(judge: "Judge", calibration: Path | None, no_calibration: bool) -> None:
    """Calibrate a judge as the options say, and say so."""
    from mlxpref.judge.loading import use_calibration

    if calibration is not None and no_calibration:
        raise click.UsageError("--calibration and --no-calibration exclude each other")
    use_calibration(judge, calibration or not no_calibration)


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
def storing(judge: "Judge", store: Path | None, no_store: bool) -> Iterator[None]:
    """Let a judge keep and recall comparisons for a while, unless it must not."""
    from mlxpref.judge.store import BroadcastStore, Store, default_store_path

    if store is not None and no_store:
        raise click.UsageError("--store and --no-store exclude each other")
    if no_store:
        yield
        return
    processes = judge.processes
    with Store(store or default_store_path()) if processes.is_main else nullcontext() as opened:
        judge.store = opened if processes.size == 1 else BroadcastStore(opened, processes)
        try:
            yield
        finally:
            judge.store = None


def check_images_of(data: str, preferences: Sequence["Preference"]) -> None:
    """Refuse data with images that cannot be read now, not in the middle of the work.

    Every image is looked for, in its folder or in its archive's list. Up to _DECODED are decoded, all of them or as
    many in runs drawn at random: a damaged one among more than that may be found only when it is its turn.
    """
    from PIL import Image

    from mlxpref.data.archives import has_member
    from mlxpref.data.images import load_image
    from mlxpref.preferences import PackedImage

    seen = dict.fromkeys(image for p in preferences for image in (p.a, p.b) if not isinstance(image, Image.Image))
    drawn = _drawn(len(seen))
    problems = []
    for number, image in enumerate(seen):
        try:
            there = has_member(image) if isinstance(image, PackedImage) else image.is_file()
        except OSError:  # a name that no file can have
            there = False
        if not there or number in drawn:
            try:
                load_image(image)
            except DataError as error:
                problems.append(f"\n  {error}")
    if problems:
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError(
            f"{data}: {len(problems)} of {len(seen)} images cannot be read; correct them or remove their rows:"
            f"{''.join(problems[:_SHOWN])}{more}"
        )


def _drawn(count: int) -> Container[int]:
    """Numbers of the images to decode: in runs, since an archive's neighbours are read together."""
    import numpy as np

    if count <= _DECODED:
        return range(count)
    starts = np.random.default_rng(0).choice(count // _RUN, _DECODED // _RUN, replace=False) * _RUN
    return {int(start) + i for start in starts for i in range(_RUN)}


def agree(question: str) -> bool:
    """Ask on the terminal; without one, nobody agrees."""
    return sys.stdin.isatty() and click.confirm(question, err=True)


def say_what_the_demo_knows(judge: "Judge", images: Sequence["ImageLike"]) -> None:
    """Say that the demo judge knows coloured shapes only, where it is shown anything else."""
    from mlxpref.cli.output import note
    from mlxpref.data.images import load_image
    from mlxpref.demo.pictures import SIZE

    if judge.name != "demo":
        return
    for image in images:
        with suppress(DataError):
            if load_image(image).size != (SIZE, SIZE):
                note("the demo judge knows only its own coloured shapes: what it says of other pictures means nothing")
                return
