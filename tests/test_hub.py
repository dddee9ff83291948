"""Files from a hub of the test: complete, checked, resumed, and what is said when something is wrong."""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants, file_download, scan_cache_dir, snapshot_download

from mlxpref import hub as module
from mlxpref.data.catalog import CATALOG, folder_of
from mlxpref.errors import DataError
from mlxpref.hub import Destination, HubFile, ask_hub, check_space, download, download_snapshot
from tests.hub_server import TOKEN, Cut, HubServer, Repository, serving, use_hub

HUB_ID = CATALOG["hpdv2"].hub_id
LIST = b'[{"prompt": "a red cube"}]'
ARCHIVE = bytes(range(256)) * 40
FILES = {"test.json": LIST, "test.tar.gz": ARCHIVE, "README.md": b"# HPDv2"}


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """A small data set."""
    for path, content in FILES.items():
        (tmp_path / "origin" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "origin" / path).write_bytes(content)
    return Repository(tmp_path / "origin", licence="apache-2.0")


@pytest.fixture
def hub(repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that has it; waits are not waited for, and content comes in small pieces."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))
    with serving({HUB_ID: repository}) as server:
        use_hub(monkeypatch, server.endpoint, tmp_path / "cache")
        yield server


@pytest.fixture(params=["cache", "folder"])
def place(request: pytest.FixtureRequest, hub: HubServer, tmp_path: Path) -> Destination:
    """The hub cache, and a folder."""
    return Destination(ask_hub(HUB_ID), tmp_path / "mine" if request.param == "folder" else None)


def the(place: Destination, path: str) -> HubFile:
    (file,) = place.repository.matching([path])
    return file


def ranges(hub: HubServer) -> list[str | None]:
    return [r.range for r in hub.requests if r.method == "GET" and "/resolve/" in r.path]


def test_one_request_for_the_file_list(hub: HubServer, repository: Repository) -> None:
    result = ask_hub(HUB_ID)
    assert (result.commit, result.licence) == (repository.commit, "apache-2.0")
    assert {file.path: (file.size, file.digest) for file in result.files} == {
        "README.md": (7, hashlib.sha1(b"blob 7\0# HPDv2").hexdigest()),
        "test.json": (len(LIST), hashlib.sha1(b"blob %d\0" % len(LIST) + LIST).hexdigest()),
        "test.tar.gz": (len(ARCHIVE), hashlib.sha256(ARCHIVE).hexdigest()),
    }
    assert len(hub.requests) == 1
    assert [file.path for file in result.matching(["*.tar.gz", "test.*"])] == ["test.tar.gz", "test.json"]
    with pytest.raises(DataError, match=r"ymhao/HPDv2: the hub has no train\.json there"):
        result.matching(["test.json", "train.json"])


def test_a_file_is_downloaded_once(place: Destination, hub: HubServer) -> None:
    for path in ("test.json", "test.tar.gz"):
        result = download(place, the(place, path))
        assert result.read_bytes() == FILES[path]
        assert result == place.snapshot / path
    count = len(hub.downloaded())
    assert download(place, the(place, "test.tar.gz")) == place.snapshot / "test.tar.gz"
    assert len(hub.downloaded()) == count == 2
    assert place.bytes_left(place.repository.files) == len(FILES["README.md"])
    left_over = [path for path in place.root.rglob("*.incomplete") if path.is_file()]
    assert left_over == []


def test_huggingface_hub_finds_the_same_files(hub: HubServer) -> None:
    place = Destination(ask_hub(HUB_ID))
    for path in FILES:
        download(place, the(place, path))
    hub.requests.clear()
    assert snapshot_download(HUB_ID, repo_type="dataset") == str(place.snapshot) == str(folder_of("hpdv2", None))
    assert hub.downloaded() == []
    (result,) = scan_cache_dir(constants.HF_HUB_CACHE).repos
    assert (result.repo_id, result.repo_type, result.nb_files) == (HUB_ID, "dataset", 3)
    assert result.size_on_disk == sum(map(len, FILES.values()))


def test_some_files_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "origin").mkdir()
    for path in ("model.safetensors", "a[b].txt", "config.json"):
        (tmp_path / "origin" / path).write_bytes(ARCHIVE)
    with serving({"some/model": Repository(tmp_path / "origin", "model")}) as server:
        use_hub(monkeypatch, server.endpoint, tmp_path / "cache")
        repository = ask_hub("some/model", "model")
        folder = download_snapshot(repository, repository.matching(["model.safetensors", "a*"]))
        assert folder == tmp_path / "cache" / "models--some--model" / "snapshots" / repository.commit
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            "model.safetensors": ARCHIVE,
            "a[b].txt": ARCHIVE,
        }
        with pytest.raises(DataError, match="was changed on the hub meanwhile"):
            download_snapshot(replace(repository, commit="0" * 40), repository.files)


def test_two_processes_download_a_file_once(place: Destination, hub: HubServer) -> None:
    file = the(place, "test.tar.gz")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: download(place, file), range(2))
    assert first.read_bytes() == second.read_bytes() == ARCHIVE
    assert ranges(hub) == [None]


def test_a_broken_connection_is_resumed_at_once(place: Destination, repository: Repository, hub: HubServer) -> None:
    repository.faults["test.tar.gz"] = Cut(5_500)
    result = download(place, the(place, "test.tar.gz"))
    assert result.read_bytes() == ARCHIVE
    assert ranges(hub) == [None, "bytes=5000-"]


def test_an_interrupted_download_is_resumed(place: Destination, repository: Repository, hub: HubServer) -> None:
    file = the(place, "test.tar.gz")
    repository.faults["test.tar.gz"] = Cut(5_500, for_good=True)
    with pytest.raises(
        DataError, match=r"^ymhao/HPDv2: test\.tar\.gz: the hub at \S+ answered 503; try again later; .*kept"
    ):
        download(place, file)
    assert place.partial(file).read_bytes() == ARCHIVE[:5000]
    assert not place.content(file).exists()
    assert not (place.snapshot / "test.tar.gz").exists()
    assert place.bytes_left([file]) == len(ARCHIVE) - 5000
    repository.faults.clear()
    hub.requests.clear()
    assert download(place, file).read_bytes() == ARCHIVE
    assert ranges(hub) == ["bytes=5000-"]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_download_of_a_killed_process_is_resumed(
    end: signal.Signals, repository: Repository, hub: HubServer, tmp_path: Path
) -> None:
    """huggingface_hub's own download begins such a file anew."""
    (repository.folder / "large.tar.gz").write_bytes(ARCHIVE * 10)
    repository.faults["large.tar.gz"] = Cut(45_000, hangs=True)
    program = (
        "from pathlib import Path\nfrom huggingface_hub import constants\nconstants.DOWNLOAD_CHUNK_SIZE = 20_000\n"
        "from mlxpref.hub import Destination, ask_hub, download\n"
        f"destination = Destination(ask_hub({HUB_ID!r}), Path({str(tmp_path / 'mine')!r}))\n"
        "download(destination, *destination.repository.matching(['large.tar.gz']))"
    )
    rest = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment = rest | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    place = Destination(ask_hub(HUB_ID), tmp_path / "mine")
    partial = place.partial(the(place, "large.tar.gz"))
    with subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL) as process:
        assert hub.hanging.wait(300)
        while process.poll() is None and not (partial.is_file() and partial.stat().st_size == 40_000):
            time.sleep(0.01)
        process.send_signal(end)
    hub.requests.clear()
    assert download(place, the(place, "large.tar.gz")).read_bytes() == ARCHIVE * 10
    assert ranges(hub) == ["bytes=40000-"]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (ARCHIVE[:-1] + b"!", r"bytes and checksum \w{12}\.\.\., not [\d,]+ and \w{12}"),
        (ARCHIVE[:-1000], r"stopped answering"),
    ],
    ids=["other", "short"],
)
def test_wrong_content_is_not_kept(place: Destination, repository: Repository, body: bytes, text: str) -> None:
    file = the(place, "test.tar.gz")
    repository.faults["test.tar.gz"] = body
    with pytest.raises(DataError, match=text) as caught:
        download(place, file)
    assert "\n" not in str(caught.value)
    assert not place.content(file).exists()
    assert not (place.snapshot / "test.tar.gz").exists()
    repository.faults.clear()
    assert download(place, file).read_bytes() == ARCHIVE


def test_existing_parts_are_checked(place: Destination) -> None:
    for path, wrong in (("test.tar.gz", b"?" * len(ARCHIVE)), ("test.json", b"[]")):
        file = the(place, path)
        download(place, file)
        place.content(file).write_bytes(wrong)
        with pytest.raises(DataError, match=rf"{path}: .*not what the hub states .*was removed; run the same command"):
            download(place, file)
        assert download(place, file).read_bytes() == FILES[path]


def test_a_part_longer_than_its_file(place: Destination) -> None:
    file = the(place, "test.tar.gz")
    place.partial(file).parent.mkdir(parents=True)
    place.partial(file).write_bytes(ARCHIVE + b"more")
    assert download(place, file).read_bytes() == ARCHIVE


def test_a_full_disk(place: Destination, monkeypatch: pytest.MonkeyPatch) -> None:
    files = place.repository.files
    left = place.bytes_left(files)
    for free, fits in ((left + module.SPARE, True), (left + module.SPARE - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if fits:
            check_space(place, files)
        else:
            with pytest.raises(DataError, match=r"10\.3 kB are to be downloaded and 1\.0 GB must stay free, but only"):
                check_space(place, files)
    for file in files:
        download(place, file)
    check_space(place, files)


def test_a_disk_that_fills_up(place: Destination, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(DataError, match=r"test\.tar\.gz: no space left on the disk; make room; what was downloaded is"):
        download(place, the(place, "test.tar.gz"))


def test_unwritable_folder(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = Destination(ask_hub(HUB_ID), tmp_path / "file" / "below")
    with pytest.raises(DataError, match=r"/file\S*: Not a directory; .*--output"):
        download(place, the(place, "test.json"))


def test_gated_data_set(
    repository: Repository, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.gated = True
    place = Destination(ask_hub(HUB_ID))
    with pytest.raises(
        DataError, match=r"agree to their terms at http\S+/datasets/ymhao/HPDv2, log in with `hf auth login`"
    ):
        download(place, the(place, "test.tar.gz"))
    use_hub(monkeypatch, hub.endpoint, tmp_path / "cache", TOKEN)
    assert download(place, the(place, "test.tar.gz")).read_bytes() == ARCHIVE


def test_private_or_absent_repository(repository: Repository, hub: HubServer) -> None:
    repository.private = True
    for hub_id in (HUB_ID, "some/where"):
        with pytest.raises(
            DataError, match=rf"{hub_id}: the hub at {hub.endpoint} has no such dataset, or it is not open"
        ):
            ask_hub(hub_id)


def test_a_token_stays_with_the_hub(repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository.gated = True
    with serving({HUB_ID: repository}, far=True) as hub:
        use_hub(monkeypatch, hub.endpoint, tmp_path / "cache", TOKEN)
        place = Destination(ask_hub(HUB_ID), tmp_path / "mine")
        assert download(place, the(place, "test.tar.gz")).read_bytes() == ARCHIVE
        far = [r for r in hub.requests if r.path.startswith("/far/")]
    assert [r.authorization for r in far] == [None]
    assert TOKEN in str([r.authorization for r in hub.requests])


def test_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({}) as hub:
        endpoint = hub.endpoint
    use_hub(monkeypatch, endpoint, tmp_path)
    with pytest.raises(
        DataError, match=rf"the hub at {endpoint} was not reached, .*\(ConnectError\); check the connection"
    ):
        ask_hub(HUB_ID)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set, so nothing is downloaded; unset it"):
        ask_hub(HUB_ID)


@pytest.mark.parametrize(
    "change",
    [lambda s: s | {"rfilename": "../up"}, lambda s: s | {"rfilename": "/etc/x"}, lambda s: s | {"blobId": "../../x"}],
)
def test_names_outside_the_folder(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, str]], dict[str, str]]
) -> None:
    from tests.hub_server import _Handler

    honest = _Handler._sibling
    monkeypatch.setattr(
        _Handler, "_sibling", lambda *asked: change(honest(*asked)) if asked[2] == "test.json" else honest(*asked)
    )
    with pytest.raises(DataError, match=r"what the hub states of .* cannot be used; check HF_ENDPOINT"):
        ask_hub(HUB_ID)


def test_data_set_changed_meanwhile(hub: HubServer) -> None:
    place = Destination(ask_hub(HUB_ID))
    download(place, the(place, "test.json"))
    earlier = Destination(replace(place.repository, commit="0" * 40))
    with pytest.raises(DataError, match="was changed on the hub meanwhile; run the same command again"):
        download(earlier, the(place, "test.json"))
