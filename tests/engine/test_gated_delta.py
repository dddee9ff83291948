"""The gated delta rule in chunks beside MLX's own operation, which on a CPU goes token by token."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlxpref.engine.gated_delta import gated_delta, gated_delta_in_chunks

Rule = Callable[..., tuple[mx.array, mx.array]]


def by_token(*arguments: mx.array) -> tuple[mx.array, mx.array]:
    """MLX's own operation."""
    queries, keys, values, decay, beta, state = arguments
    outputs, state = mx.fast.gated_delta_update(queries, keys, values, mx.exp(decay), beta, state)
    return outputs, state


def material(tokens: int, rows: int = 2, groups: int = 2, alike: float = 0.0) -> list[mx.array]:
    """Random arguments: 2 heads of values for each of keys, which are `alike` to a degree."""
    rng = np.random.default_rng(tokens)
    queries = rng.normal(size=(rows, tokens, groups, 16)) / 16
    keys = (1 - alike) * rng.normal(size=queries.shape) + alike * rng.normal(size=(rows, 1, groups, 16))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    values = rng.normal(size=(rows, tokens, 2 * groups, 8))
    beta = 1 / (1 + np.exp(-rng.normal(size=values.shape[:3]) - 9 * alike))
    decay = -rng.uniform(0, 0.2 * (1 - alike) + 1e-3, beta.shape)
    state = rng.normal(size=(rows, 2 * groups, 8, 16))
    return [mx.array(each.astype(np.float32)) for each in (queries, keys, values, decay, beta, state)]


def gradients(rule: Rule, arguments: list[mx.array]) -> list[mx.array]:
    """Those of a sum of the outputs and of the state, each with a weight of its own."""

    def total(*arguments: mx.array) -> mx.array:
        return sum((mx.sin(mx.arange(part.size)) * part.flatten()).sum() for part in rule(*arguments))  # type: ignore[return-value]

    return list(mx.grad(total, argnums=tuple(range(6)))(*arguments))


def far(ours: mx.array, theirs: mx.array) -> float:
    """The largest difference, over the largest value."""
    return float(mx.abs(ours - theirs).max() / mx.abs(theirs).max())


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 16, 63, 64, 65, 130])
def test_chunks_equal_mlxs_own_operation(tokens: int) -> None:
    arguments = material(tokens)
    for ours, theirs in zip(gated_delta_in_chunks(*arguments), by_token(*arguments), strict=True):
        assert ours.shape == theirs.shape
        assert far(ours, theirs) < 1e-5
    for ours, theirs in zip(gradients(gated_delta_in_chunks, arguments), gradients(by_token, arguments), strict=True):
        assert far(ours, theirs) < 1e-5


@pytest.mark.parametrize("alike", [0.7, 1.0])
def test_alike_keys(alike: float) -> None:
    """Keys of alike patches of an image: powers of their products grow beyond all bounds, the inverse does not."""
    arguments = material(200, alike=alike)
    for ours, theirs in zip(gated_delta_in_chunks(*arguments), by_token(*arguments), strict=True):
        assert far(ours, theirs) < 1e-5
    for ours, theirs in zip(gradients(gated_delta_in_chunks, arguments), gradients(by_token, arguments), strict=True):
        assert far(ours, theirs) < 1e-4


def test_blocks_one_after_the_other() -> None:
    """A state is all that later tokens need of earlier ones."""
    *tokens, state = material(90)
    whole, end = gated_delta(*tokens, state)
    parts = []
    for part in (slice(0, 40), slice(40, 41), slice(41, 90)):
        outputs, state = gated_delta(*(each[:, part] for each in tokens), state)
        parts.append(outputs)
    assert far(mx.concatenate(parts, axis=1), whole) < 1e-5
    assert far(state, end) < 1e-5


@pytest.mark.parametrize("rule", [gated_delta_in_chunks, by_token])
def test_a_token_without_decay_and_beta_changes_nothing(rule: Rule) -> None:
    queries, keys, values, decay, beta, state = material(70)
    filled = mx.array(np.arange(70) < np.array([[70], [33]]))[..., None]
    outputs, end = rule(queries, keys, values, mx.where(filled, decay, 0), mx.where(filled, beta, 0), state)
    short = [each[1:, :33] for each in (queries, keys, values, decay, beta)]
    alone, alone_end = rule(*short, state[1:])
    assert far(outputs[1:, :33], alone) < 1e-5
    assert far(end[1:], alone_end) < 1e-5
