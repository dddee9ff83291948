"""The customer's own command, `train --data imagereward` on a machine that has neither data nor judge, to its end."""

import json
import re
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from mlxpref.cli import main
from mlxpref.data import load
from mlxpref.data.catalog import CATALOG
from mlxpref.preferences import PackedImage
from tests.conftest import GOLDEN
from tests.data_layouts import DAMAGES, damage_member, make_layout
from tests.default_judge import ID, recommend
from tests.hub_server import Cut, HubServer, Repository, serving, use_hub

DATA = "THUDM/ImageRewardDB"
TRAIN = ["train", "--data", "imagereward", "--no-think", "--comparisons", "2", "--group", "2", "--max-tokens", "4"]
QUICK = [*TRAIN, "--steps", "3", "--save-every", "1"]


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> str:
    recommend(monkeypatch)
    return ID


@pytest.fixture
def hub(tmp_path: Path, judge: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that serves ImageRewardDB and, as the recommended judge, a tiny one; nothing is here."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("mlxpref.hub._ASK_SECONDS", 5.0)
    folder = tmp_path / "judge"
    shutil.copytree(GOLDEN / "qwen2_5_vl", folder, ignore=shutil.ignore_patterns("*.npz", "*.py"))
    data = make_layout("imagereward", tmp_path / "origin", 4)
    repositories = {DATA: Repository(data, licence="cc-test"), judge: Repository(folder, "model", "mit")}
    with serving(repositories) as server:
        use_hub(monkeypatch, server.endpoint, tmp_path / "cache")
        yield server


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def questions_of(monkeypatch: pytest.MonkeyPatch, answer: bool) -> list[str]:
    """The questions on a terminal, which are answered so."""
    questions: list[str] = []

    def ask(question: str) -> bool:
        questions.append(question)
        return answer

    monkeypatch.setattr(import_module("mlxpref.cli.common"), "agree", ask)
    return questions


def test_one_question_for_data_and_judge(
    hub: HubServer, judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage_member(hub.repositories[DATA].folder / "images/train/train_1.zip", "html", 1)
    questions = questions_of(monkeypatch, True)
    result = run(*QUICK, "--output", tmp_path / "run", "--limit", 4)
    assert result.exit_code == 0, result.output
    (question,) = questions
    assert question.startswith(f"Not here: the judge {judge} (")
    for fact in (
        "to be converted to 4 bit: 100 kB in",
        "of disk until the download is deleted",
        "licence mit",
        "to train",
    ):
        assert fact in question
    assert "imagereward, split train (about" in question
    assert "for --limit 4, of" in question
    assert "licence cc-test" in question
    assert question.endswith("Download both?")
    downloaded = [path for path in hub.downloaded() if path.startswith(("images", "metadata"))]
    assert downloaded == ["metadata-train.parquet", "images/train/train_1.zip"]
    # What is here is neither asked about nor downloaded again, also without the hub.
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run(*QUICK, "--output", tmp_path / "again", "--limit", 4).exit_code == 0
    assert len(questions) == 1
    assert hub.requests == []


def test_no_is_no(hub: HubServer, judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = questions_of(monkeypatch, False)
    for command in (QUICK, ["eval", "--data", "imagereward"], ["calibrate", "--data", "imagereward"]):
        result = run(*command)
        assert result.exit_code == 1
        line = result.stderr.splitlines()[-1]
        assert line.startswith(f"Error: the judge {judge} (")
        assert "and imagereward, split" in line
        assert line.endswith("nothing was downloaded; agree with --yes")
    assert len(questions) == 3
    assert hub.downloaded() == []
    assert not (tmp_path / "cache").exists()


def test_without_a_terminal(hub: HubServer, judge: str) -> None:
    result = run(*QUICK, "--limit", 4)
    assert (result.exit_code, result.stdout) == (1, "")
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"Error: the judge {judge} (")
    assert "imagereward, split train (about" in line


@pytest.mark.parametrize("command", ["eval", "calibrate"])
def test_other_commands(command: str, hub: HubServer, tmp_path: Path) -> None:
    result = run(command, "--data", "imagereward", "--no-think", "--yes", "--json", "--max-tokens", 4)
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("to be downloaded: the judge ")]
    assert f"imagereward, split {'test' if command == 'eval' else 'validation'}" in line
    json.loads(result.stdout)


@pytest.mark.parametrize("name", [name for name in CATALOG if name != "imagereward"])
def test_every_public_data_set(name: str, hub: HubServer, tmp_path: Path) -> None:
    """Pick-a-Pic's threshold is chosen on another split, which comes with the test."""
    folder = make_layout(name, tmp_path / name, 4)
    hub.repositories[CATALOG[name].hub_id] = Repository(folder, licence="cc-test")
    result = run("eval", "--data", name, "--no-think", "--yes", "--json", "--limit", 4)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)


@pytest.mark.parametrize("name", ["mmrb2", "genai_bench"])
def test_tables_of_one_task_are_downloaded(name: str, hub: HubServer, tmp_path: Path) -> None:
    """Of a repository with other tasks; licence and size before, and resumed where it broke off."""
    data_set, folder = CATALOG[name], make_layout(name, tmp_path / name, 12)
    repository = hub.repositories[data_set.hub_id] = Repository(folder, licence="")
    tables = {"mmrb2": [f"t2i/test-0000{i}-of-00002.parquet" for i in (0, 1)]}.get(
        name, ["image_generation/test_v1-00000-of-00001.parquet"]
    )
    repository.faults[tables[-1]] = Cut(2_500, for_good=True)
    arguments = ("eval", "--data", name, "--no-think", "--yes", "--json")
    result = run(*arguments)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("to be downloaded: the judge ")]
    size = sum(len(repository.files[table]) for table in tables)
    assert f"and {name}, split test ({size / 1000:.0f} kB; licence {data_set.licence}; into " in line
    assert "what was downloaded is kept" in result.stderr
    repository.faults.clear()
    hub.requests.clear()
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    asked = [(r.path.partition("/main/")[2] or r.path, r.range) for r in hub.requests if r.method == "GET"]
    assert [range_ for path, range_ in asked if path.endswith(tables[-1])] == ["bytes=2000-"]
    report = json.loads(result.stdout)
    assert (report["protocol"], report["pairs"]) == (name, {"mmrb2": 24, "genai_bench": 36}[name])
    assert report["strategy"] == {"mmrb2": "select", "genai_bench": "soft"}[name]
    beside = {"mmrb2": {"judgements", "of_judgements", "value_missing_wrong"}, "genai_bench": {"tau", "tau_pairs"}}
    assert set(report["official"]) == {"value", "low", "high", "definition"} | beside[name]
    hub.requests.clear()
    assert run(*arguments).exit_code == 0
    assert hub.downloaded() == []


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("imagereward", ["metadata-test.parquet"]),
        ("hpdv2", ["test.json"]),
        ("hpdv3", ["test.json"]),
        ("mmrb2", ["t2i/test-00000-of-00002.parquet", "t2i/test-00001-of-00002.parquet"]),
    ],
)
def test_scores_need_the_lists_only(
    name: str, files: list[str], hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No archive of images is downloaded, nor is a judge asked about; a judge asks for them later."""
    folder = make_layout(name, tmp_path / name, 4)
    hub.repositories[CATALOG[name].hub_id] = Repository(folder, licence="cc-test")
    questions = questions_of(monkeypatch, True)
    preferences = load.load_preferences(name, "test", data_dir=folder, needs_images=False)
    images = {image for p in preferences for image in (p.a, p.b)}
    scores = tmp_path / "scores.csv"
    names = [image.known_as or image.member if isinstance(image, PackedImage) else image.name for image in images]
    scores.write_text("image,score\n" + "".join(f"{image},{i}\n" for i, image in enumerate(sorted(names))))
    for _ in range(2):
        result = run("eval", "--data", name, "--scores", scores, "--json", "--limit", 5)
        assert result.exit_code == 0, result.output
    assert hub.downloaded() == files
    (question,) = questions
    assert question.startswith(f"{name}, split test (")
    assert "licence cc-test" in question
    result = run("eval", "--data", name, "--model", "demo", "--no-think", "--json", "--limit", 4)
    assert result.exit_code == 0, result.output
    assert len(questions) == (1 if name == "mmrb2" else 2)


def test_a_download_goes_on(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where whole files are here, and where no --limit says that more are needed."""
    archive = "images/train/train_2.zip"
    hub.repositories[DATA].faults[archive] = Cut(2_500, for_good=True)
    arguments = [*QUICK, "--yes", "--output", tmp_path / "run"]
    result = run(*arguments)
    assert result.exit_code == 1
    assert "what was downloaded is kept, and the same command resumes it" in result.stderr
    hub.repositories[DATA].faults.clear()
    hub.requests.clear()
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    ranges = [request.range for request in hub.requests if request.method == "GET" and request.path.endswith(archive)]
    assert ranges == ["bytes=2000-"]
    assert "20 preferences" in result.stderr


def test_a_larger_limit_downloads_more(hub: HubServer, tmp_path: Path) -> None:
    for number, limit in enumerate((4, 16)):
        result = run(*QUICK, "--yes", "--limit", limit, "--output", tmp_path / str(number))
        assert result.exit_code == 0, result.output
        assert ("images/train/train_2.zip" in hub.downloaded()) == (limit == 16)


def test_the_disk_is_too_small_for_both(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for either of them."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9 + 260_000))
    result = run(*QUICK, "--yes")
    assert result.exit_code == 1
    assert "must stay free, but only 1.0 GB are free; make room" in result.stderr
    assert hub.downloaded() == []


def test_offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for command in (QUICK, ["data", "imagereward", "--split", "train"]):
        result = run(*command)
        assert result.exit_code == 1
        assert "HF_HUB_OFFLINE is set" in result.stderr.splitlines()[-1]
        assert ("mlxpref data" in result.stderr) == (command is QUICK)


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_damaged_images_from_end_to_end(
    kind: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many images only a sample is looked at before; the damaged one is met in the middle, and on resuming."""
    monkeypatch.setattr(load, "_drawn_runs", lambda count: range(0))
    for split in ("train", "test", "validation"):
        damage_member(hub.repositories[DATA].folder / f"images/{split}/{split}_1.zip", kind)
    arguments = [*TRAIN, "--yes", "--steps", "11", "--held-out", "0.25"]
    result = run(*arguments, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "left out: 1 of 16 images cannot be read: 3 pairs are left out" in result.stderr
    record: dict[str, Any] = json.loads((tmp_path / "run/run.json").read_text())
    assert (record["left_out"]["images"], record["left_out"]["pairs"]) == (1, 3)
    result = run("eval", "--data", "imagereward", "--no-think", "--yes", "--json")
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout)["results"]
    assert results[0]["left_out"]["pairs"] == 3
    assert results[0]["pairs"] in (17, 18)
    result = run("calibrate", "--data", "imagereward", "--no-think", "--yes")
    assert result.exit_code == 0, result.output
    # Of its three pairs one may be a tie, which calibration does not use.
    assert re.search("1 images could not be read: [23] pairs are left out", result.stdout)
