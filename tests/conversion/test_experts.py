"""Experts in every recipe: quantized as their other layers are, loaded by mlx-vlm, and the same from any layout."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.conversion.convert import convert
from mlxpref.conversion.fidelity import Answers, answers_of, built_in_comparisons
from mlxpref.conversion.quantize import LayerQuantization, Recipe, cast, dequantize, plan_layers, quantized_layers
from mlxpref.engine.mlx_model import lazy_model
from mlxpref.engine.vlm import VLM, load_vlm
from mlxpref.errors import ModelError
from scripts.conversion_memory import make_checkpoint
from tests.variants import read_weights, write_weights

COMPARISONS = built_in_comparisons()[:2]
SIZES = {
    "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 256, "num_attention_heads": 8,
    "num_hidden_layers": 4, "decoder_sparse_step": 2,
}  # fmt: skip
"""Widths that every group size divides; of four layers the second and the fourth have experts."""
ROUTERS = {f"language_model.model.layers.{layer}.mlp.gate" for layer in (1, 3)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts") / "source"
    make_checkpoint(folder, "qwen3_vl_moe", SIZES, 10**9)
    return folder


@pytest.fixture(scope="module")
def answers(source: Path) -> Answers:
    return answers_of(load_vlm(source, 512 * 512), COMPARISONS)


def switch(layer: int, projection: str) -> str:
    return f"language_model.model.layers.{layer}.mlp.switch_mlp.{projection}_proj"


def parameters(model: object) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "group_size"),
    [("2", 32), ("3", 64), ("4", 64), ("4", 128), ("5", 32), ("6", 64), ("8", 64), ("mixed_3_6", 64), ("mxfp4", 32)],
)
def test_experts_are_quantized_by_every_recipe(
    source: Path, answers: Answers, tmp_path: Path, name: str, group_size: int
) -> None:
    from mlx_vlm import load

    recipe = Recipe.named(name, group_size)
    result = convert(source, tmp_path / "out", recipe, dtype="float32")
    vlm = load_vlm(tmp_path / "out", 512 * 512)
    plan = quantized_layers(vlm.model)
    assert (result["left"], result["quantized_layers"]) == ([], len(plan))
    assert {switch(layer, each) for layer in (1, 3) for each in ("gate", "up", "down")} < plan.keys()
    assert {plan[path] for path in ROUTERS} == {LayerQuantization(8, 64)}
    rest = {path: layer for path, layer in plan.items() if path not in ROUTERS}
    more = {path: layer.bits for path, layer in rest.items() if layer != recipe.default_layer}
    if recipe.high_bits:
        assert more[switch(3, "down")] == more["language_model.model.layers.2.self_attn.v_proj"] == recipe.high_bits
        assert not any("gate_proj" in path or "up_proj" in path for path in more)
    else:
        assert not more
    theirs, _ = load(str(tmp_path / "out"), trust_remote_code=False)
    assert quantized_layers(theirs) == plan
    weights, ours = parameters(theirs), parameters(vlm.model)
    assert weights.keys() == ours.keys()
    assert all(mx.array_equal(weight, ours[key]) for key, weight in weights.items())
    check_against_own_weights(vlm, answers)


def check_against_own_weights(vlm: VLM, answers: Answers) -> None:
    """The same model with its own dequantized weights, unquantized: an independent path through plain layers."""
    quantized = answers_of(vlm, COMPARISONS, answers.completions)
    dequantize(vlm.model, quantized_layers(vlm.model))
    cast(vlm.model, mx.float32, {})  # those of mxfp4 are in bfloat16
    assert not quantized_layers(vlm.model)
    plain = answers_of(vlm, COMPARISONS, answers.completions)
    logits = [np.maximum(each.logits, -1e3) for each in (quantized, plain)]  # those of suppressed tokens are infinite
    assert np.abs(logits[0] - logits[1]).max() < 1e-3


def test_sizes_and_fidelity(source: Path, answers: Answers, tmp_path: Path) -> None:
    results = {
        name: convert(source, tmp_path / name, Recipe.named(name, 64), comparisons=COMPARISONS, reference=answers)
        for name in ("none", "8", "4", "2")
    }
    assert results["none"]["bits_per_weight"] == 16
    weights = parameters(lazy_model(Checkpoint.open(source)))
    total, plan = (
        sum(weight.size for weight in weights.values()),
        quantized_layers(load_vlm(tmp_path / "4", 4096).model),
    )
    # A group of 64 has two numbers in half precision.
    bits = sum(
        weights[f"{path}.weight"].size * (layer.bits + 32 / layer.group_size - 16) for path, layer in plan.items()
    )
    assert results["4"]["bits_per_weight"] == pytest.approx(16 + bits / total, abs=1e-4)
    kls = [results[name]["fidelity"]["kl_answer"] for name in ("none", "8", "4", "2")]
    assert kls == sorted(kls)
    assert kls[1] < kls[3] / 10


def test_experts_are_quantized_again(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "eight", Recipe(8, 64), dtype="float32")
    with pytest.raises(ModelError, match="already quantized to 8 bit"):
        convert(tmp_path / "eight", tmp_path / "four")
    convert(tmp_path / "eight", tmp_path / "plain", Recipe(None), dtype="float32", requantize=True)
    convert(tmp_path / "plain", tmp_path / "again", Recipe(8, 64), dtype="float32")
    eight, again = (read_weights(tmp_path / name) for name in ("eight", "again"))
    assert eight.keys() == again.keys()
    four = convert(tmp_path / "eight", tmp_path / "four", Recipe(4, 64), requantize=True)
    assert four["quantized_layers"] == len(quantized_layers(lazy_model(Checkpoint.open(tmp_path / "eight"))))


def test_a_width_that_no_group_divides(source: Path) -> None:
    model = lazy_model(Checkpoint.open(source))
    layer = dict(model.named_modules())[switch(1, "down")]
    layer.weight = layer.weight[..., :96]
    plan, left = plan_layers(model, Recipe(4, 64))
    assert left == [switch(1, "down")]
    assert switch(1, "up") in plan


def test_a_tensor_for_each_expert(source: Path, tmp_path: Path) -> None:
    """As training tools write them; the layout of transformers 5 has a test in test_convert.py."""
    other = Path(shutil.copytree(source, tmp_path / "other"))
    weights: dict[str, mx.array] = {}
    for name, weight in read_weights(source).items():
        place, _, projection = name.rpartition(".")
        names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(projection)
        if not place.endswith(".experts") or names is None:
            weights[name] = weight
            continue
        for each, part in zip(names, mx.split(weight, len(names), axis=2), strict=True):
            weights |= {f"{place}.{i}.{each}.weight": mx.contiguous(one.T) for i, one in enumerate(part)}
    write_weights(other, weights)
    for name, folder in {"a": source, "b": other}.items():
        convert(folder, tmp_path / name, Recipe(4, 64))
    ours, theirs = (read_weights(tmp_path / name) for name in "ab")
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(weight, theirs[name]) for name, weight in ours.items())
