"""Verification: what is right is measured, every fault of a written folder is named, and its record holds."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.files import RECORD
from mlxpref.conversion import fidelity as fidelity_module
from mlxpref.conversion.fidelity import (
    Answers,
    Fidelity,
    answers_of,
    ask_source,
    built_in_comparisons,
    compare_with_source,
)
from mlxpref.conversion.quantize import LayerQuantization
from mlxpref.conversion.verify import naming_source, revision_of, verify, write_record
from mlxpref.engine.vlm import VLM, load_vlm
from mlxpref.errors import ModelError
from tests.conftest import GOLDEN, write_adapter

COMPARISONS = built_in_comparisons()[:4]
SIDE = (
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class Written:
    """A folder written by hand, and what was meant to be in it."""

    folder: Path
    source: Path
    plan: dict[str, LayerQuantization]
    shapes: dict[str, tuple[int, ...]]

    def compare(self, adapter: Path | None = None) -> Fidelity:
        """What the folder loses against its source; it is checked before."""
        source = Checkpoint.open(self.source)
        reference, _ = ask_source(source, COMPARISONS, adapter)
        assert reference is not None
        fidelity = compare_with_source(self.verify(), COMPARISONS, reference)
        assert fidelity is not None
        return fidelity

    def verify(self) -> VLM:
        return verify(self.folder, Checkpoint.open(self.source), self.plan, self.shapes)

    def refusal(self, reference: Answers | None = None, **changes: Any) -> str:
        """The line that names what is wrong."""
        case = replace(self, **changes)
        with pytest.raises(ModelError) as caught, naming_source(case.source, case.folder):
            compare_with_source(case.verify(), COMPARISONS, reference)
        line = str(caught.value)
        assert line.startswith(f"{self.source}: what was made of it cannot be used: ")
        assert line.endswith("; nothing was kept")
        assert "\n" not in line
        assert str(self.folder) not in line
        return line


def make(folder: Path, family: str = "qwen2_5_vl", bits: int | None = None, mode: str = "affine") -> Written:
    """A tiny checkpoint in MLX's layout, its language layers quantized by MLX, without any of our conversion."""
    source = GOLDEN / family
    model: Any = load_vlm(source, 512 * 512).model
    plan: dict[str, LayerQuantization] = {}
    config = json.loads((source / "config.json").read_text())
    if bits:
        nn.quantize(model.language_model, 32, bits, mode=mode, class_predicate=lambda _, layer: quantizable(layer))
        quantized = [name for name, layer in model.named_modules() if "scales" in layer]
        plan = {name: LayerQuantization(bits, 32, mode) for name in quantized}
        config["quantization"] = {"group_size": 32, "bits": bits, "mode": mode}
    weights = dict(tree_flatten(model.parameters()))
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    for file in source.glob("*.json"):
        if file.name != "config.json" and not file.name.endswith("index.json"):
            shutil.copy(file, folder / file.name)
    return Written(folder, source, plan, {name: tuple(weight.shape) for name, weight in weights.items()})


def quantizable(layer: nn.Module) -> bool:
    """Of the tiny experts one projection is narrower than a group."""
    return hasattr(layer, "to_quantized") and layer.weight.shape[-1] % 32 == 0


def change(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


def change_weights(written: Written, edit: Callable[[dict[str, mx.array]], Any]) -> None:
    file = written.folder / "model.safetensors"
    weights: Any = mx.load(str(file))
    mx.eval(weights)
    edit(weights)
    mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})


def test_sound_folder_is_measured(family: str, tmp_path: Path) -> None:
    same = make(tmp_path / "same", family).compare()
    assert same == Fidelity(4, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, same.tokens)
    fidelities = [make(tmp_path / f"{bits}", family, bits).compare() for bits in (8, 4, 2)]
    kls = [fidelity.kl_answer for fidelity in fidelities]
    assert 0 < 10 * kls[0] < kls[1] < kls[2]
    assert json.loads(json.dumps(fidelities[0].to_json()))["kl_answer"] == kls[0]


def test_mxfp4(tmp_path: Path) -> None:
    case = make(tmp_path / "fp4", bits=4, mode="mxfp4")
    assert case.compare().kl_answer > 0
    assert "mxfp4" in case.refusal(plan={name: LayerQuantization(4, 32) for name in case.plan})


def test_source_is_loaded_only_on_need(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Checkpoint.open(GOLDEN / "qwen2_5_vl")
    monkeypatch.setattr(fidelity_module, "load_vlm", None)
    assert ask_source(source, []) == (None, "it was not asked for")
    monkeypatch.setattr(fidelity_module, "device_working_set", lambda: 10**6)
    answers, reason = ask_source(source, COMPARISONS)
    assert answers is None
    assert reason is not None
    assert reason.startswith("the source does not fit in memory: it needs about ")
    assert reason.endswith("at most 1.0 MB")


def test_source_leaves_memory(tmp_path: Path) -> None:
    """Two checkpoints at once would be the largest thing a conversion ever holds."""
    case = make(tmp_path / "written")
    before = mx.get_active_memory()
    answers, _ = ask_source(Checkpoint.open(case.source), COMPARISONS)
    assert answers is not None
    size = sum(4 * int(np.prod(shape)) for shape in case.shapes.values())
    assert mx.get_active_memory() - before < size / 4


def test_an_adapter_in_the_weights(tmp_path: Path) -> None:
    case = make(tmp_path / "fused")
    adapter = write_adapter(tmp_path / "adapter", load_vlm(case.source, 512 * 512))
    lora: Any = mx.load(str(adapter / "adapters.safetensors"))

    def fuse(weights: dict[str, mx.array]) -> None:
        for name in case.shapes:
            base = name.removesuffix(".weight")
            if f"{base}.lora_a" in lora:
                weights[name] = weights[name] + 2.0 * (lora[f"{base}.lora_a"] @ lora[f"{base}.lora_b"]).T

    change_weights(case, fuse)
    assert case.compare(adapter).kl_answer < 1e-6 < 1e-3 < case.compare().kl_answer


def test_weights_not_as_planned(tmp_path: Path) -> None:
    case = make(tmp_path / "written", bits=8)
    name = next(iter(case.plan))
    fewer = {key: value for key, value in case.plan.items() if key != name}
    assert f"quantized layers: {name} was not expected" in case.refusal(plan=fewer)
    for layer, problem in ((name, "is LayerQuantization(bits=8, "), ("vision_tower.x", "is missing")):
        assert f"{layer} {problem}" in case.refusal(plan={**case.plan, layer: LayerQuantization(4, 32)})
    more = {**case.shapes, "language_model.model.layers.9.weight": (2, 2)}
    assert "layers.9.weight is missing" in case.refusal(shapes=more)
    assert f"{name}.weight is " in case.refusal(shapes={**case.shapes, f"{name}.weight": (1, 1)})
    assert "was not expected" in case.refusal(shapes=dict(list(case.shapes.items())[1:]))
    change_weights(case, lambda weights: weights.pop(f"{name}.scales"))
    assert f"{name}." in case.refusal()


def test_truncated_weights(tmp_path: Path) -> None:
    case = make(tmp_path / "written", bits=8)
    file = case.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    case.refusal()


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    case = make(tmp_path / "written")

    def spoil(weights: dict[str, mx.array]) -> None:
        weights["language_model.model.norm.weight"] *= mx.nan

    change_weights(case, spoil)
    assert "not finite" in case.refusal()


@pytest.mark.parametrize("name", SIDE)
def test_missing_or_changed_files(name: str, tmp_path: Path) -> None:
    case = make(tmp_path / "written")
    file = case.folder / name
    # What names remote code is not the source's own, and may go.
    source = tmp_path / "source"
    shutil.copytree(case.source, source)
    change(source / name, lambda value: value.update(auto_map={"AutoTokenizer": "code.py"}))
    case = replace(case, source=source)
    case.verify()
    change(file, lambda value: value.update(a_key_of_its_own=1))
    assert f"{name} differs from its source's" in case.refusal()
    file.unlink()
    assert f"{name} is missing" in case.refusal()


def test_files_that_the_source_lacks(tmp_path: Path) -> None:
    case = make(tmp_path / "written")
    (case.folder / "chat_template.jinja").write_text("{{ messages }}")
    assert "chat_template.jinja is not in its source" in case.refusal()
    (case.folder / "chat_template.jinja").unlink()
    (case.folder / "modeling.py").touch()
    assert "it holds code, modeling.py" in case.refusal()


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda config: config.update(rope_theta=5.0), "rope_theta is 5.0"),
        (lambda config: config["vision_config"].update(window_size=28), "vision_config.window_size is 28"),
        (lambda config: config.update(eos_token_id=3), "eos_token_id is 3"),
        (lambda config: config.update(rms_norm_eps=0.5), "rms_norm_eps is 0.5"),
        (lambda config: config.update(model_type="llava"), "'llava' is not supported"),
    ],
)
def test_a_config_of_another_model(edit: Callable[[dict[str, Any]], Any], problem: str, tmp_path: Path) -> None:
    case = make(tmp_path / "written")
    change(case.folder / "config.json", edit)
    assert problem in case.refusal()


def test_tokens_that_the_tokenizer_lacks(tmp_path: Path) -> None:
    """Where source and folder agree, and both are wrong."""
    case = make(tmp_path / "written")
    source = tmp_path / "source"
    shutil.copytree(case.source, source)
    for folder in (source, case.folder):
        change(folder / "config.json", lambda config: config.update(vision_start_token_id=40))
    assert "vision_start_token_id 40 is no special token" in replace(case, source=source).refusal()


def test_other_tokens_than_the_source_reads(tmp_path: Path) -> None:
    case = make(tmp_path / "written")
    reference = answers_of(load_vlm(case.source, 512 * 512), COMPARISONS)
    prompts = ((*reference.prompts[0], 1), *reference.prompts[1:])
    assert "other tokens than its source" in case.refusal(replace(reference, prompts=prompts))


def test_the_record_holds_every_file(tmp_path: Path) -> None:
    case = make(tmp_path / "written")
    (case.folder / "deeper").mkdir()
    (case.folder / "deeper" / "file.txt").write_text("x")
    write_record(case.folder, {"source": {"name": "a/b"}, "fidelity": None})
    record = json.loads((case.folder / RECORD).read_text())
    assert record["source"] == {"name": "a/b"}
    assert set(record["versions"]) == {"mlxpref", "mlx", "mlx-vlm", "transformers"}
    files = {path.relative_to(case.folder).as_posix(): path for path in case.folder.rglob("*") if path.is_file()}
    del files[RECORD]
    assert record["sha256"] == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def test_the_revision_is_that_of_the_cache(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (tmp_path / "link").symlink_to(snapshot)
    assert revision_of(snapshot) == revision_of(tmp_path / "link") == commit
    assert revision_of(tmp_path) is None
