"""`mlxpref data` against a hub of one's own, from the question to a training run on what was downloaded."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from mlxpref.cli import main
from mlxpref.cli.data import data
from mlxpref.data.catalog import CATALOG
from mlxpref.data.load import load_preferences
from tests.data_layouts import make_layout
from tests.hub_server import Cut, HubServer, Repository, serving, use_hub

TEST_FILES = ["images/test/test_1.zip", "images/test/test_2.zip", "metadata-test.parquet"]
Serve = Callable[[str], HubServer]


@pytest.fixture(autouse=True)
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """A hub that serves the layout of a data set."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))
    with serving({}) as server:
        use_hub(monkeypatch, server.endpoint, tmp_path / "cache")

        def add(name: str) -> HubServer:
            folder = make_layout(name, tmp_path / "origin" / name, 4)
            server.repositories[CATALOG[name].hub_id] = Repository(folder, licence="cc-test")
            return server

        yield add


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["data", *map(str, arguments)])


def json_of(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def error_of(result: Result) -> str:
    """The one line of an error."""
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.stderr.endswith(line + "\n")
    return line


def test_no_download_without_consent(serve: Serve, tmp_path: Path) -> None:
    hub = serve("imagereward")
    result = run("imagereward")
    assert error_of(result) == "Error: imagereward: nothing was downloaded; agree with --yes"
    first, second, *_ = result.stderr.splitlines()
    assert first == "imagereward, split test: THUDM/ImageRewardDB on the hub, licence: cc-test"
    size = sum((tmp_path / "origin" / "imagereward" / path).stat().st_size for path in TEST_FILES)
    assert second.startswith(f"3 files, {size / 1000:.1f} kB, of which 0 bytes are here; into {tmp_path / 'cache'}")
    assert hub.downloaded() == []
    assert not list(tmp_path.glob("cache/**/*.parquet"))


@pytest.mark.parametrize("answer", [True, False])
def test_consent_on_a_terminal(serve: Serve, monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    hub = serve("imagereward")
    questions: list[str] = []

    def ask(question: str) -> bool:
        questions.append(question)
        return answer

    monkeypatch.setattr(import_module("mlxpref.cli.data"), "agree", ask)  # `mlxpref.cli.data` is the command
    assert run("imagereward").exit_code == (0 if answer else 1)
    assert questions == ["Download it?"]
    assert bool(hub.downloaded()) == answer
    if answer:
        assert run("imagereward").exit_code == 0
        assert len(questions) == 1, "what is here is not asked about again"


def test_a_downloaded_split_is_found_by_name(serve: Serve, tmp_path: Path) -> None:
    hub = serve("imagereward")
    result = run("imagereward", "--yes")
    assert (result.exit_code, sorted(hub.downloaded())) == (0, TEST_FILES)
    preferences = load_preferences("imagereward", "test")
    assert preferences == load_preferences("imagereward", "test", data_dir=Path(*preferences[0].a.archive.parts[:-3]))
    assert len(preferences) == len(
        load_preferences("imagereward", "test", data_dir=tmp_path / "origin" / "imagereward")
    )
    where, use = result.stdout.splitlines()
    assert where.startswith("3 files, ")
    assert where.endswith(f"in {preferences[0].a.archive.parents[2]}")
    assert use == "use them with: mlxpref eval --split test --data imagereward"


@pytest.mark.parametrize("name", list(CATALOG))
def test_downloaded_data_sets_load(name: str, serve: Serve, tmp_path: Path) -> None:
    serve(name)
    for split in dict.fromkeys((CATALOG[name].splits[0].name, "test")):
        result = json_of(run(name, "--split", split, "--yes", "--json", "--output", tmp_path / "mine"))
        assert (result["folder"], result["checked"]) == (str(tmp_path / "mine"), True)
        read = load_preferences(name, split, data_dir=tmp_path / "mine")
        assert len(read) == len(load_preferences(name, split, data_dir=tmp_path / "origin" / name)) > 0


def test_json(serve: Serve, tmp_path: Path) -> None:
    serve("imagereward")
    first, second = (json_of(run("imagereward", "--yes", "--json")) for _ in range(2))
    assert (
        first.pop("downloaded")
        == first["bytes"]
        == sum((tmp_path / "origin" / "imagereward" / path).stat().st_size for path in TEST_FILES)
    )
    assert second.pop("downloaded") == 0
    assert first == second
    assert first == {
        "data": "imagereward",
        "split": "test",
        "limit": None,
        "folder": first["folder"],
        "files": ["metadata-test.parquet", *TEST_FILES[:2]],
        "bytes": first["bytes"],
        "checked": True,
        "next": "mlxpref eval --split test --data imagereward",
    }


@pytest.mark.parametrize(
    ("name", "limit", "needed"),
    [
        ("imagereward", 3, ["metadata-train.parquet", "images/train/train_1.zip"]),
        ("imagereward", 15, ["metadata-train.parquet", "images/train/train_1.zip", "images/train/train_2.zip"]),
        ("pickapic", 2, ["data/train-00000"]),
        ("pickapic", 7, ["data/train-00000", "data/train-00001"]),
        ("hpdv2", 1, ["train.json", "train.tar.gz"]),
        ("hpdv3", 1, ["train.json", "images.tar.gz.00", "images.tar.gz.01", "images.tar.gz.02"]),
    ],
)
def test_limit_downloads_only_needed_files(name: str, limit: int, needed: list[str], serve: Serve) -> None:
    hub = serve(name)
    result = run(name, "--split", "train", "--limit", limit, "--yes")
    assert [path.partition("-of-")[0] for path in hub.downloaded()] == needed
    assert result.stdout.endswith(f"use them with: mlxpref train --data {name} --limit {limit}\n")
    assert ("one archive, which has to be downloaded whole" in result.stderr) == name.startswith("hpd")
    assert len(load_preferences(name, "train", limit)) == limit


def test_larger_limit_adds_files(serve: Serve) -> None:
    hub = serve("pickapic")
    run("pickapic", "--split", "train", "--limit", 2, "--yes")
    before = len(hub.downloaded())
    run("pickapic", "--split", "train", "--yes")
    assert (before, len(hub.downloaded())) == (1, 2)
    contents = [request for request in hub.requests if request.method == "GET" and "/resolve/" in request.path]
    assert len(contents) == 2


def test_protocol_names_its_other_split(serve: Serve, tmp_path: Path) -> None:
    hub = serve("pickapic")
    result = run("pickapic", "--yes", "--output", tmp_path / "my data")
    assert [path.partition("-0")[0] for path in hub.downloaded()] == ["data/test_unique"]
    also = f"mlxpref data pickapic --split validation_unique --output '{tmp_path}/my data'"
    assert f"its protocol reads validation_unique, too: {also}" in result.stderr
    assert f"--data pickapic --data-dir '{tmp_path}/my data'" in result.stdout


def test_an_interrupted_download_is_resumed(serve: Serve) -> None:
    hub = serve("imagereward")
    repository = hub.repositories["THUDM/ImageRewardDB"]
    archive = "images/test/test_2.zip"
    repository.faults[archive] = Cut(2_500, for_good=True)
    line = error_of(run("imagereward", "--yes"))
    assert f"{archive}: the hub at {hub.endpoint} answered 503; try again later; what was downloaded is kept" in line
    repository.faults.clear()
    result = run("imagereward", "--yes", "--json")
    assert json_of(result)["downloaded"] == len(repository.files[archive]) - 2000
    assert [r.range for r in hub.requests if r.method == "GET" and r.path.endswith(archive)][-1] == "bytes=2000-"
    assert len(load_preferences("imagereward", "test")) > 0


def test_wrong_content_is_removed(serve: Serve, tmp_path: Path) -> None:
    hub = serve("imagereward")
    repository = hub.repositories["THUDM/ImageRewardDB"]
    archive = "images/test/test_1.zip"
    repository.faults[archive] = bytes(len(repository.files[archive]))
    line = error_of(run("imagereward", "--yes"))
    assert line.startswith(f"Error: {archive}: its content is not what the hub states (")
    assert [path.name for path in tmp_path.glob("cache/**/*.zip")] == []
    repository.faults.clear()
    assert run("imagereward", "--yes").exit_code == 0


def test_a_full_disk(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = serve("hpdv2")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    assert "must stay free, but only 1.0 GB are free; make room, or give another disk" in error_of(
        run("hpdv2", "--yes")
    )
    assert hub.downloaded() == []


def test_offline_with_and_without_files(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = serve("imagereward")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "are not here, and HF_HUB_OFFLINE is set; unset it" in error_of(run("imagereward", "--yes"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    online = json_of(run("imagereward", "--yes", "--json"))
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = run("imagereward", "--json")
    assert json_of(result) == online | {"downloaded": 0, "checked": False}
    line = error_of(run("imagereward", "--split", "train"))
    assert "has no metadata-train.parquet and no images/train/*.zip, and HF_HUB_OFFLINE is set; unset it" in line
    assert hub.requests == []
    assert "not checked" in run("imagereward").stderr


def test_refusals_of_the_hub(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = serve("imagereward")
    hub.repositories["THUDM/ImageRewardDB"].gated = True
    assert "its owners ask who wants it; agree to their terms at" in error_of(run("imagereward", "--yes"))
    assert "has no such dataset, or it is not open to you" in error_of(run("hpdv2", "--yes"))
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    assert "the hub at http://127.0.0.1:9 was not reached" in error_of(run("imagereward", "--yes"))


def test_wrong_usage(serve: Serve, tmp_path: Path) -> None:
    serve("imagereward")
    assert run("imagenet").exit_code == 2
    assert run("imagereward", "--limit", 0).exit_code == 2
    assert "split 'valid': imagereward has train, validation, test" in error_of(run("imagereward", "--split", "valid"))
    (tmp_path / "file").write_text("")
    assert f"--output {tmp_path / 'file'}: is no folder" in error_of(run("imagereward", "--output", tmp_path / "file"))


def test_subprocess(serve: Serve, tmp_path: Path) -> None:
    """It takes the hub and the cache from its environment, and finds there what another one downloaded."""
    rest = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    hub = {"HF_ENDPOINT": serve("imagereward").endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}

    def call(**more: str) -> Any:
        arguments = ["data", "imagereward", "--split", "train", "--limit", "4", "--yes", "--json"]
        program = f"from mlxpref.cli import main; main({arguments!r}, prog_name='mlxpref')"
        done = subprocess.run([sys.executable, "-c", program], env=rest | hub | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    downloaded = call()
    assert Path(downloaded["folder"]).is_relative_to(tmp_path / "home" / "hub")
    again = call(HF_HUB_OFFLINE="1")
    assert (again["folder"], again["checked"]) == (downloaded["folder"], False)


def test_the_help_names_every_data_set() -> None:
    text = run("--help").stdout
    assert all(name in text for name in CATALOG)
    assert isinstance(data, click.Command)
