"""A model folder on disk: what its files say, each read once and passed on."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Union

from mlxpref.checkpoints.files import CONFIG, check_complete, read_json_object
from mlxpref.checkpoints.hf_config import Json, normalise, validate
from mlxpref.checkpoints.identity import Identity, identity_of
from mlxpref.checkpoints.safetensors import TensorInfo, read_tensor_infos
from mlxpref.errors import ModelError

__all__ = ["Checkpoint"]

_FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""Bytes of the floating point types of a safetensors file."""
_HIDDEN = ("offload_index.json", "hf_quant_config.json")
"""Files that make mlx-vlm take missing weights for granted, or weights for quantized that are not MLX's."""


@dataclass(frozen=True)
class Checkpoint:
    """A model folder; each property reads its files once. All raise ModelError for files that cannot be used."""

    folder: Path

    @classmethod
    def open(cls, folder: Union[Path, "Checkpoint"]) -> "Checkpoint":
        """The checkpoint in a folder; a checkpoint is returned as it is. Nothing is read yet."""
        return folder if isinstance(folder, Checkpoint) else cls(folder)

    @cached_property
    def stored_config(self) -> Json:
        """What config.json holds; ModelError for a folder that lacks a file that every model has."""
        check_complete(self.folder)
        return read_json_object(self.folder / CONFIG)

    @cached_property
    def config(self) -> Json:
        """The config in the hub's layout, checked; see `hf_config`."""
        file = self.folder / CONFIG
        config = normalise(self.stored_config, self.tensors, file)
        validate(config, file)
        return config

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Type, shape and place of every tensor by name; empty for a folder without weights."""
        return read_tensor_infos(self.folder)

    @cached_property
    def identity(self) -> Identity:
        """Which model it is, whatever the folder is called."""
        return identity_of(self.folder, self.config, self.tensors)

    @cached_property
    def max_pixels(self) -> int | None:
        """The pixels that its image processor shrinks images to, or None where it does not say.

        As mlx-vlm reads them: what the processor's own file says of the image processor goes first.
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
        """What the loaded weights take; `float_bytes` is what a floating point number becomes, None as it is stored."""
        total = 0
        for tensor in self.tensors.values():
            width = _FLOAT_BYTES.get(tensor.dtype)
            total += tensor.size // width * float_bytes if float_bytes and width else tensor.size
        return total

    @contextmanager
    def readable(self) -> Iterator[Path]:
        """A folder that mlx-vlm can load: this one, or a temporary one with the rewritten config and links to the rest.

        The temporary one is gone afterwards; weights loaded from it, lazily too, keep their files open.
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
