"""The fingerprint of who judges: equal for the same model, another one after any change to what it says."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlxpref.engine.adapters import load_adapter
from mlxpref.engine.lora import adapter_off, attach_lora, linear_layers
from mlxpref.engine.vlm import VLM, load_vlm
from mlxpref.judge import fingerprint as module
from mlxpref.judge.fingerprint import Fingerprint
from tests.conftest import GOLDEN, write_adapter

NAME = "language_model.model.layers.0.self_attn.q_proj"
NAMES = [
    f"{NAME}.weight",
    "language_model.model.embed_tokens.weight",
    "language_model.model.norm.weight",
    "vision_tower.patch_embed.proj.weight",
]


def fresh(folder: Path = GOLDEN / "qwen2_vl", dtype: mx.Dtype | None = None) -> VLM:
    return load_vlm(folder, 512 * 512, dtype)


def now(vlm: VLM) -> str:
    return Fingerprint(vlm).now()


def weight_of(vlm: VLM, name: str) -> mx.array:
    result: mx.array = dict(tree_flatten(vlm.model.parameters()))[name]
    return result


def put(vlm: VLM, name: str, weight: mx.array) -> None:
    vlm.model.update(tree_unflatten([(name, weight)]))


def test_copies_have_the_same_fingerprint(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "qwen2_vl", tmp_path / "copy")
    assert now(fresh(tmp_path / "copy")) == now(fresh())
    assert now(fresh(GOLDEN / "qwen2_5_vl")) != now(fresh())
    assert now(fresh(dtype=mx.bfloat16)) != now(fresh())


@pytest.mark.parametrize("name", NAMES)
def test_one_bit_of_one_weight_counts(name: str) -> None:
    vlm = fresh()
    of, before, weight = Fingerprint(vlm), now(vlm), weight_of(vlm, name)
    assert of.now() == before
    bits = weight.view(mx.uint32).flatten()
    bits[-1] = bits[-1] ^ 1
    put(vlm, name, bits.view(weight.dtype).reshape(weight.shape))
    assert of.now() != before
    put(vlm, name, weight)
    assert of.now() == before


@pytest.mark.parametrize(
    "change", [lambda w: -w, lambda w: w[::-1], lambda w: w[:, ::-1], lambda w: w * 1.0001, lambda w: w.T]
)
def test_a_rearranged_weight_counts(change: Any) -> None:
    vlm = fresh()
    before = now(vlm)
    put(vlm, NAMES[1], change(weight_of(vlm, NAMES[1])))
    assert now(vlm) != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
def test_the_files_beside_the_weights_count(tmp_path: Path, name: str) -> None:
    shutil.copytree(GOLDEN / "qwen2_vl", tmp_path / "copy")
    file = tmp_path / "copy" / name
    file.write_text(file.read_text() + "\n")
    assert now(fresh(tmp_path / "copy")) != now(fresh())


def test_changed_adapter_counts(tmp_path: Path) -> None:
    vlm = fresh()
    of = Fingerprint(vlm)
    prints = [of.now()]
    load_adapter(vlm.model, write_adapter(tmp_path / "adapter", vlm))
    prints.append(of.now())
    name = f"{NAME}.lora_b"
    trained = weight_of(vlm, name)
    for factor in (1.0001, -1):
        put(vlm, name, trained * factor)
        prints.append(of.now())
    trained[0, 0] = 7.0  # in place: the same array as before
    put(vlm, name, trained)
    prints.append(of.now())
    layer = dict(vlm.model.named_modules())[NAME]
    layer.scale *= 2
    prints.append(of.now())
    with adapter_off(vlm.model):
        prints.append(of.now())
    assert len(set(prints)) == len(prints)
    assert of.now() == now(vlm) == prints[-2]
    other = fresh()
    attach_lora(other.model, list(linear_layers(other.model)), rank=4, scale=2.0)
    assert now(other) not in prints


def test_unchanged_weights_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = fresh()
    read = []
    sums = module.weight_sums

    def counting(weight: mx.array) -> bytes:
        read.append(weight.shape)
        return sums(weight)

    monkeypatch.setattr(module, "weight_sums", counting)
    of = Fingerprint(vlm)
    of.now()
    every = len(tree_flatten(vlm.model.parameters()))
    assert len(read) == every
    of.now()
    assert len(read) == every
    put(vlm, NAMES[0], weight_of(vlm, NAMES[0]) + 1)
    of.now()
    assert len(read) == every + 1


def test_a_tower_is_the_same_under_every_adapter(tmp_path: Path) -> None:
    vlm, of = fresh(), Fingerprint(fresh()).tower()
    assert Fingerprint(vlm).tower() == of
    load_adapter(vlm.model, write_adapter(tmp_path, vlm))
    assert Fingerprint(vlm).tower() == of
    assert now(vlm) != now(fresh())


def test_a_tower_is_another_one_after_any_change_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = fresh()
    of = Fingerprint(vlm).tower()
    assert Fingerprint(fresh(GOLDEN / "qwen2_5_vl")).tower() != of
    assert Fingerprint(fresh(dtype=mx.bfloat16)).tower() != of
    name = "vision_tower.merger.mlp.0.weight"
    weight = weight_of(vlm, name)
    put(vlm, name, mx.where(mx.arange(weight.size).reshape(weight.shape) == 3, -weight, weight))
    assert Fingerprint(vlm).tower() != of
    put(vlm, name, weight)
    assert Fingerprint(vlm).tower() == of
    with monkeypatch.context() as patched:
        patched.setattr(vlm.features.processor, "image_mean", [0.5, 0.5, 0.25])
        assert Fingerprint(vlm).tower() != of
    with monkeypatch.context() as patched:
        patched.setattr(module, "version", lambda package: "0")
        assert Fingerprint(vlm).tower() != of
