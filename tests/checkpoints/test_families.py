"""What differs from family to family: recurrent layers, experts, names; and families that are not supported."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlxpref.checkpoints
from mlxpref.checkpoints import families
from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.checks import check_folder
from mlxpref.checkpoints.families import FAMILIES, OTHERS
from mlxpref.checkpoints.hf_config import check_kind
from mlxpref.checkpoints.memory import ModelSize
from mlxpref.checkpoints.names import hub_name, mlx_name, places_of
from mlxpref.errors import ModelError
from tests.conftest import GOLDEN
from tests.variants import change_config, read_weights, write_transformers_5, write_weights


@pytest.fixture
def copied(tmp_path: Path) -> Callable[..., Path]:
    """Copies a family's checkpoint and sets keys of its text_config, or removes those given as ...."""

    def copy(family: str, **changes: Any) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(GOLDEN / family, folder, ignore=shutil.ignore_patterns("*.npz"))
        text = json.loads((folder / "config.json").read_text())["text_config"] | changes
        change_config(folder, text_config={key: value for key, value in text.items() if value is not ...})
        return folder

    return copy


# Configs


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_5_means_the_same(family: str, tmp_path: Path) -> None:
    ours = Checkpoint(GOLDEN / family).config
    theirs = Checkpoint(write_transformers_5(GOLDEN / family, tmp_path / "v5")).config
    mine, other = (FAMILIES[family].language(config) for config in (ours, theirs))
    assert {key: other[key] for key in FAMILIES[family].text if key in mine} == {
        key: mine[key] for key in FAMILIES[family].text if key in mine
    }
    assert other[FAMILIES[family].rope].items() >= mine[FAMILIES[family].rope].items()
    assert theirs["vision_config"].items() >= ours["vision_config"].items()


MEANS_THE_SAME: dict[str, tuple[str, dict[str, Any]]] = {
    "nulls": ("qwen3_5", {"linear_conv_kernel_dim": None, "full_attention_interval": None, "attn_output_gate": None}),
    "layer types alone": ("qwen3_5", {"full_attention_interval": ...}),
    "the interval alone": ("qwen3_5", {"layer_types": ...}),
    "null experts' keys": ("qwen3_vl_moe", {"norm_topk_prob": None, "mlp_only_layers": None}),
    "experts' older keys": ("qwen3_vl_moe", {"decoder_sparse_step": ..., "mlp_only_layers": ..., "head_dim": ...}),
    "experts' new name": ("qwen3_vl_moe", {"num_experts": ..., "num_local_experts": 8}),
}


@pytest.mark.parametrize("how", MEANS_THE_SAME)
def test_what_is_written_otherwise(how: str, copied: Callable[..., Path]) -> None:
    family, changes = MEANS_THE_SAME[how]
    language = Checkpoint(copied(family, **changes)).config["text_config"]
    expected = Checkpoint(GOLDEN / family).config["text_config"]
    keys = expected.keys() - {"layer_types", *FAMILIES[family].fixed}
    assert {key: language.get(key) for key in keys} == {key: expected[key] for key in keys}
    assert {name: language.get(name, value) for name, value in FAMILIES[family].fixed.items()} == FAMILIES[family].fixed


@pytest.mark.parametrize("where", ["rope_scaling", "text_config"])
def test_rotary_embedding_in_another_place(where: str, copied: Callable[..., Path]) -> None:
    rope = Checkpoint(GOLDEN / "qwen3_5").config["text_config"]["rope_parameters"]
    parts = ("rope_theta", "partial_rotary_factor") if where == "text_config" else ("rope_theta",)
    inner = {key: value for key, value in rope.items() if key not in parts}
    folder = copied("qwen3_5", rope_parameters=..., rope_scaling=inner, **{key: rope[key] for key in parts})
    language = Checkpoint(folder).config["text_config"]
    assert language["rope_parameters"] == rope
    assert not language.keys() & {"rope_scaling", "rope_theta", "partial_rotary_factor"}


IMPOSSIBLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "no attention": (
        "qwen3_5",
        {"full_attention_interval": 4},
        "full_attention_interval is 4, not a whole number from",
    ),
    "no recurrence": ("qwen3_5", {"full_attention_interval": 1}, "full_attention_interval is 1"),
    "an irregular order": (
        "qwen3_5",
        {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
        "layer_types is .* not full attention in the last of each 3 layers",
    ),
    "sliding windows": ("qwen3_5", {"layer_types": ["sliding_attention"] * 3}, "layer_types is .*sliding_attention"),
    "no gate": ("qwen3_5", {"attn_output_gate": False}, "attn_output_gate is False, not True"),
    "value heads that do not divide": (
        "qwen3_5",
        {"linear_num_value_heads": 3},
        "linear_num_key_heads is 2, not a div",
    ),
    "no convolution": ("qwen3_5", {"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1"),
    "a head of words": ("qwen3_5", {"linear_key_head_dim": "16"}, "linear_key_head_dim is '16'"),
    "sections of a whole head": (
        "qwen3_5",
        {"rope_parameters": {"mrope_section": [6, 5, 5], "rope_theta": 1e7, "partial_rotary_factor": 0.25}},
        "rope_parameters.mrope_section is .*6, 5, 5.*half of a head's 8",
    ),
    "a rotation of more than all": (
        "qwen3_5",
        {"rope_parameters": {"mrope_section": [2, 1, 1], "rope_theta": 1e7, "partial_rotary_factor": 2}},
        "partial_rotary_factor is 2",
    ),
    "more experts than there are": (
        "qwen3_vl_moe",
        {"num_experts_per_tok": 9},
        "num_experts_per_tok is 9, not at most",
    ),
    "no experts": ("qwen3_vl_moe", {"num_experts": 0}, "num_experts is 0"),
    "shares that are no shares": ("qwen3_vl_moe", {"norm_topk_prob": False}, "norm_topk_prob is False, not True"),
    "dense layers that are no list": ("qwen3_vl_moe", {"mlp_only_layers": "0"}, "mlp_only_layers is '0', not a list"),
    "experts without end": ("qwen3_vl_moe", {"num_experts": 4096}, "not of one model"),
    "experts of another width": ("qwen3_vl_moe", {"moe_intermediate_size": 1 << 20}, "not of one model"),
}


@pytest.mark.parametrize("how", IMPOSSIBLE)
def test_an_impossible_config(how: str, copied: Callable[..., Path]) -> None:
    family, changes, words = IMPOSSIBLE[how]
    folder = copied(family, **changes)
    with pytest.raises(ModelError, match=words) as caught:
        check_folder(Checkpoint(folder))
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_token_by_the_name_of_mlx_vlm(kind: str, copied: Callable[..., Path]) -> None:
    folder = copied("qwen3_vl")
    token = json.loads((folder / "config.json").read_text())[f"{kind}_token_id"]
    change_config(folder, **{f"{kind}_token_id": ..., f"{kind}_token_index": token})
    assert Checkpoint(folder).config[f"{kind}_token_id"] == token


# Which layers are of which kind


def test_layers_with_experts() -> None:
    family = FAMILIES["qwen3_vl_moe"]
    text = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert family.expert_layers(text) == 2  # the second and the sixth
    assert family.attention_layers(text) == 6
    assert FAMILIES["qwen3_vl"].expert_layers(text | {"num_experts": 8}) == 0


def test_layers_with_attention() -> None:
    text = {"num_hidden_layers": 6, "full_attention_interval": 4}
    assert FAMILIES["qwen3_5"].attention_layers(text) == 1
    assert FAMILIES["qwen3_vl"].attention_layers(text) == 6


def test_memory_of_a_hybrid() -> None:
    """Keys and values of one layer, states of two; the wider projection of queries, with their gates, is adapted."""
    size = ModelSize.from_config(Checkpoint(GOLDEN / "qwen3_5").config, 1, 4)
    assert size.keys_values(10) == 2 * 10 * (2 * 32) * 4
    assert size.states(3) == 3 * 2 * (4 * 16 * 16 + 3 * (2 * 32 + 64)) * 4
    attention = (64 + 256) + 2 * (64 + 64) + (128 + 64)
    recurrent = (64 + 128) + (64 + 64) + (64 + 64)
    assert size.adapter(5) == 4 * 5 * (attention + 2 * recurrent + 3 * 3 * (64 + 64))


def test_memory_of_experts() -> None:
    config = Checkpoint(GOLDEN / "qwen3_vl_moe").config
    size = ModelSize.from_config(config, 1, 4)
    assert size.states(3) == 0
    assert size.adapter(5) == 4 * 5 * 2 * ((64 + 64) + 2 * (64 + 32) + (64 + 64))  # attention only
    text = config["text_config"]
    more = ModelSize.from_config(config | {"text_config": text | {"num_experts_per_tok": 4}}, 1, 4)
    assert more.layer((1, 1, 1, 1), 1, 9) > size.layer((1, 1, 1, 1), 1, 9)


# Names


def test_the_drafting_head_is_passed_over(copied: Callable[..., Path]) -> None:
    """transformers passes over it, too; other families have none."""
    folder = copied("qwen3_5")
    drafting = ("mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight", "model.mtp.norm.weight")
    weights = read_weights(folder)
    write_weights(folder, weights | {name: mx.ones((4, 4)) for name in drafting})
    checkpoint = Checkpoint(folder)
    check_folder(checkpoint)
    assert checkpoint.places.keys() == weights.keys()
    text = checkpoint.stored_config["text_config"] | {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
    change_config(folder, text_config=text)
    assert Checkpoint(folder).config == checkpoint.config
    assert checkpoint.weight_bytes() == Checkpoint(GOLDEN / "qwen3_5").weight_bytes()
    with pytest.raises(ModelError, match="which no Qwen3-VL has"):
        places_of(drafting, FAMILIES["qwen3_vl"], "folder")


@pytest.mark.parametrize(
    "end", ["experts.gate_up_proj", "experts.down_proj", "experts.3.up_proj.weight", "switch_mlp.up_proj.weight"]
)
def test_experts_have_a_place_in_every_spelling(end: str) -> None:
    place = f"language_model.model.layers.1.mlp.{end}"
    for name in (place, f"model.language_model.layers.1.mlp.{end}", f"module.model.layers.1.mlp.{end}"):
        assert mlx_name(name) == place
    assert hub_name(place, "qwen3_vl_moe") == f"model.language_model.layers.1.mlp.{end}"


# What is not supported


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("part", ["", "_text"])
def test_another_family_is_named(kind: str, part: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        check_kind({"model_type": kind + part}, tmp_path / "config.json")
    names = ", ".join(family.name for family in FAMILIES.values())
    assert f"architecture {kind + part!r} ({OTHERS[kind]}) is not supported; give one of {names}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_model_alone_is_named(family: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=re.escape(f"only the language model of {FAMILIES[family].name}, which")):
        check_kind({"model_type": f"{family}_text"}, tmp_path / "config.json")


def test_only_its_own_file_names_a_family() -> None:
    """So that another family is another file."""
    rooms = [Path(package.__path__[0]) for package in (mlxpref.checkpoints, families)]
    for file in rooms[0].glob("*.py"):
        assert not set(FAMILIES) & set(re.findall(r"\w+", file.read_text())), file.name
    assert {file.stem for file in rooms[1].glob("*.py")} == {*FAMILIES, "__init__", "family"}
