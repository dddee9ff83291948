"""What an adapter learned from: digests of preferences and of their images' contents, whatever their files are called.

A run writes them into its folder, and an export keeps the pairs. Resuming compares them, and a measurement counts the
preferences that are among them.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from mlxpref.files import LEARNED, write_file
from mlxpref.log import logger, track_many
from mlxpref.preferences import ImageLike, PackedImage, Preference

_BLOCK = 1 << 16
"""Bytes at the start, in the middle and at the end of a file that stand for it, with its size."""
Digests = NDArray[np.uint64]


def digests_of(preferences: Sequence[Preference]) -> Digests:
    """Digests (N, 4) of preferences: prompt, what people said, contents of a and of b, 0 for an unreadable image."""
    known, sizes = dict[Path, int](), dict[Path, int]()

    def image(image: ImageLike) -> int:
        if isinstance(image, Image.Image):
            return _digest(f"{image.size}".encode() + image.tobytes())
        if isinstance(image, PackedImage):  # by its name, which is sooner hashed than found again
            return _member_digest(image, sizes)
        digest = known.get(image)
        if digest is None:
            digest = known[image] = _file_digest(image)
        return digest

    @lru_cache(typed=True)  # many pairs of one prompt follow each other
    def text(*values: str | float) -> int:
        return _digest(json.dumps(values if len(values) > 1 else values[0]).encode())

    digests = array("Q")
    for p in track_many(preferences, "reading digests of images"):
        digests.extend((text(p.prompt), text(p.p_people, p.votes, p.group), image(p.a), image(p.b)))
    return np.array(digests, np.uint64).reshape(-1, 4)


def pair_names(preferences: Sequence[Preference]) -> list[str]:
    """A name for each preference: of its prompt and the contents of its images, in either order; "" if unreadable."""
    return [f"{_digest(pair.tobytes()) >> 16:012x}" if pair[1] else "" for pair in _pairs(digests_of(preferences))]


def write_learned(folder: Path, preferences: Digests, learned: Digests, earlier: Iterable[Path | None]) -> None:
    """Write the digests (N, 4) of a run's preferences, and the pairs of those that it learns from and of earlier runs.

    `learned` are rows of `preferences`, `earlier` the folders of what the run begins with.
    """
    pairs = _pairs(learned)
    pairs = pairs[pairs[:, 1] != 0]  # without unreadable images
    pairs = np.concatenate([pairs, *_pairs_of(earlier).values()])
    write_file(folder / LEARNED, save({"preferences": preferences, "pairs": np.unique(pairs, axis=0)}))


def keep_learned(folder: Path, earlier: Sequence[Path | None]) -> None:
    """Write what earlier folders say that they learned from into the folder that is made of them."""
    if _pairs_of(earlier):
        write_learned(folder, digests_of([]), digests_of([]), earlier)


def read_learned(folder: Path) -> tuple[Digests, Digests] | None:
    """The digests (N, 4) of a run's preferences and (M, 3) of the pairs it learned from; None without such a file."""
    try:
        arrays = load_file(folder / LEARNED)
        return arrays["preferences"].reshape(-1, 4), arrays["pairs"].reshape(-1, 3)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def count_changed(before: Digests, now: Digests) -> int:
    """The number of preferences that are not the same now; an image that cannot be read now or then is no change."""
    if before.shape != now.shape:
        return max(len(before), len(now))
    differs = before != now
    differs[:, 2:] &= (before[:, 2:] != 0) & (now[:, 2:] != 0)
    return int(differs.any(axis=1).sum())


def has_learned(folders: Iterable[Path | None]) -> bool:
    """Whether any of a judge's folders, its adapter's and its model's, says what it learned from."""
    return bool(_pairs_of(folders))


def count_learned(folders: Iterable[Path | None], preferences: Sequence[Preference]) -> int | None:
    """The number of preferences, of pairs with a prompt, that a judge learned from; warns if there are any.

    `folders` are its adapter's, if it has one, and its model's. None where none of them says what it learned from.
    """
    known = _pairs_of(folders)
    if not known:
        return None
    pairs = set(map(tuple, np.concatenate([*known.values()]).tolist()))
    count = sum(tuple(pair) in pairs for pair in _pairs(digests_of(preferences)).tolist())
    if count:
        logger.warning(
            f"{count} of {len(preferences)} preferences are among those that {' and '.join(map(str, known))} learned "
            "from: this says what it remembers, not how well it judges others; hold some out (train --held-out 0.1), "
            "or give other data"
        )
    return count


def _pairs_of(folders: Iterable[Path | None]) -> dict[Path, Digests]:
    """Digests (M, 3) of the pairs that folders learned from, of those that say it."""
    return {folder: learned[1] for folder in folders if folder and (learned := read_learned(folder))}


def _pairs(digests: Digests) -> Digests:
    """Digests (N, 3) of prompts and their images, in either order."""
    pairs: Digests = np.column_stack([digests[:, 0], np.sort(digests[:, 2:], axis=1)])
    return pairs


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) or 1


def _member_digest(image: PackedImage, sizes: dict[Path, int]) -> int:
    """The digest of a member by its archive's size and its name; `sizes` are those of archives that are known."""
    try:
        size = sizes.get(image.archive)
        if size is None:
            size = sizes[image.archive] = image.archive.stat().st_size
        return _digest(f"{size}/{image.member}".encode())
    except (OSError, ValueError):
        return 0


def _file_digest(image: Path) -> int:
    """The digest of a file by its size and parts of its content."""
    try:
        file = os.open(image, os.O_RDONLY)  # there may be half a million, and Python's own files take thrice as long
        try:
            size = os.fstat(file).st_size
            whole = os.pread(file, 3 * _BLOCK, 0) if size <= 3 * _BLOCK else None
            parts = [
                os.pread(file, _BLOCK, start) if whole is None else whole[start : start + _BLOCK]
                for start in (0, size // 2, max(0, size - _BLOCK))
            ]
            return _digest(b"".join([f"{size}".encode(), *parts]))
        finally:
            os.close(file)
    except (OSError, ValueError):
        return 0
