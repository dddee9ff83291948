"""Weights of the hub's form, of transformers 5's and of older files become the same model, and go back bit by bit."""

import mlx.core as mx
import numpy as np
import pytest

from mlxpref.checkpoints.families import FAMILIES
from mlxpref.engine.weights import to_hub, to_mlx

MLP = "language_model.model.layers.0.mlp"
MOE, HYBRID = FAMILIES["qwen3_vl_moe"], FAMILIES["qwen3_5"]


@pytest.mark.parametrize("inner", [8, 16, 32], ids=["twice the inner width is the outer", "the widths are one", "none"])
def test_experts_in_every_spelling(inner: int) -> None:
    """Also where one of the two tensors is square, so that its shape says nothing."""
    hidden, rng = 16, np.random.default_rng(0)
    gate, up = (mx.array(rng.normal(size=(4, inner, hidden)).astype(np.float32)) for _ in range(2))
    down = mx.array(rng.normal(size=(4, hidden, inner)).astype(np.float32))
    wanted = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    joint = mx.concatenate([gate, up], axis=1)
    hub = {f"{MLP}.experts.gate_up_proj": joint.swapaxes(1, 2), f"{MLP}.experts.down_proj": down.swapaxes(1, 2)}
    spellings = [
        hub,
        {f"{MLP}.experts.gate_up_proj": joint, f"{MLP}.experts.down_proj": down},
        {f"{MLP}.experts.{i}.{name}.weight": each[i] for name, each in wanted.items() for i in range(4)},
        {f"{MLP}.switch_mlp.{name}.weight": each for name, each in wanted.items()},
    ]
    for stored in spellings:
        found = to_mlx(stored, MOE, {"hidden_size": hidden})
        assert found.keys() == {f"{MLP}.switch_mlp.{name}.weight" for name in wanted}
        for name, weight in wanted.items():
            assert mx.array_equal(found[f"{MLP}.switch_mlp.{name}.weight"], weight)
        back = to_hub(found, MOE)
        assert back.keys() == hub.keys()
        assert all(mx.array_equal(back[name], weight) for name, weight in hub.items())


def test_norms_and_convolutions() -> None:
    """A norm is 1 + w, but that of a recurrent layer; where the convolution is MLX's, so are the norms."""
    layer = "language_model.model.layers.0"
    stored = {
        f"{layer}.linear_attn.conv1d.weight": mx.random.normal((6, 1, 4)).astype(mx.bfloat16),
        f"{layer}.linear_attn.norm.weight": mx.random.normal((3,)).astype(mx.bfloat16),
        f"{layer}.input_layernorm.weight": (0.2 * mx.random.normal((50,))).astype(mx.bfloat16),
        "language_model.model.norm.weight": (0.2 * mx.random.normal((50,))).astype(mx.bfloat16),
    }
    found = to_mlx(stored, HYBRID, {})
    assert found[f"{layer}.linear_attn.conv1d.weight"].shape == (6, 4, 1)
    assert mx.array_equal(found[f"{layer}.linear_attn.norm.weight"], stored[f"{layer}.linear_attn.norm.weight"])
    norm = stored[f"{layer}.input_layernorm.weight"]
    assert mx.array_equal(found[f"{layer}.input_layernorm.weight"], 1 + norm.astype(mx.float32))
    again = to_mlx(found, HYBRID, {})
    assert all(mx.array_equal(again[name], weight) for name, weight in found.items())
    back = to_hub(found, HYBRID)
    assert all(mx.array_equal(back[name].astype(mx.bfloat16), weight) for name, weight in stored.items())
