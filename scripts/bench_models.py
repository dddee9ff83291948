"""The judges of the benchmarks: one checkpoint for both sides, equal weights and adapters, and what a token costs.

The judge of `qwen2_5_vl` is the demo's own. That of `qwen3_5` has random weights, about its size and its words: layers
of two kinds, of which every fourth attends.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mlxpref._blas import preload

preload()  # before MLX is first imported

import click  # noqa: E402
import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten, tree_map, tree_unflatten  # noqa: E402

from mlxpref.demo import JUDGE  # noqa: E402
from mlxpref.engine.lora import adapter_weights, attach_lora, linear_layers, linear_shape, lora_targets  # noqa: E402
from mlxpref.engine.vlm import VLM, load_vlm  # noqa: E402

__all__ = [
    "DEMO_SIZE",
    "FAMILIES",
    "LARGEST",
    "attach_equal_adapters",
    "build_hybrid",
    "decoder_operations",
    "family_option",
    "give_random_weights",
    "hybrid_config",
    "load_both",
    "make_endless",
    "named",
    "pixels_of_a_token",
    "vision_operations",
]

F = TypeVar("F", bound=Callable[..., Any])

FAMILIES = ("qwen2_5_vl", "qwen3_5")
LARGEST = 1 << 20
"""Pixels that a picture may have; the demo judge's own checkpoint shrinks pictures to 84 by 84."""
DEMO_SIZE: dict[str, dict[str, int]] = {
    "text": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    },
    "vision": {"depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2},
}  # fmt: skip
_SLOW = -2.5
"""The middle of the logarithms of decay rates: a state keeps about 0.9 of itself from token to token."""


def family_option(command: F) -> F:
    """Add the option of a benchmark that says whose architecture the judge has."""
    said = "The judge's architecture: the demo judge's own, or random weights with recurrent layers."
    option = click.option("--family", type=click.Choice(FAMILIES), default=FAMILIES[0], show_default=True, help=said)
    return option(command)


def load_both(folder: Path, family: str = FAMILIES[0]) -> tuple[VLM, Any, Any]:
    """A judge for pictures of any size, in float32: ours, mlx-vlm's own model beside it, and the processor.

    `folder` is where a copy of the checkpoint is written whose processor shrinks no picture.
    """
    from mlx_vlm.utils import load

    copy = folder / "judge"
    if family == FAMILIES[0]:
        shutil.copytree(JUDGE, copy)
        change_json(copy / "preprocessor_config.json", max_pixels=LARGEST)
    else:
        model = build_hybrid(hybrid_config(DEMO_SIZE), copy)
        mx.save_safetensors(str(copy / "model.safetensors"), dict(named(model.parameters())), {"format": "mlx"})
    vlm = load_vlm(copy, LARGEST, mx.float32)
    model, processor = load(str(copy), trust_remote_code=False)
    model.update(tree_map(lambda x: x.astype(mx.float32), model.parameters()))
    model.eval()
    if (
        family != FAMILIES[0]
    ):  # what ours does not say, or passes over before an answer, is unlikely: both write the same
        silent = mx.array([*vlm.suppressed_ids, *vlm.tokenizer.blank_ids])
        for each in (vlm.model, model):
            each.language_model.model.embed_tokens.weight[silent] = 0
    mx.eval(model.parameters())
    return vlm, model, processor


def change_json(file: Path, **changes: Any) -> None:
    """Change a file that has one JSON object."""
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def hybrid_config(sizes: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """The config of a Qwen3.5 whose language model and vision tower have these sizes, with the demo judge's words."""
    text, vision = sizes["text"], sizes["vision"]
    demo = json.loads((JUDGE / "config.json").read_text(encoding="utf-8"))
    rotating = text["head_dim"] // 8  # frequencies: a quarter of a head rotates, two numbers together
    height = width = rotating // 3
    rope = {
        "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_interleaved": True,
        "mrope_section": [rotating - height - width, height, width],
    }  # fmt: skip
    same = ("vocab_size", "tie_word_embeddings", "eos_token_id", "rms_norm_eps", "max_position_embeddings")
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    patches = {
        "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
        "num_position_embeddings": 2304, "deepstack_visual_indexes": [], "out_hidden_size": text["hidden_size"],
    }  # fmt: skip
    layers = {"full_attention_interval": 4, "linear_conv_kernel_dim": 4, "attn_output_gate": True}
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        **{key: demo[key] for key in ("tie_word_embeddings", *tokens)},
        "text_config": {"model_type": "qwen3_5_text", "rope_parameters": rope}
        | {key: demo[key] for key in same}
        | layers
        | dict(text),
        "vision_config": {"model_type": "qwen3_5"} | patches | dict(vision),
    }


def build_hybrid(config: Mapping[str, Any], folder: Path) -> Any:
    """mlx-vlm's model of such a config, with lazy random weights.

    `folder` is where its checkpoint is written, without weights: the demo judge's words, and pictures of any size.
    """
    from mlx_vlm.models.qwen3_5 import Model, ModelConfig

    shutil.copytree(JUDGE, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    patch = config["vision_config"]["patch_size"]
    processor = {"min_pixels": (2 * patch) ** 2, "max_pixels": LARGEST, "processor_class": "Qwen3VLProcessor"}
    change_json(folder / "preprocessor_config.json", patch_size=patch, **processor)
    mx.random.seed(0)
    model = Model(ModelConfig.from_dict(dict(config)))
    for layer in model.language_model.model.layers:
        if "linear_attn" in layer:
            layer.linear_attn.A_log = _SLOW + mx.random.normal(layer.linear_attn.A_log.shape)
    return model


def named(tree: Any) -> list[tuple[str, mx.array]]:
    """The arrays of a tree by their full names, in the order of the names."""
    found: dict[str, mx.array] = dict(tree_flatten(tree))
    return sorted(found.items())


def give_random_weights(vlm: VLM, model: Any) -> None:
    """Replace the language model's weights by random ones, equal on both sides, at whose scale every token is likely.

    The decays of recurrent layers stay.
    """
    for each in (vlm.model, model):
        draw = np.random.default_rng(0)
        language, weights = each.language_model, list[tuple[str, mx.array]]()
        for name, old in named(language.parameters()):
            scale = 0.2 if "embed_tokens" in name else (old[0].size if old.ndim > 1 else old.size) ** -0.5
            drawn = mx.array(scale * draw.standard_normal(old.shape), mx.float32)
            if not name.endswith(("A_log", "dt_bias")):
                weights.append((name, mx.ones_like(old) if "norm" in name else drawn))
        language.update(tree_unflatten(weights))
        mx.eval(language.parameters())
    make_endless(vlm)


def make_endless(vlm: VLM) -> None:
    """Let completions end only where they are cut: by chance one may end, or close its reasons and answer."""
    vlm.eos_ids = frozenset()
    for token in vlm.tokenizer.encode_template_text("</think>"):
        vlm.tokenizer.vocabulary[token] = ""


def attach_equal_adapters(vlm: VLM, model: Any, rank: int) -> None:
    """An adapter whose B is not zero on the linear layers that training adapts, equal on both sides."""
    for each in (vlm.model, model):
        attach_lora(each, lora_targets(each), rank, scale=2.0)
        draw = np.random.default_rng(0)
        drawn = [
            (name, mx.array(0.02 * draw.standard_normal(old.shape), mx.float32))
            for name, old in named(adapter_weights(each))
        ]
        each.update(tree_unflatten(drawn))
        mx.eval(each.parameters())


def pixels_of_a_token(model: Any) -> int:
    """Pixels along a side of a picture for one token."""
    config = model.config.vision_config
    return int(config.patch_size * config.spatial_merge_size)


def decoder_operations(model: Any, count: int, before: int = 0, heads: int = 0) -> int:
    """Multiply-adds of `count` tokens in the language model, behind `before` others, with the head at `heads` of them.

    A token meets every weight of the linear layers once. In a layer that attends its queries meet the keys of itself
    and of all before it, and what comes out meets as many values. A recurrent layer convolves, and its state answers a
    key, learns, and answers a query. Norms, rotations, decays and softmax are left out.
    """
    arguments = model.language_model.args
    weights = sum(math.prod(linear_shape(layer)) for layer in linear_layers(model).values())
    keys = count * before + count * (count + 1) // 2
    mixing = sum(
        2 * keys * arguments.num_attention_heads * layer.self_attn.head_dim
        if "self_attn" in layer
        else count * _recurrent_operations(layer.linear_attn)
        for layer in model.language_model.model.layers
    )
    return int(count * weights + mixing + heads * arguments.vocab_size * arguments.hidden_size)


def _recurrent_operations(module: nn.Module) -> int:
    """Multiply-adds of a token in a recurrent layer, beside its linear layers, by the rule token by token.

    In chunks of C tokens the rule takes more, C (2 W + K + C / 3) more in each head of values and 2 C K in each head of
    keys, which are K numbers, and values W: that is a price of speed, so no part of a bound.
    """
    state = module.num_v_heads * module.head_v_dim * module.head_k_dim
    return int(module.conv1d.weight.size + 3 * state)


def vision_operations(model: Any, pixels: int) -> int:
    """Multiply-adds of one square picture in a vision tower: weights, and attention in windows or in full.

    The merger runs once for every four patches. Positions that are looked up cost nothing.
    """
    tower, config = model.vision_tower, model.config.vision_config
    side = pixels // config.patch_size
    matrices = [(name, weight.size) for name, weight in named(tower.parameters()) if weight.ndim > 1]
    per_patch = sum(size for name, size in matrices if "merger" not in name and "pos_embed" not in name)
    per_token = sum(size for name, size in matrices if "merger" in name)
    full = len(set(getattr(tower, "fullatt_block_indexes", range(config.depth))) & set(range(config.depth)))
    keys = full * side**4
    if full < config.depth:
        window = config.window_size // config.patch_size
        sides = [min(window, side - start) for start in range(0, side, window)]
        keys += (config.depth - full) * sum((height * width) ** 2 for height in sides for width in sides)
    merge = config.spatial_merge_size**2
    return int(side**2 * per_patch + side**2 // merge * per_token + 2 * keys * config.hidden_size)
