"""Adapters: the right one changes what the model says as in mlx-vlm; one of another model is refused, unchanged."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.tuner.lora import LoRALinear

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.conversion.convert import convert
from mlxpref.conversion.quantize import Recipe
from mlxpref.engine.adapters import ADAPTER_WEIGHTS, load_adapter
from mlxpref.engine.lora import linear_layers
from mlxpref.engine.peft import ADAPTER_CONFIG
from mlxpref.engine.vlm import VLM, load_vlm
from mlxpref.errors import ModelError
from tests.conftest import GOLDEN, hidden_states, write_adapter
from tests.engine.test_vlm import golden_input, text_logits


def fresh(folder: Path) -> VLM:
    return load_vlm(folder, max_pixels=512 * 512)


def logits(vlm: VLM, golden: dict[str, Any]) -> np.ndarray:
    hidden = hidden_states(vlm, [golden_input(vlm, golden)])
    return text_logits(vlm, vlm.head(hidden)[0, -1])


@pytest.mark.parametrize("bits", [None, 4])
def test_an_adapter_equals_mlx_vlms(family: str, golden: dict[str, Any], tmp_path: Path, bits: int | None) -> None:
    from mlx_vlm import load

    folder = GOLDEN / family
    if bits:
        convert(folder, tmp_path / "converted", Recipe(bits), dtype="float32")
        folder = tmp_path / "converted"
    vlm = fresh(folder)
    before = logits(vlm, golden)
    adapter = write_adapter(tmp_path / "adapter", vlm)
    load_adapter(vlm.model, adapter)
    after = logits(vlm, golden)
    assert np.abs(after - before).max() > 0.1
    theirs, processor = load(str(folder), adapter_path=str(adapter), trust_remote_code=False)
    theirs.update(tree_map(lambda x: x.astype(mx.float32) if x.dtype == mx.bfloat16 else x, theirs.parameters()))
    assert np.abs(logits(VLM(theirs, processor, Checkpoint.open(folder), 512 * 512), golden) - after).max() < 1e-4


def test_an_adapter_may_touch_a_few_layers(tmp_path: Path) -> None:
    vlm = fresh(GOLDEN / "qwen2_5_vl")
    names = [name for name in linear_layers(vlm.model) if name.endswith("q_proj")]
    load_adapter(vlm.model, write_adapter(tmp_path / "adapter", vlm, names))
    changed = {name for name, layer in vlm.model.named_modules() if isinstance(layer, LoRALinear)}
    assert changed == set(names)


def broken(folder: Path, config: Any = None, drop: str = "", rename: tuple[str, str] = ("", "")) -> Path:
    """The adapter with its config or its weights changed."""
    if config is not None:
        (folder / ADAPTER_CONFIG).write_text(config if isinstance(config, str) else json.dumps(config))
    weights = mx.load(str(folder / ADAPTER_WEIGHTS))
    arrays = {name.replace(*rename): weight for name, weight in weights.items() if not drop or not name.endswith(drop)}
    mx.save_safetensors(str(folder / ADAPTER_WEIGHTS), arrays)
    return folder


def test_adapters_of_another_model_are_refused(tmp_path: Path) -> None:
    vlm = fresh(GOLDEN / "qwen2_5_vl")
    names = {name for name, _ in vlm.model.named_modules()}
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0}

    def adapter(**changes: Any) -> Path:
        return broken(write_adapter(tmp_path / "adapter", vlm), **changes)

    for changes, problem in (
        (
            {"config": {"lora_parameters": parameters | {"rank": 8}}},
            r"another model: .*lora_a is \(64, 4\), .*\(64, 8\)",
        ),
        ({"rename": ("q_proj", "query")}, r"adapter of another model: the judge has no place for .*\.query\.lora_a"),
        ({"rename": ("layers.1", "layers.7")}, r"adapter of another model: the judge has no place for .*layers\.7"),
        ({"rename": ("lora_b", "lora_c")}, "has only one of lora_a and lora_b"),
        ({"drop": "v_proj.lora_b"}, "v_proj has only one of lora_a and lora_b"),
        ({"drop": "lora_a"}, "has only one of lora_a and lora_b"),
        ({"config": "{"}, "adapter_config.json: not readable as JSON: .*; copy or train the adapter again"),
        ({"config": []}, "adapter_config.json: not readable as JSON: .*; copy or train the adapter again"),
        ({"config": {}}, "adapter_config.json: not in mlx-vlm's format"),
        ({"config": {"lora_parameters": parameters | {"scale": float("inf")}}}, "not in mlx-vlm's format"),
        ({"config": {"lora_parameters": {"rank": "many", "scale": 1}}}, "not in mlx-vlm's format"),
        ({"config": {"fine_tune_type": "dora", "lora_parameters": parameters}}, "'dora' adapter; only plain LoRA"),
    ):
        with pytest.raises(ModelError, match=problem) as caught:
            load_adapter(vlm.model, adapter(**changes))
        assert str(tmp_path / "adapter") in str(caught.value)
        assert "\n" not in str(caught.value)
    assert {name for name, _ in vlm.model.named_modules()} == names


def test_missing_adapters_are_refused(tmp_path: Path) -> None:
    vlm = fresh(GOLDEN / "qwen2_5_vl")
    with pytest.raises(ModelError, match="nowhere: no such adapter folder"):
        load_adapter(vlm.model, tmp_path / "nowhere")
    folder = write_adapter(tmp_path / "adapter", vlm)
    weights = (folder / ADAPTER_WEIGHTS).read_bytes()
    (folder / ADAPTER_WEIGHTS).write_bytes(weights[:2000])
    with pytest.raises(
        ModelError, match=r"adapters.safetensors: not readable as weights: .*; copy or train the adapter again"
    ):
        load_adapter(vlm.model, folder)
    (folder / ADAPTER_WEIGHTS).write_bytes(b"\2\0\0\0\0\0\0\0{}")
    with pytest.raises(ModelError, match=r"adapter: holds no weights"):
        load_adapter(vlm.model, folder)
    (folder / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r"no adapters.safetensors there"):
        load_adapter(vlm.model, folder)
