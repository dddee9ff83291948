"""Checkpoints in every layout that is written: the same numbers from each, and what no model can be is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.checks import check_folder
from mlxpref.checkpoints.families import FAMILIES
from mlxpref.checkpoints.memory import model_size
from mlxpref.demo import JUDGE
from mlxpref.engine.vlm import VLM, load_vlm
from mlxpref.errors import ModelError
from tests.conftest import GOLDEN, hidden_states, tiny_model
from tests.engine.test_vlm import golden_input, text_logits
from tests.variants import change_config, read_weights, write_transformers_5, write_weights

Golden = dict[str, Any]


def distance(vlm: VLM, golden: Golden) -> float:
    """The largest difference in logits from transformers, at all positions."""
    hidden = hidden_states(vlm, [golden_input(vlm, golden)])
    return float(np.abs(text_logits(vlm, vlm.head(hidden)[0]) - text_logits(vlm, mx.array(golden["logits"]))).max())


def refusal(folder: Path) -> str:
    """The message for a folder that cannot be used, on one line that begins with the folder."""
    with pytest.raises(ModelError) as caught:
        load_vlm(folder, 512 * 512)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


# What transformers 5 writes, and others


def test_the_logits_of_transformers_5(family: str, golden: Golden, tmp_path: Path) -> None:
    folder = write_transformers_5(GOLDEN / family, tmp_path / "v5")
    assert Checkpoint.open(folder).config != Checkpoint.open(folder).stored_config
    vlm = load_vlm(folder, 512 * 512)
    assert distance(vlm, golden) < 1e-3
    assert vlm.checkpoint.folder == folder
    inputs = vlm.features.processor([Image.fromarray(golden["image0"]), Image.fromarray(golden["image1"])])
    assert np.abs(np.array(inputs["pixel_values"]) - golden["pixel_values"]).max() < 1e-5
    ours = tiny_model(family)
    assert (vlm.eos_ids, vlm.suppressed_ids, vlm.tokenizer.label_ids) == (
        ours.eos_ids,
        ours.suppressed_ids,
        ours.tokenizer.label_ids,
    )
    assert vlm.context == ours.context


@pytest.mark.parametrize("family", FAMILIES)
def test_the_memory_plan_of_transformers_5(family: str, tmp_path: Path) -> None:
    folder = write_transformers_5(GOLDEN / family, tmp_path / "v5")
    assert model_size(Checkpoint.open(folder)) == model_size(Checkpoint.open(GOLDEN / family))


@pytest.mark.parametrize("source", [*FAMILIES, "demo"])
def test_layout_of_the_hub_is_unchanged(source: str) -> None:
    folder = JUDGE if source == "demo" else GOLDEN / source
    assert Checkpoint.open(folder).config == Checkpoint.open(folder).stored_config
    with Checkpoint.open(folder).readable() as place:
        assert place == folder


@pytest.mark.parametrize("whole", [True, False])
def test_text_config_beside_the_same_keys(whole: bool, one: Path) -> None:
    """transformers 4.5 wrote the text's settings twice, and some tools only in text_config."""
    config = json.loads((one / "config.json").read_text())
    text = {key: value for key, value in config.items() if key != "vision_config"}
    nested = text | {"model_type": "qwen2_5_vl_text", "image_token_id": None, "num_hidden_layers": 2}
    keys = {"hidden_size": 1, "num_hidden_layers": 5} if whole else dict.fromkeys(["hidden_size", "vocab_size"], ...)
    change_config(one, text_config=nested, **keys)
    read = Checkpoint.open(one).config
    assert read["num_hidden_layers"] == 2
    assert read["hidden_size"] == text["hidden_size"]
    assert read["image_token_id"] == text["image_token_id"]
    assert read["model_type"] == "qwen2_5_vl"
    assert "text_config" not in read
    assert len(load_vlm(one, 512 * 512).decoder.layers) == 2


def test_a_view_has_all_files_but_code(one: Path, tmp_path: Path) -> None:
    folder = write_transformers_5(one, tmp_path / "v5")
    for name in ("modeling.py", "offload_index.json", "hf_quant_config.json"):
        (folder / name).write_text("{}")
    with Checkpoint.open(folder).readable() as view:
        names = {file.name for file in view.iterdir()}
        assert names == {f.name for f in folder.iterdir()} - {
            "modeling.py",
            "offload_index.json",
            "hf_quant_config.json",
        }
        assert json.loads((view / "config.json").read_text()) == Checkpoint.open(folder).config
        assert (view / "model.safetensors").samefile(folder / "model.safetensors")
        weights = mx.load(str(view / "model.safetensors"))
    assert not view.exists()
    assert (folder / "model.safetensors").is_file()
    assert all(np.array_equal(weights[k], v) for k, v in read_weights(folder).items() if v.dtype != mx.bfloat16)
    assert float(mx.stack([mx.abs(w.astype(mx.float32)).sum() for w in weights.values()]).sum().item()) > 0


def test_view_is_removed_after_a_failure(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_transformers_5(one, tmp_path / "v5")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with pytest.raises(KeyboardInterrupt), Checkpoint.open(folder).readable():
        raise KeyboardInterrupt
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("key", ["auto_map", "model_file"])
def test_code_in_a_folder_is_not_run(key: str, one: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it-was-run"
    (one / "evil.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    value = "evil.py" if key == "model_file" else {"AutoConfig": "evil.C", "AutoProcessor": "evil.P"}
    change_config(one, **{key: value})
    assert distance(load_vlm(one, 512 * 512), dict(np.load(GOLDEN / "qwen2_5_vl" / "golden.npz"))) < 1e-3
    assert not mark.exists()


# Types, files, ties


@pytest.mark.parametrize(("dtype", "close"), [(mx.float32, 1e-3), (mx.float16, 2e-2), (mx.bfloat16, 1e-3)])
def test_one_file_of_any_type(folder: Path, golden: Golden, dtype: mx.Dtype, close: float) -> None:
    write_weights(folder, {name: array.astype(dtype) for name, array in read_weights(folder).items()})
    assert distance(load_vlm(folder, 512 * 512), golden) < close


def test_many_files(folder: Path, golden: Golden) -> None:
    weights = read_weights(folder)
    write_weights(folder, weights)
    (folder / "model.safetensors").unlink()
    names, where = sorted(weights), {}
    for number in range(3):
        file = f"model-0000{number + 1}-of-00003.safetensors"
        part = {name: weights[name] for name in names[number::3]}
        mx.save_safetensors(str(folder / file), part)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert distance(load_vlm(folder, 512 * 512), golden) < 1e-3


def untied(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Weights with a head that is a copy of the embedding."""
    return weights | {"lm_head.weight": next(w for name, w in weights.items() if name.endswith("embed_tokens.weight"))}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("stated", [True, False, ...])
@pytest.mark.parametrize("stored", [True, False])
def test_tied_and_untied_heads(folder: Path, golden: Golden, stated: Any, stored: bool) -> None:
    if stored:
        write_weights(folder, untied(read_weights(folder)))
    text = json.loads((folder / "config.json").read_text()).get("text_config")
    inner = {"text_config": {k: v for k, v in text.items() if k != "tie_word_embeddings"}} if text else {}
    change_config(folder, tie_word_embeddings=stated, **inner)
    if stated is False and not stored:
        assert "lm_head" in refusal(folder)
        return
    vlm = load_vlm(folder, 512 * 512)
    assert vlm.language_model.args.tie_word_embeddings is not stored
    assert distance(vlm, golden) < 1e-3


def test_a_tied_head_that_differs(one: Path) -> None:
    weights = untied(read_weights(one))
    weights["lm_head.weight"] = weights["lm_head.weight"] * 1.5
    write_weights(one, weights)
    assert "says that the head is the embedding, but lm_head.weight is another" in refusal(one)


# What is missing or of another model


def without(part: str) -> Callable[[Path], None]:
    return lambda folder: write_weights(folder, {k: v for k, v in read_weights(folder).items() if part not in k})


def test_a_vision_tower_without_weights(folder: Path) -> None:
    without("visual.")(folder)
    assert "vision_tower" in refusal(folder) or "not of one model" in refusal(folder)


def test_weights_of_another_type(one: Path) -> None:
    weights = read_weights(one)
    name = next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))
    write_weights(one, weights | {name: mx.ones(weights[name].shape, mx.int32)})
    assert "up_proj.weight is stored as" in refusal(one)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"patch_size": 16}, "image processor's patch_size is 16, the vision tower needs 14"),
        ({"max_pixels": -100}, "takes images of 3136 to -100 pixels"),
    ],
)
def test_an_impossible_image_processor(changes: dict[str, int], problem: str, one: Path) -> None:
    file = one / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert problem in refusal(one)


def test_a_tokenizer_of_a_larger_vocabulary(one: Path) -> None:
    weights, rows = read_weights(one), 340
    for name in [name for name in weights if name.endswith("embed_tokens.weight")]:
        weights[name] = weights[name][:rows]
    write_weights(one, weights)
    change_config(one, vocab_size=rows)
    assert "tokens, the embedding 340 rows" in refusal(one) or "a token of the 340" in refusal(one)


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "layers without end": ({"num_hidden_layers": 1000}, "not of one model"),
    "more layers than can be": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "negative": ({"intermediate_size": -64}, "intermediate_size is -64"),
    "a fraction": ({"intermediate_size": 64.5}, "intermediate_size"),
    "true": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "words": ({"vocab_size": "many " * 1000}, "vocab_size"),
    "a vocabulary that memory cannot hold": ({"vocab_size": 1 << 23}, "not of one model"),
    "a vocabulary that is not that of the weights": ({"vocab_size": 400}, "cannot be loaded"),
    "a width past 64 bits": ({"hidden_size": 1 << 70}, "hidden_size"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads"),
    "heads that do not divide": ({"num_attention_heads": 5}, "a divisor of the 5 heads"),
    "groups that do not divide": ({"num_key_value_heads": 3}, "a divisor of the 4 heads"),
    "an epsilon of no number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    "an infinite base": ({"rope_theta": float("inf")}, "rope_theta"),
    "no rotation": ({"rope_scaling": ...}, "mrope_section is [16, 24, 24], not"),
    "stretched rotation": (
        {"rope_scaling": {"type": "yarn", "factor": 4, "mrope_section": [2, 3, 3]}},
        "rope_scaling.type is 'yarn'",
    ),
    "sections of another head": ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "mrope_section"),
    "a window": ({"use_sliding_window": True}, "full attention"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "a token past the vocabulary": ({"image_token_id": 1 << 40}, "image_token_id"),
    "a tie of words": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    "no vision": ({"vision_config": ...}, "not of one model"),
    "a vision tower that is a list": ({"vision_config": [1]}, "vision_config is no object"),
    "text that is a number": ({"text_config": 7}, "text_config is no object"),
    "GPTQ": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantized by gptq: mlxpref reads only MLX's",
    ),
    "quantization of words": ({"quantization": "4 bit"}, "quantization is '4 bit'"),
    "one bit": ({"quantization": {"bits": 1, "group_size": 64}}, "bits is 1"),
    "groups of three": ({"quantization": {"bits": 4, "group_size": 3}}, "group_size is 3"),
    "a mode that is none": ({"quantization": {"bits": 4, "group_size": 64, "mode": ["affine"]}}, "mode"),
    "a layer of no bits": (
        {"quantization": {"bits": 4, "group_size": 64, "language_model.lm_head": {"bits": 0, "group_size": 64}}},
        "language_model.lm_head: bits is 0",
    ),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_an_impossible_config(how: str, one: Path) -> None:
    changes, words = HOSTILE[how]
    change_config(one, **changes)
    assert words in refusal(one)


VISION: dict[str, dict[str, Any]] = {
    "blocks without end": {"depth": 900},
    "a depth of words": {"depth": "4"},
    "no width": {"hidden_size": 0},
    "heads that do not divide": {"num_heads": 7},
    "a patch of nothing": {"patch_size": 0},
    "another activation": {"hidden_act": "relu"},
    "blocks that are no list": {"fullatt_block_indexes": 3},
    "blocks before the first": {"fullatt_block_indexes": [-1]},
    "levels again and again": {"deepstack_visual_indexes": [0] * 100_000},
    "levels past the last": {"deepstack_visual_indexes": [99]},
    "another family's": {"model_type": "qwen2_vl"},
}


@pytest.mark.parametrize("how", VISION)
def test_an_impossible_vision_config(how: str, one: Path) -> None:
    config = json.loads((one / "config.json").read_text())
    change_config(one, vision_config=config["vision_config"] | VISION[how])
    message = refusal(one)
    assert any(reason in message for reason in ("vision_config.", "not of one model", "Unsupported model type"))


def test_wrong_sizes_allocate_nothing(one: Path) -> None:
    change_config(one, intermediate_size=1 << 20, num_hidden_layers=2)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with pytest.raises(ModelError, match="not of one model"):
        check_folder(Checkpoint.open(one))
    assert mx.get_peak_memory() - before < 1 << 20


def test_no_folder_or_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        _ = Checkpoint.open(tmp_path / "absent").config
    with pytest.raises(ModelError, match=r"no config\.json there"):
        _ = Checkpoint.open(tmp_path).config
