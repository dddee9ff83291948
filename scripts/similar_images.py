"""Distances of perceptual hashes that keep bursts whole and other pictures apart: `python -m scripts.similar_images F`.

The folder F has pictures that differ. Every other one becomes a burst of 2 to 10 frames: the camera moves, turns and
zooms by a random walk, a part in the middle moves, the light changes, noise and JPEG are added. The others stay, whole
and in 4 and 9 parts. `whole` counts bursts that are one group with nothing else in it, for three speeds of the walk, in
percent of the width a frame; `joined` counts other pictures that are in a group, at the middle speed; blank ones are
left out. `connected` groups have all that steps within the distance lead to, in `complete` ones all are within it of
each other.
"""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist

from mlxpref.cli.output import print_table, show_on_stderr
from mlxpref.data.find_images import find_images
from mlxpref.data.images import load_image
from mlxpref.log import track

SPEEDS = (0.003, 0.006, 0.012)
DISTANCES = (6, 8, 10, 12, 14)
HASHES = {"pHash": imagehash.phash, "dHash": imagehash.dhash}
GROUPS = {"connected": "single", "complete": "complete"}
_WIDTH = 256
_MARGIN = 0.06
"""The part of the picture around a frame in which the camera can move."""
_LEAST_CONTRAST = 3.0
"""A part of a picture with a lower standard deviation of its grey levels is blank, and every blank one is alike."""


def burst(picture: Image.Image, speed: float, rng: np.random.Generator) -> Iterator[Image.Image]:
    """The frames of a burst; `speed` is the standard deviation of the camera's steps, in parts of the width."""
    x, y, turn, zoom = 0.0, 0.0, 0.0, 1.0
    for _ in range(int(rng.integers(2, 11))):
        yield _frame(picture, (x, y, turn, zoom), rng)
        x, y = x + rng.normal(0, speed), y + rng.normal(0, speed)
        turn, zoom = turn + rng.normal(0, 40 * speed), zoom * float(np.exp(rng.normal(0, 0.6 * speed)))


def _frame(picture: Image.Image, camera: tuple[float, float, float, float], rng: np.random.Generator) -> Image.Image:
    x, y, turn, zoom = camera
    width, height = picture.size
    part = min(1.0, (1 - 2 * _MARGIN) * zoom)
    left, top = (float(np.clip((1 - part) / 2 + shift, 0, 1 - part)) for shift in (x, y))
    box = (left * width, top * height, (left + part) * width, (top + part) * height)
    turned = picture.rotate(turn, resample=Image.Resampling.BICUBIC)
    frame = turned.resize((_WIDTH, _WIDTH * height // width), box=box, reducing_gap=2)
    third = (frame.width // 3, frame.height // 3)
    subject = frame.crop((*third, 2 * third[0], 2 * third[1]))
    moved = rng.normal(0, 0.015, 2) * frame.size
    frame.paste(subject, (third[0] + int(moved[0]), third[1] + int(moved[1])))
    lit = np.asarray(ImageEnhance.Brightness(frame).enhance(float(np.exp(rng.normal(0, 0.05)))), np.float64)
    content = io.BytesIO()
    noisy = np.clip(lit + rng.normal(0, 4, lit.shape), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(content, "JPEG", quality=85)
    return load_image(io.BytesIO(content.getvalue()))


def parts(picture: Image.Image) -> Iterator[Image.Image]:
    """A picture, its quarters and its ninths, without blank ones."""
    width, height = picture.size
    for n in (1, 2, 3):
        for i, j in np.ndindex(n, n):
            part = picture.crop((width * i // n, height * j // n, width * (i + 1) // n, height * (j + 1) // n))
            if np.asarray(part.convert("L")).std() > _LEAST_CONTRAST:
                yield part


def measure(bits: NDArray[np.bool_], truth: NDArray[np.intp], bursts: int, method: str) -> dict[int, tuple[int, int]]:
    """For each distance the number of whole bursts, and of other pictures that are in a group.

    `bits` (N, 64) are hashes, `truth` (N,) the number of each picture, below `bursts` for all frames of a burst.
    """
    tree, counts = linkage(64 * pdist(bits, "hamming"), method), {}
    for distance in DISTANCES:
        labels = fcluster(tree, distance + 0.5, "distance")
        size = np.bincount(labels)[labels]
        frames = np.bincount(truth)
        whole = sum(len({*labels[truth == i]}) == 1 and size[truth == i][0] == frames[i] for i in range(bursts))
        counts[distance] = whole, int((size[truth >= bursts] > 1).sum())
    return counts


@click.command()
@click.argument("folder", metavar="F", type=click.Path(path_type=Path))
@show_on_stderr()
def main(folder: Path) -> None:
    """Count bursts that are found, and other pictures that are joined, by the distance of near-duplicates."""
    pictures = [load_image(path, 512 * 512) for path in find_images([folder])]
    moving, other = pictures[::2], [part for picture in pictures[1::2] for part in parts(picture)]
    found: dict[tuple[str, str], list[Mapping[int, tuple[int, int]]]] = {}
    for speed in track(SPEEDS, len(SPEEDS), "speeds"):
        rng = np.random.default_rng(0)
        groups = [*(list(burst(picture, speed, rng)) for picture in moving), *([each] for each in other)]
        truth = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        for name, hash_of in HASHES.items():
            bits = np.array([hash_of(picture).hash.ravel() for group in groups for picture in group])
            for kind, method in GROUPS.items():
                found.setdefault((name, kind), []).append(measure(bits, truth, len(moving), method))
    print_table(
        ("hash", "groups", ">distance", *(f">whole at {100 * speed:.1f} %" for speed in SPEEDS), ">joined"),
        [
            (name, kind, distance, *(f"{counts[distance][0]} of {len(moving)}" for counts in by_speed),
             f"{by_speed[1][distance][1]} of {len(other)}")
            for (name, kind), by_speed in found.items()
            for distance in DISTANCES
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
