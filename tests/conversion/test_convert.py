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
from mlx.utils import tree_flatten
from mlx_vlm.models.switch_layers import QuantizedSwitchLinear
from PIL import Image

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.families import FAMILIES
from mlxpref.checkpoints.safetensors import read_tensor_infos
from mlxpref.conversion import writer as model_folder
from mlxpref.conversion.convert import convert
from mlxpref.conversion.fidelity import built_in_comparisons
from mlxpref.conversion.quantize import Recipe, cast, dequantize, quantized_layers
from mlxpref.conversion.writer import is_finite, write_model
from mlxpref.engine.mlx_model import _correct_activations, lazy_model
from mlxpref.engine.vlm import VLM, load_vlm
from mlxpref.errors import ConfigError, ModelError
from mlxpref.files import sha256_of
from tests.conftest import GOLDEN, hidden_states, tiny_model
from tests.engine.test_vlm import golden_input, text_logits
from tests.variants import read_weights, write_transformers_5

SOURCE = GOLDEN / "qwen2_vl"


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def logits(vlm: VLM, golden: dict[str, Any]) -> np.ndarray:
    hidden = hidden_states(vlm, [golden_input(vlm, golden)])
    return text_logits(vlm, vlm.head(hidden)[0])


def while_writing(monkeypatch: pytest.MonkeyPatch, happens: Callable[[Path], None]) -> None:
    """Let something happen when the first file of weights was written."""
    save = mx.save_safetensors

    def saving(file: str, *arguments: Any) -> None:
        save(file, *arguments)
        happens(Path(file).parent)

    monkeypatch.setattr(mx, "save_safetensors", saving)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unquantized_conversion_is_equal(family: str, golden: dict[str, Any], tmp_path: Path, dtype: str) -> None:
    output = tmp_path / "converted"
    result = convert(GOLDEN / family, output, Recipe(None), dtype=dtype)
    assert (result["path"], result["bits"], result["quantized_layers"]) == (str(output), None, 0)
    assert result["bytes"] == sum(path.stat().st_size for path in output.iterdir())
    converted = load_vlm(output, max_pixels=512 * 512)
    difference = np.abs(logits(converted, golden) - text_logits(converted, mx.array(golden["logits"])))
    if (family, dtype) == ("qwen3_5", "bfloat16"):  # which rounds norms, stored as 1 + w
        assert 1e-3 < difference.mean() < 0.03
    else:
        assert difference.max() < 1e-3
    for form in ("choice", "scores"):
        for think in (True, False):
            words = [vlm.tokenizer.comparison("a hat", form, think) for vlm in (converted, tiny_model(family))]
            assert words[0] == words[1]


@pytest.mark.parametrize(("bits", "group_size", "closeness"), [(4, 32, 0.75), (8, 64, 0.98)])
def test_quantized_conversion_is_near(
    family: str, golden: dict[str, Any], tmp_path: Path, bits: int, group_size: int, closeness: float
) -> None:
    output = tmp_path / "converted"
    result = convert(GOLDEN / family, output, Recipe(bits, group_size))
    vlm = load_vlm(output, max_pixels=512 * 512)
    layers = dict(vlm.model.named_modules())
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
    quantized = {name for name, layer in layers.items() if isinstance(layer, kinds)}
    assert result["quantized_layers"] == len(quantized) >= 14
    experts = [f"language_model.model.layers.{i}.mlp.switch_mlp.down_proj" for i in range(2)]
    assert sorted(result["left"]) == (experts if family == "qwen3_vl_moe" else [])
    assert not any("vision" in name for name in quantized)
    source = dict(tiny_model(family).model.named_modules())
    for name in quantized:
        layer, stored = layers[name], (8, 64) if name.endswith(".mlp.gate") else (bits, group_size)
        assert (layer.bits, layer.group_size) == stored
        step = np.array(layer.scales.astype(mx.float32)).repeat(layer.group_size, axis=-1)
        weight = mx.dequantize(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits)
        error = np.abs(np.array(weight.astype(mx.float32) - source[name].weight))
        assert (error <= np.abs(step) * 1.01 + 0.01).all(), name
    golden_logits, ours = text_logits(vlm, mx.array(golden["logits"])), logits(vlm, golden)
    assert np.corrcoef(golden_logits.ravel(), ours.ravel())[0, 1] > closeness
    assert np.abs(golden_logits - ours).max() > 1e-3


@pytest.mark.parametrize("name", ["none", "8", "4", "mixed_3_6"])
def test_mlx_vlm_loads_a_conversion(family: str, golden: dict[str, Any], tmp_path: Path, name: str) -> None:
    from mlx_vlm import load

    convert(GOLDEN / family, tmp_path / "converted", Recipe.named(name, 32), dtype="float32")
    model, processor = load(str(tmp_path / "converted"), trust_remote_code=False)
    _correct_activations(model, FAMILIES[family])  # which are not about the folder
    features = processor.image_processor([Image.fromarray(golden[name]) for name in ("image0", "image1")])
    pixels, grid = (mx.array(np.array(features[name])) for name in ("pixel_values", "image_grid_thw"))
    theirs = model(mx.array(golden["input_ids"][None].astype(np.int32)), pixels, image_grid_thw=grid).logits[0]
    ours = load_vlm(tmp_path / "converted", max_pixels=512 * 512)
    weights, others = (dict(tree_flatten(each.parameters())) for each in (model, ours.model))
    assert weights.keys() == others.keys()
    assert all(mx.array_equal(weight, others[key]) for key, weight in weights.items())
    assert np.abs(text_logits(ours, theirs) - logits(ours, golden)).max() < 1e-3


def test_the_layout_of_transformers_5_gives_the_same_folder(family: str, tmp_path: Path) -> None:
    write_transformers_5(GOLDEN / family, tmp_path / "v5")
    for name, folder in {"ours": GOLDEN / family, "theirs": tmp_path / "v5"}.items():
        convert(folder, tmp_path / name, Recipe(4, 32))
    ours, theirs = (read_weights(tmp_path / name) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(weight, theirs[name]) for name, weight in ours.items())


def test_decays_keep_their_type(tmp_path: Path) -> None:
    for dtype in ("float16", "float32"):
        convert(GOLDEN / "qwen3_5", tmp_path / dtype, Recipe(4, 32), dtype=dtype)
        weights = read_weights(tmp_path / dtype)
        assert {weight.dtype for name, weight in weights.items() if name.endswith(".A_log")} == {mx.bfloat16}
        kept = [
            weight for name, weight in weights.items() if name.endswith((".dt_bias", ".conv1d.weight", "norm.weight"))
        ]
        assert {weight.dtype for weight in kept} == {getattr(mx, dtype)}


def test_full_folder_is_refused(tmp_path: Path) -> None:
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
def test_an_interrupted_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, had_one: bool) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "deep" / "er" / "out"
    if had_one:
        output.mkdir(parents=True)
        (output / "config.json").write_text("{}")
    while_writing(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(SOURCE, output, overwrite=True)
    if had_one:
        assert contents(output) == {"config.json": b"{}"}
        assert entries(output.parent) == ["out"]
    else:
        assert entries(tmp_path) == []


def test_an_interruption_while_replacing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        model_folder._replace(new, old)
    assert contents(old) == {"config.json": b"old"}
    assert entries(tmp_path) == ["new", "old"]


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"qwen3_5"}))  # it has a projection of this width
def test_a_group_size_that_divides_nothing(tmp_path: Path, family: str) -> None:
    with pytest.raises(
        ModelError, match=rf"{family}: no layer .* group size 128 .*hidden size 64.*smaller --group-size"
    ):
        convert(GOLDEN / family, tmp_path / "out", Recipe(4, 128))
    assert entries(tmp_path) == []


@pytest.mark.parametrize(
    ("missing", "problem"),
    [
        ("preprocessor_config.json", "no preprocessor_config.json there"),
        ("config.json", "no config.json there"),
        ("model-00002-of-00002.safetensors", "no such file"),
        ("tokenizer.json", ""),
    ],
)
def test_incomplete_sources_are_refused(tmp_path: Path, missing: str, problem: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source)
    (source / missing).unlink()
    with pytest.raises(ModelError, match=rf"source.*: {problem}") as caught:
        convert(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert entries(tmp_path) == ["source"]


def test_sources_that_cannot_be_converted(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such model folder"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    with pytest.raises(ModelError, match=r"'llava' is not supported; .*Qwen2-VL, Qwen2.5-VL, Qwen3-VL"):
        convert(source, tmp_path / "out")
    (source / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "awq", "bits": 4}})
    )
    with pytest.raises(ModelError, match="awq"):
        convert(source, tmp_path / "out")
    assert entries(tmp_path) == ["source"]


def test_a_folder_that_cannot_be_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])

    while_writing(monkeypatch, spoil)
    with pytest.raises(ModelError, match=r"qwen2_vl: what was made of it cannot be used: model.safetensors: "):
        convert(SOURCE, tmp_path / "out")
    assert entries(tmp_path) == []


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three ways in which the libraries below say so: Python's, the tokenizer's and MLX's."""
    for error in (
        OSError(28, "No space left on device"),
        Exception("No space left on device (os error 28)"),
        RuntimeError("[write] Unable to write 900094 bytes to file."),
    ):

        def full(_: object, error: Exception = error) -> None:
            raise error

        while_writing(monkeypatch, full)
        with pytest.raises(ModelError, match=r"(?i)out: cannot be written: no space left.*; .*nothing was kept"):
            convert(SOURCE, tmp_path / "out")
        assert entries(tmp_path) == []


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on the size of files")
def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    """For real: MLX may not write more than 100 kB into one file."""
    program = f"""
import resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
from mlxpref.cli import main
main(["convert", {str(SOURCE)!r}, {str(tmp_path / "out")!r}, "--bits", "none"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"Error: {tmp_path / 'out'}: cannot be written: no space left")
    assert "Traceback" not in done.stderr
    assert entries(tmp_path) == []


# Recipes, layouts, requantization


def converted_and_dequantized(family: str, folder: Path, recipe: Recipe) -> tuple[VLM, VLM]:
    """A conversion, and the same with the weights in float32 that its quantized layers stand for."""
    convert(GOLDEN / family, folder, recipe, dtype="float32")
    quantized, plain = (load_vlm(folder, max_pixels=512 * 512) for _ in range(2))
    dequantize(plain.model, quantized_layers(plain.model))
    cast(plain.model, mx.float32, {})  # those of mxfp4 are in bfloat16
    assert quantized_layers(quantized.model)
    assert not quantized_layers(plain.model)
    return quantized, plain


@pytest.mark.parametrize("name", ["4", "mixed_3_6", "mxfp4", "8"])
def test_a_quantized_model_against_its_weights(family: str, golden: dict[str, Any], tmp_path: Path, name: str) -> None:
    """The same model with its own dequantized weights, unquantized: an independent path through plain layers."""
    quantized, plain = converted_and_dequantized(family, tmp_path / "out", Recipe.named(name, 32))
    assert np.abs(logits(quantized, golden) - logits(plain, golden)).max() < 1e-3


def test_quantized_vision_tower_against_its_weights(family: str, golden: dict[str, Any], tmp_path: Path) -> None:
    """By its features: these tiny models make 0.004 of a logit out of 1e-6 in a feature."""
    pair = converted_and_dequantized(family, tmp_path / "out", Recipe(4, 32, vision_bits=8))
    features = [golden_input(vlm, golden).images for vlm in pair]
    for ours, theirs in zip(*features, strict=True):
        for a, b in zip([ours.merged, *ours.deepstack], [theirs.merged, *theirs.deepstack], strict=True):
            assert float(mx.abs(a - b).max()) < 1e-4


def test_the_vision_tower_is_quantized_on_request(tmp_path: Path, family: str) -> None:
    for bits in (None, 8):
        report = convert(GOLDEN / family, tmp_path / f"out{bits}", Recipe(4, 32, vision_bits=bits))
        model = lazy_model(Checkpoint.open(tmp_path / f"out{bits}"))
        vision = {path: layer for path, layer in quantized_layers(model).items() if path.startswith("vision_tower")}
        assert {layer.bits for layer in vision.values()} == ({8} if bits else set())
        assert report["quantized_layers"] == len(quantized_layers(model))
        assert all(path.startswith("vision_tower") or "switch_mlp.down" in path for path in report["left"])


def test_largest_file_size(tmp_path: Path) -> None:
    limit = 100_000
    convert(SOURCE, tmp_path / "out", Recipe(None), dtype="float32", shard_size=limit)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 3
    for file in files:
        held = [tensor for tensor in read_tensor_infos(tmp_path / "out").values() if tensor.file == file]
        assert len(held) == 1 or sum(tensor.size for tensor in held) <= limit
    one = tmp_path / "one"
    convert(SOURCE, one, Recipe(None), dtype="float32")
    assert read_tensor_infos(one).keys() == read_tensor_infos(tmp_path / "out").keys()


def test_memory_holds_one_file(tmp_path: Path) -> None:
    size, limit = 400_000, 2_000_000
    # 20 MB, lazy, and transposed as experts are
    weights = {f"{i:02d}": mx.random.normal((250, 400), key=mx.random.key(i)).T for i in range(50)}
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    write_model(tmp_path, SOURCE, {}, weights, limit)
    assert not weights
    assert mx.get_peak_memory() - before < limit + 4 * size
    assert len(list(tmp_path.glob("*.safetensors"))) == 10


def test_a_quantized_source(family: str, golden: dict[str, Any], tmp_path: Path) -> None:
    convert(GOLDEN / family, tmp_path / "eight", Recipe(8, 32), dtype="float32")
    with pytest.raises(ModelError, match=r"is already quantized to 8 bit; convert the original.*--requantize"):
        convert(tmp_path / "eight", tmp_path / "four")
    convert(tmp_path / "eight", tmp_path / "plain", Recipe(None), dtype="float32", requantize=True)
    eight, plain = (load_vlm(tmp_path / name, max_pixels=512 * 512) for name in ("eight", "plain"))
    assert not quantized_layers(plain.model)
    assert np.abs(logits(eight, golden) - logits(plain, golden)).max() < 1e-3
    report = convert(tmp_path / "eight", tmp_path / "four", Recipe(4, 32), requantize=True)
    assert report["quantized_layers"] == len(quantized_layers(eight.model))
    result = convert(tmp_path / "eight", tmp_path / "kept", None, dtype=None)
    assert result["recipe"] == "kept"
    assert quantized_layers(lazy_model(Checkpoint.open(tmp_path / "kept"))) == quantized_layers(eight.model)


def test_missing_and_unknown_tensors(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "qwen2_5_vl", source)
    arrays = mx.load(str(source / "model.safetensors"))
    assert isinstance(arrays, dict)
    mx.save_safetensors(str(source / "model.safetensors"), arrays | {"visual.extra.weight": mx.zeros((4,))})
    with pytest.raises(ModelError, match=r"source: .*extra"):
        convert(source, tmp_path / "out")
    arrays.pop("visual.merger.mlp.0.weight")
    mx.save_safetensors(str(source / "model.safetensors"), arrays)
    with pytest.raises(ModelError, match=r"source.*: .+"):
        convert(source, tmp_path / "out")
    assert entries(tmp_path) == ["source"]


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "qwen2_5_vl", source)
    arrays = mx.load(str(source / "model.safetensors"))
    assert isinstance(arrays, dict)
    name = "visual.merger.mlp.0.bias"
    arrays[name] = arrays[name] + mx.array(float("nan"), arrays[name].dtype)
    mx.save_safetensors(str(source / "model.safetensors"), arrays)
    with pytest.raises(ModelError, match=r"source: vision_tower.merger.mlp.0.bias holds numbers that are not finite"):
        convert(source, tmp_path / "out")
    assert entries(tmp_path) == ["source"]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_finite_by_bits(dtype: mx.Dtype) -> None:
    """Every number of half precision, alone and among others."""
    numbers = mx.arange(1 << 16, dtype=mx.uint16).view(dtype)
    finite = mx.isfinite(numbers)
    order = mx.argsort(finite)
    count = int(np.array(finite).sum())
    assert is_finite(numbers[order][-count:])
    assert not any(is_finite(each) for each in numbers[order][:-count][::17])
    assert not is_finite(numbers)


def test_finite_in_single_precision() -> None:
    most = mx.finfo(mx.float32).max
    assert is_finite(mx.array([1.0, -1e300], mx.float64))
    assert is_finite(mx.array([0.0, -0.0, 1e-45, most, -most]))
    assert is_finite(mx.zeros((0, 3)))
    assert not any(is_finite(mx.array([1.0, number])) for number in (mx.inf, -mx.inf, mx.nan, -mx.nan))


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=60_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ModelError, match=r"out: no space left for the model: 67.2 MB are needed, 60.0 MB are free"):
        convert(SOURCE, tmp_path / "out")
    assert entries(tmp_path) == []


def test_record_names_its_source(tmp_path: Path) -> None:
    comparisons = built_in_comparisons()[:2]
    report = convert(GOLDEN / "qwen2_5_vl", tmp_path / "out", Recipe(8, 32), name="Owner/Name", comparisons=comparisons)
    record = json.loads((tmp_path / "out" / "mlxpref.json").read_text())
    assert (record["source"], record["recipe"], record["quantized_layers"]) == (
        "Owner/Name", "8", report["quantized_layers"]
    )  # fmt: skip
    assert record["fidelity"] == report["fidelity"]
    assert report["fidelity"]["comparisons"] == 2
    assert {"mlxpref", "mlx", "mlx-vlm", "transformers"} <= set(record["versions"])
    files = [path for path in (tmp_path / "out").iterdir() if path.name != "mlxpref.json"]
    assert record["sha256"] == {path.name: sha256_of(path) for path in files}


def test_a_source_without_generation_config(family: str, tmp_path: Path) -> None:
    """mlx-vlm then adds the end of a turn of the real Qwen3.5, which a tokenizer of one's own need not have."""
    source = Path(shutil.copytree(GOLDEN / family, tmp_path / "source"))
    (source / "generation_config.json").unlink()
    convert(source, tmp_path / "out", Recipe(8, 32))


def test_code_is_not_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source)
    (source / "modeling_evil.py").write_text("raise SystemExit('code ran')")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_evil.Model"}}))
    convert(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
