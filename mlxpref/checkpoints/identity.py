"""Which model a folder holds, whatever it is called and however it is stored: what an adapter is known to belong to."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxpref.checkpoints.files import RECORD, read_json_object
from mlxpref.checkpoints.safetensors import TensorInfo
from mlxpref.errors import ModelError

__all__ = ["Identity", "identity_of"]

_SAMPLE = 4096
"""The bytes of each tensor that count: enough to tell a model from its fine-tuned copies, quick at any size."""
_STORAGE = ("_name_or_path", "architectures", "auto_map", "transformers_version", "use_cache")


@dataclass(frozen=True)
class Identity:
    """A folder's own fingerprint, and those of the folders that it was converted from."""

    own: str
    ancestors: tuple[str, ...] = ()

    @property
    def all(self) -> frozenset[str]:
        """Every fingerprint that it answers to."""
        return frozenset((self.own, *self.ancestors))

    def is_same_model(self, other: "Identity") -> bool:
        """Whether two folders hold one model, the same weights or one's weights stored in another way."""
        return bool(self.all & other.all)

    def to_json(self) -> dict[str, Any]:
        """As it is kept beside adapters and in mlxpref.json."""
        return {"fingerprint": self.own, "ancestors": list(self.ancestors)}

    @classmethod
    def from_json(cls, value: Any) -> "Identity | None":
        """What `to_json` made, or None for anything else."""
        if not isinstance(value, Mapping) or not isinstance(value.get("fingerprint"), str):
            return None
        ancestors = value.get("ancestors") or []
        return cls(value["fingerprint"], tuple(map(str, ancestors))) if isinstance(ancestors, list) else None


def identity_of(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Identity:
    """The identity of the model in a folder; ModelError where it cannot be read.

    The fingerprint is of the config, of names, types and shapes of all tensors and of the first bytes of each. A folder
    that was converted descends from its source; one that an adapter was fused into is a model of its own.
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
