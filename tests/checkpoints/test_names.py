"""Tensors in every spelling go to the same places; weights of another kind are named for what they are."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxpref.checkpoints.families import FAMILIES
from mlxpref.checkpoints.names import hub_name, mlx_name, places_of
from mlxpref.conversion.convert import convert
from mlxpref.conversion.quantize import Recipe
from mlxpref.engine.vlm import load_vlm
from mlxpref.errors import ModelError
from tests.conftest import GOLDEN, hidden_states, tiny_model
from tests.engine.test_vlm import golden_input
from tests.variants import change_config, read_weights, write_weights


def old(name: str) -> str:
    """As transformers before 4.52 named the Qwen2-VL families, and their files on the hub still do."""
    return hub_name(mlx_name(name), "qwen2_vl")


def new(name: str) -> str:
    """As transformers names all families since 4.52."""
    return hub_name(mlx_name(name))


SPELLINGS: dict[str, Callable[[str], str]] = {
    "before 4.52": old,
    "since 4.52": new,
    "mlx-vlm": mlx_name,
    "language model within": lambda name: old(name).replace("model.", "language_model.model."),
    "base model alone": lambda name: new(name).removeprefix("model."),
    "DistributedDataParallel": lambda name: f"module.{new(name)}",
    "torch.compile": lambda name: f"_orig_mod.{old(name)}",
    "torch.compile of layers": lambda name: new(name).replace(".self_attn.", "._orig_mod.self_attn."),
    "PEFT after merging": lambda name: f"base_model.model.{new(name)}",
    "a wrapper's attribute": lambda name: f"model.{old(name)}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_model(spelling: str, family: str, folder: Path) -> None:
    weights = {SPELLINGS[spelling](name): array for name, array in read_weights(folder).items()}
    assert not any("inv_freq" in name for name in weights)
    write_weights(folder, weights)
    ours, vlm = tiny_model(family), load_vlm(folder, 512 * 512)
    golden = dict(np.load(GOLDEN / family / "golden.npz"))
    states = [np.array(hidden_states(each, [golden_input(each, golden)])) for each in (ours, vlm)]
    assert np.array_equal(*states)


def test_a_converted_model_has_the_usual_names(one: Path, tmp_path: Path) -> None:
    convert(one, tmp_path / "expected", Recipe(8, 32))
    write_weights(one, {new(name): array for name, array in read_weights(one).items()})
    convert(one, tmp_path / "out", Recipe(8, 32))
    expected, weights = read_weights(tmp_path / "expected"), read_weights(tmp_path / "out")
    assert expected.keys() == weights.keys()
    assert all(bool(mx.array_equal(weights[name], array)) for name, array in expected.items())


def test_leftovers_are_passed_over(family: str, folder: Path) -> None:
    """What transformers, too, passes over: tables of rotation, positions and masks, which the model computes itself."""
    table = mx.ones((4,))
    left = ("layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq", "layers.1.self_attn.rotary_emb.cos_cached",
            "layers.0.self_attn.masked_bias", "embeddings.position_ids")  # fmt: skip
    leftovers = {f"model.{name}": table for name in left} | {"visual.rotary_pos_emb.inv_freq": table}
    write_weights(folder, read_weights(folder) | leftovers)
    vlm, golden = load_vlm(folder, 512 * 512), dict(np.load(GOLDEN / family / "golden.npz"))
    states = [np.array(hidden_states(each, [golden_input(each, golden)])) for each in (tiny_model(family), vlm)]
    assert np.array_equal(*states)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_go_there_and_back(family: str) -> None:
    names = set(read_weights(GOLDEN / family))
    assert {hub_name(mlx_name(name), family) for name in names} == names


FOREIGN = {
    "model.layers.0.self_attn.rotary_emb.frequencies": "no place for 1 of its tensors, such as .*frequencies;",
    "model.layers.0.mlp.experts.0.up_proj.weight": "no place for 1 of its tensors, such as .*layers.0.mlp",
    "audio_tower.conv.weight": "which no Qwen2.5-VL has",
    "rm_head.0.weight": "a reward model with a head of its own",
    "score.weight": "a reward model with a head of its own",
    "v_head.summary.bias": "a reward model with a head of its own",
    "model.value_head.weight": "a reward model with a head of its own",
    "regression_head.weight": "a reward model with a head of its own",
    "model.score_head.0.weight": "a reward model with a head of its own",
    "v_head": "a reward model with a head of its own",
    "model.layers.0.self_attn.q_proj.lora_A.weight": "a LoRA adapter that is not merged: merge it first",
    "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight": "not merged: merge it first",
    "language_model.model.layers.0.self_attn.q_proj.lora_a": "not merged",
    "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4": "quantized by bitsandbytes: .*`mlxpref convert`",
    "model.layers.0.mlp.up_proj.SCB": "quantized by bitsandbytes",
    "model.layers.0.mlp.up_proj.qweight": "quantized by GPTQ or AWQ",
    "model.layers.0.mlp.up_proj.weight_scale_inv": "quantized to FP8",
    "model.layers.0.mlp.up_proj.weight_packed": "by compressed-tensors",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_weights_of_another_kind(name: str, one: Path) -> None:
    write_weights(one, read_weights(one) | {name: mx.ones((4, 4))})
    with pytest.raises(ModelError, match=FOREIGN[name]) as caught:
        load_vlm(one, 512 * 512)
    assert str(caught.value).startswith(f"{one}: ")
    assert "\n" not in str(caught.value)


def test_one_place_for_two_tensors() -> None:
    with pytest.raises(ModelError, match=r"'model.norm.weight' and 'model.language_model.norm.weight' .* twice"):
        places_of(["model.norm.weight", "model.language_model.norm.weight"], FAMILIES["qwen3_vl"], "folder")


def test_a_language_model_alone(one: Path) -> None:
    """The vision tower's weights are missing, whatever the config says."""
    write_weights(one, {name: array for name, array in read_weights(one).items() if "visual" not in name})
    with pytest.raises(ModelError, match=r"no weights of the vision_tower there"):
        load_vlm(one, 512 * 512)
    change_config(one, model_type="qwen2_5_vl_text")
    with pytest.raises(ModelError, match=r"only the language model of Qwen2.5-VL, which cannot see"):
        load_vlm(one, 512 * 512)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llava"}, "architecture 'llava' is not supported; give one of Qwen2-VL"),
        ({"model_type": "internvl_chat", "auto_map": {"AutoModel": "x.y"}}, "architecture 'internvl_chat'"),
        ({"model_type": "gemma3", "quantization_config": {"quant_method": "fp8"}}, "quantized by fp8"),
        ({"model_type": ..., "_class_name": "FluxTransformer2DModel"}, "architecture .*Qwen2_5_VL|Flux"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantized by bitsandbytes"),
        ({"quantization_config": {"_load_in_4bit": True}}, "quantized by _load_in_4bit"),
        ({"model_type": ..., "architectures": ["LlavaForConditionalGeneration"]}, "architecture 'LlavaForCond"),
        ({"model_type": ..., "architectures": ...}, "'without a model_type'"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "quantized by awq"),
    ],
)
def test_another_architecture_is_named_before_weights_are_read(
    changes: dict[str, object], words: str, one: Path
) -> None:
    change_config(one, **changes)
    (one / "model.safetensors").write_bytes(b"nothing that could be read")
    with pytest.raises(ModelError, match=words):
        load_vlm(one, 512 * 512)
