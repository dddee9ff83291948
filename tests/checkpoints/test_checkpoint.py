"""A checkpoint's config and the heads of its weights are read once a command."""

from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from mlxpref.checkpoints import checkpoint, safetensors
from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.cli import main
from mlxpref.demo import JUDGE
from tests.conftest import GOLDEN, picture, tiny_model, write_adapter


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """How often each config and each head of a weights file was read."""
    counts: Counter[Path] = Counter()

    def counting(module: object, name: str) -> None:
        read = getattr(module, name)

        def counted(file: Path, *arguments: object) -> object:
            counts[file.resolve()] += 1
            return read(file, *arguments)

        monkeypatch.setattr(module, name, counted)

    counting(checkpoint, "read_json_object")
    counting(safetensors, "read_file_tensor_infos")
    return counts


def run(*arguments: object) -> None:
    result = CliRunner().invoke(main, [str(part) for part in arguments])
    assert result.exit_code == 0, result.output


def of_model(reads: Counter[Path], folder: Path) -> dict[str, int]:
    """The reads of a folder's config and weights."""
    names = {file.name: count for file, count in reads.items() if file.parent == folder.resolve()}
    return {name: count for name, count in names.items() if name == "config.json" or name.endswith(".safetensors")}


ONCE = {"config.json": 1, "model.safetensors": 1}


def test_convert(tmp_path: Path, reads: Counter[Path]) -> None:
    run("convert", "demo", tmp_path / "out")
    assert of_model(reads, JUDGE) == ONCE
    (folder,) = {file.parent for file in reads} - {JUDGE.resolve()}
    assert of_model(reads, folder) == ONCE  # to verify it


def test_convert_compare(reads: Counter[Path]) -> None:
    run("convert", GOLDEN / "qwen2_5_vl", "--compare", "8,4", "--group-size", "32")
    assert of_model(reads, GOLDEN / "qwen2_5_vl") == ONCE


@pytest.mark.parametrize("to", ["fused", "hf"])
def test_export(to: str, tmp_path: Path, reads: Counter[Path]) -> None:
    write_adapter(tmp_path / "adapter", tiny_model("qwen2_5_vl"))
    base = tiny_model("qwen2_5_vl").checkpoint.folder
    reads.clear()
    run("export", tmp_path / "adapter", tmp_path / "out", "--to", to, "--model", base)
    assert of_model(reads, base) == ONCE


def test_rank(tmp_path: Path, reads: Counter[Path]) -> None:
    for seed in range(3):
        Image.Image.save(picture(seed), tmp_path / f"{seed}.png")
    run("rank", tmp_path, "--prompt", "a shape", "--model", "demo", "--no-think", "--no-store")
    assert of_model(reads, JUDGE) == ONCE


def test_train(tmp_path: Path, reads: Counter[Path]) -> None:
    run("train", "--data", "demo", "--model", "demo", "--output", tmp_path / "run", "--limit", "4", "--no-think",
        "--steps", "1", "--rank", "2")  # fmt: skip
    assert of_model(reads, JUDGE) == ONCE


def test_nothing_is_read_before_it_is_needed(tmp_path: Path, reads: Counter[Path]) -> None:
    opened = Checkpoint.open(tmp_path / "nowhere")
    assert Checkpoint.open(opened) is opened
    assert not reads
