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
from mlxpref.conversion import verify as verification
from mlxpref.conversion.fidelity import Fidelity, answers_of, built_in_comparisons
from mlxpref.conversion.quantize import LayerQuantization
from mlxpref.conversion.verify import Check, check_record, revision_of, source_answers, verify, write_record
from mlxpref.engine.vlm import load_vlm
from mlxpref.errors import ModelError
from tests.conftest import GOLDEN, write_adapter

CHECK = Check(built_in_comparisons()[:4])
SIDE = (
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class Made:
    """A folder made by hand, and what was meant to be in it."""

    folder: Path
    source: Path
    plan: dict[str, LayerQuantization]
    shapes: dict[str, tuple[int, ...]]

    def verify(self, check: Check = CHECK, adapter: Path | None = None) -> tuple[Fidelity | None, str | None]:
        return verify(self.folder, Checkpoint.open(self.source), self.plan, self.shapes, check, adapter=adapter)

    def refused(self, **changes: Any) -> str:
        """The line that names what is wrong."""
        made = replace(self, **changes)
        with pytest.raises(ModelError) as caught:
            made.verify(replace(CHECK, fidelity=False))
        said = str(caught.value)
        assert said.startswith(f"{self.source}: what was made of it cannot be used: ")
        assert said.endswith("; nothing was kept")
        assert "\n" not in said
        assert str(self.folder) not in said
        return said


def make(folder: Path, family: str = "qwen2_5_vl", bits: int | None = None, mode: str = "affine") -> Made:
    """A tiny checkpoint in MLX's layout, its language layers quantized by MLX, without any of our conversion."""
    source = GOLDEN / family
    model: Any = load_vlm(source, 512 * 512).model
    plan: dict[str, LayerQuantization] = {}
    config = json.loads((source / "config.json").read_text())
    if bits:
        nn.quantize(model.language_model, 32, bits, mode=mode)
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
    return Made(folder, source, plan, {name: tuple(weight.shape) for name, weight in weights.items()})


def change(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


def change_weights(made: Made, edit: Callable[[dict[str, mx.array]], Any]) -> None:
    file = made.folder / "model.safetensors"
    weights: Any = mx.load(str(file))
    mx.eval(weights)
    edit(weights)
    mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})


def test_what_is_right_is_measured(family: str, tmp_path: Path) -> None:
    same, skipped = make(tmp_path / "same", family).verify()
    assert skipped is None
    assert same == Fidelity(4, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, same.tokens if same else 0)
    found = [make(tmp_path / f"{bits}", family, bits).verify()[0] for bits in (8, 4, 2)]
    kls = [each.kl_answer for each in found if each]
    assert 0 < 10 * kls[0] < kls[1] < kls[2]
    assert json.loads(json.dumps(found[0].to_json() if found[0] else None))["kl_answer"] == kls[0]


def test_mxfp4_and_layers_of_their_own_are_found(tmp_path: Path) -> None:
    made = make(tmp_path / "fp4", bits=4, mode="mxfp4")
    fidelity, _ = made.verify()
    assert fidelity is not None
    assert fidelity.kl_answer > 0
    assert "mxfp4" in made.refused(plan={name: LayerQuantization(4, 32) for name in made.plan})


def test_without_fidelity_the_source_is_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path / "made", bits=8)
    loaded = []

    def load(folder: Path, *arguments: Any) -> Any:
        loaded.append(folder)
        return load_vlm(folder, *arguments)

    monkeypatch.setattr(verification, "load_vlm", load)
    assert made.verify(replace(CHECK, fidelity=False)) == (None, "it was not asked for")
    assert loaded == [Checkpoint.open(made.folder)]
    monkeypatch.setattr(verification, "device_working_set", lambda: 10**6)
    fidelity, skipped = made.verify()
    assert fidelity is None
    assert skipped is not None
    assert skipped.startswith("the source does not fit in memory: it needs about ")
    assert "at most 1.0 MB" in skipped
    assert loaded == [Checkpoint.open(made.folder)] * 2
    monkeypatch.undo()
    reference, _ = source_answers(Checkpoint.open(made.source), CHECK)
    monkeypatch.setattr(verification, "load_vlm", load)
    assert made.verify(replace(CHECK, reference=reference))[0] == make(tmp_path / "again", bits=8).verify()[0]
    assert loaded[:3] == [Checkpoint.open(made.folder)] * 3


def test_the_source_is_gone_before_the_folder_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two checkpoints at once would be the largest thing a conversion ever holds."""
    made = make(tmp_path / "made")
    held = []

    def load(folder: Path, *arguments: Any) -> Any:
        held.append(mx.get_active_memory())
        return load_vlm(folder, *arguments)

    monkeypatch.setattr(verification, "load_vlm", load)
    made.verify()
    size = sum(4 * int(np.prod(shape)) for shape in made.shapes.values())
    assert len(held) == 2
    assert held[1] - held[0] < size / 4


def test_an_adapter_in_the_weights_is_no_infidelity(tmp_path: Path) -> None:
    made = make(tmp_path / "fused")
    adapter = write_adapter(tmp_path / "adapter", load_vlm(made.source, 512 * 512))
    lora: Any = mx.load(str(adapter / "adapters.safetensors"))

    def fuse(weights: dict[str, mx.array]) -> None:
        for name in made.shapes:
            base = name.removesuffix(".weight")
            if f"{base}.lora_a" in lora:
                weights[name] = weights[name] + 2.0 * (lora[f"{base}.lora_a"] @ lora[f"{base}.lora_b"]).T

    change_weights(made, fuse)
    with_adapter, _ = made.verify(adapter=adapter)
    without, _ = made.verify()
    assert with_adapter is not None
    assert without is not None
    assert with_adapter.kl_answer < 1e-6 < 1e-3 < without.kl_answer


def test_weights_that_are_not_as_planned_are_named(tmp_path: Path) -> None:
    made = make(tmp_path / "made", bits=8)
    name = next(iter(made.plan))
    fewer = {key: value for key, value in made.plan.items() if key != name}
    assert f"quantized layers (bits, group size, mode): {name} was not expected" in made.refused(plan=fewer)
    assert f"{name} is (8, 32, 'affine'), not (4, 32, 'affine')" in made.refused(
        plan={**made.plan, name: LayerQuantization(4, 32)}
    )
    assert "vision_tower.x is missing" in made.refused(plan={**made.plan, "vision_tower.x": LayerQuantization(8, 32)})
    more = {**made.shapes, "language_model.model.layers.9.weight": (2, 2)}
    assert "layers.9.weight is missing" in made.refused(shapes=more)
    assert f"{name}.weight is " in made.refused(shapes={**made.shapes, f"{name}.weight": (1, 1)})
    assert "was not expected" in made.refused(shapes=dict(list(made.shapes.items())[1:]))
    change_weights(made, lambda weights: weights.pop(f"{name}.scales"))
    assert f"{name}.scales is missing" in made.refused()


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    made = make(tmp_path / "made", bits=8)
    file = made.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    made.refused()


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    made = make(tmp_path / "made")

    def spoil(weights: dict[str, mx.array]) -> None:
        weights["language_model.model.norm.weight"] *= mx.nan

    change_weights(made, spoil)
    assert "not finite" in made.refused()


@pytest.mark.parametrize("name", SIDE)
def test_files_that_are_missing_or_changed_are_named(name: str, tmp_path: Path) -> None:
    made = make(tmp_path / "made")
    file = made.folder / name
    # What names remote code is not the source's own, and may go.
    source = tmp_path / "source"
    shutil.copytree(made.source, source)
    change(source / name, lambda value: value.update(auto_map={"AutoTokenizer": "code.py"}))
    made = replace(made, source=source)
    assert made.verify(replace(CHECK, fidelity=False))[1]
    change(file, lambda value: value.update(a_key_of_its_own=1))
    assert f"{name} is not its source's" in made.refused()
    file.unlink()
    assert f"{name} is missing" in made.refused()


def test_files_that_the_source_lacks_are_named(tmp_path: Path) -> None:
    made = make(tmp_path / "made")
    (made.folder / "chat_template.jinja").write_text("{{ messages }}")
    assert "chat_template.jinja is none of its source" in made.refused()
    (made.folder / "chat_template.jinja").unlink()
    (made.folder / "modeling.py").touch()
    assert "it holds code, modeling.py" in made.refused()


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
def test_a_config_of_another_model_is_named(
    edit: Callable[[dict[str, Any]], Any], problem: str, tmp_path: Path
) -> None:
    made = make(tmp_path / "made")
    change(made.folder / "config.json", edit)
    assert problem in made.refused()


def test_tokens_that_the_tokenizer_lacks_are_named(tmp_path: Path) -> None:
    """Where source and folder agree, and both are wrong."""
    made = make(tmp_path / "made")
    source = tmp_path / "source"
    shutil.copytree(made.source, source)
    for folder in (source, made.folder):
        change(folder / "config.json", lambda config: config.update(vision_start_token_id=40))
    assert "vision_start_token_id 40 is no special token" in replace(made, source=source).refused()


def test_other_tokens_than_the_source_reads_are_named(tmp_path: Path) -> None:
    made = make(tmp_path / "made")
    reference = answers_of(load_vlm(made.source, 512 * 512), CHECK.comparisons)
    prompts = ((*reference.prompts[0], 1), *reference.prompts[1:])
    with pytest.raises(ModelError, match=r"qwen2_5_vl: .* other tokens than its source"):
        made.verify(replace(CHECK, reference=replace(reference, prompts=prompts)))


def test_the_record_holds_every_file(tmp_path: Path) -> None:
    made = make(tmp_path / "made")
    (made.folder / "deeper").mkdir()
    (made.folder / "deeper" / "file.txt").write_text("x")
    write_record(made.folder, {"source": {"name": "a/b"}, "fidelity": None})
    record = json.loads((made.folder / RECORD).read_text())
    assert record["source"] == {"name": "a/b"}
    assert set(record["versions"]) == {"mlxpref", "mlx", "mlx-vlm", "transformers"}
    files = {path.relative_to(made.folder).as_posix(): path for path in made.folder.rglob("*") if path.is_file()}
    del files[RECORD]
    assert record["sha256"] == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert check_record(made.folder) == []
    change_weights(made, lambda weights: weights.update(x=mx.zeros((2,))))
    (made.folder / "tokenizer.json").unlink()
    assert sorted(check_record(made.folder)) == ["model.safetensors", "tokenizer.json"]
    write_record(made.folder, {})
    assert check_record(made.folder) == []
    assert load_vlm(make(tmp_path / "loads").folder, 512 * 512)


def test_records_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no mlxpref\.json there"):
        check_record(tmp_path)
    for text in ("{}", '{"sha256": []}', '{"sha256": {"../out": "0"}}', '{"sha256": {"/etc/hosts": "0"}}', "[]", "{"):
        (tmp_path / RECORD).write_text(text)
        with pytest.raises(ModelError, match=r"mlxpref\.json"):
            check_record(tmp_path)


def test_the_revision_is_that_of_the_cache(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (tmp_path / "link").symlink_to(snapshot)
    assert revision_of(snapshot) == revision_of(tmp_path / "link") == commit
    assert revision_of(tmp_path) is None
