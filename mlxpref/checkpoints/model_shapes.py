"""The shapes of a checkpoint, and what its weights take: from its config and the heads of its files, without MLX."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Quantization", "Shapes", "VisionShapes", "shapes_from"]

_CHANNELS = 3


@dataclass(frozen=True)
class VisionShapes:
    """A vision tower: `full` are the blocks that attend to the whole image, `levels` the deepstack outputs."""

    depth: int
    hidden: int
    inner: int
    heads: int
    out: int
    gated: bool
    patch: int = 14
    merge: int = 2
    frames: int = 2
    window: int = 0
    full: tuple[int, ...] = ()
    places: int = 0
    levels: int = 0

    @property
    def pixels_a_token(self) -> int:
        """Pixels that become one token of the language model."""
        return (self.patch * self.merge) ** 2

    @property
    def patch_values(self) -> int:
        """Numbers that a patch is given as."""
        return _CHANNELS * self.frames * self.patch**2

    @property
    def parameters(self) -> int:
        """How many weights it has."""
        hidden, wide = self.hidden, self.hidden * self.merge**2
        # Qwen2.5-VL has norms without and linear layers with biases; the ungated ones have biases everywhere.
        mlp = 3 * hidden * self.inner + 2 * self.inner if self.gated else 2 * hidden * self.inner + self.inner
        block = 4 * hidden**2 + 4 * hidden + mlp + hidden + (2 if self.gated else 4) * hidden
        merger = wide**2 + wide + wide * self.out + self.out
        return (
            self.patch_values * hidden
            + self.depth * block
            + (1 + self.levels) * merger
            + (1 if self.gated else 2) * (hidden + self.levels * wide)
            + (self.places + 1 if self.places else 0) * hidden  # learned places come with a bias of the patch embedding
        )


@dataclass(frozen=True)
class Quantization:
    """Weights of `bits` bits in groups that share a scale; affine ones have an offset, too."""

    bits: int
    group: int
    affine: bool = True

    def bytes_of(self, rows: int, columns: int, float_bytes: int) -> int:
        """A matrix (rows, columns); one that the groups do not divide is left as it is."""
        if columns % self.group or rows * columns % 64:
            return rows * columns * float_bytes
        scale = 2 * float_bytes if self.affine else 1
        return rows * columns * self.bits // 8 + rows * columns // self.group * scale


@dataclass(frozen=True)
class Shapes:
    """A vision-language model of the Qwen-VL families: what its memory follows from.

    `context` is how many tokens it can read, `float_bytes` the size of a number that is not quantized.
    """

    hidden: int
    layers: int
    heads: int
    key_heads: int
    head: int
    inner: int
    vocabulary: int
    tied: bool
    vision: VisionShapes
    context: int = 1 << 20
    float_bytes: int = 2
    biases: bool = True
    quantization: Quantization | None = None

    @property
    def key_width(self) -> int:
        """Numbers of a token's keys in one layer; its values are as many."""
        return self.key_heads * self.head

    @property
    def linear(self) -> list[tuple[int, int]]:
        """The linear layers of one layer, (out, in)."""
        hidden, mixed, keys = self.hidden, self.heads * self.head, self.key_width
        attention = [(mixed, hidden), (keys, hidden), (keys, hidden), (hidden, mixed)]
        return [*attention, (self.inner, hidden), (self.inner, hidden), (hidden, self.inner)]

    def adapter_bytes(self, rank: int) -> int:
        """A LoRA adapter in float32 on all linear layers of the language model."""
        return 4 * self.layers * rank * sum(rows + columns for rows, columns in self.linear)

    def weight_bytes(self, float_bytes: int) -> int:
        """All weights, where what is not quantized has `float_bytes` bytes a number; the vision tower never is."""
        matrices = [(self.vocabulary, self.hidden)] * (1 if self.tied else 2) + self.layers * self.linear
        one = self.quantization.bytes_of if self.quantization else lambda rows, columns, size: rows * columns * size
        mixed, norms = self.heads * self.head, (2 * self.layers + 1) * self.hidden
        vectors = self.layers * (mixed + 2 * self.key_width if self.biases else 2 * self.head) + norms
        return sum(one(*matrix, float_bytes) for matrix in matrices) + float_bytes * (vectors + self.vision.parameters)


def shapes_from(config: Mapping[str, Any]) -> Shapes:
    """The shapes that a config.json states; KeyError for what it lacks."""
    text = {**config, **(config.get("text_config") or {})}
    family = config["model_type"]
    found = config.get("quantization") or config.get("quantization_config")
    quantization = None
    if found and "bits" in found:
        affine = found.get("mode", "affine") == "affine"
        quantization = Quantization(int(found["bits"]), int(found["group_size"]), affine)
    hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    dtype = str(text.get("dtype") or text.get("torch_dtype") or "bfloat16")
    return Shapes(
        hidden=hidden,
        layers=int(text["num_hidden_layers"]),
        heads=heads,
        key_heads=int(text.get("num_key_value_heads") or heads),
        head=int(text.get("head_dim") or hidden // heads),
        inner=int(text["intermediate_size"]),
        vocabulary=int(text["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        vision=_vision_from(config["vision_config"], family, hidden),
        context=int(text.get("max_position_embeddings") or 1 << 20),
        float_bytes=4 if dtype == "float32" else 2,
        biases=family != "qwen3_vl",
        quantization=quantization,
    )


def _vision_from(config: Mapping[str, Any], family: str, out: int) -> VisionShapes:
    depth = int(config.get("depth", 32))
    old = family == "qwen2_vl"
    hidden = int(config.get("embed_dim", 1280) if old else config["hidden_size"])
    common: dict[str, Any] = {
        "depth": depth,
        "hidden": hidden,
        "heads": int(config.get("num_heads", 16)),
        "out": out,
        "patch": int(config.get("patch_size", 14)),
        "merge": int(config.get("spatial_merge_size", 2)),
        "frames": int(config.get("temporal_patch_size", 2)),
    }
    if old:
        return VisionShapes(**common, inner=int(hidden * config.get("mlp_ratio", 4)), gated=False, full=_all(depth))
    inner = int(config["intermediate_size"])
    if family == "qwen3_vl":
        places, levels = int(config["num_position_embeddings"]), len(config.get("deepstack_visual_indexes") or ())
        return VisionShapes(**common, inner=inner, gated=False, full=_all(depth), places=places, levels=levels)
    full = tuple(i for i in config.get("fullatt_block_indexes", (7, 15, 23, 31)) if i < depth)
    return VisionShapes(**common, inner=inner, gated=True, full=full, window=int(config.get("window_size", 112)))


def _all(depth: int) -> tuple[int, ...]:
    return tuple(range(depth))
