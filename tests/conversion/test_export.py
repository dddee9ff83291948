"""Adapters elsewhere: PEFT's read and written, fused for MLX and for transformers, all saying the same."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub import ModelCard

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.files import ADAPTER_CONFIG, RECORD
from mlxpref.checkpoints.names import hub_name
from mlxpref.checkpoints.safetensors import read_tensor_infos
from mlxpref.conversion.convert import convert
from mlxpref.conversion.export import export_adapter
from mlxpref.conversion.quantize import Recipe, quantized_layers
from mlxpref.engine.adapters import load_adapter
from mlxpref.engine.lora import linear_layers, lora_targets
from mlxpref.engine.mlx_model import lazy_model
from mlxpref.engine.peft import PEFT_WEIGHTS
from mlxpref.engine.profile import PROMPT_SLOT, own_profile
from mlxpref.errors import ModelError
from tests.conftest import GOLDEN, tiny_model, write_adapter
from tests.conversion.test_convert import logits
from tests.engine.test_adapters import fresh


@pytest.fixture
def adapter(family: str, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", tiny_model(family))


def with_adapter(family: str, adapter: Path, golden: dict[str, Any]) -> np.ndarray:
    vlm = fresh(GOLDEN / family)
    load_adapter(vlm.model, adapter)
    return logits(vlm, golden)


def export(adapter: Path, output: Path, to: Any, family: str, **more: Any) -> dict[str, Any]:
    return export_adapter(adapter, output, to, GOLDEN / family, f"Owner/{family}", **more)


def peft_folder(folder: Path, family: str, **config: Any) -> Path:
    """A PEFT adapter with a changed config."""
    export(write_adapter(folder / "ours", tiny_model(family)), folder / "peft", "peft", family)
    file = folder / "peft" / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder / "peft"


def renamed(folder: Path, *changes: tuple[str, str]) -> Path:
    """A PEFT adapter with renamed tensors."""
    arrays = mx.load(str(folder / PEFT_WEIGHTS))
    assert isinstance(arrays, dict)
    for old, new in changes:
        assert any(old in name for name in arrays)
        arrays = {name.replace(old, new): array for name, array in arrays.items()}
    mx.save_safetensors(str(folder / PEFT_WEIGHTS), arrays)
    return folder


def test_every_form_is_equal(family: str, golden: dict[str, Any], adapter: Path, tmp_path: Path) -> None:
    expected = with_adapter(family, adapter, golden)
    assert np.abs(expected - logits(tiny_model(family), golden)).max() > 0.1
    export(adapter, tmp_path / "peft", "peft", family)
    assert np.abs(with_adapter(family, tmp_path / "peft", golden) - expected).max() < 1e-4
    for to in ("fused", "hf"):
        report = export(adapter, tmp_path / to, to, family, dtype="float32", shard_size=200_000)
        assert report["bytes"] == sum(file.stat().st_size for file in (tmp_path / to).iterdir())
        assert np.abs(logits(fresh(tmp_path / to), golden) - expected).max() < 1e-4


@pytest.mark.parametrize("base", ["hub", "converted"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_hubs_names_and_layouts(family: str, adapter: Path, tmp_path: Path, base: str, dtype: str | None) -> None:
    source = GOLDEN / family
    if base == "converted":
        source = tmp_path / "converted"
        convert(GOLDEN / family, source, Recipe(None), dtype="float32" if dtype else "bfloat16")
    export_adapter(adapter, tmp_path / "hf", "hf", source, "Owner/name", dtype=dtype)
    theirs, ours = read_tensor_infos(GOLDEN / family), read_tensor_infos(tmp_path / "hf")
    assert {name: (x.shape, x.dtype) for name, x in theirs.items()} == {n: (x.shape, x.dtype) for n, x in ours.items()}
    fused = {hub_name(f"{name}.weight", family) for name in lora_targets(tiny_model(family).model)}
    assert fused <= set(theirs)
    changed = {name for name in theirs if _bytes(theirs[name]) != _bytes(ours[name])}
    if (base, dtype, family) == ("converted", None, "qwen3_5"):  # which holds 1 + w in half precision
        fused |= {name for name in theirs if "layernorm" in name or re.search(r"[qk]_norm|model\.norm", name)}
        assert changed <= fused
    else:
        assert changed == fused  # the others to the last bit
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert not {"quantization", "quantization_config", "auto_map"} & set(config)


def test_every_linear_layer_may_be_adapted(tmp_path: Path) -> None:
    """Training leaves out the two of a recurrent layer that say how fast it forgets; PEFT may not."""
    family = "qwen3_5"
    vlm, golden = tiny_model(family), dict(np.load(GOLDEN / family / "golden.npz"))
    layers = [*linear_layers(vlm.model)]
    assert {name.rpartition(".")[2] for name in layers} > {"in_proj_a", "in_proj_b", "in_proj_qkv", "in_proj_z"}
    adapter = write_adapter(tmp_path / "adapter", vlm, layers)
    expected = with_adapter(family, adapter, golden)
    export(adapter, tmp_path / "peft", "peft", family)
    assert np.abs(with_adapter(family, tmp_path / "peft", golden) - expected).max() < 1e-4
    for to in ("fused", "hf"):
        export(adapter, tmp_path / to, to, family, dtype="float32")
        assert np.abs(logits(fresh(tmp_path / to), golden) - expected).max() < 1e-3


def _bytes(stored: Any) -> bytes:
    with stored.file.open("rb") as file:
        file.seek(stored.start)
        content: bytes = file.read(stored.size)
        return content


def test_a_quantized_base(family: str, golden: dict[str, Any], adapter: Path, tmp_path: Path) -> None:
    """Fused layers are quantized as they were; for transformers, all is what the quantized weights stand for."""
    convert(GOLDEN / family, tmp_path / "base", Recipe(8, 32, high_bits=None), dtype="float32")
    base = fresh(tmp_path / "base")
    load_adapter(base.model, adapter)
    expected = logits(base, golden)
    export_adapter(adapter, tmp_path / "fused", "fused", tmp_path / "base", "base")
    fused = fresh(tmp_path / "fused")
    assert quantized_layers(fused.model) == quantized_layers(lazy_model(Checkpoint.open(tmp_path / "base")))
    assert np.corrcoef(logits(fused, golden).ravel(), expected.ravel())[0, 1] > 0.99
    export_adapter(adapter, tmp_path / "hf", "hf", tmp_path / "base", "base", dtype="float32")
    assert np.abs(logits(fresh(tmp_path / "hf"), golden) - expected).max() < 1e-3
    export_adapter(adapter, tmp_path / "four", "fused", tmp_path / "base", "base", Recipe(4, 32))
    four = quantized_layers(fresh(tmp_path / "four").model)
    assert {layer.bits for name, layer in four.items() if not name.endswith(".mlp.gate")} == {4}


@pytest.mark.parametrize(
    "names",
    [
        [("model.model.language_model.", "model.model.")],  # before transformers 4.52
        [("model.model.language_model.", "model.language_model.model.")],
        [(".lora_A.", ".lora_A.default."), (".lora_B.", ".lora_B.default.")],
        [("base_model.model.", "")],
    ],
)
def test_every_naming_of_peft_is_read(names: list[tuple[str, str]], tmp_path: Path) -> None:
    family = "qwen2_5_vl"
    golden = dict(np.load(GOLDEN / family / "golden.npz"))
    folder = peft_folder(tmp_path, family)
    expected = with_adapter(family, folder, golden)
    assert np.abs(with_adapter(family, renamed(folder, *names), golden) - expected).max() == 0


def test_rank_stabilised_scales(tmp_path: Path) -> None:
    golden = dict(np.load(GOLDEN / "qwen3_vl" / "golden.npz"))
    folder = peft_folder(tmp_path, "qwen3_vl", lora_alpha=6, use_rslora=True)
    plain = with_adapter("qwen3_vl", folder, golden)
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    assert config["r"] == 4
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config | {"lora_alpha": 12, "use_rslora": False}))
    assert np.abs(with_adapter("qwen3_vl", folder, golden) - plain).max() == 0  # 6 / sqrt(4) = 12 / 4


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "Gaussian", "orthogonal", "eva"])
def test_beginnings_that_leave_the_base_alone(start: Any, tmp_path: Path) -> None:
    golden = dict(np.load(GOLDEN / "qwen2_5_vl" / "golden.npz"))
    folder = peft_folder(tmp_path, "qwen2_5_vl")
    expected = with_adapter("qwen2_5_vl", folder, golden)
    rest = {"a_key_of_tomorrow": None, "another": {}, "third": [], "eva_config": {"rho": 2.0}, "qalora_group_size": 16,
            "megatron_core": "megatron.core", "auto_mapping": {"unsloth_fixed": True}}  # fmt: skip
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config | rest | {"init_lora_weights": start}))
    assert np.array_equal(with_adapter("qwen2_5_vl", folder, golden), expected)


CHANGED_BASE = [
    "pissa",
    "pissa_niter_16",
    "PiSSA",
    "olora",
    "corda",
    "loftq",
    "milora",
    "lora_ga",
    "of_tomorrow",
    1,
    {},
]
EXTRAS: list[dict[str, Any]] = [
    {"rank_pattern": {"q_proj": 8}}, {"alpha_pattern": {"q_proj": 8}}, {"use_dora": True}, {"lora_bias": True},
    {"modules_to_save": ["lm_head"]}, {"fan_in_fan_out": True}, {"layer_replication": [[0, 2]]},
    {"trainable_token_indices": [1]}, {"alora_invocation_tokens": [5]}, {"use_qalora": True}, {"use_bdlora": {"a": 1}},
    {"target_parameters": ["w"]}, {"loftq_config": {"loftq_bits": 4}}, {"corda_config": {"a": 1}},
    {"arrow_config": {"top_k": 3}}, {"kasa_config": {"a": 1}}, {"of_tomorrow": True},
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        *(({"init_lora_weights": start}, "path_initial_model_for_weight_conversion") for start in CHANGED_BASE),
        *((config, rf"it sets {next(iter(config))}; .*merge it into its base") for config in EXTRAS),
        ({"peft_type": "LOHA"}, "'LOHA' adapter; only plain LoRA"),
        ({"bias": "all"}, "trains biases"),
        ({"r": 0}, "r is '0'"),
        ({"r": True}, "r is 'True'"),
        ({"lora_alpha": None}, "lora_alpha is 'None'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is 'nan'"),
        ({"r": 8}, "another model"),
    ],
)
def test_adapters_that_are_not_plain_lora(config: dict[str, Any], problem: str, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path, "qwen2_5_vl", **config)
    vlm = fresh(GOLDEN / "qwen2_5_vl")
    with pytest.raises(ModelError, match=problem) as caught:
        load_adapter(vlm.model, folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("model.visual.blocks.0.attn.qkv", "the vision tower"),
        ("visual.blocks.0.attn.qkv", "the vision tower"),
        ("model.visual.merger.mlp.0", "the connector"),
        ("lm_head", "the head"),
        ("model.language_model.embed_tokens", "the embedding"),
    ],
)
def test_lora_elsewhere_is_named_for_what_it_is(path: str, words: str, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path, "qwen2_5_vl")
    arrays = dict(mx.load(str(folder / PEFT_WEIGHTS)))
    more = {f"base_model.model.{path}.lora_{part}.weight": mx.ones((4, 4)) for part in "AB"}
    mx.save_safetensors(str(folder / PEFT_WEIGHTS), arrays | more)
    with pytest.raises(ModelError, match=rf"it also changes {words} .*2 of \d+ tensors .*merge it into its base"):
        load_adapter(fresh(GOLDEN / "qwen2_5_vl").model, folder)


def test_tensors_without_a_place(tmp_path: Path) -> None:
    vlm = fresh(GOLDEN / "qwen2_5_vl")
    for number, change in enumerate(
        [(".q_proj.", ".query."), ("lora_B", "lora_magnitude_vector"), ("layers.1", "layers.9")]
    ):
        folder = renamed(peft_folder(tmp_path / str(number), "qwen2_5_vl"), change)
        with pytest.raises(ModelError, match=r"no place for|only one of|more than plain LoRA"):
            load_adapter(vlm.model, folder)
    for more in ("score.weight", "model.language_model.layers.0.input_layernorm.weight"):
        folder = peft_folder(tmp_path / more, "qwen2_5_vl")
        arrays = dict(mx.load(str(folder / PEFT_WEIGHTS))) | {f"base_model.model.{more}": mx.ones((1, 64))}
        mx.save_safetensors(str(folder / PEFT_WEIGHTS), arrays)
        with pytest.raises(ModelError, match="which is more than plain LoRA"):
            load_adapter(vlm.model, folder)
    folder = peft_folder(tmp_path / "pickled", "qwen2_5_vl")
    (folder / PEFT_WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        load_adapter(vlm.model, folder)


def test_peft_names_whole_paths(tmp_path: Path) -> None:
    """A bare `down_proj` would also mean the vision tower's, which this adapter does not touch."""
    config = json.loads((peft_folder(tmp_path, "qwen2_5_vl") / ADAPTER_CONFIG).read_text())
    targets = config["target_modules"]
    assert len(targets) == len(linear_layers(tiny_model("qwen2_5_vl").model))  # of this family all are adapted
    assert all(target.startswith("model.language_model.layers.") for target in targets)


def test_model_cards(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", tiny_model("qwen2_5_vl"))
    record = {
        "settings": {
            "data": "mine`.jsonl",
            "split": "train",
            "reward": "soft",
            "steps": 7,
            "think": False,
            "max_pixels": 12544,
        },
        "ended": {"step": 7},
    }
    (adapter / "run.json").write_text(json.dumps(record))
    (adapter / "log.jsonl").write_text(json.dumps({"step": 7, "held_out": {"accuracy": 0.875}}) + "\n")
    for to, loads in {"peft": "PeftModel", "fused": "mlx_vlm", "hf": "AutoModelForImageTextToText"}.items():
        export(adapter, tmp_path / to, to, "qwen2_5_vl")
        card = (tmp_path / to / "README.md").read_text()
        assert ModelCard(card).data.base_model == "Owner/qwen2_5_vl"
        assert all(text in card for text in (loads, "`soft`", "accuracy 0.875", "mine'.jsonl", "mlxpref rank"))
        assert "It was trained to answer at once. Images are shrunk to at most 12544 pixels" in card
        assert "profile" not in card  # our own goes without saying
        words = json.loads(card.partition("messages = ")[2].partition("\n```")[0])
        expected = json.dumps(own_profile().messages()).replace(json.dumps(PROMPT_SLOT)[1:-1], "PROMPT")
        assert words == json.loads(expected)  # what the judge itself asks with
        assert own_profile().at_once in card
        assert own_profile().closing in card
    (adapter / "run.json").unlink()
    (adapter / "log.jsonl").unlink()
    export(adapter, tmp_path / "bare", "peft", "qwen2_5_vl")
    local = tmp_path / "local"
    export_adapter(adapter, local, "peft", GOLDEN / "qwen2_5_vl", str(GOLDEN / "qwen2_5_vl"))
    assert "base_model:" not in (local / "README.md").read_text()  # which the hub would refuse
    export_adapter(adapter, tmp_path / "revision", "peft", GOLDEN / "qwen2_5_vl", "Owner/model@v2")
    assert ModelCard((tmp_path / "revision" / "README.md").read_text()).data.base_model == "Owner/model"
    bare = (tmp_path / "bare" / "README.md").read_text()
    assert "Not measured" in bare
    assert "at most 262144 pixels, as mlxpref does by default" in bare


@pytest.mark.parametrize(
    ("kept", "patience", "words"),
    [
        (20, 3, "after step `20`, the best of 4 measurements: accuracy 0.889."),
        (40, 3, "after step `40`, the best of 4 measurements: accuracy 0.833."),
        (40, 0, "after step `40`: accuracy 0.833."),
        (35, 0, "after step `30` (this adapter is of step `35`): accuracy 0.861."),
        (5, 0, "Not measured"),
    ],
)
def test_model_card_measures_the_kept_step(kept: int, patience: int, words: str, tmp_path: Path) -> None:
    """The log goes on behind the best adapter, and behind the last saved one of a killed run; step 0 is no adapter."""
    adapter = write_adapter(tmp_path / "adapter", tiny_model("qwen2_5_vl"))
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config | {"step": kept}))
    (adapter / "run.json").write_text(json.dumps({"settings": {"patience": patience}}))
    accuracies = {0: 0.95, 10: 0.5, 20: 0.889, 25: None, 30: 0.861, 40: 0.833}
    lines = [{"step": step, "held_out": value and {"accuracy": value}} for step, value in accuracies.items()]
    (adapter / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    export(adapter, tmp_path / "out", "peft", "qwen2_5_vl")
    assert words in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("to", ["peft", "fused", "hf"])
def test_exports_name_no_place_on_this_machine(tmp_path: Path, to: str) -> None:
    adapter, output = write_adapter(tmp_path / "adapter", tiny_model("qwen2_5_vl")), tmp_path / "out"
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    trained = {"think": False, "max_pixels": 50176, "max_tokens": 9, "read_weight": 1.0}
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config | {"trained": trained}))
    settings = {"data": f"{tmp_path}/mine.jsonl", "reward": "~/own.py:score", "think": False, "max_pixels": 12544}
    (adapter / "run.json").write_text(json.dumps({"settings": settings}))
    base = tmp_path / "base"
    shutil.copytree(GOLDEN / "qwen2_5_vl", base)
    export_adapter(adapter, output, to, base, str(base))
    card, record = ((output / name).read_text() for name in ("README.md", RECORD))
    assert str(tmp_path) not in card + record
    assert all(text in card for text in ("`mine.jsonl`", "`own.py:score`", "at most 50176 pixels"))
    assert json.loads(record)["adapter"] == "adapter"


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", tiny_model("qwen2_5_vl"))
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    config["lora_parameters"]["rank"] = 8
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config))
    for to in ("peft", "fused", "hf"):
        with pytest.raises(ModelError, match="adapter of another model"):
            export(adapter, tmp_path / "out", to, "qwen2_5_vl")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
