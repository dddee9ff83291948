"""Heads of safetensors files: as the format's own library reads them, and refused wherever it would not."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mlxpref.checkpoints.files import INDEX, read_json_object
from mlxpref.checkpoints.safetensors import read_file_tensor_infos, read_tensor_infos
from mlxpref.errors import ModelError
from tests.conftest import FAMILIES, GOLDEN

SOUND = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(file: Path, head: str | Mapping[str, Any], data: bytes = bytes(8)) -> Path:
    text = (head if isinstance(head, str) else json.dumps(head)).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def refusal(file: Path) -> str:
    """The message for a file, which is one line that names it."""
    with pytest.raises(ModelError) as caught:
        read_file_tensor_infos(file)
    text = str(caught.value)
    assert text.startswith(f"{file}: ")
    assert text.isprintable()
    assert len(text) < 600
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_against_safetensors(family: str) -> None:
    heads = read_tensor_infos(GOLDEN / family)
    names = set()
    for file in (GOLDEN / family).glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            for name in opened.keys():  # noqa: SIM118  it is no mapping
                part = opened.get_slice(name)
                assert heads[name].file == file
                assert (heads[name].dtype, list(heads[name].shape)) == (part.get_dtype(), part.get_shape())
                names.add(name)
    assert heads.keys() == names


def test_bytes_at_the_offsets_of_the_head(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {"a": rng.standard_normal((3, 4)).astype(np.float32), "b": rng.integers(0, 9, 5), "c": np.zeros((0, 2))}
    arrays["c"] = arrays["c"].astype(np.float16)
    save_file(arrays, tmp_path / "model.safetensors", {"format": "pt"})
    content = (tmp_path / "model.safetensors").read_bytes()
    tensors = read_tensor_infos(tmp_path)
    assert tensors.keys() == arrays.keys()
    for name, stored in tensors.items():
        assert content[stored.start : stored.end] == arrays[name].tobytes()


def test_a_folder_without_weights_has_no_heads(tmp_path: Path) -> None:
    assert read_tensor_infos(tmp_path) == {}


HEADS: dict[str, str | dict[str, Any]] = {
    "no JSON": "{what}",
    "a list": "[]",
    "deep": "[" * 200_000,
    "deep objects": '{"a":' * 200_000,
    "a key twice": '{"a": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}',
    "an entry that is none": {"a": None},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": SOUND},
    "an unknown type": {"a": SOUND | {"dtype": "F9"}},
    "a type that MLX does not read": {"a": SOUND | {"dtype": "F64", "shape": [1]}},
    "a type that is a list": {"a": SOUND | {"dtype": []}},
    "a shape that is no list": {"a": SOUND | {"shape": 2}},
    "a shape of fractions": {"a": SOUND | {"shape": [2.0]}},
    "a shape of truths": {"a": SOUND | {"shape": [True, 2]}},
    "a negative shape": {"a": SOUND | {"shape": [-1, -2]}},
    "a shape that overflows 64 bits to 2": {"a": SOUND | {"shape": [2**32, 2**32, 2]}},
    "an axis beyond 32 bits": {"a": SOUND | {"shape": [2**32, 0], "data_offsets": [0, 0]}, "b": SOUND},
    "many axes": {"a": SOUND | {"shape": [1] * 100 + [2]}},
    "a number of very many digits": '{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 8]}}' % ("9" * 9000),
    "a product of very many digits": {"a": SOUND | {"shape": [10**4000]}},
    "three offsets": {"a": SOUND | {"data_offsets": [0, 8, 8]}},
    "offsets backwards": {"a": SOUND | {"data_offsets": [8, 0]}},
    "negative offsets": {"a": SOUND | {"data_offsets": [-8, 0]}},
    "huge offsets": {"a": SOUND | {"data_offsets": [2**63, 2**63 + 8]}},
    "beyond the file": {"a": SOUND | {"shape": [4], "data_offsets": [0, 16]}},
    "bytes unlike the shape": {"a": SOUND | {"shape": [3]}},
    "overlapping": {"a": SOUND, "b": SOUND},
    "a gap before": {"a": SOUND | {"shape": [1], "data_offsets": [4, 8]}},
    "a gap between": {
        "a": {"dtype": "I16", "shape": [1], "data_offsets": [0, 2]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    },
    "bytes of no tensor": {"a": SOUND | {"shape": [1], "data_offsets": [0, 4]}},
    "a line break in a name": {"a\nb": SOUND},
}
LENIENT = {"a type that MLX does not read", "an axis beyond 32 bits", "many axes", "a line break in a name"}
"""What the format's own library takes, and MLX or a message would not."""


@pytest.mark.parametrize("how", HEADS)
def test_hostile_head_is_refused(how: str, tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", HEADS[how])
    assert "not readable as weights" in refusal(file)
    if how not in LENIENT:
        with pytest.raises(SafetensorError), safe_open(file, "np") as opened:
            opened.keys()


def test_sound_head_is_read(tmp_path: Path) -> None:
    tensors = read_file_tensor_infos(write(tmp_path / "model.safetensors", {"a": SOUND}))
    assert tensors["a"].shape == (2,)
    assert tensors["a"].size == 8


@pytest.mark.parametrize(
    "content", [b"", b"\1\2", bytes(8), bytes(100), b"\xff" * 100, (10**8 + 1).to_bytes(8, "little")]
)
def test_impossible_size_of_head_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    refusal(tmp_path / "model.safetensors")


def test_a_head_of_a_hundred_megabytes(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write((101_000_000).to_bytes(8, "little"))
        stream.truncate(200_000_000)  # takes no room on the disk
    assert "header too large" in refusal(file)


@pytest.mark.parametrize("change", [-1, -1000, 1, 1000])
def test_cut_or_extended_file_is_refused(change: int, tmp_path: Path) -> None:
    content = (GOLDEN / "qwen3_vl" / "model.safetensors").read_bytes()
    file = tmp_path / "model.safetensors"
    file.write_bytes(content[:change] if change < 0 else content + bytes(change))
    assert "file not fully covered" in refusal(file)


def test_null_metadata(tmp_path: Path) -> None:
    """MLX writes them so where it is given none."""
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"a": mx.zeros(2)})
    assert read_file_tensor_infos(tmp_path / "model.safetensors")["a"].shape == (2,)
    assert read_file_tensor_infos(write(tmp_path / "null.safetensors", {"__metadata__": None, "a": SOUND})).keys() == {
        "a"
    }


# Index


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of two files with an index."""
    return Path(shutil.copytree(GOLDEN / "qwen2_vl", tmp_path / "model"))


def index_error(folder: Path, text: str | None = None, **placed: Any) -> str:
    """The message for a folder whose index is another, or places some tensors elsewhere; None drops one."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {k: v for k, v in (index["weight_map"] | placed).items() if v is not None}
    (folder / INDEX).write_text(json.dumps(index) if text is None else text)
    with pytest.raises(ModelError) as caught:
        read_tensor_infos(folder)
    assert str(folder) in str(caught.value)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_links_of_the_hubs_cache(sharded: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        (links / file.name).symlink_to(file.rename(file.with_name(f"blob{number}")))
    assert read_tensor_infos(links).keys() == read_tensor_infos(GOLDEN / "qwen2_vl").keys()


def test_only_indexed_files_are_read(sharded: Path) -> None:
    (sharded / "consolidated.safetensors").write_bytes(b"something else")
    assert read_tensor_infos(sharded).keys() == read_tensor_infos(GOLDEN / "qwen2_vl").keys()


PLACES = ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b.safetensors", "..", "", "config.json"]
PLACES += ["\0.safetensors", "\n.safetensors", ".safetensors", "x" * 300 + ".safetensors"]


@pytest.mark.parametrize("place", [*PLACES, 3, [], {}, True])
def test_an_index_that_leads_elsewhere(place: Any, sharded: Path) -> None:
    assert "no safetensors file of this folder" in index_error(sharded, **{"lm_head.weight": place})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 200_000, "3"])
def test_malformed_index_is_refused(text: str, sharded: Path) -> None:
    assert index_error(sharded, text).startswith(f"{sharded / INDEX}: ")


def test_index_agrees_with_the_files(sharded: Path) -> None:
    name = next(iter(json.loads((sharded / INDEX).read_text())["weight_map"]))
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    there = read_tensor_infos(sharded)[name].file.name
    assert "where it is not" in index_error(sharded, **{name: second if there == first else first})
    assert f"does not name {name!r}" in index_error(sharded, **{name: None})
    assert "where it is not" in index_error(sharded, **{name: there, "x.weight": first})
    assert "no such file" in index_error(sharded, **{"x.weight": "model-3.safetensors"})


def test_tensor_in_two_files_is_refused(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    shutil.copy(sharded / "model-00001-of-00002.safetensors", sharded / "model.safetensors")
    with pytest.raises(ModelError, match="is in both"):
        read_tensor_infos(sharded)


def test_missing_or_strange_file_is_named(sharded: Path) -> None:
    file = sharded / "model-00002-of-00002.safetensors"
    file.unlink()
    for make in (lambda: None, file.mkdir):
        make()
        with pytest.raises(ModelError, match="no such file"):
            read_tensor_infos(sharded)


# JSON


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[]", b"{", b"[" * 200_000, b'{"a": 1} x', b"9" * 9000, b"null", b'{"a": "\\ud800"}']
)
def test_json_without_object_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_json_object(tmp_path / "a.json")
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'}: not readable as JSON: ")
    assert str(caught.value).isprintable()


def test_a_json_object_is_read_up_to_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a": [1, "ä"]}', encoding="utf-8")
    assert read_json_object(file, file.stat().st_size) == {"a": [1, "ä"]}
    with pytest.raises(ModelError, match="larger than"):
        read_json_object(file, file.stat().st_size - 1)
    with pytest.raises(ModelError, match="no such file"):
        read_json_object(tmp_path / "b.json")
