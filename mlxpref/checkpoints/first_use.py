"""The first use of a recommended judge: it is downloaded, and converted to 4 bit into the user's cache.

A converted judge is a folder `judges/owner--name@commit-4bit` of the cache. Its name for the user is owner/name@commit,
so that an adapter that was trained on it finds it again, also where the cache is empty.
"""

import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mlxpref.checkpoints.converter import convert
from mlxpref.checkpoints.download import ask_model, bytes_left, cached_model, download_model, needed_bytes
from mlxpref.checkpoints.files import check_complete
from mlxpref.checkpoints.recommended import RecommendedJudge, Work
from mlxpref.errors import DataError, ModelError
from mlxpref.files import cache_dir, free_bytes, lock
from mlxpref.hub import SPARE, Destination, HubRepository
from mlxpref.log import logger
from mlxpref.text import format_bytes

_VERBS: dict[Work, str] = {"judging": "judge", "training": "train"}
_FOLDER = re.compile(r".+@([0-9a-f]{40})-4bit")


def judges_dir() -> Path:
    """The folder of converted judges; DataError for a user without a home."""
    return cache_dir() / "judges"


def converted_judge(hub_id: str, commit: str | None = None) -> tuple[str, Path] | None:
    """The name and the folder of a judge that was converted, from a commit or (None) last; None if there is none."""
    found = []
    with suppress(OSError, DataError):
        for folder in judges_dir().glob(f"{_stem(hub_id)}@{commit or '*'}-4bit"):
            with suppress(ModelError):
                check_complete(folder)
                if match := _FOLDER.fullmatch(folder.name):
                    found.append((folder.stat().st_mtime, f"{hub_id}@{match[1]}", folder))
    return max(found)[1:] if found else None


@dataclass(frozen=True)
class FirstUse:
    """What the first use of a judge takes; its `source` is a folder of the hub cache, or still on the hub."""

    judge: RecommendedJudge
    source: Path | HubRepository

    @classmethod
    def of(cls, judge: RecommendedJudge, revision: str | None) -> "FirstUse":
        """That of a judge which is not converted; ModelError where it is not here and the hub cannot be asked."""
        return cls(judge, cached_model(judge.id, revision) or ask_model(judge.id, revision))

    @property
    def commit(self) -> str:
        """The commit of its source."""
        return self.source.name if isinstance(self.source, Path) else self.source.commit

    @property
    def folder(self) -> Path:
        """The folder of the converted judge."""
        return judges_dir() / f"{_stem(self.judge.id)}@{self.commit}-4bit"

    @property
    def needs(self) -> dict[Path, int]:
        """The bytes that it adds to the disk of each place."""
        needs = {judges_dir(): self.judge.kept}
        if not isinstance(self.source, Path):
            needs[Destination(self.source).root] = bytes_left(self.source)
        return needs

    @property
    def words(self) -> str:
        """The judge and what a user has to know before: sizes, licence, memory, and what is known of it."""
        judge, licence, size = self.judge, self.judge.licence, "downloaded"
        if not isinstance(self.source, Path):
            licence, size = self.source.licence or licence, f"{format_bytes(needed_bytes(self.source))} to download"
        disk = f"{format_bytes(sum(self.needs.values()))} of disk until the download is deleted, which it may be then"
        memory = [f"about {format_bytes(judge.needed(work))} to {verb}" for work, verb in _VERBS.items()]
        return (
            f"{judge.id} ({size}, to be converted to 4 bit: {format_bytes(judge.kept)} in {judges_dir()}; {disk}; "
            f"licence {licence}; planned memory: {', '.join(memory)}; {judge.known})"
        )

    def run(self) -> tuple[str, Path]:
        """Download and convert it, and return its name and folder; waits for another process that does the same.

        ModelError, one line, for a full disk and where either fails. An interruption leaves only what was downloaded.
        """
        name, output = self.judge.id, self.folder
        with _alone(output, name):
            if found := converted_judge(name, self.commit):
                return found
            check_disks(self.needs)
            source = self.source if isinstance(self.source, Path) else download_model(self.source)
            for part in output.parent.glob(f".{output.name}.partial-*"):  # of a process that was killed
                shutil.rmtree(part, ignore_errors=True)
            logger.info(f"converting {name} to 4 bit, once, into {output}")
            convert(source, output, name)
        logger.info(f"{name} is converted; its download, {source.parents[1]}, may be deleted")
        return f"{name}@{self.commit}", output


def check_disks(needs: Mapping[Path, int]) -> None:
    """ModelError if the bytes for some places do not fit on their disks, with some space to spare."""
    disks: dict[int, list[Path]] = {}
    for place in needs:
        existing = next(each for each in (place.absolute(), *place.absolute().parents) if each.exists())
        disks.setdefault(existing.stat().st_dev, []).append(place)
    for places in disks.values():
        rest, free = sum(needs[place] for place in places), free_bytes(places[0])
        if rest and rest + SPARE > free:
            raise ModelError(
                f"{' and '.join(map(str, places))}: {format_bytes(rest)} are needed and {format_bytes(SPARE)} must "
                f"stay free, but only {format_bytes(free)} are free; make room, or give other disks with HF_HOME and "
                "MLXPREF_CACHE"
            )


def _stem(hub_id: str) -> str:
    return hub_id.replace("/", "--")


@contextmanager
def _alone(output: Path, what: str) -> Iterator[None]:
    """Keep other processes from making the same folder meanwhile; waits for one that does."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        file = output.with_name(f".{output.name}.lock").open("ab")
    except OSError as error:
        raise ModelError(
            f"{output.parent}: cannot be written ({error.strerror}); give another place with MLXPREF_CACHE"
        ) from error
    with file:
        if not lock(file):
            logger.info(f"another process makes {what} ready; waiting for it")
            while not lock(file):
                time.sleep(0.2)
        yield
