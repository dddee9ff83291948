"""What the recurrent layers of a model take: gated delta networks behind a short convolution.

A row holds its state in float32, whatever the type of the weights, and the last columns that the convolution saw. Many
tokens run in chunks, whose arrays are in float32, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxpref.checkpoints import bounds
from mlxpref.checkpoints.families import Family

_SCORES = 3
"""Rows of scores of a token and value head, each over its chunk."""
_HEADS = 6
"""Arrays of a head's width of a token and value head."""
_PROJECTED = 2
"""Arrays of queries, keys, values and gates: before and after the convolution."""


@dataclass(frozen=True)
class RecurrentSize:
    """The sizes of a model's recurrent layers: how many, their value heads, and the widths of a head's key and value.

    `keys` is the width of the keys of all key heads, `kernel` the columns that the convolution sees. No layers for
    models that have none.
    """

    layers: int = 0
    heads: int = 0
    head_key: int = 0
    head_value: int = 0
    keys: int = 0
    kernel: int = 1

    @classmethod
    def of(cls, family: Family, text: Mapping[str, Any]) -> "RecurrentSize":
        """The sizes in a language model's settings."""
        layers = int(text["num_hidden_layers"]) - family.attention_layers(text)
        if not layers:
            return cls()
        head_key = int(text["linear_key_head_dim"])
        return cls(
            layers=layers,
            heads=int(text["linear_num_value_heads"]),
            head_key=head_key,
            head_value=int(text["linear_value_head_dim"]),
            keys=int(text["linear_num_key_heads"]) * head_key,
            kernel=int(text["linear_conv_kernel_dim"]),
        )

    @property
    def value_width(self) -> int:
        """The width of the values of all heads."""
        return self.heads * self.head_value

    @property
    def channels(self) -> int:
        """The width of what goes through the convolution: queries, keys and values."""
        return 2 * self.keys + self.value_width

    def state(self, float_bytes: int) -> int:
        """Bytes of a row's state in one layer, and of the columns for its convolution."""
        return 4 * self.value_width * self.head_key + (self.kernel - 1) * self.channels * float_bytes

    def padded(self, columns: int) -> int:
        """The columns of a row's block in whole chunks."""
        chunk = bounds.state_chunk(columns)
        return -(-columns // chunk) * chunk

    def token(self, float_bytes: int) -> int:
        """Bytes of a running layer's arrays on one token, without what all kinds of layers have."""
        chunk = self.heads * (_SCORES * bounds.STATE_CHUNK + _HEADS * max(self.head_key, self.head_value))
        return _PROJECTED * (self.channels + self.value_width) * float_bytes + 4 * chunk
