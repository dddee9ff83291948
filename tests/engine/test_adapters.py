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
from mlxpref.checkpoints.files import ADAPTER_CONFIG
from mlxpref.conversion.convert import convert
from mlxpref.conversion.quantize import Recipe
from mlxpref.engine.adapters import ADAPTER_WEIGHTS, load_adapter
from mlxpref.engine.lora import linear_layers
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

    folder = tmp_path / "converted"  # in float32, in which mlx-vlm's own sums for norms are exact, too
    convert(GOLDEN / family, folder, Recipe(bits), dtype="float32")
    vlm = fresh(folder)
    before = logits(vlm, golden)
    adapter = write_adapter(tmp_path / "adapter", vlm)
    load_adapter(vlm.model, adapter)
    after = logits(vlm, golden)
    assert np.abs(after - before).max() > 0.1
    theirs, processor = load(str(folder), adapter_path=str(adapter), trust_remote_code=False)
    theirs.vision_tower = vlm.model.vision_tower
    assert np.abs(logits(VLM(theirs, processor, Checkpoint.open(folder), 512 * 512), golden) - after).max() < 1e-4


@pytest.mark.parametrize("alpha", [None, 0.7, 8])
@pytest.mark.parametrize("name", [ADAPTER_WEIGHTS, "weights.safetensors"])
def test_mlx_vlms_older_format(name: str, alpha: float | None, tmp_path: Path) -> None:
    """`{"rank", "alpha", "dropout"}` and matrices A and B mean to us what they mean to mlx-vlm's own loader."""
    from mlx_vlm import load

    folder, golden = GOLDEN / "qwen2_5_vl", dict(np.load(GOLDEN / "qwen2_5_vl" / "golden.npz"))
    vlm = fresh(folder)
    before = logits(vlm, golden)
    adapter = write_adapter(tmp_path / "adapter", vlm)
    weights = {
        key.replace("lora_a", "A").replace("lora_b", "B"): w
        for key, w in mx.load(str(adapter / ADAPTER_WEIGHTS)).items()
    }
    (adapter / ADAPTER_WEIGHTS).unlink()
    mx.save_safetensors(str(adapter / name), weights)
    config = {"rank": 4, "alpha": alpha, "dropout": 0.1}
    (adapter / ADAPTER_CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    load_adapter(vlm.model, adapter)
    after = logits(vlm, golden)
    theirs, processor = load(str(folder), adapter_path=str(adapter), trust_remote_code=False)
    theirs.eval()
    theirs.update(tree_map(lambda x: x.astype(mx.float32) if x.dtype == mx.bfloat16 else x, theirs.parameters()))
    assert np.abs(logits(VLM(theirs, processor, Checkpoint.open(folder), 512 * 512), golden) - after).max() < 1e-4
    assert np.abs(after - before).max() > 1e-3


def adapter_beside(other: str, tmp_path: Path) -> tuple[VLM, Path]:
    """A model, and an adapter of it in a folder with another file."""
    vlm = fresh(GOLDEN / "qwen2_5_vl")
    adapter = write_adapter(tmp_path / "adapter", vlm)
    (adapter / other).parent.mkdir(exist_ok=True)
    (adapter / other).write_bytes(b"x")
    return vlm, adapter


@pytest.mark.parametrize(
    "other",
    [
        "vit.safetensors", "non_lora_state_dict.bin", "adapter_model.bin", "mm_projector.bin", "visual.pt",
        "value_head.safetensors", "adapter_model.safetensors", "new_embeddings.safetensors", "pytorch_model.bin",
        "visual/model.safetensors", "mm_projector/pytorch_model.bin", "modules_to_save.npz",
    ],
)  # fmt: skip
def test_half_of_an_adapter_in_another_file(other: str, tmp_path: Path) -> None:
    vlm, adapter = adapter_beside(other, tmp_path)
    with pytest.raises(ModelError, match=rf"adapters.safetensors.*{other}|{other}.*adapters.safetensors"):
        load_adapter(vlm.model, adapter)
    assert not any(isinstance(layer, LoRALinear) for _, layer in vlm.model.named_modules())


@pytest.mark.parametrize(
    "other",
    [
        "0000100_adapters.safetensors", "optimizer.pt", "optimizer.safetensors", "scheduler.pt", "rng_state_0.pth",
        "training_args.bin", "scaler.pt", "tokenizer.json", "checkpoint/adapters.safetensors",
        "checkpoint-100/adapter_model.safetensors", "global_step100/states.pt", "._adapters.safetensors",
    ],
)  # fmt: skip
def test_what_training_leaves_beside_an_adapter(other: str, tmp_path: Path) -> None:
    vlm, adapter = adapter_beside(other, tmp_path)
    load_adapter(vlm.model, adapter)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vision_tower.blocks.0.attn.qkv.lora_a", "it also changes the vision tower"),
        ("vision_tower.blocks.0.attn.qkv.weight", "it also changes the vision tower"),
        ("vision_tower.merger.mlp.0.lora_b", "it also changes the connector"),
        ("language_model.lm_head.lora_a", "it also changes the head"),
        ("language_model.model.embed_tokens.lora_a", "it also changes the embedding"),
        ("language_model.model.layers.0.self_attn.q_proj.m", "more than plain LoRA"),
    ],
)
def test_weights_of_more_than_the_language_layers(name: str, words: str, tmp_path: Path) -> None:
    vlm = fresh(GOLDEN / "qwen2_5_vl")
    file = write_adapter(tmp_path / "adapter", vlm) / ADAPTER_WEIGHTS
    mx.save_safetensors(str(file), dict(mx.load(str(file))) | {name: mx.ones((4, 4))})
    with pytest.raises(ModelError, match=words):
        load_adapter(vlm.model, tmp_path / "adapter")


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
        ({"config": {"rank": 4, "alpha": float("nan")}}, "not in mlx-vlm's format"),
        ({"config": {"rank": 0}}, "not in mlx-vlm's format"),
        ({"config": {"fine_tune_type": "full", "lora_parameters": parameters}}, "'full' adapter; only plain LoRA"),
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
    with pytest.raises(ModelError, match=r"no such adapter folder; to get one from the hub: `hf download some/lora"):
        load_adapter(vlm.model, Path("some/lora"))
    folder = write_adapter(tmp_path / "adapter", vlm)
    with pytest.raises(ModelError, match=r"no such adapter folder; give the folder that it is in"):
        load_adapter(vlm.model, folder / ADAPTER_WEIGHTS)
    with pytest.raises(ModelError, match=r"no adapter_config.json there; adapters are in adapter: give"):
        load_adapter(vlm.model, tmp_path)
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


def test_an_adapter_on_the_router_is_refused(tmp_path: Path) -> None:
    vlm = fresh(GOLDEN / "qwen3_vl_moe")
    names = [name for name in linear_layers(vlm.model) if name.endswith("mlp.gate")]
    with pytest.raises(ModelError, match="it also changes the router of the experts"):
        load_adapter(vlm.model, write_adapter(tmp_path / "adapter", vlm, names))


def test_an_adapter_on_the_gates_of_recurrent_layers(tmp_path: Path) -> None:
    """Training leaves these alone, but PEFT's "all-linear" takes them."""
    vlm, golden = fresh(GOLDEN / "qwen3_5"), dict(np.load(GOLDEN / "qwen3_5" / "golden.npz"))
    before = logits(vlm, golden)
    load_adapter(vlm.model, write_adapter(tmp_path / "adapter", vlm, list(linear_layers(vlm.model))))
    assert any(name.endswith("in_proj_a") for name, layer in vlm.model.named_modules() if isinstance(layer, LoRALinear))
    assert np.abs(logits(vlm, golden) - before).max() > 0.1
