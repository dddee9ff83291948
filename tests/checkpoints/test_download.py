"""Models from a hub of one's own: the needed files, resumed, at a revision, and the message when a download fails."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from mlxpref.checkpoints.files import PROFILE_FILE
from mlxpref.checkpoints.resolve import find_checkpoint
from mlxpref.engine.find_profile import find_profile
from mlxpref.engine.profile import built_in_profiles
from mlxpref.engine.vlm import load_vlm
from mlxpref.errors import ModelError
from tests.conftest import GOLDEN
from tests.hub_server import TOKEN, Cut, HubServer, Repository, serving, use_hub
from tests.messages import messages
from tests.variants import change_config

NAME = "some/model"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
NEEDED = {
    *("chat_template.json", "config.json", "generation_config.json", "model.safetensors.index.json"),
    *("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", PROFILE_FILE, *SHARDS),
}
USELESS = (
    *("pytorch_model.bin", "model.gguf", "modeling.py", "onnx/model.onnx", "consolidated.safetensors", "README.md"),
    *("trainer_state.json", "pytorch_model.bin.index.json", "fp32/model.safetensors", "model.fp16.safetensors"),
)


def never(question: str) -> bool:
    raise AssertionError(f"asked: {question}")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """A tiny model in two files, among much that is not needed."""
    origin = tmp_path / "origin"
    shutil.copytree(GOLDEN / "qwen2_vl", origin, ignore=shutil.ignore_patterns("*.npz"))
    for path in USELESS:
        (origin / path).parent.mkdir(exist_ok=True)
        (origin / path).write_bytes(b"useless")
    (origin / PROFILE_FILE).write_text(built_in_profiles()["unifiedreward-think"].text())
    return Repository(origin, "model", "apache-2.0")


@pytest.fixture
def hub(repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that has it; waits are not waited for, and content comes in small pieces."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.delenv("MLXPREF_MODEL", raising=False)
    with serving({NAME: repository}) as server:
        use_hub(monkeypatch, server.endpoint, tmp_path / "cache")
        yield server


def refusal(name: str = NAME, revision: str | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        find_checkpoint(name, never, revision=revision)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(name.partition("@")[0])
    return str(caught.value)


def test_only_needed_files_are_downloaded(hub: HubServer, repository: Repository) -> None:
    with messages() as lines:
        name, folder = find_checkpoint(NAME, never)
    assert name == NAME
    assert {path.name for path in folder.iterdir()} == NEEDED == set(hub.downloaded())
    assert sorted(hub.downloaded()[-2:]) == SHARDS
    whole = sum(len(repository.files[path]) for path in NEEDED)
    assert lines[0] == f"downloading {NAME} ({whole / 1000:.0f} kB, licence apache-2.0) from the Hugging Face hub"
    assert len(load_vlm(folder, 512 * 512).decoder.layers) == 2
    assert find_profile("", [folder], [name]).name == "unifiedreward-think"
    hub.requests.clear()
    assert find_checkpoint(NAME, never) == (NAME, folder)
    assert hub.requests == []


def test_files_of_a_broken_download_are_kept(hub: HubServer, repository: Repository) -> None:
    repository.faults[SHARDS[1]] = Cut(40_000, for_good=True)
    assert f"the hub at {hub.endpoint} answered 503; try again later" in refusal()
    assert "HF_HUB_OFFLINE" not in refusal()
    repository.faults.clear()
    hub.requests.clear()
    _, folder = find_checkpoint(NAME, never)
    assert hub.downloaded() == [SHARDS[1]]
    assert (folder / SHARDS[1]).read_bytes() == repository.files[SHARDS[1]]


def test_a_file_of_the_wrong_size_is_not_kept(hub: HubServer, repository: Repository) -> None:
    content = repository.files[SHARDS[0]]
    repository.faults[SHARDS[0]] = content[:-1000]
    refusal()
    repository.faults.clear()
    assert (find_checkpoint(NAME, never)[1] / SHARDS[0]).read_bytes() == content


def test_offline_uses_complete_models_only(
    hub: HubServer, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.faults[SHARDS[1]] = Cut(40_000, for_good=True)
    refusal()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert "HF_HUB_OFFLINE is set, so nothing is downloaded; unset it and run it again" in refusal()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    repository.faults.clear()
    _, folder = find_checkpoint(NAME, never)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert find_checkpoint(NAME, never) == (NAME, folder)
    assert hub.requests == []


def test_a_revision(hub: HubServer, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Path(shutil.copytree(repository.folder, tmp_path / "other"))
    change_config(other, max_position_embeddings=1234)
    repository.branches["v1/beta"] = Repository(other, "model")
    commit = repository.branches["v1/beta"].commit
    for name, revision in (
        (f"{NAME}@v1/beta", None),
        (NAME, "v1/beta"),
        (f"{NAME}@v1/beta", "v1/beta"),
        (NAME, commit),
    ):
        full_name, folder = find_checkpoint(name, never, revision=revision)
        assert full_name == f"{NAME}@{revision or 'v1/beta'}"
        assert folder.name == commit
        assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 1234
    _, main = find_checkpoint(NAME, never)
    assert main.name == repository.commit != commit
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_checkpoint(f"{NAME}@v1/beta", never)[1].name == commit
    assert find_checkpoint(NAME, never)[1].name == repository.commit


def test_missing_revision(hub: HubServer, tmp_path: Path) -> None:
    words = refusal(f"{NAME}@v9")
    assert f"the hub at {hub.endpoint} has no such branch, tag or commit of it" in words
    assert f"{hub.endpoint}/{NAME} shows" in words
    assert "another revision than 'v2'" in refusal(f"{NAME}@v1", "v2")
    assert "is no revision" in refusal(NAME, "../../v1")
    for name in ("demo", str(tmp_path)):
        with pytest.raises(ModelError, match="is no Hugging Face id, so it has no revision"):
            find_checkpoint(name, never, revision="v1")


def test_gated_model(hub: HubServer, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository.gated = True
    page = f"agree to their terms at {hub.endpoint}/{NAME}, log in with `hf auth login` (or set HF_TOKEN)"
    assert page in refusal()
    use_hub(monkeypatch, hub.endpoint, tmp_path / "cache", TOKEN)
    assert {path.name for path in find_checkpoint(NAME, never)[1].iterdir()} == NEEDED


def test_private_or_unknown_model(hub: HubServer, repository: Repository) -> None:
    repository.private = True
    for name in (NAME, "no/where"):
        words = refusal(name)
        assert f"the hub at {hub.endpoint} has no such model, or it is not open to you" in words
        assert "no such folder, not in the local cache" in words


def test_renamed_model(hub: HubServer) -> None:
    hub.renamed["old/name"] = NAME
    name, folder = find_checkpoint("old/name", never)
    assert name == "old/name"
    assert {path.name for path in folder.iterdir()} == NEEDED
    assert "models--old--name" in str(folder)


def test_a_full_disk(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**6))
    words = refusal()
    assert "must stay free, but only 1.0 MB are free; make room, or give another disk with HF_HOME" in words
    assert hub.downloaded() == []


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("*.safetensors", "no .safetensors on the hub, only .bin, .gguf, which mlxpref does not read"),
        ("config.json", "no config.json on the hub"),
        ("tokenizer.json", "no tokenizer.json on the hub"),
        ("preprocessor_config.json", "no preprocessor_config.json on the hub"),
        (SHARDS[1], f"names '{SHARDS[1]}', which the hub does not have"),
    ],
)
def test_a_repository_that_is_no_model(hub: HubServer, repository: Repository, gone: str, words: str) -> None:
    for file in repository.folder.glob(gone):
        file.unlink()
    assert words in refusal()
    assert not any(path.endswith((".safetensors", ".bin")) for path in hub.downloaded())


@pytest.mark.parametrize("index", [b"[]", b"{", b'{"weight_map": {"a": "../../up.safetensors"}}', b'{"weight_map": 1}'])
def test_an_index_that_leads_elsewhere(hub: HubServer, repository: Repository, index: bytes) -> None:
    (repository.folder / "model.safetensors.index.json").write_bytes(index)
    assert "model.safetensors.index.json" in refusal()
    assert not any(path.endswith(".safetensors") for path in hub.downloaded())


def test_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({}) as server:
        endpoint = server.endpoint
    use_hub(monkeypatch, endpoint, tmp_path)
    assert f"the hub at {endpoint} was not reached" in refusal()


def test_hf_endpoint_in_a_subprocess(repository: Repository, tmp_path: Path, hub: HubServer) -> None:
    program = (
        "import logging\nfrom mlxpref.checkpoints.resolve import find_checkpoint\n"
        "logging.basicConfig()\nlogging.getLogger('mlxpref').setLevel('INFO')\n"
        f"print(find_checkpoint({NAME!r}, lambda question: False)[1])"
    )
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    rest = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "MLXPREF_MODEL"))}
    done = subprocess.run(
        [sys.executable, "-c", program], env=rest | environment, capture_output=True, text=True, check=True
    )
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(tmp_path / "home")
    assert {path.name for path in folder.iterdir()} == NEEDED
    assert f"downloading {NAME}" in done.stderr
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    again = subprocess.run(
        [sys.executable, "-c", program], env=rest | offline, capture_output=True, text=True, check=True
    )
    assert again.stdout == done.stdout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantized by awq"),
        ({"model_type": "gemma3"}, "architecture 'gemma3' (Gemma 3) is not supported"),
    ],
)
def test_weights_of_another_kind_are_not_downloaded(
    changes: dict[str, object], words: str, hub: HubServer, repository: Repository
) -> None:
    change_config(repository.folder, **changes)
    assert words in refusal()
    assert not set(SHARDS) & set(hub.downloaded())


def test_a_second_set_in_the_cache(hub: HubServer, repository: Repository) -> None:
    """What another program downloaded beside: nothing is downloaded again, and the error names both."""
    _, folder = find_checkpoint(NAME, never)
    hub.requests.clear()
    (folder / "consolidated.safetensors").write_bytes(b"x")
    assert find_checkpoint(NAME, never)[1] == folder
    assert hub.requests == []
    with pytest.raises(ModelError, match=r"index\.json and consolidated\.safetensors"):
        load_vlm(folder, 512 * 512)
