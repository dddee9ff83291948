"""The public data sets: their places and licences, and the files that a split or a limit needs."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from huggingface_hub.constants import is_offline_mode

from mlxpref.data.archives import count_rows, read_columns
from mlxpref.errors import ConfigError, UnknownSplitError

Files = list[str]
"""Paths in the hub's layout."""


@dataclass(frozen=True)
class Split:
    """One part of a data set: the files it needs, as patterns of their paths in the hub's repository.

    `lists` hold the pairs, `images` the pictures (and, without lists, the pairs as well). The images of a split that is
    `together` are one archive, perhaps in pieces, and cannot be downloaded in part. `beside` is another split that its
    official protocol reads. `pairs` is about the number of pairs that are no tie, 0 if it is not known. Without lists,
    `rows_of` counts the preferences of a table towards a limit.
    """

    name: str
    lists: tuple[str, ...]
    images: tuple[str, ...]
    together: bool = False
    beside: str | None = None
    pairs: int = 0
    rows_of: Callable[[Path], int] = count_rows


@dataclass(frozen=True)
class DataSet:
    """A data set on the Hugging Face hub.

    `aliases` are other ids of the same files in the cache, `parts` are ids that mean it in `--data` and hold other
    files.
    """

    name: str
    hub_id: str
    licence: str
    splits: tuple[Split, ...]
    aliases: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    def split(self, name: str) -> Split:
        """A split by its name; UnknownSplitError if there is none."""
        for split in self.splits:
            if split.name == name:
                return split
        names = ", ".join(split.name for split in self.splits)
        raise UnknownSplitError(f"split {name!r}: {self.name} has {names}")


def _imagereward(split: str) -> Split:
    # The test has 6,399 pairs of 466 prompts; train has 8,000 prompts, validation 412.
    pairs = {"train": 110_000, "validation": 5_600, "test": 6_399}[split]
    return Split(split, (f"metadata-{split}.parquet",), (f"images/{split}/*.zip",), pairs=pairs)


def _hpdv2(split: str) -> Split:
    return Split(split, (f"{split}.json",), (f"{split}.tar.gz",), together=True)


def _pickapic(split: str) -> Split:
    # `test_unique` is the official test; its tie threshold is chosen on validation_unique.
    is_test = split.startswith("test")
    files = "test_unique" if is_test else split
    pairs = 500_000 if split == "train" else 0  # v1 has 584 thousand, v2 959 thousand, with ties
    beside = "validation_unique" if is_test else None
    return Split(split, (), (f"data/{files}-*.parquet",), beside=beside, pairs=pairs, rows_of=_decided_rows)


def _decided_rows(table: Path) -> int:
    """The labelled rows of one of Pick-a-Pic's tables that are no tie, as training drops ties."""
    rows = read_columns(table, ("has_label", "label_0")).to_pylist()
    return sum(bool(row["has_label"]) and row["label_0"] != 0.5 for row in rows)


def _hpdv3(split: str) -> Split:
    return Split(split, (f"{split}.json",), ("images.tar.gz.*",), together=True)


def _genai_bench(split: str) -> Split:
    # The hub's own `test` is another, longer list; the votes of the official 1,735 pairs are in test_v1.
    return Split(split, (), ("image_generation/test_v1-*.parquet",))


_VALIDATED = ("train", "validation", "test")
_PICKAPIC = ("train", "validation", "validation_unique", "test_unique", "test")
_PICKAPIC_LICENCE = "not stated for the images; the authors' code is MIT"

CATALOG = {
    data_set.name: data_set
    for data_set in (
        DataSet(
            "imagereward",
            "THUDM/ImageRewardDB",
            "apache-2.0",
            tuple(map(_imagereward, _VALIDATED)),
            ("zai-org/ImageRewardDB",),
        ),
        DataSet("hpdv2", "ymhao/HPDv2", "apache-2.0", tuple(map(_hpdv2, ("train", "test")))),
        DataSet("pickapic", "yuvalkirstain/pickapic_v2", _PICKAPIC_LICENCE, tuple(map(_pickapic, _PICKAPIC))),
        DataSet("pickapic_v1", "yuvalkirstain/pickapic_v1", _PICKAPIC_LICENCE, tuple(map(_pickapic, _PICKAPIC))),
        DataSet("hpdv3", "MizzenAI/HPDv3", "MIT", tuple(map(_hpdv3, ("train", "test")))),
        DataSet(
            "mmrb2",
            "rl-research/multimodal-rewardbench-2",
            "CC BY-NC 4.0",
            (Split("test", (), ("t2i/*.parquet",), pairs=1000),),
            parts=("facebook/MMRB2_image",),
        ),
        DataSet("genai_bench", "TIGER-Lab/GenAI-Bench", "cc-by-4.0", tuple(map(_genai_bench, ("test_v1", "test")))),
    )
}
"""The data sets of `--data` and `mlxpref data` by name; the last split of each is the test."""


def catalog_name(data: str) -> str:
    """The name in the catalogue of a data set that is named by its id on the hub; other names as they are."""
    return next((x.name for x in CATALOG.values() if data in (x.hub_id, *x.aliases, *x.parts)), data)


def folder_of(name: str, data_dir: Path | None = None, split: str | None = None) -> Path:
    """The folder that holds a data set's files in the hub's layout: `data_dir`, else the hub cache's snapshot.

    Of several snapshots in the cache it returns the hub's main, else the newest. It downloads nothing and does not
    check the files. ConfigError, with the command that makes the folder, if there is none.
    """
    data_set = CATALOG[name]
    if data_dir is not None:
        if data_dir.is_dir():
            return data_dir
        raise ConfigError(f"--data-dir {data_dir}: no such folder; give the one that holds the files of {name}")
    for hub_id in (data_set.hub_id, *data_set.aliases):
        if snapshot := snapshot_of(hub_id):
            return snapshot
    raise missing_files(name, split or data_set.splits[-1].name, "its files are not here")


def missing_files(name: str, split: str, what: str) -> ConfigError:
    """The error for missing files of a data set, with the command that downloads them."""
    offline = " (HF_HUB_OFFLINE is set: unset it before)" if is_offline_mode() else ""
    return ConfigError(
        f"--data {name}, split {split}: {what}; download them with `mlxpref data {name} --split {split}`, which shows "
        f"their size first{offline}, or say with --data-dir where they are"
    )


def snapshot_of(hub_id: str, revision: str | None = None) -> Path | None:
    """The snapshot of a data set in the hub cache at a revision, or main, else the newest; None if there is none."""
    # Not by snapshot_download, which raises an error for a snapshot with only one split, though that is enough here.
    # The names below are the hub's documented cache layout.
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE).expanduser() / f"datasets--{hub_id.replace('/', '--')}"
    snapshots = repository / "snapshots"
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    if commit and (snapshots / commit).is_dir():
        return snapshots / commit
    if revision or not snapshots.is_dir():
        return None
    return max((path for path in snapshots.iterdir() if path.is_dir()), key=lambda p: p.stat().st_mtime, default=None)


def files_for_limit(split: Split, lists: Files, images: Files, folder: Path, limit: int | None) -> Iterator[Files]:
    """The files that a split's first `limit` preferences need, in portions: each lies in `folder` before the next.

    Ties of ImageReward and Pick-a-Pic do not count, as training drops them. Without a limit, or with all images in one
    archive, it returns all files at once. Otherwise it returns the lists, then the fewest first archives with both
    images of enough pairs; or one table after the other, until there are enough rows. DataError for an unreadable list
    or table.
    """
    if limit is None or split.together:
        yield lists + images
    elif lists:
        yield lists
        yield _first_archives([folder / path for path in lists], images, limit)
    else:
        rows = 0
        for table in images:
            if rows < limit:
                yield [table]
                rows += split.rows_of(folder / table)


def archives_in(lists: Sequence[Path]) -> Files:
    """The archives that the tables of ImageRewardDB name, each once."""
    columns = [read_columns(path, ("image_path",))["image_path"].to_pylist() for path in lists]
    return list(dict.fromkeys(f"{str(path).rpartition('/')[0]}.zip" for paths in columns for path in paths))


def _first_archives(lists: Sequence[Path], archives: Files, limit: int) -> Files:
    """The first archives, by their numbers, with both images of `limit` pairs that are no tie."""
    names = sorted(archives, key=lambda path: (len(path), path))
    place = {path.removesuffix(".zip"): i for i, path in enumerate(names)}
    groups: dict[str, list[tuple[int, int]]] = {}
    for path in lists:
        for row in read_columns(path, ("image_path", "prompt_id", "rank")).to_pylist():
            archive = str(row["image_path"]).rpartition("/")[0]
            if archive in place:
                groups.setdefault(str(row["prompt_id"]), []).append((place[archive], row["rank"]))
    # The number of pairs that the i-th archive completes.
    complete_with = Counter(
        max(i, j) for images in groups.values() for (i, rank), (j, other) in combinations(images, 2) if rank != other
    )
    pairs = 0
    for i in range(len(names)):
        pairs += complete_with[i]
        if pairs >= limit:
            return names[: i + 1]
    return names
