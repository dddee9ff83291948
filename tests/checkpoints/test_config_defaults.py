"""A config that leaves out what equals the class's default means what it means to transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import CONFIG_MAPPING

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.families import FAMILIES
from mlxpref.checkpoints.hf_config import normalise
from mlxpref.checkpoints.hf_values import validate
from mlxpref.checkpoints.memory import ModelSize
from mlxpref.conversion.convert import convert
from mlxpref.engine.vlm import load_vlm
from tests.conftest import GOLDEN, hidden_states, tiny_model
from tests.engine.test_vlm import golden_input
from tests.variants import leave_out_defaults, write_transformers_5

FILE = Path("model/config.json")
TEXT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps")  # fmt: skip
every_family = pytest.mark.parametrize("family", FAMILIES)


def read(config: dict[str, Any]) -> dict[str, Any]:
    """A config as it is read, with a stored head."""
    result = normalise(config, ["lm_head.weight"], FILE)
    validate(result, FILE)
    return result


def language_of(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's settings in the hub's layout of its family."""
    return config["text_config"] if FAMILIES[config["model_type"]].is_nested else config  # type: ignore[no-any-return]


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding as transformers 5 has it."""
    language = language_of(config)
    return language.get("rope_parameters") or language["rope_scaling"] | {"rope_theta": language["rope_theta"]}


@every_family
@pytest.mark.parametrize("layout", ["nested", "flat"])
def test_what_is_left_out_is_transformers_default(family: str, layout: str) -> None:
    parts = {"text_config": {}, "vision_config": {}} if layout == "nested" else {"vision_config": {}}
    ours = read({"model_type": family, **parts})
    theirs = CONFIG_MAPPING[family](**parts)
    text, vision = theirs.text_config, theirs.vision_config
    keys = {*TEXT, *FAMILIES[family].text} - {"rope_theta", "full_attention_interval"}
    assert {key: language_of(ours)[key] for key in keys} == {key: getattr(text, key) for key in keys}
    assert {key: rope_of(ours).get(key) for key in ("rope_theta", "partial_rotary_factor")} == {
        key: text.rope_parameters.get(key) for key in ("rope_theta", "partial_rotary_factor")
    }
    if kinds := getattr(text, "layer_types", None):
        interval = language_of(ours).get("full_attention_interval", 1)
        expected = ["linear_attention" if (layer + 1) % interval else "full_attention" for layer in range(len(kinds))]
        assert kinds == expected
    left = {key: value for key, value in ours["vision_config"].items() if key != "model_type"}
    assert left == {key: list(v) if isinstance(v := getattr(vision, key), tuple) else v for key in left}
    sizes = {"intermediate_size", "depth", "num_heads", "patch_size", "spatial_merge_size", "temporal_patch_size"}
    assert left.keys() >= sizes - ({"intermediate_size"} if family == "qwen2_vl" else set())


@every_family
def test_no_section_of_the_vision_tower(family: str) -> None:
    assert read({"model_type": family}) == read({"model_type": family, "vision_config": None, "text_config": None})


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])  # the others' classes refuse null
@pytest.mark.parametrize("heads", [None, ...])
def test_key_heads_that_are_null_are_as_many_as_heads(heads: Any, family: str) -> None:
    part = {"num_attention_heads": 16, "hidden_size": 2048} | ({} if heads is ... else {"num_key_value_heads": None})
    expected = CONFIG_MAPPING[family](text_config=part).text_config.num_key_value_heads
    if family == "qwen3_vl" and heads is ...:
        part["num_key_value_heads"] = expected = 8  # 32 by default, more than there are heads
    assert language_of(read({"model_type": family, "text_config": part}))["num_key_value_heads"] == expected


@pytest.mark.parametrize("outer", [True, False, None, ...])
@pytest.mark.parametrize("inner", [True, False, None, ...])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_head_that_either_part_ties(outer: Any, inner: Any, family: str) -> None:
    """Before transformers 5 the language model's part had the key; without a stored head, either part's yes counts."""
    parts = {"text_config": {"tie_word_embeddings": inner}, "tie_word_embeddings": outer}
    parts = {key: value for key, value in parts.items() if value is not ...}
    parts["text_config"] = {key: value for key, value in parts["text_config"].items() if value is not ...}
    stored = json.loads(json.dumps(parts))
    if True in (outer, inner):
        theirs = CONFIG_MAPPING[family](**{k: v for k, v in parts.items() if v is not None})
        assert theirs.tie_word_embeddings
        assert normalise({"model_type": family, **stored}, ["model.norm.weight"], FILE)["tie_word_embeddings"] is True
    else:
        untied = normalise({"model_type": family, **stored}, ["lm_head.weight"], FILE)
        assert untied["tie_word_embeddings"] is False


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])
def test_theta_of_transformers_4(family: str) -> None:
    """transformers 4.57 had another default of Qwen3-VL's than 5."""
    thetas = [
        read({"model_type": family, "transformers_version": version})["text_config"]["rope_theta"]
        for version in ("4.57.1", "5.24.0")
    ]
    assert thetas == [5000000.0, 500000.0]


def test_qwen2_5_vl_7b_as_transformers_4_49_saved_it() -> None:
    stored = {
        "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 32768, "model_type": "qwen2_5_vl",
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0, "tie_word_embeddings": False, "transformers_version": "4.49.0", "vocab_size": 152064,
        "vision_config": {"hidden_size": 1280, "in_chans": 3, "model_type": "qwen2_5_vl", "spatial_patch_size": 14,
                          "tokens_per_second": 2},
    }  # fmt: skip
    config = read(stored)
    vision = config["vision_config"]
    assert (vision["intermediate_size"], vision["out_hidden_size"], vision["depth"]) == (3420, 3584, 32)
    assert vision["tokens_per_second"] == 2
    assert ModelSize.from_config(config, 1).vision == (1280, 3420, 16)


@pytest.mark.parametrize("version", ["hub", "5"])
def test_a_tiny_model_without_its_defaults(version: str, family: str, tmp_path: Path) -> None:
    """The same numbers from a config without all that equals a default, and a whole config after converting."""
    if version == "hub":
        folder = Path(shutil.copytree(GOLDEN / family, tmp_path / "model", ignore=shutil.ignore_patterns("*.npz")))
    else:
        folder = write_transformers_5(GOLDEN / family, tmp_path / "model")
    assert leave_out_defaults(folder)
    vlm, golden = load_vlm(folder, 512 * 512), dict(np.load(GOLDEN / family / "golden.npz"))
    states = [np.array(hidden_states(each, [golden_input(each, golden)])) for each in (tiny_model(family), vlm)]
    assert np.array_equal(*states)
    convert(folder, tmp_path / "out", None)
    written, whole = Checkpoint.open(tmp_path / "out").stored_config, read({"model_type": family})
    assert written["vision_config"].keys() >= whole["vision_config"].keys() - {"model_type"}
    assert language_of(written).keys() >= {*TEXT, FAMILIES[family].rope}
