"""Shapes: what a config says of a checkpoint is what loading it shows."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlxpref.checkpoints.advice import checkpoint_at
from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.model_shapes import shapes_from
from mlxpref.conversion.convert import convert
from mlxpref.conversion.quantize import Recipe
from mlxpref.demo import JUDGE
from mlxpref.engine.lora import attach_lora, linear_layers
from mlxpref.engine.vlm import VLM, load_vlm
from mlxpref.errors import ModelError
from scripts.memory_table import JUDGES
from tests.conftest import FAMILIES, GOLDEN, picture, tiny_model

FOLDERS = (*(GOLDEN / family for family in FAMILIES), JUDGE)
AMOUNTS = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def bytes_of(vlm: VLM) -> int:
    """What the arrays of a loaded model take."""
    arrays: dict[str, mx.array] = dict(tree_flatten(vlm.model.parameters()))
    return sum(int(array.nbytes) for array in arrays.values())


# Weights


@AMOUNTS
def test_weights_take_what_loading_shows(folder: Path) -> None:
    loaded = bytes_of(load_vlm(folder, 512 * 512))
    assert shapes_from(Checkpoint.open(folder).config).weight_bytes(4) == loaded
    assert Checkpoint.open(folder).weight_bytes(4) == loaded
    half = bytes_of(load_vlm(folder, 512 * 512, mx.bfloat16))
    assert shapes_from(Checkpoint.open(folder).config).weight_bytes(2) == half == loaded // 2
    assert Checkpoint.open(folder).weight_bytes(2) == half


@AMOUNTS
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 64), (4, 32), (3, 64)])
def test_quantized_weights_take_what_loading_shows(folder: Path, bits: int, group: int, tmp_path: Path) -> None:
    convert(folder, tmp_path / "small", Recipe(bits, group))
    shapes = shapes_from(Checkpoint.open(tmp_path / "small").config)
    assert shapes.quantization is not None
    assert (shapes.quantization.bits, shapes.quantization.group) == (bits, group)
    assert replace(shapes, quantization=None) == replace(
        shapes_from(Checkpoint.open(folder).config), float_bytes=shapes.float_bytes
    )
    for dtype, size in ((mx.float32, 4), (mx.bfloat16, 2)):
        loaded = bytes_of(load_vlm(tmp_path / "small", 512 * 512, dtype))
        assert shapes.weight_bytes(size) == loaded
        assert Checkpoint.open(tmp_path / "small").weight_bytes(size) == loaded
    assert Checkpoint.open(tmp_path / "small").weight_bytes() == shapes.weight_bytes(2)  # written in bfloat16


def test_what_groups_do_not_divide_is_not_quantized(tmp_path: Path) -> None:
    """The demo judge's inner width of 256 divides by 128; a hidden width of 64 does not."""
    convert(JUDGE, tmp_path / "small", Recipe(4, 128))
    loaded = bytes_of(load_vlm(tmp_path / "small", 512 * 512))
    assert shapes_from(Checkpoint.open(tmp_path / "small").config).weight_bytes(4) == loaded
    shapes = shapes_from(Checkpoint.open(tmp_path / "small").config)
    assert shapes.quantization is not None
    assert shapes.quantization.bytes_of(8, 64, 4) == 8 * 64 * 4
    assert shapes.quantization.bytes_of(8, 128, 4) == 8 * 128 // 2 + 8 * 8


@pytest.mark.parametrize(("name", "published"), [("3B", 7509245952), ("7B", 16584333312), ("32B", 66905436672)])
def test_the_judges_of_the_table_are_as_large_as_published(name: str, published: int) -> None:
    """The total_size of Qwen2.5-VL's model.safetensors.index.json, in bfloat16."""
    assert JUDGES[name].weight_bytes(2) == published


@AMOUNTS
@pytest.mark.parametrize("rank", [1, 16])
def test_an_adapter_takes_what_attaching_it_adds(folder: Path, rank: int) -> None:
    vlm = load_vlm(folder, 512 * 512)
    before = bytes_of(vlm)
    attach_lora(vlm.model, list(linear_layers(vlm.model)), rank, 2.0)
    assert shapes_from(Checkpoint.open(folder).config).adapter_bytes(rank) == bytes_of(vlm) - before


# Widths


@AMOUNTS
def test_widths_are_those_of_a_run(folder: Path) -> None:
    shapes = shapes_from(Checkpoint.open(folder).config)
    vlm = load_vlm(folder, 512 * 512)
    prompt = vlm.prompt(picture(0), picture(1), "a hat", "choice", think=True)
    cache, logits = vlm.prefill([prompt])
    assert len(cache.layers) == shapes.layers == vlm.layer_count
    for layer in cache.layers:
        assert layer.keys is not None
        assert layer.values is not None
        assert layer.keys.shape == layer.values.shape == (1, shapes.key_heads, len(prompt), shapes.head)
        assert layer.keys[0, :, 0].size == shapes.key_width
    assert logits.shape == (1, shapes.vocabulary)
    assert shapes.context == vlm.context
    assert shapes.heads == vlm.language.model.layers[0].self_attn.n_heads
    assert vlm.head(mx.zeros((1, shapes.hidden))).shape == logits.shape
    layers = [tuple(layer.weight.shape) for layer in linear_layers(vlm.model).values()]
    assert sorted(layers) == sorted(shapes.layers * shapes.linear)


@AMOUNTS
def test_the_vision_tower_is_as_it_runs(folder: Path) -> None:
    tower, vlm = shapes_from(Checkpoint.open(folder).config).vision, load_vlm(folder, 512 * 512)
    side = tower.patch * tower.merge
    features = vlm.features.get(picture(0, (3 * side, 2 * side)))
    assert features.tokens == 6 * side**2 // tower.pixels_a_token
    assert features.merged.shape == (features.tokens, tower.out)
    assert [level.shape for level in features.deepstack] == [features.merged.shape] * tower.levels
    assert features.nbytes == features.tokens * tower.out * (1 + tower.levels) * 4
    weights = dict(tree_flatten(vlm.model.vision_tower.parameters()))
    assert tower.parameters == sum(int(array.size) for array in weights.values())
    assert tower.patch_values == weights["patch_embed.proj.weight"].size // tower.hidden


def test_which_blocks_see_the_whole_image() -> None:
    found = {family: shapes_from(Checkpoint.open(GOLDEN / family).config).vision for family in FAMILIES}
    assert found["qwen2_vl"].full == (0, 1)
    assert found["qwen2_5_vl"].full == (1, 3)
    assert found["qwen2_5_vl"].window == 56
    assert found["qwen3_vl"].full == (0, 1, 2)


def test_a_checkpoint_is_described_as_it_is_loaded_here() -> None:
    """The tests run on a CPU, where bfloat16 becomes float32."""
    for folder in FOLDERS:
        vlm, model = load_vlm(folder, 1 << 30), checkpoint_at(Checkpoint.open(folder))
        assert model.weights == bytes_of(vlm)
        assert model.float_bytes == 4
        assert model.max_pixels == vlm.features.max_pixels
    assert checkpoint_at(Checkpoint.open(JUDGE)).tokens(1 << 30) == 9
    assert checkpoint_at(Checkpoint.open(JUDGE)).tokens(784) == 1
    assert checkpoint_at(Checkpoint.open(GOLDEN / "qwen2_5_vl")).tokens(308 * 308) == 121


def test_numbers_keep_the_size_that_the_config_states() -> None:
    assert shapes_from(Checkpoint.open(JUDGE).config).float_bytes == 4
    assert shapes_from(Checkpoint.open(GOLDEN / "qwen2_vl").config).float_bytes == 2
    assert shapes_from(Checkpoint.open(GOLDEN / "qwen3_vl").config).float_bytes == 2


# Damage


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of a checkpoint in two files of weights."""
    return shutil.copytree(GOLDEN / "qwen2_vl", tmp_path / "model")


def changed(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config | changes


CONFIGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda config: [config],
    "null": lambda config: None,
    "no width": lambda config: {k: v for k, v in config.items() if k != "hidden_size"},
    "no vision": lambda config: {k: v for k, v in config.items() if k != "vision_config"},
    "a vision tower that is a number": changed(vision_config=7),
    "words for a number": changed(num_hidden_layers="many"),
    "a list for a number": changed(vocab_size=[1]),
    "no heads": changed(num_attention_heads=0),
    "an infinite number": changed(intermediate_size=float("inf")),
    "a quantization without groups": changed(quantization={"bits": 4}),
}


@pytest.mark.parametrize("how", CONFIGS)
def test_a_damaged_config_is_named(copy: Path, how: str) -> None:
    file = copy / "config.json"
    file.write_text(json.dumps(CONFIGS[how](json.loads(file.read_text()))))
    with pytest.raises(ModelError) as caught:
        shapes_from(Checkpoint.open(copy).config)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_a_config_that_is_no_json_is_named(copy: Path, content: bytes) -> None:
    file = copy / "config.json"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json: not readable as JSON"):
        shapes_from(Checkpoint.open(copy).config)
    file.unlink()
    with pytest.raises(ModelError, match=r"no config\.json there"):
        shapes_from(Checkpoint.open(copy).config)


def headed(text: str) -> bytes:
    """A safetensors file of this header and no weights."""
    return len(text).to_bytes(8, "little") + text.encode()


WEIGHTS = {
    "nothing": b"",
    "less than a length": b"\x01\x02",
    "a length without a header": (64).to_bytes(8, "little"),
    "a length of everything": b"\xff" * 8 + b"{}",
    "no JSON": headed("{what}"),
    "a list": headed("[]"),
    "an entry that is a number": headed('{"w": 1}'),
    "an entry without offsets": headed('{"w": {"dtype": "F32"}}'),
    "an entry without a type": headed('{"w": {"data_offsets": [0, 4]}}'),
    "offsets that are three": headed('{"w": {"dtype": "F32", "data_offsets": [0, 1, 2]}}'),
    "offsets that are words": headed('{"w": {"dtype": "F32", "data_offsets": ["a", "b"]}}'),
}


@pytest.mark.parametrize("how", WEIGHTS)
def test_damaged_weights_are_named(copy: Path, how: str) -> None:
    file = copy / "model-00002-of-00002.safetensors"
    file.write_bytes(WEIGHTS[how])
    with pytest.raises(ModelError) as caught:
        Checkpoint.open(copy).weight_bytes(4)
    assert str(caught.value).startswith(f"{file}: not readable as weights: ")
    assert "\n" not in str(caught.value)


def test_only_what_has_a_floating_point_changes_its_size(tmp_path: Path) -> None:
    arrays = {"a": mx.zeros((3, 5), mx.bfloat16), "b": mx.zeros((7,)), "c": mx.zeros((2, 2), mx.uint32)}
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), arrays, metadata={"format": "mlx"})
    assert Checkpoint.open(tmp_path).weight_bytes() == 30 + 28 + 16
    assert Checkpoint.open(tmp_path).weight_bytes(4) == 60 + 28 + 16
    assert Checkpoint.open(tmp_path).weight_bytes(2) == 30 + 14 + 16
    (tmp_path / "weights.safetensors").unlink()
    assert Checkpoint.open(tmp_path).weight_bytes() == 0


# Pixels

PIXELS: dict[str, tuple[Any, Any, int]] = {
    "max_pixels": ({"max_pixels": 200704}, None, 200704),
    "the longest edge": ({"size": {"longest_edge": 100352, "shortest_edge": 3136}}, None, 100352),
    "both": ({"max_pixels": 200704, "size": {"longest_edge": 100352}}, None, 200704),
    "null beside it": ({"max_pixels": None, "size": {"longest_edge": 100352}}, None, 100352),
    "the processor's file alone": (None, {"image_processor": {"size": {"longest_edge": 100352}}}, 100352),
    "the processor's file last": ({"max_pixels": 200704}, {"image_processor": {"max_pixels": 50176}}, 50176),
    "one of two kinds each": (
        {"max_pixels": 200704, "size": {"longest_edge": 100352}},
        {"image_processor": {"size": {"longest_edge": 50176}}},
        200704,
    ),
    "a processor without an image processor": ({"max_pixels": 200704}, {"processor_class": "x"}, 200704),
    "null for an image processor": ({"max_pixels": 200704}, {"image_processor": None}, 200704),
}


@pytest.mark.parametrize("how", PIXELS)
def test_pixels_are_those_that_the_processor_has(copy: Path, how: str) -> None:
    first, second, pixels = PIXELS[how]
    (copy / "preprocessor_config.json").unlink()
    for name, content in (("preprocessor_config.json", first), ("processor_config.json", second)):
        if content is not None:
            (copy / name).write_text(json.dumps(content))
    assert Checkpoint.open(copy).max_pixels == pixels
    assert load_vlm(copy, 1 << 30).features.max_pixels == pixels


@pytest.mark.parametrize(
    "content", ["", "[]", "[1]", "null", "{}", '{"size": 5}', '{"size": {}}', '{"max_pixels": []}']
)
def test_pixels_that_are_not_stated_are_not_known(copy: Path, content: str) -> None:
    (copy / "preprocessor_config.json").write_text(content)
    assert Checkpoint.open(copy).max_pixels is None
    (copy / "preprocessor_config.json").unlink()
    assert Checkpoint.open(copy).max_pixels is None


def test_the_tiny_checkpoints_say_their_pixels() -> None:
    for family in FAMILIES:
        assert Checkpoint.open(GOLDEN / family).max_pixels == tiny_model(family).features._processor.max_pixels
    assert Checkpoint.open(JUDGE).max_pixels == 84 * 84
