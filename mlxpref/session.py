"""What several commands do before their work: load the judge, look at the images, say what must be said."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxpref.errors import DataError
from mlxpref.options import chosen

if TYPE_CHECKING:
    from mlxpref.judge import Judge
    from mlxpref.preferences import ImageLike, Preference

__all__ = ["agree", "check_images_of", "load_from_options", "say_what_the_demo_knows", "storing"]

_SHOWN = 10
"""How many of the unreadable images are named."""


def load_from_options(
    model: str | None, adapter: Path | None, yes: bool, settings: dict[str, Any], images: int | None = None
) -> "Judge":
    """The judge that the common options name, to judge pairs of `images` images."""
    from mlxpref.console import note
    from mlxpref.loading import load_judge

    return load_judge(model, adapter, chosen(settings), (lambda question: True) if yes else agree, note, images)


@contextmanager
def storing(judge: "Judge", store: Path | None, no_store: bool) -> Iterator[None]:
    """Let a judge keep and recall comparisons for a while, unless it must not."""
    from mlxpref.store import Store, default_store_path

    if store is not None and no_store:
        raise click.UsageError("--store and --no-store exclude each other")
    if no_store:
        yield
        return
    with Store(store or default_store_path()) as judge.store:
        try:
            yield
        finally:
            judge.store = None


def check_images_of(data: str, preferences: Sequence["Preference"]) -> None:
    """Refuse data with images that cannot be read now, not in the middle of the work."""
    from mlxpref.images import check_images

    paths = dict.fromkeys(image for p in preferences for image in (p.a, p.b) if isinstance(image, Path))
    skipped = check_images(paths)[1] if paths else []
    if skipped:
        lines = [f"\n  {each.path}: {each.error}" for each in skipped[:_SHOWN]]
        lines += [f"\n  and {len(skipped) - _SHOWN} more"] if len(skipped) > _SHOWN else []
        raise DataError(
            f"{data}: {len(skipped)} of {len(paths)} images cannot be read; correct them or remove their rows:"
            + "".join(lines)
        )


def agree(question: str) -> bool:
    """Ask on the terminal; without one, nobody agrees."""
    import sys

    return sys.stdin.isatty() and click.confirm(question, err=True)


def say_what_the_demo_knows(judge: "Judge", images: Sequence["ImageLike"]) -> None:
    """Say that the demo judge knows coloured shapes only, where it is shown anything else."""
    from mlxpref.console import note
    from mlxpref.demo.pictures import SIZE
    from mlxpref.images import load_image

    if judge.name != "demo":
        return
    for image in images:
        with suppress(DataError):
            if load_image(image).size != (SIZE, SIZE):
                note("the demo judge knows only its own coloured shapes: what it says of other pictures means nothing")
                return
