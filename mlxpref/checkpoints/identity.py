"""The identity of a folder's model, independent of its name and storage; adapters refer to it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxpref.checkpoints.files import RECORD, read_json_object
from mlxpref.checkpoints.safetensors import TensorInfo
from mlxpref.errors import ModelError

_SAMPLE = 4096
"""Bytes of each tensor in the hash: enough to tell a model from its fine-tuned copies, and quick."""
_STORAGE = ("_name_or_path", "architectures", "auto_map", "transformers_version", "use_cache")


@dataclass(frozen=True)
class Identity:
    """A folder's own fingerprint, and those of the folders it was converted from."""

    own: str
    ancestors: tuple[str, ...] = ()

    @property
    def all(self) -> frozenset[str]:
        """All its fingerprints."""
        return frozenset((self.own, *self.ancestors))

    def is_same_model(self, other: "Identity") -> bool:
        """Whether two folders hold the same weights, perhaps stored in another way."""
        return bool(self.all & other.all)

    def to_json(self) -> dict[str, Any]:
        """As in mlxpref.json and with adapters."""
        return {"fingerprint": self.own, "ancestors": list(self.ancestors)}

    @classmethod
    def from_json(cls, value: Any) -> "Identity | None":
        """The identity that `to_json` wrote, or None for anything else."""
        if not isinstance(value, Mapping) or not isinstance(value.get("fingerprint"), str):
            return None
        ancestors = value.get("ancestors") or []
        return cls(value["fingerprint"], tuple(map(str, ancestors))) if isinstance(ancestors, list) else None


def identity_of(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Identity:
    """The identity of the model in a folder; ModelError where it cannot be read.

    The fingerprint is of the config, of names, types and shapes of all tensors and of the first bytes of each. A
    converted folder descends from its source; a folder with a fused adapter is a new model.
    """
    digest = hashlib.sha256()
    model = {key: value for key, value in config.items() if key not in _STORAGE}
    digest.update(json.dumps(model, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        digest.update(next(tensor.chunks(_SAMPLE), b""))
    return Identity(digest.hexdigest()[:32], _ancestors(folder))


def _ancestors(folder: Path) -> tuple[str, ...]:
    try:
        record = read_json_object(folder / RECORD) if (folder / RECORD).is_file() else {}
    except ModelError:
        return ()
    source = None if record.get("adapter") else Identity.from_json(record.get("identity"))
    return tuple(sorted(source.all)) if source else ()
