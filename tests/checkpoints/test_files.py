"""What lies in a model folder: two sets of weights are an error that names both, other formats are named."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.checks import check_folder
from mlxpref.errors import ModelError
from tests.conftest import GOLDEN


def model(folder: Path, family: str = "qwen2_vl") -> Path:
    return Path(shutil.copytree(GOLDEN / family, folder / "model", ignore=shutil.ignore_patterns("*.npz")))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        check_folder(Checkpoint.open(folder))
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    "second",
    [
        "model.safetensors", "consolidated.safetensors", "model.fp16.safetensors", "model-00001-of-00003.safetensors",
        "model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json", "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin", "adapter_model.safetensors", "adapters.safetensors", "adapter_model.bin",
        "adapter_config.json", "visual.safetensors", "value_head.bin", "non_lora_state_dict.bin",
    ],
)  # fmt: skip
def test_two_sets_of_weights(second: str, tmp_path: Path) -> None:
    """Beside complete shards with their index."""
    folder = model(tmp_path)
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"model.norm.weight": mx.ones(4)})
    shutil.move(tmp_path / "other.safetensors", folder / second)
    message = refusal(folder)
    assert "two sets of weights" in message
    assert INDEX in message
    assert second in message


@pytest.mark.parametrize("second", ["consolidated.safetensors", "adapter_config.json", "model.fp16.safetensors"])
def test_two_sets_without_an_index(second: str, tmp_path: Path) -> None:
    folder = model(tmp_path, "qwen2_5_vl")
    shutil.copy(folder / ("model.safetensors" if second.endswith("safetensors") else "config.json"), folder / second)
    assert "model.safetensors" in (message := refusal(folder))
    assert second in message


@pytest.mark.parametrize(
    "beside", ["training_args.bin", "optimizer.pt", "model.gguf", ".model.safetensors", "README.md"]
)
def test_what_is_no_second_set(beside: str, tmp_path: Path) -> None:
    folder = model(tmp_path)
    (folder / beside).write_bytes(b"x")
    check_folder(Checkpoint.open(folder))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.Q4_K_M.gguf", "GGUF"),
        ("pytorch_model.bin", "pickled weights"),
        ("consolidated.00.pth", "pickled weights"),
        ("model_index.json", "a pipeline of diffusers"),
        ("adapter_config.json", "an adapter, no model; give its base with --model and this folder with --adapter"),
    ],
)
def test_a_folder_of_another_kind(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    assert words in refusal(tmp_path)


def test_a_folder_with_pickled_weights_alone(tmp_path: Path) -> None:
    folder = model(tmp_path, "qwen2_5_vl")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "no .safetensors weights there, but pickled weights" in refusal(folder)


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "judge-Q4.gguf").write_bytes(b"GGUF")
    assert "is weights in GGUF" in refusal(tmp_path / "judge-Q4.gguf")


def test_an_index_of_one_file(tmp_path: Path) -> None:
    """transformers and mlx-vlm write it beside one file, too."""
    folder = model(tmp_path, "qwen2_5_vl")
    names = Checkpoint.open(folder).tensors
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    check_folder(Checkpoint.open(folder))
