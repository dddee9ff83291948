"""The memory plan of a run from a checkpoint's shapes and the settings, before loading.

A plan is the weights, other resident memory (adapter and optimizer, image features, shared prefixes), and the largest
of the consecutive phases. A phase is keys and values, logits, and MLX's arrays for one running layer (`activations`),
whose factors were fitted to the peaks of MLX 0.32.4 on a CPU for models of 0.6 and 300 million parameters;
`scripts/memory_table.py --check` measures them again. Metal was not measured: all attention scores count, as on a CPU,
though its fused attention holds none in a forward pass (it is not used with a gradient, see `use_fallback` in MLX's
scaled_dot_product_attention.cpp). Recurrent layers (`recurrent_size.py`) were measured with 1 and 60 million
parameters. Experts are estimated from the arrays in their code.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mlxpref.checkpoints import bounds
from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.families import FAMILIES, Family
from mlxpref.checkpoints.recommended import device_working_set
from mlxpref.checkpoints.recurrent_size import RecurrentSize
from mlxpref.config import JudgeSettings, TrainSettings
from mlxpref.errors import ConfigError
from mlxpref.text import format_bytes

S = TypeVar("S", TrainSettings, JudgeSettings)
Widths = tuple[int, int, int]
Held = tuple[float, float, float, float]

# Arrays that exist at once while a layer runs: of the hidden width, of the MLP's inner width, of attention scores, and
# of what a recurrent layer has in place of these.
_FORWARD = (8, 4, 1.1, 2.0)
_BACKWARD = (16, 14, 2.6, 2.1)
_KEPT = (7, 5, 1, 2.1)  # of a layer without recomputing, until its backward pass
_KEYS = 3  # arrays of a layer's visible keys, repeated for the rows that share them
_LOGITS = 3 * 4  # bytes of three arrays of logits in float32
_HEAD_CHUNKS = 6 * 4  # bytes of the most chunks of logits in an update
_BESIDE = 0.4  # share of the smaller of comparisons and completions in memory with the larger, backwards
_TEXT = 192  # tokens of a comparison without its images: 110 of ours, and room for a prompt
_QUESTION = 40  # of these, tokens after the second image

# Settings that save memory when halved, and their least useful values. The first two change no result.
_LEAST = {"micro_batch": 1, "rows": 1, "max_pixels": 128 * 128, "max_tokens": 32, "group": 2}


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model on a device: its weights take `weights` bytes, other numbers `float_bytes` each.

    `text` and `vision` are the width of hidden states, the width inside the MLP (of the experts of a token together,
    with their copies of its state) and the attention heads of the layers of the language model and of the vision tower.
    `key_width` is the width of a token's keys in a layer with attention; its values are as wide. `adapted` are the
    inputs and outputs of all linear layers that an adapter is on. `image_width` is the width of an image token's
    features with all deepstack levels. `max_pixels` is the model's own pixel budget. All methods but `image_tokens`
    return bytes.
    """

    weights: int
    float_bytes: int
    max_pixels: int
    text: Widths
    vision: Widths
    layers: int
    attention_layers: int
    recurrent: RecurrentSize
    query_width: int
    key_width: int
    adapted: int
    vocabulary: int
    image_width: int
    pixels_per_token: int
    patches_per_token: int

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], weights: int, float_bytes: int | None = None, max_pixels: int | None = None
    ) -> "ModelSize":
        """The sizes in a checked config.json; `float_bytes` None takes those of its dtype."""
        family = FAMILIES[config["model_type"]]
        text, vision = family.language(config), {**family.vision, **config["vision_config"]}
        hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
        head, width = int(text.get("head_dim") or hidden // heads), int(vision[family.vision_width])
        query_width, key_width = heads * head, int(text.get("num_key_value_heads") or heads) * head
        inner, merge = int(text["intermediate_size"]), int(vision["spatial_merge_size"])
        vision_inner = int(vision.get("intermediate_size") or width * vision["mlp_ratio"])
        if family.expert_layers(text):
            inner = max(inner, int(text["num_experts_per_tok"]) * (int(text["moe_intermediate_size"]) + hidden))
        return cls(
            weights=weights,
            float_bytes=float_bytes or (4 if (text.get("dtype") or text.get("torch_dtype")) == "float32" else 2),
            max_pixels=max_pixels or 1 << 30,
            text=(hidden, inner, heads),
            vision=(width, vision_inner, int(vision["num_heads"])),
            layers=int(text["num_hidden_layers"]),
            attention_layers=family.attention_layers(text),
            recurrent=RecurrentSize.of(family, text),
            query_width=query_width,
            key_width=key_width,
            adapted=_adapted(family, text, query_width, key_width),
            vocabulary=int(text["vocab_size"]),
            image_width=hidden * (1 + len(vision.get("deepstack_visual_indexes") or ())),
            pixels_per_token=(int(vision["patch_size"]) * merge) ** 2,
            patches_per_token=merge**2,
        )

    def adapter(self, rank: int) -> int:
        """A LoRA adapter in float32."""
        return 4 * rank * self.adapted

    def image_tokens(self, max_pixels: int) -> int:
        """Tokens of an image under a pixel budget, at most."""
        return max(1, min(max_pixels, self.max_pixels) // self.pixels_per_token)

    def features(self, images: int, tokens: int) -> int:
        """Cached features of images."""
        return min(bounds.FEATURE_BYTES, images * tokens * self.image_width * self.float_bytes)

    def keys_values(self, tokens: int) -> int:
        """Keys and values of tokens through all layers with attention."""
        return 2 * tokens * self.attention_layers * self.key_width * self.float_bytes

    def states(self, rows: int) -> int:
        """The states of rows through all recurrent layers."""
        return self.recurrent.layers * rows * self.recurrent.state(self.float_bytes)

    def layer(self, held: Held, rows: int, columns: int, before: int = 0) -> int:
        """A running layer on the last piece of a block (rows, columns), which sees `before` columns and the block."""
        context = before + columns
        keys = _KEYS * rows * context * self.key_width * self.float_bytes
        columns = min(columns, bounds.piece_columns(rows))
        attention = keys + self.activations(held, rows * columns, context)
        return max(attention, self.recurrence(held, rows * self.recurrent.padded(columns)))

    def kept(self, tokens: int, context: int) -> int:
        """Arrays of all layers on tokens that see `context` columns each, without recomputing."""
        attention = self.attention_layers * self.activations(_KEPT, tokens, context)
        return attention + self.recurrent.layers * self.recurrence(_KEPT, tokens)

    def vision_tower(self, images: int, tokens: int) -> int:
        """The running vision tower on a batch of images of `tokens` each."""
        patches = tokens * self.patches_per_token
        batch = min(images, -(-bounds.VISION_TOKENS // tokens))
        return self.activations(_FORWARD, batch * patches, patches, self.vision)

    def activations(self, held: Held, tokens: int, context: int, widths: Widths | None = None) -> int:
        """Arrays of a running layer on tokens that see `context` columns each."""
        hidden, inner, heads = widths or self.text
        return int(tokens * (held[0] * hidden + held[1] * inner + held[2] * heads * context) * self.float_bytes)

    def recurrence(self, held: Held, tokens: int) -> int:
        """Arrays of a running recurrent layer on tokens."""
        hidden, inner, _ = self.text
        own = held[3] * self.recurrent.token(self.float_bytes)
        shared = (held[0] * hidden + held[1] * inner) * self.float_bytes
        return int(tokens * (own + shared)) if self.recurrent.layers else 0

    def rollout(self, comparisons: int, length: int, samples: int, completion: int) -> int:
        """Completions at full length: keys and values with spare room, states of each, and the arrays of a step."""
        copies = bounds.row_copies(length, completion, samples)
        rows, branches = comparisons * copies, -(-samples // copies)
        room = bounds.STEPS_TOGETHER * (1 + bounds.RUNS_AHEAD)
        columns = length + branches * room * math.ceil(completion / room)
        step = _LOGITS * rows * branches * self.vocabulary + self.layer(_FORWARD, rows, branches, columns - branches)
        return self.keys_values(rows * columns) + self.states(comparisons * (1 + samples)) + step


def _adapted(family: Family, text: Mapping[str, Any], query_width: int, key_width: int) -> int:
    """The inputs and outputs of all linear layers of the language model that an adapter is on, none of experts."""
    hidden, dense = int(text["hidden_size"]), int(text["num_hidden_layers"]) - family.expert_layers(text)
    adapted = family.attention_layers(text) * (4 * hidden + family.query_widths * query_width + 2 * key_width)
    adapted += dense * 3 * (hidden + int(text["intermediate_size"]))
    recurrent = RecurrentSize.of(family, text)
    return adapted + recurrent.layers * (3 * hidden + recurrent.channels + 2 * recurrent.value_width)


def model_size(checkpoint: Checkpoint) -> ModelSize:
    """The sizes of a checkpoint on this device: on a CPU in float32. ModelError for unusable files."""
    import mlx.core as mx

    float_bytes = 4 if mx.default_device().type == mx.DeviceType.cpu else None
    weights = checkpoint.weight_bytes(float_bytes)
    return ModelSize.from_config(checkpoint.config, weights, float_bytes, checkpoint.max_pixels)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a run: the `weights`, other `resident` memory, and each phase's additional memory."""

    weights: int
    resident: int
    phases: Mapping[str, int]

    @property
    def peak(self) -> int:
        """The largest total at any time."""
        return self.weights + self.resident + max(self.phases.values())


def training_plan(
    model: ModelSize,
    settings: TrainSettings,
    preferences: int,
    writes: bool = True,
    text: int = _TEXT,
    question: int = _QUESTION,
) -> MemoryPlan:
    """The plan of training on a number of preferences, whose images reach `max_pixels`.

    `writes` says whether there are completions (of `max_tokens`), `text` are a comparison's other tokens, of which
    `question` come after its images.
    """
    images = 2 * min(preferences, settings.steps * settings.comparisons or preferences)
    tokens = model.image_tokens(settings.max_pixels)
    length = 2 * tokens + text
    samples, completion = (settings.group, settings.max_tokens) if writes else (1, 0)
    together = min(settings.comparisons, max(1, settings.rows // samples))
    adapter = model.adapter(settings.rank)
    phases = {
        "vision": model.vision_tower(1, tokens),
        "prefill": model.keys_values(together * length)
        + model.states(together)
        + model.layer(_FORWARD, together, length),
        "rollout": model.rollout(together, length, samples, completion) if writes else 0,
        "update": 2 * adapter + _update(model, settings, length, samples, completion),
    }
    if settings.held_out:
        judging = judging_plan(model, settings.judging, min(images, 2 * settings.held_out_limit), text, question)
        phases["evaluation"] = judging.peak - judging.weights
    return MemoryPlan(model.weights, 3 * adapter + model.features(images, tokens), phases)


def _update(model: ModelSize, settings: TrainSettings, length: int, samples: int, completion: int) -> int:
    """An update's arrays for the backward pass and the running layer or head, without the adapter's gradients."""
    in_parts = samples > settings.micro_batch  # a group's completions part by part, then its comparison
    groups = 1 if in_parts else min(settings.comparisons, settings.micro_batch // samples)
    rows, layers = settings.micro_batch if in_parts else groups * samples, model.layers
    blocks = [(groups, length, 0), (rows, completion, length)][: 2 if completion else 1]
    head = min(_LOGITS * rows * (completion + 1) * model.vocabulary, _HEAD_CHUNKS * bounds.HEAD_LOGITS)
    if not settings.recompute:
        return head + sum(model.kept(row * new, before + new) for row, new, before in blocks)
    *smaller, larger = sorted(model.layer(_BACKWARD, *block) for block in blocks)
    beside = 0 if in_parts else int(_BESIDE * sum(smaller))
    inputs = layers * (groups * length + rows * completion) * model.text[0] * model.float_bytes
    shared = model.keys_values(2 * groups * length + rows * completion)
    # Every piece of a block keeps the states that it begins with, and a comparison's end has gradients.
    shared += model.states(groups + sum(row * -(-new // bounds.piece_columns(row)) for row, new, _ in blocks))
    return inputs + shared + max(larger + beside, head)


def judging_plan(
    model: ModelSize, settings: JudgeSettings, images: int, text: int = _TEXT, question: int = _QUESTION
) -> MemoryPlan:
    """The plan of judging comparisons of `images` images for one prompt; see `training_plan`."""
    tokens = model.image_tokens(settings.max_pixels)
    samples = settings.samples if settings.think else 1
    together = max(1, min(settings.rows // samples, bounds.PREFILL_TOKENS // (2 * tokens), images * (images - 1)))
    before, new = tokens + text - question, tokens + question  # up to the second image, and from it on
    completion, prefixes = settings.max_tokens + bounds.ANSWER_TOKENS, min(together, images)
    phases = {
        "vision": model.vision_tower(min(images, 2 * together), tokens),
        "prefill": model.keys_values(prefixes * before + together * new)
        + model.states(prefixes + together)
        + model.layer(_FORWARD, together, new, before),
        "rollout": model.rollout(together, before + new, samples, completion) if settings.think else 0,
    }
    shared = model.keys_values(images * before) + model.states(images)
    resident = model.features(images, tokens) + min(bounds.PREFIX_BYTES, shared)
    return MemoryPlan(model.weights, resident, phases)


def with_fitting_batches(plan_of: Callable[[S], MemoryPlan], settings: S, chosen: Collection[str]) -> S:
    """The settings with batches halved until they fit this device, unless these are `chosen`; it changes no result.

    Unchanged where the smallest do not fit, either.
    """
    working_set = device_working_set()
    sizes = {name: getattr(settings, name, 0) for name in ("rows", "micro_batch") if name not in chosen}
    for n in range(max(sizes.values(), default=1).bit_length()):
        halved: dict[str, Any] = {name: max(1, size >> n) for name, size in sizes.items() if size}
        fewer = replace(settings, **halved)
        if plan_of(fewer).peak <= working_set:
            return fewer
    return settings


def require_fit(plan_of: Callable[[S], MemoryPlan], settings: S, work: str) -> MemoryPlan:
    """The plan of a run on this device; ConfigError, with settings that would fit, if it does not fit."""
    plan, working_set = plan_of(settings), device_working_set()
    if plan.peak <= working_set:
        return plan
    needs = f"{work} needs about {format_bytes(plan.peak)}, this device recommends at most {format_bytes(working_set)}"
    if fitting := _fitting(settings, lambda changes: plan_of(replace(settings, **changes)).peak <= working_set):
        raise ConfigError(f"{needs}: try {' or '.join(fitting)}")
    weights = f"its weights take {format_bytes(plan.weights)}"
    raise ConfigError(f"{needs}, and no settings make it fit: {weights}; take a smaller model, or one of fewer bits")


def _fitting(settings: Any, fits: Callable[[dict[str, Any]], bool]) -> list[str]:
    """Options that make it fit: each of one setting, or else several together."""
    steps: dict[str, list[Any]] = {} if getattr(settings, "recompute", True) else {"recompute": [True]}
    for name, least in _LEAST.items():
        steps[name] = [value for n in range(1, 40) if (value := getattr(settings, name, 0) >> n) >= least]
    alone = [next(({name: value} for value in values if fits({name: value})), {}) for name, values in steps.items()]
    together: dict[str, Any] = {}
    for name, values in steps.items():
        if values and not fits(together):
            together[name] = next((value for value in values if fits(together | {name: value})), values[-1])
    for name in reversed(list(together)):
        fewer = {other: value for other, value in together.items() if other != name}
        together = fewer if fits(fewer) else together
    changes = [change for change in alone if change] or ([together] if fits(together) else [])
    return [
        " ".join(f"--{name.replace('_', '-')} {value}".removesuffix(" True") for name, value in change.items())
        for change in changes
    ]
