"""Positions and caches: what the models see of padding and order."""

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlxpref.engine.branched_cache import (
    PADDING,
    SHARED,
    BranchColumns,
    BranchedCache,
    KeyValueCache,
    StateCache,
    row_branch_ids,
)
from mlxpref.engine.positions import image_positions
from mlxpref.engine.vlm import load_vlm
from tests.conftest import GOLDEN, picture, tiny_model


def test_positions_of_text() -> None:
    positions, following = image_positions([4], start=3)
    assert positions.tolist() == [[3, 4, 5, 6]] * 3
    assert following == 7


def test_positions_of_an_image() -> None:
    positions, following = image_positions([1, (2, 3), 1])
    assert positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4],
        [0, 1, 1, 1, 2, 2, 2, 4],
        [0, 1, 2, 3, 1, 2, 3, 4],
    ]
    assert following == 5


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    grids=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=2),
)
def test_positions_equal_mlx_vlms(texts: list[int], grids: list[tuple[int, int]]) -> None:
    vlm = tiny_model("qwen2_5_vl")
    start, image = vlm.model.config.vision_start_token_id, vlm.image_token_id
    ids: list[int] = []
    for text, grid in zip(texts, [*grids, None], strict=True):
        ids += [5] * text
        if grid:
            ids[-1] = start
            ids += [image] * (grid[0] * grid[1])
    sizes = mx.array([[1, 2 * h, 2 * w] for h, w in grids])
    theirs, delta = vlm.language_model.get_rope_index(mx.array([ids]), sizes)
    ours, following = image_positions([texts[0], grids[0], texts[1], grids[1], texts[2]])
    assert np.array_equal(np.array(theirs)[:, 0], ours)
    assert following == len(ids) + int(delta.item())


def seen(rows: BranchedCache, columns: int, filled: int) -> list[list[list[bool]]]:
    """The mask of a block behind `filled` columns as lists, one a row."""
    rows.layers[0].offset = filled  # type: ignore[attr-defined]
    mask = rows.next_mask(columns)
    assert isinstance(mask, mx.array)
    return np.array(mask)[:, 0].tolist()  # type: ignore[no-any-return]


def test_padded_columns_stay_masked() -> None:
    rows = BranchedCache(row_branch_ids([3, 2], 3), [KeyValueCache()])
    rows.begin_branches(np.array([[0], [0]]))
    rows.reserve(np.array([[0], [0]]))
    assert seen(rows, 1, 3) == [[[True, True, True, True]], [[True, True, False, True]]]
    rows.reserve(np.array([[0, 0], [0, 0]]))
    assert seen(rows, 2, 4)[1] == [
        [True, True, False, True, True, False],
        [True, True, False, True, True, True],
    ]


def test_rows_without_padding_need_no_mask() -> None:
    rows = BranchedCache(row_branch_ids([3, 3], 3), [KeyValueCache()])
    rows.begin_branches(np.array([[0], [0]]))
    rows.reserve(np.array([[0], [0]]), steps=2)
    assert rows.next_mask(1) is None


def test_branch_sees_shared_and_own_columns() -> None:
    rows = BranchedCache(row_branch_ids([2], 2), [KeyValueCache()])
    rows.begin_branches(np.array([[0, 1]]))
    rows.reserve(np.array([[0, 1]]), steps=2)
    assert seen(rows, 2, 2)[0] == [[True, True, True, False], [True, True, False, True]]
    assert seen(rows, 2, 4)[0] == [[True, True, True, False, True, False], [True, True, False, True, False, True]]


def test_invisible_columns_are_dropped() -> None:
    layer, keys = KeyValueCache(), mx.arange(14).reshape(2, 1, 7, 1)
    rows = BranchedCache(np.array([[SHARED, SHARED, 0, 1, 0, 1, 1], [SHARED, PADDING, 0, 1, 0, 1, 1]]), [layer])
    rows.begin_branches(np.array([[0, 1], [0, 1]]))
    layer.update_and_fetch(keys, -keys)
    rows.drop_branches([{0, 1}, {0, 1}])
    assert rows.branch_ids.shape == (2, 7)  # everything is seen
    rows.drop_branches([{0}, {1}])
    assert rows.branch_ids.tolist() == [[SHARED, SHARED, 0, 0], [SHARED, 1, 1, 1]]
    rows.reserve(np.array([[0], [1]]))
    columns, values = layer.update_and_fetch(mx.zeros((2, 1, 1, 1)), mx.zeros((2, 1, 1, 1)))
    assert columns[:, 0, :, 0].tolist() == [[0, 1, 2, 4, 0], [7, 10, 12, 13, 0]]
    assert mx.array_equal(values, -columns)


def test_selecting_rows() -> None:
    layer, keys = KeyValueCache(), mx.arange(8).reshape(2, 1, 2, 2)
    rows = BranchedCache(row_branch_ids([2, 1], 2), [layer])
    layer.update_and_fetch(keys, -keys)
    rows.select_rows([1, 1, 0])
    columns, _ = layer.update_and_fetch(mx.zeros((3, 1, 1, 2)), mx.zeros((3, 1, 1, 2)))
    assert columns[:, 0, :2].tolist() == [keys[1, 0].tolist(), keys[1, 0].tolist(), keys[0, 0].tolist()]
    assert rows.branch_ids.tolist() == [[SHARED, PADDING], [SHARED, PADDING], [SHARED, SHARED]]


def test_growth_keeps_the_content() -> None:
    layer = KeyValueCache()
    blocks = [mx.random.normal((2, 3, n, 4)) for n in (5, 1, 1, 70, 1)]
    for block in blocks:
        keys, values = layer.update_and_fetch(block, 2 * block)
    assert mx.array_equal(keys, mx.concatenate(blocks, axis=2))
    assert mx.array_equal(values, 2 * keys)


def test_half_precision_is_kept() -> None:
    """The engine is right for bf16 too; on a CPU it is not chosen by itself, because it is slow there."""
    vlm = load_vlm(GOLDEN / "qwen2_5_vl", 512 * 512, mx.bfloat16)
    exact = tiny_model("qwen2_5_vl")
    images = picture(1, (140, 84)), picture(2, (84, 112))
    cache, logits = vlm.prefill([vlm.input(*images, "a hat", "choice", True)])
    _, expected = exact.prefill([exact.input(*images, "a hat", "choice", True)])
    finite = np.isfinite(np.array(expected))
    assert logits.dtype == mx.float32
    assert {array.dtype for array in cache.arrays} == {mx.bfloat16}
    assert np.abs(np.array(logits)[finite] - np.array(expected)[finite]).max() < 0.5
    assert np.array(logits).argmax() == np.array(expected).argmax()


def states(cache: StateCache) -> list[int]:
    assert np.array_equal(np.array(cache.window)[:, 0, 0], np.array(cache.state)[:, 0, 0, 0])
    return np.array(cache.window)[:, 0, 0].astype(int).tolist()  # type: ignore[no-any-return]


def state_cache(values: list[int]) -> StateCache:
    """A layer's windows and states, filled with one number a row."""
    numbers = mx.array(values).astype(mx.float32)
    return StateCache(
        numbers[:, None, None] + mx.zeros((1, 3, 2)), numbers[:, None, None, None] + mx.zeros((1, 2, 2, 2))
    )


def test_branches_have_states_of_their_own() -> None:
    layer = state_cache([10, 20])
    rows = BranchedCache(row_branch_ids([2, 2], 2), [layer])
    rows.select_rows([1, 0, 1])
    assert states(layer) == [20, 10, 20]
    rows.begin_branches(np.array([[0, 2, 4], [1, 3, PADDING], [5, 6, 7]]))
    assert states(layer) == [20] * 3 + [10] * 3 + [20] * 3
    numbers = mx.arange(9).astype(mx.float32)
    layer.window, layer.state = (
        numbers[:, None, None] + mx.zeros((1, 3, 2)),
        numbers[:, None, None, None] + layer.state * 0,
    )
    rows.drop_branches([{4, 0}, {3}, set()])
    assert rows.branches.tolist() == [[0, 4], [3, PADDING], [PADDING, PADDING]]
    assert states(layer)[:3] == [0, 2, 4]
    rows.select_rows([1, 0])
    assert rows.branches.tolist() == [[3, PADDING], [0, 4]]
    assert [states(layer)[place] for place in (0, 2, 3)] == [4, 0, 2]


def test_columns_of_branches() -> None:
    """Columns by branch and back, with padding, missing branches, and branches in another order."""
    branches = np.array([[0, 1, 2], [5, 7, PADDING]])
    block = np.array([[1, 0, 1, PADDING, 1], [7, PADDING, PADDING, 7, PADDING]])
    columns = BranchColumns.of(block, branches)
    assert columns is not None
    assert columns.lengths.tolist() == [1, 3, 0, 0, 2, 0]
    index = np.array(columns.index).reshape(2, 3, 3)
    assert index[0, 0, :1].tolist() == [1]
    assert index[0, 1].tolist() == [0, 2, 4]
    assert index[1, 1, :2].tolist() == [0, 3]
    chosen = np.take_along_axis(block, np.array(columns.index), axis=1)  # (B, M * C)
    back = np.take_along_axis(chosen, np.array(columns.back), axis=1)
    assert np.array_equal(back[block != PADDING], block[block != PADDING])
    assert BranchColumns.of(branches, branches) is None


def test_half_precision_keeps_states_whole() -> None:
    """States are in float32 in any model, and norms in float32 leave everything else in its type."""
    vlm, exact = load_vlm(GOLDEN / "qwen3_5", 512 * 512, mx.bfloat16), tiny_model("qwen3_5")
    norms = {name: w for name, w in tree_flatten(exact.model.parameters()) if name.endswith("norm.weight")}
    vlm.model.load_weights(list(norms.items()), strict=False)
    images = picture(1, (140, 84)), picture(2, (84, 112))
    cache, logits = vlm.prefill([vlm.input(*images, "a hat", "choice", True)])
    _, expected = exact.prefill([exact.input(*images, "a hat", "choice", True)])
    states = {array.dtype for layer in cache.layers if isinstance(layer, StateCache) for array in [layer.state]}
    others = {array.dtype for array in cache.arrays if array.ndim == 3} | {
        array.dtype for layer in cache.layers if isinstance(layer, KeyValueCache) for array in layer.arrays
    }
    assert states == {mx.float32}
    assert others == {mx.bfloat16}
    finite = np.isfinite(np.array(expected))
    assert np.abs(np.array(logits)[finite] - np.array(expected)[finite]).mean() < 0.1
