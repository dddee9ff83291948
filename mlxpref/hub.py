"""The Hugging Face hub: a repository's files and licence, and checked downloads of the files.

Models come through huggingface_hub's `snapshot_download`. That restarts an interrupted file in the next command
(huggingface_hub 2.4, its issue 4196), which is too slow for a data set's 32 GB: `download` resumes such files.
"""

import errno
import glob
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Literal

from huggingface_hub import HfApi, constants, file_download, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]  # they are exported lazily

from mlxpref.errors import DataError
from mlxpref.files import free_bytes
from mlxpref.text import format_bytes

RepositoryKind = Literal["dataset", "model"]

SPARE = 10**9
"""Bytes that must stay free on the disk of a download."""
_DIGEST = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_ASK_SECONDS = 30.0
_ELSEWHERE = {"dataset": "HF_HOME (or `mlxpref data --output`)", "model": "HF_HOME"}


@dataclass(frozen=True)
class HubFile:
    """A file's entry on the hub: its path, its size in bytes, and its sha256 (for files in git, git's own sha1)."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True)
class HubRepository:
    """A repository of the hub, now or at a `revision`; `licence` is None if its card names none."""

    hub_id: str
    kind: RepositoryKind
    commit: str
    licence: str | None
    files: tuple[HubFile, ...]
    revision: str | None = None

    def matching(self, patterns: Iterable[str]) -> list[HubFile]:
        """The files whose paths match a pattern, in the patterns' order; DataError for a pattern without a file."""
        files: dict[HubFile, None] = {}
        for pattern in patterns:
            matches = [file for file in self.files if fnmatchcase(file.path, pattern)]
            if not matches:
                raise DataError(
                    f"{self.hub_id}: the hub has no {pattern} there; mlxpref does not know its new layout yet, please "
                    "report it"
                )
            files |= dict.fromkeys(sorted(matches, key=lambda file: file.path))
        return list(files)


@dataclass(frozen=True)
class Destination:
    """The place for a repository's files: a folder in the hub's layout, or the hub cache (None)."""

    repository: HubRepository
    folder: Path | None = None

    @property
    def root(self) -> Path:
        """The folder itself, or the repository's in the hub cache."""
        if self.folder is not None:
            return self.folder
        name = f"{self.repository.kind}s/{self.repository.hub_id}".replace("/", "--")
        return Path(constants.HF_HUB_CACHE).expanduser() / name

    @property
    def snapshot(self) -> Path:
        """The folder in which the files have their own paths."""
        return self.folder or self.root / "snapshots" / self.repository.commit

    def content(self, file: HubFile) -> Path:
        """The file's content; in the hub cache, the snapshot's path is a link to it."""
        return self.root / file.path if self.folder else self.root / "blobs" / file.digest

    def partial(self, file: HubFile) -> Path:
        """The downloaded part of an unfinished file."""
        return (self.root / ".cache" / "mlxpref" if self.folder else self.root / "blobs") / f"{file.digest}.incomplete"

    def bytes_left(self, files: Iterable[HubFile]) -> int:
        """The bytes of files still to download."""
        absent = {file.digest: file for file in files if not self.content(file).is_file()}
        return sum(max(0, file.size - _size(self.partial(file))) for file in absent.values())


class Question(str):
    """The question whether to download something: `what`, with so many `bytes` for the disk of `place`."""

    def __new__(cls, what: str, place: Destination, bytes: int) -> "Question":
        """Ask about `what`."""
        question = super().__new__(cls, f"{what} is not here. Download it?")
        question.what, question.place, question.bytes = what, place, bytes
        return question

    what: str
    place: Destination
    bytes: int


def ask_hub(hub_id: str, kind: RepositoryKind = "dataset", revision: str | None = None) -> HubRepository:
    """The hub's entry of a repository, at a branch, tag or commit, or now; DataError if the hub cannot be asked."""
    with _translated(f"{hub_id}@{revision}" if revision else hub_id, kind):
        get_info = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
        info = get_info(hub_id, revision=revision, files_metadata=True, timeout=_ASK_SECONDS)
    files = []
    for sibling in info.siblings or []:
        digest = (sibling.lfs.sha256 if sibling.lfs else sibling.blob_id) or ""
        path = PurePosixPath(sibling.rfilename)
        if sibling.size is None or not _DIGEST.fullmatch(digest) or path.is_absolute() or ".." in path.parts:
            raise DataError(f"{hub_id}: what the hub states of {sibling.rfilename!r} cannot be used; check HF_ENDPOINT")
        files.append(HubFile(sibling.rfilename, sibling.size, digest))
    licence = info.card_data.get("license") if info.card_data else None
    return HubRepository(hub_id, kind, info.sha or "", str(licence) if licence else None, tuple(files), revision)


def check_space(destination: Destination, files: Sequence[HubFile]) -> None:
    """DataError if the rest of some files does not fit on the disk, with some space to spare."""
    check_room(destination, destination.bytes_left(files))


def check_room(destination: Destination, rest: int) -> None:
    """DataError if so many bytes do not fit on the disk, with some space to spare."""
    free = free_bytes(destination.root)
    if rest and rest + SPARE > free:
        raise DataError(
            f"{destination.root}: {format_bytes(rest)} are to be downloaded and {format_bytes(SPARE)} must stay free, "
            f"but only {format_bytes(free)} are free; make room, or give another disk with "
            f"{_ELSEWHERE[destination.repository.kind]}"
        )


def download_snapshot(repository: HubRepository, files: Sequence[HubFile]) -> Path:
    """Download files of a repository into the hub cache and return their folder; DataError, one line, if that fails.

    It skips existing files, and restarts an interrupted file.
    """
    # By the revision's name, so that the cache knows it by this name offline.
    with _translated(repository.hub_id, repository.kind):
        snapshot = snapshot_download(
            repository.hub_id,
            repo_type=repository.kind,
            revision=repository.revision,
            allow_patterns=[glob.escape(file.path) for file in files],
        )
    return _same_commit(Path(snapshot), repository)


def download(destination: Destination, file: HubFile) -> Path:
    """Download and check a file, or resume its download, and return its path.

    It checks an existing file, too, and removes a file with another size or checksum than the hub's. DataError, one
    line, for any error.
    """
    repository = destination.repository
    content, partial = destination.content(file), destination.partial(file)
    with _translated(repository.hub_id, repository.kind, file):
        partial.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(partial.with_suffix(".lock")):
            if content.is_file():
                _check(file, content)
            else:
                _append_rest(repository, file, partial)
                _check(file, partial)
                content.parent.mkdir(parents=True, exist_ok=True)
                partial.replace(content)
        if destination.folder:
            return content
        # Links a file in the cache to its path in the snapshot.
        path = hf_hub_download(repository.hub_id, file.path, repo_type=repository.kind, revision=repository.revision)
    return _same_commit(Path(path), repository)


def visibility_of(hub_id: str) -> str | None:
    """Whether a model repository of the hub is "public" or "private"; None for one that is not there (for this user).

    DataError, one line, if the hub cannot be asked.
    """
    with _translated(hub_id, "model"):
        try:
            return "private" if HfApi().model_info(hub_id, timeout=_ASK_SECONDS).private else "public"
        except GatedRepoError:
            return "public"
        except RepositoryNotFoundError:
            return None


def upload_model(folder: Path, hub_id: str) -> str:
    """Upload a model folder into a repository of the hub and return its address; a new repository is private.

    Weights that are there and not in the folder are removed, so that two sets never mix. DataError, one line, for any
    error.
    """
    with _translated(hub_id, "model"):
        api = HfApi()
        address = api.create_repo(hub_id, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=hub_id, folder_path=folder, commit_message="Upload from mlxpref",
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )  # fmt: skip
        return str(address)


def _append_rest(repository: HubRepository, file: HubFile, partial: Path) -> None:
    """Append the rest to a partial file."""
    if _size(partial) > file.size:
        partial.unlink()
    # By commit, as main may move; uncompressed, as a compressed stream cannot be resumed.
    url = hf_hub_url(repository.hub_id, file.path, repo_type=repository.kind, revision=repository.commit)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    with partial.open("ab") as target:
        file_download.http_get(url, target, resume_size=target.tell(), headers=headers, expected_size=file.size)


def _check(file: HubFile, path: Path) -> None:
    """Remove a file with another size or checksum than the hub's, and raise DataError."""
    with path.open("rb") as content:
        if len(file.digest) == 64:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        else:
            digest = hashlib.file_digest(content, lambda: hashlib.sha1(b"blob %d\0" % file.size)).hexdigest()
    if (size := path.stat().st_size) == file.size and digest == file.digest:
        return
    sizes = f"{size:,} bytes and checksum {digest[:12]}..., not {file.size:,} and {file.digest[:12]}..."
    path.unlink()
    raise DataError(
        f"{file.path}: its content is not what the hub states ({sizes}) and was removed; run the same command again to "
        "download it anew"
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _same_commit(path: Path, repository: HubRepository) -> Path:
    """A path in the cache; DataError if it belongs to another commit than the repository's."""
    if repository.commit not in path.parts:
        raise DataError(f"{repository.hub_id} was changed on the hub meanwhile; run the same command again")
    return path


@contextmanager
def _translated(hub_id: str, kind: RepositoryKind, file: HubFile | None = None) -> Iterator[None]:
    """Turn all errors of the hub and the connection into a DataError of one line, with a remedy."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # the hub's transport library raises its own errors, and changes between releases
        what = f"{hub_id}: {file.path}" if file else hub_id
        hint = "; what was downloaded is kept, and the same command resumes it" if file else ""
        raise DataError(f"{what}: {_reason(hub_id, kind, error)}{hint}") from error


def _reason(hub_id: str, kind: RepositoryKind, error: Exception) -> str:
    """The reason of an error, and the remedy."""
    hub = f"the hub at {constants.ENDPOINT}"
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{hub_id.partition('@')[0]}"
    match error:
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set, so nothing is downloaded; unset it and run it again"
        case GatedRepoError():
            return (
                f"its owners ask who wants it; agree to their terms at {page}, log in with `hf auth login` (or set "
                "HF_TOKEN), and run it again"
            )
        case RepositoryNotFoundError():
            return (
                f"{hub} has no such {kind}, or it is not open to you; check HF_ENDPOINT, or log in with `hf auth login`"
            )
        case RevisionNotFoundError():
            return f"{hub} has no such branch, tag or commit of it; choose one that {page} shows"
        case HfHubHTTPError():
            status = error.response.status_code
            remedy = "log in anew with `hf auth login`" if status in (401, 403) else "try again later"
            return f"{hub} answered {status}; {remedy}"
        case OSError(errno=errno.ENOSPC):
            return "no space left on the disk; make room"
        case OSError(errno=int(), filename=str() as path):
            return f"{path}: {error.strerror}; correct that, or give another place with {_ELSEWHERE[kind]}"
    return f"{hub} was not reached, or stopped answering ({type(error).__name__}); check the connection"
