"""The public data sets that mlxpref reads: where they are, their licences and sizes, and which files a split needs."""

from dataclasses import dataclass
from pathlib import Path

from mlxpref.errors import ConfigError
from mlxpref.text import format_bytes

__all__ = ["CATALOG", "DataSet", "Split", "data_set_of", "files_of", "folder_of", "shown_size"]

_GB = 10**9
_MB = 10**6


@dataclass(frozen=True)
class Split:
    """One part of a data set: the files it needs, as patterns of their paths in the hub's repository.

    `lists` say which pairs there are, `images` hold the pictures (and, where there are no lists, the pairs as well).
    `size` is their sum in bytes, about, and `known_from` says how we know; None is not known before the hub is
    asked. `together` means that the images cannot be had in part: one archive, or one cut into pieces. `beside` is
    another split that its official protocol reads.
    """

    name: str
    lists: tuple[str, ...]
    images: tuple[str, ...]
    size: int | None
    known_from: str = ""
    together: bool = False
    beside: str | None = None


@dataclass(frozen=True)
class DataSet:
    """A data set on the Hugging Face hub; `aliases` are other ids under which the same files may be in the cache."""

    name: str
    hub_id: str
    licence: str
    splits: tuple[Split, ...]
    aliases: tuple[str, ...] = ()

    def split(self, name: str) -> Split:
        """A split by its name; ConfigError if there is none."""
        for split in self.splits:
            if split.name == name:
                return split
        known = ", ".join(split.name for split in self.splits)
        raise ConfigError(f"split {name!r}: {self.name} has {known}")


def _imagereward(split: str, size: int) -> Split:
    return Split(split, (f"metadata-{split}.parquet",), (f"images/{split}/*.zip",), size, "by its card")


def _hpdv2(split: str, size: int) -> Split:
    return Split(split, (f"{split}.json",), (f"{split}.tar.gz",), size, "by the hub's list of files", together=True)


def _pickapic(split: str, size: int | None = None, known_from: str = "by its card", files: str = "") -> Split:
    # The tie threshold of the official test is chosen on validation_unique.
    beside = "validation_unique" if split.startswith("test") else None
    return Split(split, (), (f"data/{files or split}-*.parquet",), size, known_from if size else "", beside=beside)


def _hpdv3(split: str) -> Split:
    return Split(split, (f"{split}.json",), ("images.tar.gz.*",), None, together=True)


_PICKAPIC_LICENCE = "not stated for the images; the authors' code is MIT"

CATALOG = {
    data_set.name: data_set
    for data_set in (
        DataSet(
            "imagereward",
            "THUDM/ImageRewardDB",
            "apache-2.0",
            (
                _imagereward("train", 20_900 * _MB),
                _imagereward("validation", 1_100 * _MB),
                _imagereward("test", 1_160 * _MB),
            ),
            ("zai-org/ImageRewardDB",),
        ),
        DataSet("hpdv2", "ymhao/HPDv2", "apache-2.0", (_hpdv2("train", 31_796 * _MB), _hpdv2("test", 158 * _MB))),
        DataSet(
            "pickapic",
            "yuvalkirstain/pickapic_v2",
            _PICKAPIC_LICENCE,
            (
                _pickapic("train", 322 * _GB),
                _pickapic("validation"),
                _pickapic("validation_unique"),
                _pickapic("test_unique", 175 * _MB, "from memory"),
                _pickapic("test", 175 * _MB, "from memory", "test_unique"),
            ),
        ),
        DataSet(
            "pickapic_v1",
            "yuvalkirstain/pickapic_v1",
            _PICKAPIC_LICENCE,
            (
                _pickapic("train", 193 * _GB),
                _pickapic("validation", 5_600 * _MB),
                _pickapic("validation_unique"),
                _pickapic("test_unique"),
                _pickapic("test", files="test_unique"),
            ),
        ),
        DataSet("hpdv3", "MizzenAI/HPDv3", "MIT", (_hpdv3("train"), _hpdv3("test"))),
    )
}
"""What `--data` and `mlxpref data` know by name. The `test` of Pick-a-Pic is `test_unique`, as its readers have it."""


def data_set_of(name: str) -> DataSet:
    """A data set by its name; ConfigError if there is none."""
    if name not in CATALOG:
        raise ConfigError(f"unknown data set {name!r}: known are {', '.join(CATALOG)}")
    return CATALOG[name]


def files_of(name: str, split: str) -> tuple[str, ...]:
    """The patterns of all files that a split needs, lists first; ConfigError for an unknown name or split."""
    wanted = data_set_of(name).split(split)
    return wanted.lists + wanted.images


def folder_of(name: str, data_dir: Path | None = None, split: str | None = None) -> Path:
    """The folder that holds a data set's files in the hub's layout: `data_dir`, else the hub cache's snapshot.

    Of several snapshots in the cache it is the one that the hub calls main, else the newest. Nothing is downloaded, and
    nothing is said about which files there are. Raises ConfigError if there is no such folder, with the command that
    makes one for `split` (without it, for the last one of the data set: the test) and how large that is.
    """
    data_set = data_set_of(name)
    if data_dir is not None:
        if data_dir.is_dir():
            return data_dir
        raise ConfigError(f"--data-dir {data_dir}: no such folder; give the one that holds the files of {name}")
    for hub_id in (data_set.hub_id, *data_set.aliases):
        if snapshot := _snapshot(hub_id):
            return snapshot
    wanted = data_set.split(split) if split else data_set.splits[-1]
    raise ConfigError(
        f"--data {name}: its files are not here; download them with `mlxpref data {name} --split {wanted.name}` "
        f"({shown_size(wanted)}), or say with --data-dir where they are"
    )


def shown_size(split: Split) -> str:
    """A split's size for a person, and where it is known from."""
    if split.size is None:
        return "the command shows the size and asks first"
    return f"about {format_bytes(split.size)} {split.known_from}"


def _snapshot(hub_id: str) -> Path | None:
    """The snapshot of a data set in the hub cache that is main's, else the newest; None if there is none."""
    # Not through snapshot_download: it refuses a snapshot of which only one split was downloaded, and this one is all
    # that is needed. The names below are the hub's documented cache layout.
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE).expanduser() / f"datasets--{hub_id.replace('/', '--')}"
    snapshots = repository / "snapshots"
    main = repository / "refs" / "main"
    commit = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    if commit and (snapshots / commit).is_dir():
        return snapshots / commit
    if not snapshots.is_dir():
        return None
    return max((path for path in snapshots.iterdir() if path.is_dir()), key=lambda p: p.stat().st_mtime, default=None)
