"""Conversion keeps what the model says, and whatever goes wrong leaves nothing half-made and nothing lost."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from PIL import Image

from mlxpref import conversion
from mlxpref.conversion import convert
from mlxpref.errors import ConfigError, ModelError
from mlxpref.vlm import VLM, load_vlm
from tests.conftest import GOLDEN, tiny_model
from tests.test_vlm import golden_prompt, spoken

SOURCE = GOLDEN / "qwen2_vl"


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def logits(vlm: VLM, golden: dict[str, Any]) -> np.ndarray:
    _, hidden = vlm.hidden([golden_prompt(vlm, golden)])
    return spoken(vlm, vlm.head(hidden)[0])


def while_converting(monkeypatch: pytest.MonkeyPatch, happens: Callable[[Path], None]) -> None:
    """Let something happen in mlx-vlm's place, after the first file was written."""

    def convert(source: str, output: str, **_: Any) -> None:
        Path(output).mkdir()
        (Path(output) / "model.safetensors").write_bytes(bytes(100))
        happens(Path(output))

    import mlx_vlm.convert  # the package has a function of the same name

    monkeypatch.setattr(sys.modules[mlx_vlm.convert.__module__], "convert", convert)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_unquantized_conversion_says_the_same(
    family: str, golden: dict[str, Any], tmp_path: Path, dtype: str
) -> None:
    output = tmp_path / "converted"
    written = convert(GOLDEN / family, output, bits=None, dtype=dtype)
    assert (written["path"], written["bits"], written["quantized_layers"]) == (str(output), None, 0)
    assert written["bytes"] == sum(path.stat().st_size for path in output.iterdir())
    converted = load_vlm(output, max_pixels=512 * 512)
    assert np.abs(logits(converted, golden) - spoken(converted, mx.array(golden["logits"]))).max() < 1e-3
    for form in ("choice", "scores"):
        for think in (True, False):
            words = [vlm.words.comparison("a hat", form, think) for vlm in (converted, tiny_model(family))]
            assert words[0] == words[1]


@pytest.mark.parametrize(("bits", "group_size", "closeness"), [(4, 32, 0.9), (8, 64, 0.99)])
def test_a_quantized_conversion_says_nearly_the_same(
    family: str, golden: dict[str, Any], tmp_path: Path, bits: int, group_size: int, closeness: float
) -> None:
    output = tmp_path / "converted"
    written = convert(GOLDEN / family, output, bits, group_size)
    vlm = load_vlm(output, max_pixels=512 * 512)
    layers = dict(vlm.model.named_modules())
    quantized = {
        name for name, layer in layers.items() if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding)
    }
    assert written["quantized_layers"] == len(quantized) >= 14
    assert not any("vision" in name for name in quantized)
    source = dict(tiny_model(family).model.named_modules())
    for name in quantized:
        layer, step = layers[name], np.array(layers[name].scales.astype(mx.float32)).repeat(group_size, axis=1)
        assert (layer.bits, layer.group_size) == (bits, group_size)
        weight = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size, bits)
        error = np.abs(np.array(weight.astype(mx.float32) - source[name].weight))
        assert (error <= np.abs(step) * 1.01 + 0.01).all(), name
    golden_logits, ours = spoken(vlm, mx.array(golden["logits"])), logits(vlm, golden)
    assert np.corrcoef(golden_logits.ravel(), ours.ravel())[0, 1] > closeness
    assert np.abs(golden_logits - ours).max() > 1e-3


def test_mlx_vlm_loads_what_was_converted(family: str, golden: dict[str, Any], tmp_path: Path) -> None:
    from mlx_vlm import load

    convert(GOLDEN / family, tmp_path / "converted", bits=4)
    model, processor = load(str(tmp_path / "converted"), trust_remote_code=False)
    model.update(tree_map(lambda x: x.astype(mx.float32) if x.dtype == mx.bfloat16 else x, model.parameters()))
    features = processor.image_processor([Image.fromarray(golden[name]) for name in ("image0", "image1")])
    pixels, grid = (mx.array(np.array(features[name])) for name in ("pixel_values", "image_grid_thw"))
    theirs = model(mx.array(golden["input_ids"][None].astype(np.int32)), pixels, image_grid_thw=grid).logits[0]
    ours = load_vlm(tmp_path / "converted", max_pixels=512 * 512)
    assert np.abs(spoken(ours, theirs) - logits(ours, golden)).max() < 1e-3


def test_a_full_folder_is_refused_and_unharmed(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match=r"out: is not empty; .*--overwrite"):
        convert(SOURCE, output)
    assert contents(output) == {"mine.txt": b"precious"}
    convert(SOURCE, output, overwrite=True)
    assert {"config.json", "model.safetensors"} <= set(entries(output))
    assert "mine.txt" not in entries(output)
    assert entries(tmp_path) == ["out"]
    (tmp_path / "empty").mkdir()
    convert(SOURCE, tmp_path / "empty")
    assert "config.json" in entries(tmp_path / "empty")


def test_outputs_in_the_way_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "models" / "source"
    shutil.copytree(SOURCE, source)
    before = contents(source)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output, problem in {
        tmp_path / "file": "is a file",
        source: "is the source itself",
        tmp_path / "link": "is the source itself",
        source / "4bit": "within each other",
        source.parent: "within each other",
        Path(): "the folder you are in",
        tmp_path / "here": "the folder you are in",
        Path.home(): "your home",
    }.items():
        with pytest.raises(ConfigError, match=problem):
            convert(source, output, overwrite=True)
    assert contents(source) == before
    assert entries(source.parent) == ["source"]


@pytest.mark.parametrize("had_one", [False, True])
def test_an_interrupted_conversion_leaves_things_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, had_one: bool
) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "deep" / "er" / "out"
    if had_one:
        output.mkdir(parents=True)
        (output / "config.json").write_text("{}")
    while_converting(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(SOURCE, output, overwrite=True)
    if had_one:
        assert contents(output) == {"config.json": b"{}"}
        assert entries(output.parent) == ["out"]
    else:
        assert entries(tmp_path) == []


def test_an_interruption_while_replacing_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    for folder in (new, old):
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self == new:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        conversion._replace(new, old)
    assert contents(old) == {"config.json": b"old"}
    assert entries(tmp_path) == ["new", "old"]


def test_a_group_size_that_divides_nothing_is_an_error(tmp_path: Path, family: str) -> None:
    with pytest.raises(
        ModelError, match=rf"{family}: no layer .* group size 128 .*hidden size 64.*smaller --group-size"
    ):
        convert(GOLDEN / family, tmp_path / "out", group_size=128)
    assert entries(tmp_path) == []


@pytest.mark.parametrize(
    ("missing", "problem"),
    [
        ("preprocessor_config.json", "no preprocessor_config.json there"),
        ("config.json", "no config.json there"),
        ("model-00002-of-00002.safetensors", "cannot be converted"),
        ("tokenizer.json", ""),
    ],
)
def test_incomplete_sources_are_refused(tmp_path: Path, missing: str, problem: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source)
    (source / missing).unlink()
    with pytest.raises(ModelError, match=rf"source: {problem}") as caught:
        convert(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert entries(tmp_path) == ["source"]


def test_sources_that_cannot_be_converted_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such model folder"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    with pytest.raises(ModelError, match=r"'llava' is not supported; .*Qwen2-VL, Qwen2.5-VL, Qwen3-VL"):
        convert(source, tmp_path / "out")
    (source / "config.json").write_text(json.dumps(config | {"quantization": {"bits": 4, "group_size": 64}}))
    with pytest.raises(ModelError, match="is already quantized to 4 bit; convert the original"):
        convert(source, tmp_path / "out", bits=8)
    assert entries(tmp_path) == ["source"]


def test_what_cannot_be_read_back_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    while_converting(monkeypatch, lambda output: None)
    with pytest.raises(ModelError, match=r"qwen2_vl: what was made of it cannot be used: no config.json there"):
        convert(SOURCE, tmp_path / "out")
    assert entries(tmp_path) == []


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three ways in which the libraries below say so: Python's, the tokenizer's and MLX's."""
    for error in (
        OSError(28, "No space left on device"),
        Exception("No space left on device (os error 28)"),
        RuntimeError("[write] Unable to write 900094 bytes to file."),
    ):

        def full(_: object, error: Exception = error) -> None:
            raise error

        while_converting(monkeypatch, full)
        with pytest.raises(ModelError, match=r"(?i)out: cannot be written: no space left.*; .*nothing was kept"):
            convert(SOURCE, tmp_path / "out")
        assert entries(tmp_path) == []


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on the size of files")
def test_weights_that_do_not_fit_leave_nothing(tmp_path: Path) -> None:
    """For real: MLX may not write more than 100 kB into one file."""
    program = f"""
import resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
from mlxpref.cli import main
main(["convert", {str(SOURCE)!r}, {str(tmp_path / "out")!r}, "--bits", "none"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"Error: {tmp_path / 'out'}: cannot be written: no space left")
    assert "Traceback" not in done.stderr
    assert entries(tmp_path) == []
