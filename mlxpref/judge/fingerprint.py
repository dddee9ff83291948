"""The fingerprint of a judge: equal for the same model and adapter, different after any change to them."""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxpref.checkpoints.files import RECORD
from mlxpref.engine.lora import adapter_weights
from mlxpref.engine.vlm import VLM

_FILES = ("*.json", "*.jinja", "*.txt")
"""The files next to the weights: config, tokenizer, chat template, image processor."""
_ENCODERS = ("mlx", "mlx-vlm", "pillow")
"""The packages that make features of pixels."""


class Fingerprint:
    """The fingerprint of a model in memory: its weights in their precision, its adapter, its files.

    It reads the weights from memory, so that no file's name, copy or date makes another model look like this one. It
    hashes the adapter's bytes each time. Of the other matrices it hashes the sums of rows and columns, computed once
    while the arrays are the same objects. So it misses base weights that are overwritten in place, and changes that
    keep all these sums on purpose.
    """

    def __init__(self, vlm: VLM) -> None:
        self._vlm = vlm
        self._sums: dict[str, tuple[mx.array, bytes]] = {}

    def now(self) -> str:
        """The fingerprint of the model and its current adapter."""
        model = self._vlm.model
        adapter = adapter_weights(model)
        weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
        base = {name: weight for name, weight in weights.items() if name not in adapter}
        digest = hashlib.sha256(self._files)
        digest.update(_lines(weights, self._sums_of(base) | _bytes_of(adapter)))
        # An adapter's scale is a number of the layer, not a weight.
        scales = [(name, layer.scale) for name, layer in model.named_modules() if f"{name}.lora_a" in adapter]
        digest.update(repr(sorted(scales)).encode())
        return digest.hexdigest()

    def tower(self) -> str:
        """The fingerprint of what makes features of pixels, to the bit: the same under all adapters of a model."""
        model, device = self._vlm.model, mx.default_device().type
        settings = self._vlm.features.processor.to_dict(), model.config.vision_config, model.vision_tower
        versions = [f"{name} {version(name)}" for name in _ENCODERS]
        digest = hashlib.sha256("\n".join(map(str, [*settings, *versions, device])).encode())
        weights: dict[str, mx.array] = dict(tree_flatten(model.vision_tower.parameters()))
        digest.update(_lines(weights, {name: weight_sums(weight) for name, weight in weights.items()}))
        return digest.hexdigest()

    @cached_property
    def _files(self) -> bytes:
        """The content of the checkpoint's small files, as one digest."""
        matches = (file for pattern in _FILES for file in self._vlm.checkpoint.folder.glob(pattern))
        # The record of a conversion changes no answer.
        files = sorted(file for file in matches if file.name != RECORD)
        contents = [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
        return "\n".join(contents).encode()

    def _sums_of(self, weights: dict[str, mx.array]) -> dict[str, bytes]:
        """The sums of weights, cached while the arrays are the same objects."""
        before = self._sums
        self._sums = {
            name: before[name] if name in before and before[name][0] is weight else (weight, weight_sums(weight))
            for name, weight in weights.items()
        }
        return {name: sums for name, (_, sums) in self._sums.items()}


def weight_sums(weight: mx.array) -> bytes:
    """The sums of the rows and of the columns of a weight's bits.

    It adds 16 bits at a time: sums of 32 bits are modulo 2^32, where two changed signs cancel.
    """
    kind = mx.uint8 if weight.dtype.size == 1 else mx.uint16
    bits = weight.reshape(-1, weight.shape[-1] if weight.ndim > 1 else 1).view(kind)
    return _bytes(bits.sum(axis=1)) + _bytes(bits.sum(axis=0))


def _lines(weights: Mapping[str, mx.array], contents: Mapping[str, bytes]) -> bytes:
    """The contents of weights with their types and shapes."""
    return b"".join(
        f"{name} {weights[name].dtype} {weights[name].shape} {len(content)}\n".encode() + content
        for name, content in sorted(contents.items())
    )


def _bytes_of(weights: dict[str, mx.array]) -> dict[str, bytes]:
    return {name: _bytes(weight.view(mx.uint8)) for name, weight in weights.items()}


def _bytes(array: mx.array) -> bytes:
    return np.array(array).tobytes()
