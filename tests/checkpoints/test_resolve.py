"""Which judge a name means, which one is proposed, and the message where there is none; nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from mlxpref.checkpoints import resolve as models
from mlxpref.checkpoints.resolve import choose_judge, device_working_set, find_checkpoint, recommended_judges
from mlxpref.demo import JUDGE
from mlxpref.errors import ModelError
from mlxpref.hub import HubFile, HubRepository
from tests.messages import messages

GB = 10**9
COMMIT = "0" * 40
SIDE = {"config.json": "{}", "tokenizer.json": "{}", "preprocessor_config.json": "{}"}


def never(question: str) -> bool:
    raise AssertionError(f"asked: {question}")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, no hub, no $MLXPREF_MODEL, and the working set of a Mac with 16 GB."""

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("MLXPREF_MODEL", raising=False)
    monkeypatch.setattr(models, "device_working_set", lambda: 12 * GB)
    return folder


def put_into_cache(cache: Path, name: str, files: dict[str, str]) -> Path:
    """A snapshot as the hub's client leaves it."""
    repo = cache / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for file, content in files.items():
        (snapshot / file).write_text(content)
    return snapshot


def fake_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """A hub where every id is a model of 4.2 GB, which is downloaded to a folder at once; the ids that were."""
    fetched = []

    def download(repository: HubRepository) -> Path:
        fetched.append(repository.hub_id)
        return folder

    def ask(hub_id: str, revision: str | None = None) -> HubRepository:
        weights = HubFile("model.safetensors", 42 * GB // 10, "0" * 64)
        return HubRepository(hub_id, "model", COMMIT, "apache-2.0", (weights,), revision)

    monkeypatch.setattr(models, "ask_model", ask)
    monkeypatch.setattr(models, "download_model", download)
    return fetched


def test_recommended_list() -> None:
    judges = recommended_judges()
    assert len({judge.id for judge in judges}) == len(judges) >= 4
    for judge in judges:
        assert judge.id.count("/") == 1
        assert judge.licence
        assert judge.checked, f"{judge.id}: say what was verified"
        if judge.any_use:
            assert judge.licence in ("apache-2.0", "mit")
            assert 0 < judge.size_gb < judge.working_set_gb
    research = [judge for judge in judges if "3B" in judge.id or "alexgambashidze" in judge.id]
    assert len(research) == 2
    assert not any(judge.any_use for judge in research)


def test_the_choice_follows_the_working_set() -> None:
    judges = [choose_judge(size * GB) for size in (200, 16, 11, 10, 5)]
    assert [judge.working_set_gb for judge in judges] == sorted((j.working_set_gb for j in judges), reverse=True)
    assert judges[0] == recommended_judges()[0]
    assert "8B" in judges[2].id
    assert "7B" in judges[3].id
    assert "4B" in judges[4].id
    for size in range(5 * GB, 40 * GB, GB // 2):
        judge = choose_judge(size)
        assert judge.any_use
        assert judge.working_set_gb * GB <= size
    with pytest.raises(ModelError, match=r"no recommended judge fits this device \(4.0 GB .*--model demo"):
        choose_judge(4 * GB)


def test_the_working_set_of_this_device() -> None:
    assert GB // 4 < device_working_set() < 10_000 * GB


def test_folders_and_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_checkpoint("demo", never) == ("demo", JUDGE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "judge").mkdir(parents=True)
    assert find_checkpoint("my/judge", never) == ("my/judge", Path("my/judge"))
    assert find_checkpoint("./no/where", never)[1] == Path("no/where")
    assert find_checkpoint("~nobody-of-this-name/x", never)[1] == Path("~nobody-of-this-name/x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_checkpoint("~/my", never)[1] == tmp_path / "my"


def test_the_environment_names_a_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXPREF_MODEL", "demo")
    assert find_checkpoint(None, never) == ("demo", JUDGE)
    assert find_checkpoint("elsewhere", never)[0] == "elsewhere"
    monkeypatch.setenv("MLXPREF_MODEL", "")
    with pytest.raises(ModelError, match="no --model given"):
        find_checkpoint(None, lambda question: False)


@pytest.mark.parametrize("name", ["", " "])
def test_empty_name_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXPREF_MODEL", "demo")
    with pytest.raises(ModelError, match="name is empty"):
        find_checkpoint(name, never)


@pytest.mark.parametrize("name", ["some-one/a_model.v2", None])
def test_cached_judge_needs_no_hub(name: str | None, cache: Path) -> None:
    expected = name or choose_judge(12 * GB).id
    snapshot = put_into_cache(cache, expected, SIDE | {"model.safetensors": "x"})
    assert find_checkpoint(name, never) == (expected, snapshot)


def test_an_interrupted_download(cache: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    files = SIDE | {"model.safetensors.index.json": index, "model-1.safetensors": "x"}
    snapshot = put_into_cache(cache, "some/model", files)
    with pytest.raises(ModelError, match=r"some/model: .*cannot be downloaded"):
        find_checkpoint("some/model", never)
    (snapshot / "model-2.safetensors").write_text("x")
    assert find_checkpoint("some/model", never)[1] == snapshot
    (snapshot / "model.safetensors.index.json").write_text("[")
    with pytest.raises(ModelError, match="cannot be downloaded"):
        find_checkpoint("some/model", never)


def test_without_agreement() -> None:
    questions = []

    def refuse(question: str) -> bool:
        questions.append(question)
        return False

    judge = choose_judge(12 * GB)
    terms = f"{judge.id} (about {judge.size_gb} GB, licence {judge.licence})"
    with pytest.raises(ModelError) as caught:
        find_checkpoint(None, refuse)
    assert len(questions) == 1
    assert terms in questions[0]
    assert terms in str(caught.value)
    assert "--yes" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["some/model", None])
def test_an_unreachable_hub_is_one_line(name: str | None) -> None:
    with pytest.raises(ModelError) as caught:
        find_checkpoint(name, lambda question: True)
    assert str(caught.value).startswith(name or choose_judge(12 * GB).id)
    assert "no such folder, not in the local cache, and it cannot be downloaded: the hub" in str(caught.value)
    assert "check the connection" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_download_names_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched, questions = fake_hub(monkeypatch, tmp_path), []

    def agree(question: str) -> bool:
        questions.append(question)
        return True

    with messages() as lines:
        assert find_checkpoint(None, agree) == (choose_judge(12 * GB).id, tmp_path)
        find_checkpoint("some/model", never)
    assert fetched == [choose_judge(12 * GB).id, "some/model"]
    assert "4.2 GB, licence apache-2.0" in questions[0]
    assert "4.2 GB, licence apache-2.0" in lines[0]
    assert lines[1:] == ["downloading some/model (4.2 GB, licence apache-2.0) from the Hugging Face hub"]


@pytest.mark.parametrize("missing", sorted(SIDE))
def test_an_incomplete_cached_judge(missing: str, cache: Path) -> None:
    snapshot = put_into_cache(cache, "some/model", SIDE | {"model.safetensors": "x"})
    assert find_checkpoint("some/model", never)[1] == snapshot
    (snapshot / missing).unlink()
    with pytest.raises(ModelError, match="cannot be downloaded"):
        find_checkpoint("some/model", never)
