"""The gated delta rule of recurrent layers, token by token or in chunks (arXiv 2412.06464).

A head's state S (W values, K keys) decays by exp(g) at every token, and then unlearns what it holds under the token's
key k before it learns the value v: S <- exp(g) S, S <- S + beta (v - S k) k^T. The token's output is S q.

MLX's own operation is one kernel on Metal, and a loop over the tokens elsewhere. The chunks here are ordinary matrix
products with gradients: on a CPU six times as fast as the loop, with a tenth of its memory in the backward pass.

Axes: R rows, L tokens, J heads of keys, H heads of values, K width of a key, W width of a value, N chunks of C tokens.
"""

import math
from typing import Any

import mlx.core as mx

from mlxpref.checkpoints import bounds

_SPLIT = 8
"""The most parts of one split."""
_SMALLEST = 4
"""Up to this size an inverse is a product of powers; these grow beyond float32 in a whole chunk of similar keys."""


def gated_delta(
    queries: mx.array, keys: mx.array, values: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """The outputs (R, L, H, W) of the gated delta rule, and the state (R, H, W, K) after it; all in float32.

    Queries and keys are (R, L, J, K), values (R, L, H, W); `decay`, the logarithm g, and `beta` are (R, L, H). A token
    with 0 for both changes nothing.
    """
    if mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu:
        outputs, state = mx.fast.gated_delta_update(queries, keys, values, mx.exp(decay), beta, state)
        return outputs, state
    rule = _one_token if queries.shape[1] == 1 else gated_delta_in_chunks
    return rule(queries, keys, values, decay, beta, state)


def _one_token(
    queries: mx.array, keys: mx.array, values: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """`gated_delta` of one token."""
    copies = values.shape[2] // keys.shape[2]  # of J heads for H
    query, key = (mx.repeat(each[:, 0], copies, axis=1)[..., None] for each in (queries, keys))  # (R, H, K, 1)
    state = state * mx.exp(decay[:, 0, :, None, None])  # (R, H, W, K)
    new = beta[:, 0, :, None, None] * (values[:, 0, ..., None] - state @ key)  # (R, H, W, 1)
    state = state + new * key.swapaxes(-1, -2)
    return (state @ query)[:, None, ..., 0], state


def gated_delta_in_chunks(
    queries: mx.array, keys: mx.array, values: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """`gated_delta` in chunks: the tokens of a chunk together, the chunks one after the other.

    Within a chunk, what a token learns depends on what the tokens before it learned: a triangular system of equations
    (I + A) U = beta V, solved by the inverse of I + A.
    """
    rows, count, groups, _ = keys.shape
    heads, width = values.shape[2:]
    size = bounds.state_chunk(count)  # C

    def chunks(array: mx.array) -> mx.array:
        array = mx.pad(array, [(0, 0), (0, -count % size)] + [(0, 0)] * (array.ndim - 2))
        array = array.reshape(rows, -1, size, *array.shape[2:])  # (R, N * C, heads, ...) -> (R, N, C, heads, ...)
        return array.transpose(1, 0, 3, 2, *range(4, array.ndim))  # (N, R, heads, C, ...)

    def of_heads(array: mx.array) -> mx.array:  # J -> H
        return mx.repeat(array, heads // groups, axis=2)

    queries, keys, values = chunks(queries), chunks(keys), chunks(values)  # (N, R, J, C, K), and (N, R, H, C, W)
    beta = chunks(beta)[..., None]  # (N, R, H, C, 1)
    total = mx.cumsum(chunks(decay), axis=-1)  # (N, R, H, C): the decay since the chunk began
    earlier = mx.tril(mx.ones((size, size), mx.bool_))
    between = mx.exp(mx.where(earlier, total[..., :, None] - total[..., None, :], -mx.inf))  # (N, R, H, C, C)
    similar = of_heads(keys @ keys.swapaxes(-1, -2)) * between  # (N, R, H, C, C)
    attention = of_heads(queries @ keys.swapaxes(-1, -2)) * between
    inverse: Any = _inverse(mx.tril(beta * similar, -1))
    queries, keys = of_heads(queries), of_heads(keys)
    since, until = mx.exp(total)[..., None], mx.exp(total[..., -1:] - total)[..., None]  # (N, R, H, C, 1)
    learned, known = inverse @ (beta * values), inverse @ (beta * since * keys)  # (N, R, H, C, W), and (..., C, K)
    queries, keys, whole = queries * since, keys * until, since[..., -1:, :]  # whole: (N, R, H, 1, 1)
    outputs = []
    for u, w, a, q, k, d in zip(*map(_each, (learned, known, attention, queries, keys, whole)), strict=True):
        new = u - w @ state.swapaxes(-1, -2)  # (R, H, C, W)
        outputs.append(q @ state.swapaxes(-1, -2) + a @ new)
        state = d * state + new.swapaxes(-1, -2) @ k  # (R, H, W, K)
    # (N, R, H, C, W) -> (R, N, C, H, W) -> (R, L, H, W)
    together = mx.stack(outputs).transpose(1, 0, 3, 2, 4).reshape(rows, -1, heads, width)
    return together[:, :count], state


def _each(array: mx.array) -> list[mx.array]:
    """The N parts (...) of an array (N, ...).

    The gradient of a part by its index, or of a split into many, is a whole array of zeros for each part.
    """
    count = len(array)
    if count <= _SPLIT:
        return [part[0] for part in mx.split(array, count)]
    size = _SPLIT ** math.ceil(math.log(count, _SPLIT) - 1)
    return [part for group in mx.split(array, list(range(size, count, size))) for part in _each(group)]


@mx.custom_function
def _inverse(lower: mx.array) -> mx.array:
    """The inverses X of I + A, (..., C, C) each, for strictly lower triangular matrices A."""
    return _inverse_by_halves(lower)


@_inverse.vjp
def _inverse_vjp(_: mx.array, cotangent: mx.array, inverse: mx.array) -> mx.array:
    """The gradient by A: -X^T G X^T."""
    transposed = inverse.swapaxes(-1, -2)
    return -(transposed @ cotangent @ transposed)


def _inverse_by_halves(lower: mx.array) -> mx.array:
    """`_inverse`: of two halves it is both inverses, and in the corner -(I + B)^-1 A_corner (I + A)^-1.

    Powers of A end with A^C.
    """
    size = lower.shape[-1]
    if size <= _SMALLEST:
        power, result, exponent = -lower, mx.eye(size) - lower, 2
        while exponent < size:  # (I - A)(I + A^2)(I + A^4)...
            power = power @ power
            result, exponent = result + result @ power, 2 * exponent
        return result
    half = size // 2
    halves = mx.stack([lower[..., :half, :half], lower[..., half:, half:]])  # (2, ..., C / 2, C / 2)
    first, second = _inverse_by_halves(halves)
    corner = -second @ lower[..., half:, :half] @ first
    above = mx.concatenate([first, mx.zeros_like(first)], axis=-1)  # (..., C / 2, C)
    return mx.concatenate([above, mx.concatenate([corner, second], axis=-1)], axis=-2)
