"""The judges of `scripts.rehearsal`: real sizes, random weights, and a vocabulary of the real number of words.

Qwen's whole tokenizer is not here. The part of it that the tests carry splits our questions as the whole does. Behind
it come placeholders, so that what is done for every word is done as often as for a real judge, and so the special
tokens have their real ids.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlxpref.checkpoints.families import FAMILIES
from mlxpref.checkpoints.files import CONFIG, SIDE_FILES, TOKENIZER
from scripts.bench_gpu_judges import QWEN3_5_4B
from scripts.conversion_memory import GOLDEN, Json, config_of, write_random
from scripts.memory_table import SHAPES as LISTED

__all__ = ["SHAPES", "Shape", "tokenizer_of"]

_VOCABULARY = GOLDEN / "profiles" / "vocabulary" / TOKENIZER
_WORDS = {151936: 151643, 248320: 248044}
"""The words before the special tokens, by the rows of the embedding."""


@dataclass(frozen=True)
class Shape:
    """A family, and the sizes that differ from those of the tests' tiny checkpoint; a file has `shard` bytes."""

    family: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any] = field(default_factory=dict)
    shard: int = 10**9

    def write(self, folder: Path) -> None:
        """Write a checkpoint as the hub has it; ModelError where the disk has no room."""
        config, words = config_of(self.family, self.text, self.vision), tokenizer_of(self.text["vocab_size"])
        old = _read(GOLDEN / self.family / "tokenizer_config.json")
        new = {token["content"]: token["id"] for token in words["added_tokens"]}
        ids = {int(number): new[token["content"]] for number, token in old["added_tokens_decoder"].items()}
        with TemporaryDirectory() as place:
            files = Path(place)
            for name in SIDE_FILES:
                if (GOLDEN / self.family / name).is_file():
                    shutil.copy(GOLDEN / self.family / name, files)
            (files / TOKENIZER).write_text(json.dumps(words), encoding="utf-8")
            added = {str(token.pop("id")): token for token in words["added_tokens"]}
            _write(files / "tokenizer_config.json", old | {"added_tokens_decoder": added})
            _write(files / "generation_config.json", _renumbered(_read(files / "generation_config.json"), ids))
            write_random(folder, _renumbered(config, ids), files, self.shard)

    @property
    def largest(self) -> int:
        """The numbers of the largest tensor, the embedding."""
        return int(self.text["vocab_size"] * self.text["hidden_size"])


def tokenizer_of(rows: int) -> Json:
    """A tokenizer for an embedding of so many rows; where these are no real number, without placeholders."""
    description = _read(_VOCABULARY)
    words = description["model"]["vocab"]
    first = len(words)
    words |= {f"Ġw{number}": number for number in range(first, _WORDS.get(rows, first))}
    for token in description["added_tokens"]:
        token["id"] += len(words) - first
    return description


def _renumbered(settings: Any, ids: Mapping[int, int]) -> Any:
    """Settings in which each id of a token is another one."""
    if not isinstance(settings, dict):
        return settings
    changed = {key: _renumbered(value, ids) for key, value in settings.items()}
    for key, value in changed.items():
        if key.endswith("token_id"):
            changed[key] = [ids[each] for each in value] if isinstance(value, list) else ids[value]
    return changed


def _read(file: Path) -> Json:
    content: Json = json.loads(file.read_text(encoding="utf-8"))
    return content


def _write(file: Path, content: Json) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def _real(family: str, text: Mapping[str, Any], vision: Mapping[str, Any]) -> Shape:
    """A shape of real sizes: the rotary embedding and the number of image positions are the family's own."""
    facts = FAMILIES[family]
    tiny = _read(GOLDEN / family / CONFIG)["text_config"][facts.rope]
    rope = {facts.rope: tiny | {"mrope_section": list(facts.mrope_section)}}
    positions = {"num_position_embeddings": facts.vision["num_position_embeddings"]}
    return Shape(family, {**text, **rope}, {**positions, **vision})


def _listed(name: str) -> Shape:
    """A shape of convert/models.toml."""
    shape = LISTED[name]
    return _real(shape["model_type"], shape["text_config"], shape["vision_config"])


SHAPES: Mapping[str, Shape] = {
    "2b": _listed("Qwen3-VL-2B"),
    "4b": _listed("Qwen3-VL-4B"),
    "qwen3_5-4b": _real("qwen3_5", {**QWEN3_5_4B["text"], "full_attention_interval": 4}, QWEN3_5_4B["vision"]),
    "tiny": Shape("qwen3_vl", {"vocab_size": 1024, "hidden_size": 64}, shard=10**5),
}
"""Qwen3-VL as convert/models.toml has it, Qwen3.5 as `scripts.bench_gpu_judges`, and a small one for tests."""
