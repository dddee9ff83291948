"""What the code knows of a family: the facts about its configs and files that differ from other families'."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """One architecture of transformers, by its `model_type`.

    `class_prefix` begins the names of its classes there. `text` and `vision` are what these take for a missing key,
    `mrope_section` for the key of this name; None for a `head_dim` is the width divided by the heads.
    """

    model_type: str
    name: str
    class_prefix: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    mrope_section: tuple[int, int, int]
    vision_activation: str
    """The activation of the vision tower, which mlx-vlm computes whatever the config says."""
    text_sizes: Mapping[str, int] = field(default_factory=dict)
    """Sizes of the language model that only this family has, with the largest value of each."""
    vision_sizes: Mapping[str, int] = field(
        default_factory=lambda: {"hidden_size": 1 << 16, "intermediate_size": 1 << 18}
    )
    """Sizes of the vision tower that a config must have, with the largest value of each."""
    vision_width: str = "hidden_size"
    """The key of the width of the vision tower's states."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """The hub's names of keys of the language model's settings that transformers 5 writes by another name."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the language model's settings whose value is always this, whatever a config could say."""
    is_nested: bool = True
    """Whether the hub's layout has the language model's settings in `text_config`, not at the top level."""
    rope: str = "rope_scaling"
    """Where the hub's layout has the rotary embedding: `rope_parameters`, or `rope_scaling` beside `rope_theta`."""
    interleaves: bool = True
    """Whether the rotary embedding's axes take turns along a head."""
    rotary_share: float = 1.0
    """The share of a head that rotates by default."""
    theta_of_4: float | None = None
    """The default of `rope_theta` in transformers 4, where it was another than in transformers 5."""
    root: str = "model."
    """What the hub's files put in front of the names of the language model and of the vision tower."""
    passed_over: str = ""
    """A pattern of the names of tensors that transformers, too, does not load."""
    zero_centred_norms: bool = False
    """Whether a norm of weight w multiplies by 1 + w."""

    def language(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The language model's settings in a config of the hub's layout; the top level has what they lack."""
        return {**config, **config["text_config"]} if self.is_nested else dict(config)

    @property
    def query_widths(self) -> int:
        """How often the width of all heads stands in a layer's projections: queries, their gates if any, the output."""
        return 3 if "attn_output_gate" in self.fixed else 2

    def attention_layers(self, text: Mapping[str, Any]) -> int:
        """How many layers of a language model with these settings attend; the others are recurrent."""
        interval = text["full_attention_interval"] if "full_attention_interval" in self.text else 1
        return int(text["num_hidden_layers"]) // int(interval)

    def expert_layers(self, text: Mapping[str, Any]) -> int:
        """How many layers of a language model with these settings have experts."""
        if "num_experts" not in self.text:
            return 0
        step, dense = int(text["decoder_sparse_step"]), set(text["mlp_only_layers"])
        return sum((layer + 1) % step == 0 and layer not in dense for layer in range(int(text["num_hidden_layers"])))

    def inner_width(self, text: Mapping[str, Any]) -> int:
        """The width inside the MLPs of all layers together, those of all experts, too."""
        mixtures = self.expert_layers(text)
        dense = (int(text["num_hidden_layers"]) - mixtures) * int(text["intermediate_size"])
        return dense + (mixtures * int(text["num_experts"]) * int(text["moe_intermediate_size"]) if mixtures else 0)
