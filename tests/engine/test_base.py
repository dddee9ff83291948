"""An adapter names the model that it was trained on, and that one judges with it unless the user names another."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import mlxpref
from mlxpref.checkpoints.files import ADAPTER_CONFIG
from mlxpref.engine.adapters import base_name, find_base
from mlxpref.errors import ModelError
from tests.conftest import GOLDEN, tiny_model, write_adapter


def never(question: str) -> bool:
    raise AssertionError(question)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "runs" / "adapter", tiny_model("qwen2_5_vl"))


def naming(adapter: Path, **base: Any) -> Path:
    """The adapter with another base in its config."""
    file = adapter / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | base))
    return adapter


@pytest.mark.parametrize("key", ["base_model", "base_model_name_or_path"])
def test_the_base_judges(key: str, adapter: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Also where the environment names another judge; the user's own name overrides it."""
    base = str(GOLDEN / "qwen2_5_vl")
    monkeypatch.setenv("MLXPREF_MODEL", str(GOLDEN / "qwen3_vl"))
    caplog.set_level(logging.INFO, "mlxpref")
    judge = mlxpref.load(adapter=naming(adapter, **{key: base}))
    assert judge.name == base
    assert f"{adapter} was trained on {base}" in caplog.text
    assert find_base(adapter, "demo", never)[0] == "demo"


def test_a_path_from_another_folder(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path counts from here, from the adapter, or from the folder that it is in."""
    for place in (tmp_path, adapter, adapter.parent):
        folder = place / "models" / "judge"
        folder.mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert Path(base_name(naming(adapter, base_model="models/judge"))).resolve() == folder.resolve()
        folder.rmdir()


@pytest.mark.parametrize("base", ["/gone/judge", "../judge", "judge", "C:\\models\\judge", "x\n" * 1000, "a\0b"])
def test_a_base_that_is_gone(base: str, adapter: Path) -> None:
    with pytest.raises(
        ModelError, match=r"it was trained on .*, which is not there; say where it is with --model"
    ) as caught:
        find_base(naming(adapter, base_model=base), None, never)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("base", [None, "", " ", 3])
def test_an_adapter_that_does_not_say(base: Any, adapter: Path) -> None:
    with pytest.raises(ModelError, match=r"does not say which model it was trained on; name that with --model"):
        find_base(naming(adapter, base_model=base), None, never)


def test_a_base_of_the_hub(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is downloaded only if the user agrees to its size, as the user did not name it."""
    from mlxpref.checkpoints import resolve
    from mlxpref.hub import HubRepository

    repository = HubRepository("owner/judge", "model", "0" * 40, "apache-2.0", (), None)
    monkeypatch.setattr(resolve, "cached_model", lambda *_: None)
    monkeypatch.setattr(resolve, "ask_model", lambda *_: repository)
    monkeypatch.setattr(resolve, "download_model", lambda _: GOLDEN / "qwen2_5_vl")
    questions: list[str] = []
    naming(adapter, base_model=None, base_model_name_or_path="owner/judge", revision="v2")
    with pytest.raises(ModelError, match=r"its base cannot be had; give it with --model .*agree with --yes"):
        find_base(adapter, None, lambda question: bool(questions.append(question)))
    assert find_base(adapter, None, lambda _: True) == ("owner/judge@v2", GOLDEN / "qwen2_5_vl")
    assert "needs its base owner/judge@v2 (0 bytes, licence apache-2.0). Download it?" in questions[0]


def test_another_kind_of_adapter_is_refused_before_a_model_is_loaded(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxpref.judge.loading.load_vlm", never)
    (adapter / "vit.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"vit\.safetensors"):
        mlxpref.load(adapter=naming(adapter, base_model=str(GOLDEN / "qwen2_5_vl")))
    (adapter / "vit.safetensors").unlink()
    with pytest.raises(ModelError, match="'dora' adapter"):
        mlxpref.load(adapter=naming(adapter, fine_tune_type="dora"))
