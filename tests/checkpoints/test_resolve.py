"""Which judge a name means, which one is proposed, and the message where there is none; nothing is downloaded."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import mlx.core as mx
import pytest
from huggingface_hub import constants

from mlxpref.checkpoints import first_use
from mlxpref.checkpoints import resolve as models
from mlxpref.checkpoints.first_use import converted_judge, judges_dir
from mlxpref.checkpoints.recommended import Work, choose_judge, device_working_set, recommended_judges
from mlxpref.checkpoints.resolve import find_checkpoint, find_source, missing_judge
from mlxpref.demo import JUDGE
from mlxpref.errors import ModelError
from mlxpref.hub import HubFile, HubRepository
from tests.messages import messages

GB = 10**9
COMMIT = "0" * 40
WORKS: tuple[Work, ...] = ("judging", "training")
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
    on_gpu(monkeypatch)
    return folder


def on_gpu(monkeypatch: pytest.MonkeyPatch, is_gpu: bool = True) -> None:
    """A device with or without a GPU: on a CPU judges take more, as they compute in float32."""
    device = SimpleNamespace(type=mx.DeviceType.gpu if is_gpu else mx.DeviceType.cpu)
    monkeypatch.setattr(mx, "default_device", lambda: device)


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
    monkeypatch.setattr(first_use, "ask_model", ask)
    monkeypatch.setattr(models, "download_model", download)
    return fetched


def test_recommended_list() -> None:
    judges = recommended_judges()
    assert len({judge.id for judge in judges}) == len(judges) >= 4
    for judge in judges:
        assert judge.id.count("/") == 1
        assert judge.licence
        assert judge.checked, f"{judge.id}: say what was verified"
        assert not judge.tried, f"{judge.id}: say where it was tried, in scripts/README.md"
        if judge.any_use:
            assert judge.licence in ("apache-2.0", "mit")
            assert 0 < (judge.converted_gb or judge.download_gb) < judge.judging_gb < judge.training_gb
            assert judge.judging_gb < judge.judging_cpu_gb
            assert judge.training_gb < judge.training_cpu_gb
    research = [judge for judge in judges if "3B" in judge.id or "alexgambashidze" in judge.id]
    assert len(research) == 2
    assert not any(judge.any_use for judge in research)


def test_the_choice_follows_the_working_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that was trained for this wherever one fits, and the largest of them; training takes more."""
    think = [judge.id for judge in recommended_judges()[:3]]
    assert [size in name for size, name in zip(("8b", "4b", "2b"), think, strict=True)] == [True] * 3
    large, middle, small = think
    judging = {200: large, 10: large, 9: middle, 7: middle, 6: small, 5: small}
    training = {200: large, 11: large, 10: middle, 8: middle, 7: small, 6: small}
    assert {size: choose_judge(size * GB).id for size in judging} == judging
    assert {size: choose_judge(size * GB, "training").id for size in training} == training
    for work in WORKS:
        for size in range(6 * GB, 40 * GB, GB // 2):
            judge = choose_judge(size, work)
            assert judge.any_use
            assert judge.needed(work) <= size
    with pytest.raises(ModelError, match=r"no recommended judge fits .*\(4.0 GB .*4\.6 GB for judging"):
        choose_judge(4 * GB)
    on_gpu(monkeypatch, False)
    assert [choose_judge(size * GB).id for size in (15, 12, 9)] == think
    with pytest.raises(ModelError, match="no recommended judge fits"):
        choose_judge(8 * GB)


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
    with pytest.raises(ModelError, match="no --model was given"):
        find_checkpoint(None, lambda question: False)


@pytest.mark.parametrize("name", ["", " "])
def test_empty_name_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXPREF_MODEL", "demo")
    with pytest.raises(ModelError, match="name is empty"):
        find_checkpoint(name, never)


@pytest.mark.parametrize("name", ["some-one/a_model.v2", "mlx-community/Qwen3-VL-4B-Instruct-4bit"])
def test_cached_judge_needs_no_hub(name: str, cache: Path) -> None:
    snapshot = put_into_cache(cache, name, SIDE | {"model.safetensors": "x"})
    assert find_checkpoint(name, never) == (name, snapshot)
    assert missing_judge(name) is None


def test_the_source_of_a_judge_that_is_converted(cache: Path) -> None:
    """`convert` takes it as it is; a command asks before it is converted, also where it was downloaded already."""
    name = choose_judge(12 * GB).id
    snapshot = put_into_cache(cache, name, SIDE | {"model.safetensors": "x"})
    assert find_source(name) == (name, snapshot)
    with pytest.raises(ModelError, match=r"\(downloaded, to be converted to 4 bit: 5\.8 GB .*: agree with --yes"):
        find_checkpoint(None, lambda question: False)
    words, needs = missing_judge(None) or ("", {})
    assert words.startswith(f"the judge {name} (downloaded, ")
    assert list(needs.values()) == [5.8 * GB]


def converted(name: str, commit: str) -> Path:
    """A folder as the conversion leaves it."""
    folder = judges_dir() / f"{name.replace('/', '--')}@{commit}-4bit"
    folder.mkdir(parents=True)
    for file in (*SIDE, "model.safetensors"):
        (folder / file).write_text("{}")
    return folder


def test_a_converted_judge(cache: Path) -> None:
    """The one of a commit, or the last one; another judge's has a longer name."""
    name = choose_judge(12 * GB).id
    converted(f"{name}-more", "3" * 40)
    assert converted_judge(name) is None
    old, new = (converted(name, digit * 40) for digit in "21")
    os.utime(old, (1, 1))
    for model, expected in ((None, new), (name, new), (f"{name}@{'1' * 40}", new), (f"{name}@{'2' * 40}", old)):
        commit = "1" * 40 if expected == new else "2" * 40
        assert find_checkpoint(model, never) == (f"{name}@{commit}", expected)
        assert missing_judge(model) is None
    assert find_checkpoint(name, never, revision="2" * 40)[1] == old
    with pytest.raises(ModelError, match="cannot be downloaded"):
        find_checkpoint(f"{name}@{'4' * 40}", never)
    (new / "config.json").unlink()
    assert find_checkpoint(None, never)[1] == old


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


def test_without_agreement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = []

    def refuse(question: str) -> bool:
        questions.append(question)
        return False

    fake_hub(monkeypatch, tmp_path)
    judge = choose_judge(12 * GB)
    with pytest.raises(ModelError) as caught:
        find_checkpoint(None, refuse)
    assert len(questions) == 1
    for line in (questions[0], str(caught.value)):
        for fact in (
            f"{judge.id} (4.2 GB to download, to be converted to 4 bit: 5.8 GB in {judges_dir()}",
            "; 10.0 GB of disk until the download is deleted, which it may be then; ",
            "; licence apache-2.0; planned memory: about 9.5 GB to judge, about 10.6 GB to train; ",
            "; MMRB2, text to image: 66.0 for UnifiedReward-Think, of which size is not said; not tried here)",
        ):
            assert fact in line, fact
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
        assert find_checkpoint("some/model", agree, ask="It needs") == ("some/model", tmp_path)
        find_checkpoint("some/model", never)
    assert fetched == ["some/model"] * 2
    assert questions == ["It needs some/model (4.2 GB, licence apache-2.0). Download it?"]
    assert lines == ["downloading some/model (4.2 GB, licence apache-2.0) from the Hugging Face hub"] * 2


@pytest.mark.parametrize("missing", sorted(SIDE))
def test_an_incomplete_cached_judge(missing: str, cache: Path) -> None:
    snapshot = put_into_cache(cache, "some/model", SIDE | {"model.safetensors": "x"})
    assert find_checkpoint("some/model", never)[1] == snapshot
    (snapshot / missing).unlink()
    with pytest.raises(ModelError, match="cannot be downloaded"):
        find_checkpoint("some/model", never)
