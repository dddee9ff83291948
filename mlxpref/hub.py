"""Files of the Hugging Face hub, downloaded so that nothing is lost: gone on with where it stopped, and checked.

huggingface_hub (2.4) begins a file anew when a command is run again, which at 31.7 GB is too late; so the content comes
through its `http_get` into a file of one name, and into the hub cache through its `hf_hub_download`, which links what
lies there already.
"""

import errno
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Literal

from mlxpref.errors import DataError
from mlxpref.files import free_bytes
from mlxpref.text import format_bytes

__all__ = ["Destination", "HubFile", "HubRepository", "ask_hub", "check_space", "download"]

RepositoryKind = Literal["dataset", "model"]
Progress = Callable[["HubFile", int], None]
"""Told how many bytes of a file are there, those of earlier runs included."""

SPARE = 10**9
"""Bytes that must stay free where files are put."""
_DIGEST = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_ASK_SECONDS = 30.0
_ELSEWHERE = {"dataset": "--output (or HF_HOME)", "model": "HF_HOME"}


@dataclass(frozen=True)
class HubFile:
    """A file as the hub states it: its path, its size in bytes, and its sha256 (git's own sha1 where it is in git)."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True)
class HubRepository:
    """A repository of the hub as it is now, or at a `revision`; `licence` is None where its card names none."""

    hub_id: str
    kind: RepositoryKind
    commit: str
    licence: str | None
    files: tuple[HubFile, ...]
    revision: str | None = None

    def matching(self, patterns: Iterable[str]) -> list[HubFile]:
        """The files whose paths match one of the patterns, in the patterns' order; each pattern has to match one."""
        found: dict[HubFile, None] = {}
        for pattern in patterns:
            matches = [file for file in self.files if fnmatchcase(file.path, pattern)]
            if not matches:
                raise DataError(
                    f"{self.hub_id}: the hub has no {pattern} there; mlxpref does not know its new layout yet, please "
                    "report it"
                )
            found |= dict.fromkeys(sorted(matches, key=lambda file: file.path))
        return list(found)


@dataclass(frozen=True)
class Destination:
    """Where the files of a repository are put: into a folder in the hub's layout, or the hub cache (None)."""

    repository: HubRepository
    folder: Path | None = None

    @property
    def root(self) -> Path:
        """The folder itself, or the repository's in the hub cache."""
        if self.folder is not None:
            return self.folder
        from huggingface_hub import constants

        name = f"{self.repository.kind}s/{self.repository.hub_id}".replace("/", "--")
        return Path(constants.HF_HUB_CACHE).expanduser() / name

    @property
    def snapshot(self) -> Path:
        """The folder in which the files have their own paths."""
        return self.folder or self.root / "snapshots" / self.repository.commit

    def content(self, file: HubFile) -> Path:
        """The file itself; in the hub cache, the snapshot's path is a link to it."""
        return self.root / file.path if self.folder else self.root / "blobs" / file.digest

    def partial(self, file: HubFile) -> Path:
        """What there is of a file that is not whole."""
        return (self.root / ".cache" / "mlxpref" if self.folder else self.root / "blobs") / f"{file.digest}.incomplete"

    def bytes_left(self, files: Iterable[HubFile]) -> int:
        """How much of some files is still to be downloaded."""
        absent = {file.digest: file for file in files if not self.content(file).is_file()}
        return sum(max(0, file.size - _size(self.partial(file))) for file in absent.values())

    def link(self, file: HubFile) -> Path:
        """Give a file that is whole its path in the snapshot."""
        if self.folder:
            return self.content(file)
        from huggingface_hub import hf_hub_download

        repository = self.repository
        # By the name of the revision, so that the cache knows it by this name when the hub cannot be asked.
        revision = repository.revision
        path = Path(hf_hub_download(repository.hub_id, file.path, repo_type=repository.kind, revision=revision))
        if repository.commit not in path.parts:
            raise DataError(f"{repository.hub_id} was changed on the hub meanwhile; run the same command again")
        return path


def ask_hub(hub_id: str, kind: RepositoryKind = "dataset", revision: str | None = None) -> HubRepository:
    """What the hub says of a repository; DataError, one line, where it cannot be asked or does not tell.

    `revision` is a branch, a tag or a commit; None is the main one.
    """
    from huggingface_hub import HfApi

    try:
        ask = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
        found = ask(hub_id, revision=revision, files_metadata=True, timeout=_ASK_SECONDS)
    except Exception as error:  # the hub's transport library raises its own errors, and changes between releases
        raise _explained(f"{hub_id}@{revision}" if revision else hub_id, kind, error) from error
    files = []
    for sibling in found.siblings or []:
        digest = (sibling.lfs.sha256 if sibling.lfs else sibling.blob_id) or ""
        path = PurePosixPath(sibling.rfilename)
        if sibling.size is None or not _DIGEST.fullmatch(digest) or path.is_absolute() or ".." in path.parts:
            raise DataError(f"{hub_id}: what the hub states of {sibling.rfilename!r} cannot be used; check HF_ENDPOINT")
        files.append(HubFile(sibling.rfilename, sibling.size, digest))
    licence = found.card_data.get("license") if found.card_data else None
    return HubRepository(hub_id, kind, found.sha or "", str(licence) if licence else None, tuple(files), revision)


def check_space(place: Destination, files: Sequence[HubFile]) -> None:
    """DataError if what is left of some files does not fit where they are put, with some space to spare."""
    left = place.bytes_left(files)
    free = free_bytes(place.root)
    if left and left + SPARE > free:
        raise DataError(
            f"{place.root}: {format_bytes(left)} are to be downloaded and {format_bytes(SPARE)} must stay free, but "
            f"only {format_bytes(free)} are; make room, or give another disk with {_ELSEWHERE[place.repository.kind]}"
        )


def download(place: Destination, file: HubFile, progress: Progress = lambda file, done: None) -> Path:
    """The path of a file that is whole and checked.

    What an earlier run left is gone on with. What lies there already is checked as well. A file whose size or checksum
    is not what the hub states is removed and is a DataError, as is whatever else goes wrong; each is one line.
    """
    content, partial = place.content(file), place.partial(file)
    try:
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # it is exported lazily

        partial.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(partial.with_suffix(".lock")):
            is_here = content.is_file()
            if not is_here:
                _download(place.repository, file, partial, progress)
            progress(file, file.size)
            _check(file, content if is_here else partial)
            if not is_here:
                content.parent.mkdir(parents=True, exist_ok=True)
                partial.replace(content)
        return place.link(file)
    except DataError:
        raise
    except Exception as error:  # as above
        raise _explained(place.repository.hub_id, place.repository.kind, error, file) from error


def _download(repository: HubRepository, file: HubFile, partial: Path, progress: Progress) -> None:
    """Append to what there is of a file until it is whole."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, disable_progress_bars  # type: ignore[attr-defined]

    if _size(partial) > file.size:
        partial.unlink()
    partial.touch()
    # By the commit, as main may move; not compressed, as that could not be gone on with.
    url = hf_hub_url(repository.hub_id, file.path, repo_type=repository.kind, revision=repository.commit)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    disable_progress_bars()
    while (start := _size(partial)) < file.size:
        try:
            with _Watched(io.FileIO(partial, "r+"), lambda done: progress(file, done)) as target:
                target.seek(start)
                http_get(url, target, resume_size=start, headers=headers, expected_size=file.size)
        except HfHubHTTPError:
            raise
        except Exception:  # http_get goes on after some breaks of a connection, not after all
            if _size(partial) <= start:
                raise


class _Watched(io.BufferedRandom):
    """A file that says how long it is whenever it grows."""

    def __init__(self, raw: io.FileIO, say: Callable[[int], None]) -> None:
        super().__init__(raw)
        self._say = say

    def write(self, content: bytes) -> int:  # type: ignore[override]
        written = super().write(content)
        self._say(self.tell())
        return written


def _check(file: HubFile, path: Path) -> None:
    """Remove a file that is not what the hub states, with a DataError."""
    size = path.stat().st_size
    if size != file.size:
        wrong = f"{size:,} bytes, not {file.size:,}"
    elif (digest := _digest(path, file)) != file.digest:
        wrong = f"checksum {digest[:12]}..., not {file.digest[:12]}..."
    else:
        return
    path.unlink()
    raise DataError(
        f"{file.path}: its content is not what the hub states ({wrong}) and was removed; run the same command again to "
        "download it anew"
    )


def _digest(path: Path, file: HubFile) -> str:
    """The checksum of a file, of the kind that the hub states: a sha256, or git's sha1 of a blob."""
    start = b"" if len(file.digest) == 64 else b"blob %d\0" % file.size
    kind = hashlib.sha256 if len(file.digest) == 64 else hashlib.sha1
    with path.open("rb") as content:
        return hashlib.file_digest(content, lambda: kind(start)).hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _explained(hub_id: str, kind: RepositoryKind, error: Exception, file: HubFile | None = None) -> DataError:
    """What went wrong between the hub and here, and what to do about it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"{hub_id}: {file.path}" if file else hub_id
    kept = "; what was downloaded is kept, and the same command goes on from there" if file else ""
    hub = f"the hub at {constants.ENDPOINT}"
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{hub_id.partition('@')[0]}"
    if isinstance(error, OfflineModeIsEnabled):
        return DataError(f"{what}: HF_HUB_OFFLINE is set, so nothing is downloaded; unset it and run it again{kept}")
    if isinstance(error, GatedRepoError):
        return DataError(
            f"{what}: its owners ask who wants it; agree to their terms at {page}, log in with `hf auth login` (or set "
            "HF_TOKEN), and run it again"
        )
    if isinstance(error, RepositoryNotFoundError):
        return DataError(
            f"{what}: {hub} has no such {kind}, or it is not open to you; check HF_ENDPOINT, or log in with "
            "`hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return DataError(f"{what}: {hub} has no such branch, tag or commit of it; choose one that {page} shows")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        remedy = "log in anew with `hf auth login`" if status in (401, 403) else "try again later"
        return DataError(f"{what}: {hub} answered {status}; {remedy}{kept}")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return DataError(f"{what}: no space left on the disk; make room{kept}")
    if isinstance(error, OSError) and error.errno is not None and error.filename:
        elsewhere = _ELSEWHERE[kind]
        return DataError(
            f"{error.filename}: {error.strerror}; correct that, or give another place with {elsewhere}{kept}"
        )
    return DataError(
        f"{what}: {hub} was not reached, or stopped answering ({type(error).__name__}); check the connection{kept}"
    )
