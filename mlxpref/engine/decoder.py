"""The language model's layers one by one, so that each can be recomputed in the backward pass.

What a layer leaves for later, its keys and values, are outputs of the recomputed function: as a side effect on a cache
they would be cut off from the gradient, and recomputing would make it silently wrong. What stands before a block, its
stems, keeps its own rows; only inside a layer are they repeated for the rows that share them, so that no more than one
layer's copies exist at a time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxpref.checkpoints import bounds
from mlxpref.engine.kv_cache import PADDING, LayerCache, mask_behind
from mlxpref.engine.recompute import recomputed

__all__ = [
    "Block",
    "KeysValues",
    "Prefix",
    "RotaryTables",
    "expand_rows",
    "rotary_tables",
    "run_block",
    "run_layers",
    "run_step",
]

KeysValues = tuple[mx.array, mx.array]
RotaryTables = tuple[mx.array, mx.array] | None


@dataclass(frozen=True)
class Block:
    """Rows that run through the layers together.

    `embeddings` (B, L, D), `positions` (3, B, L), `owners` (B, L) whose its columns are (see `RowCache`), `levels`
    (B, L, D) each: what is added after the first layers (deepstack).
    """

    embeddings: mx.array
    positions: mx.array
    owners: NDArray[np.int32]
    levels: Sequence[mx.array] = ()

    def columns(self, start: int, end: int) -> "Block":
        """Some columns of it."""
        part = slice(start, end)
        return Block(
            self.embeddings[:, part],
            self.positions[:, :, part],
            self.owners[:, part],
            [level[:, part] for level in self.levels],
        )


@dataclass(frozen=True)
class Prefix:
    """Keys and values of an earlier block by layer, and whose its columns are.

    `rows` (B,) says which of its rows each row of a later block goes on; many may share one.
    """

    layers: Sequence[KeysValues]
    owners: NDArray[np.int32]
    rows: NDArray[np.int64]


def expand_rows(part: mx.array, rows: NDArray[np.int64]) -> mx.array:
    """Rows of an array (P, ...) by number: (B, ...); gradients add up over a row's copies."""
    count = part.shape[0]
    group = len(rows) // count
    if np.array_equal(rows, np.repeat(np.arange(count), group)):
        return mx.repeat(part, group, axis=0) if group > 1 else part  # its gradient is a sum, not a scatter
    return part[mx.array(rows)]


def run_block(
    trunk: Any,
    block: Block,
    stems: Sequence[Prefix] = (),
    recompute: bool = True,
    ends: NDArray[np.int64] | None = None,
    in_turn: bool = False,
) -> tuple[mx.array, list[KeysValues]]:
    """Run a block through all layers: the hidden states (B, L, D) and each layer's new keys and values.

    `stems` stand before it, outermost first. `recompute` keeps only what enters each layer and makes the rest again in
    the backward pass. A long block runs in pieces, each behind those before it. With `ends` (B,), only the states
    (B, D) at these columns: the last layer leaves out the others. `in_turn`, where there is no gradient, lets no more
    than two pieces be under way: bounded work at a time, and Ctrl-C is heard in between.
    """
    rows, columns = block.owners.shape
    size = bounds.piece_columns(rows)
    depth = len(trunk.layers) - (ends is not None)
    states: list[mx.array] = []
    pieces: list[Prefix] = []
    under_way: list[mx.array] = []
    for start in range(0, columns, size):
        piece = block.columns(start, start + size) if columns > size else block
        hidden, kept = run_layers(trunk, piece, [*stems, *pieces], recompute, depth)
        states.append(hidden)
        pieces.append(Prefix(kept, piece.owners, np.arange(rows)))
        if in_turn and start + size < columns:
            mx.async_eval(hidden, kept)
            if under_way:
                mx.eval(under_way)  # so that the device has one piece to go on with while the next is made
            under_way = [hidden]
    layers = [tuple(_joined(parts, axis=2) for parts in zip(*pairs, strict=True)) for pairs in _by_layer(pieces)]
    hidden = _joined(states, axis=1)
    if ends is not None:
        hidden, last = _run_ends(trunk, block, stems, recompute, hidden, ends)
        layers.append(last)
    return trunk.norm(hidden), layers  # type: ignore[return-value]


def run_layers(
    trunk: Any, block: Block, stems: Sequence[Prefix], recompute: bool, depth: int
) -> tuple[mx.array, list[KeysValues]]:
    """The first `depth` layers of `run_block`, all columns at once, without the norm at the end."""
    turning = rotary_tables(trunk, block.embeddings, block.positions)
    mask = mask_behind(_owners_before(block, stems), block.owners)
    attend = _attention(block.embeddings.dtype, recompute)
    hidden, kept = block.embeddings, []
    for number, layer in enumerate(trunk.layers[:depth]):

        def run(states: mx.array, *parts: mx.array, layer: Any = layer) -> tuple[mx.array, ...]:
            queries, keys, values = _projected(layer, states, block.owners.shape, block.positions, turning)
            keys = mx.contiguous(keys)  # as a part of what was turned together, they would keep the queries in memory
            mixed = attend(queries, *_behind(stems, parts, keys, values), scale=layer.self_attn.scale, mask=mask)
            return _mixed_in(layer, states, mixed), keys, values

        through = recomputed(layer, run) if recompute else run
        hidden, keys, values = through(hidden, *_parts_of(stems, number))
        kept.append((keys, values))
        if number < len(block.levels):
            hidden = hidden + block.levels[number]
    return hidden, kept


def run_step(
    trunk: Any,
    embeddings: mx.array,
    positions: mx.array,
    turning: RotaryTables,
    layers: Sequence[LayerCache],
    mask: mx.array | str | None,
) -> mx.array:
    """Run embeddings (B, N, D) behind caches, which keep what is new, at positions (3, B, N): the states (B, N, D)."""
    shape, states = embeddings.shape, embeddings.flatten(0, 1)  # in two axes, a product is one operation
    attend = _attention(embeddings.dtype, recompute=False)
    for layer, cache in zip(trunk.layers, layers, strict=True):
        queries, keys, values = _projected(layer, states, shape[:2], positions, turning)
        mixed = attend(queries, *cache.update_and_fetch(keys, values), scale=layer.self_attn.scale, mask=mask)
        states = _mixed_in(layer, states, mixed)
    return trunk.norm(states).reshape(shape)  # type: ignore[no-any-return]


def _run_ends(
    trunk: Any, block: Block, stems: Sequence[Prefix], recompute: bool, hidden: mx.array, ends: NDArray[np.int64]
) -> tuple[mx.array, KeysValues]:
    """The last layer: keys and values of all columns, and the states (B, D) of one column a row."""
    number, rows = len(trunk.layers) - 1, np.arange(len(ends))
    layer, at = trunk.layers[number], (mx.array(rows), mx.array(ends))
    positions = block.positions[:, at[0], at[1]][..., None]
    turning = rotary_tables(trunk, block.embeddings, block.positions)
    turning_at = rotary_tables(trunk, block.embeddings, positions)
    reached = np.where(np.arange(block.owners.shape[1]) <= ends[:, None], block.owners, PADDING)
    mask = mask_behind(
        np.concatenate([_owners_before(block, stems), reached], axis=1), block.owners[rows, ends][:, None]
    )
    if isinstance(mask, mx.array):
        mask = mask[..., :-1]  # the query's own column is among those reached

    def run(states: mx.array, *parts: mx.array) -> tuple[mx.array, ...]:
        _, keys, values = _projected(layer, states, block.owners.shape, block.positions, turning)
        keys = mx.contiguous(keys)
        state = states[at][:, None]
        queries, _, _ = _projected(layer, state, state.shape[:2], positions, turning_at)
        whole = _behind(stems, parts, keys, values)
        mixed = mx.fast.scaled_dot_product_attention(queries, *whole, scale=layer.self_attn.scale, mask=mask)
        return _mixed_in(layer, state, mixed)[:, 0], keys, values

    through = recomputed(layer, run) if recompute else run
    state, keys, values = through(hidden, *_parts_of(stems, number))
    if number < len(block.levels):
        state = state + block.levels[number][at]
    return state, (keys, values)


def _by_layer(pieces: Sequence[Prefix]) -> Iterable[tuple[KeysValues, ...]]:
    return zip(*(piece.layers for piece in pieces), strict=True)


def _joined(parts: Sequence[mx.array], axis: int) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts), axis=axis)


def _owners_before(block: Block, stems: Sequence[Prefix]) -> NDArray[np.int32]:
    """Whose the columns of the stems are, (B, columns)."""
    nothing = np.zeros((len(block.owners), 0), np.int32)
    return np.concatenate([nothing, *(stem.owners[stem.rows] for stem in stems)], axis=1)


def _parts_of(stems: Sequence[Prefix], number: int) -> list[mx.array]:
    """The keys and values of the stems in one layer, one behind the other."""
    return [part for stem in stems for part in stem.layers[number]]


def _behind(
    stems: Sequence[Prefix], parts: Sequence[mx.array], keys: mx.array, values: mx.array
) -> tuple[mx.array, mx.array]:
    """Keys and values with those of the stems before them, whose rows are repeated for the rows that share them."""
    before = [
        expand_rows(part, stem.rows) for part, stem in zip(parts, [s for s in stems for _ in (0, 1)], strict=True)
    ]
    return _joined([*before[::2], keys], axis=2), _joined([*before[1::2], values], axis=2)


def _mixed_in(layer: Any, states: mx.array, mixed: mx.array) -> mx.array:
    """What follows attention in a layer: states (..., D), and what was attended to (B, heads, L, width)."""
    states = states + layer.self_attn.o_proj(mixed.swapaxes(1, 2).reshape(*states.shape[:-1], -1))
    out: mx.array = states + layer.mlp(layer.post_attention_layernorm(states))
    return out


def rotary_tables(trunk: Any, like: mx.array, positions: mx.array) -> RotaryTables:
    """Cosines and sines (B, L, width) of the rotary embedding, once for all layers.

    None on Metal, where each layer turns its own queries and keys in one kernel, as in mlx-vlm.
    """
    rotary = trunk.layers[0].self_attn.rotary_emb
    return None if rotary.fused_apply else rotary(like, positions)


def _attention(dtype: mx.Dtype, recompute: bool) -> Any:
    """The attention of a run.

    Where activations are kept for the backward pass, so is softmax: the fused attention makes it again. Not in half
    precision, in which scores outside of the fused attention would be rounded.
    """
    kept = dtype == mx.float32 and not recompute
    return _attend if kept else mx.fast.scaled_dot_product_attention


def _projected(
    layer: Any, states: mx.array, shape: Sequence[int], positions: mx.array, turning: RotaryTables
) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, keys and values (B, heads, L, width) of a layer from states of a shape (B, L), turned to positions."""
    attention, states = layer.self_attn, layer.input_layernorm(states)
    queries, keys, values = (
        projection(states).reshape(*shape, heads, -1)
        for projection, heads in (
            (attention.q_proj, attention.n_heads),
            (attention.k_proj, attention.n_kv_heads),
            (attention.v_proj, attention.n_kv_heads),
        )
    )
    if "q_norm" in attention:
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    queries, keys, values = (part.swapaxes(1, 2) for part in (queries, keys, values))
    if turning is None:
        queries, keys = attention.rotary_emb.apply_rotary(queries, keys, positions)
    else:
        both = _turned(mx.concatenate([queries, keys], axis=1), *turning)
        queries, keys = both[:, : attention.n_heads], both[:, attention.n_heads :]
    return queries, keys, values


def _turned(part: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """The rotary embedding (B, heads, L, width) of halves that belong together, by angles (B, L, width)."""
    half = part.shape[-1] // 2
    swapped = mx.concatenate([-part[..., half:], part[..., :half]], axis=-1)
    return part * cos[:, None] + swapped * sin[:, None]


def _attend(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None) -> mx.array:
    """`mx.fast.scaled_dot_product_attention`, whose backward pass finds the softmax that the forward pass made."""
    rows, heads, columns, _ = queries.shape
    grouped = (rows, keys.shape[1], heads // keys.shape[1] * columns, -1)
    scores = (queries * scale).reshape(grouped) @ keys.swapaxes(-1, -2)
    scores = scores.reshape(rows, heads, columns, -1)
    if isinstance(mask, str):
        mask = mx.array(np.tri(columns, keys.shape[2], keys.shape[2] - columns, dtype=bool))
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf)
    return (mx.softmax(scores, axis=-1).reshape(grouped) @ values).reshape(queries.shape)
