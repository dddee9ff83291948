"""A model folder on disk; reads each of its files once."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Union

from mlxpref.checkpoints.families import FAMILIES, Family
from mlxpref.checkpoints.files import CONFIG, check_complete, check_single, read_json_object
from mlxpref.checkpoints.hf_config import Json, check_kind, normalise
from mlxpref.checkpoints.hf_values import validate
from mlxpref.checkpoints.identity import Identity, identity_of
from mlxpref.checkpoints.names import places_of
from mlxpref.checkpoints.safetensors import TensorInfo, read_tensor_infos
from mlxpref.errors import ModelError

_FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""Bytes of the floating point types of a safetensors file."""
_HIDDEN = ("offload_index.json", "hf_quant_config.json")
"""Files that make mlx-vlm accept missing weights, or take foreign weights for quantized ones."""


@dataclass(frozen=True)
class Checkpoint:
    """A model folder; each property reads its files once. All raise ModelError for unusable files."""

    folder: Path

    @classmethod
    def open(cls, folder: Union[Path, "Checkpoint"]) -> "Checkpoint":
        """The checkpoint in a folder, or the checkpoint itself. It reads nothing yet."""
        return folder if isinstance(folder, Checkpoint) else cls(folder)

    @cached_property
    def stored_config(self) -> Json:
        """The content of config.json; ModelError for a folder without a necessary file."""
        check_complete(self.folder)
        check_single(self.folder)
        return read_json_object(self.folder / CONFIG)

    @cached_property
    def config(self) -> Json:
        """The config in the hub's layout, checked; see `hf_config`."""
        file = self.folder / CONFIG
        check_kind(self.stored_config, file)  # before any file of weights is opened
        config = normalise(self.stored_config, self.tensors, file)
        validate(config, file)
        return config

    @property
    def family(self) -> Family:
        """What differs from family to family."""
        return FAMILIES[self.config["model_type"]]

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Type, shape and place of every tensor by name; empty for a folder without weights."""
        return read_tensor_infos(self.folder)

    @cached_property
    def places(self) -> Mapping[str, str]:
        """The name in mlx-vlm's model of each stored tensor; see `places_of`."""
        return places_of(self.tensors, self.family, self.folder)

    @cached_property
    def identity(self) -> Identity:
        """The model's identity, independent of the folder's name."""
        return identity_of(self.folder, self.config, self.tensors)

    @cached_property
    def max_pixels(self) -> int | None:
        """The pixel budget of its image processor, or None without one.

        As in mlx-vlm, the processor's own file overrides the image processor's.
        """
        settings: dict[str, Any] = {}
        for name, part in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
            with suppress(ModelError, ValueError, TypeError, KeyError):
                config = read_json_object(self.folder / name)
                settings.update(config[part] if part else config)
        with suppress(ValueError, TypeError, KeyError, OverflowError):
            return int(settings.get("max_pixels") or settings["size"]["longest_edge"])
        return None

    def weight_bytes(self, float_bytes: int | None = None) -> int:
        """Bytes of the loaded weights; `float_bytes` is the size of a loaded floating point number, None as stored."""
        total = 0
        for name in self.places:
            tensor = self.tensors[name]
            width = _FLOAT_BYTES.get(tensor.dtype)
            total += tensor.size // width * float_bytes if float_bytes and width else tensor.size
        return total

    @contextmanager
    def readable(self) -> Iterator[Path]:
        """A folder that mlx-vlm can load: this one, or a temporary one with a new config and links to the rest.

        The temporary one is then removed; weights loaded from it, lazy ones, too, keep their files open.
        """
        if self.config == self.stored_config and not any((self.folder / name).exists() for name in _HIDDEN):
            yield self.folder
            return
        with TemporaryDirectory(prefix="mlxpref-") as place:
            view = Path(place)
            for file in self.folder.resolve().iterdir():
                if file.name not in (CONFIG, *_HIDDEN) and file.suffix != ".py" and file.is_file():
                    (view / file.name).symlink_to(file)
            (view / CONFIG).write_text(json.dumps(self.config, indent=2), encoding="utf-8")
            yield view
