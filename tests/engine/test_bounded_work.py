"""Bounded work: what one operation and one evaluation take on at most, counted. A Mac ends GPU work that is long."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxpref.checkpoints.memory import _Block
from mlxpref.config import TrainSettings
from mlxpref.engine import decoder as trunk
from mlxpref.engine import image_features as features
from mlxpref.engine import rollout
from mlxpref.engine import vision as tower
from mlxpref.engine.decoder import columns_of_piece
from mlxpref.engine.prefix_cache import PrefixCache
from mlxpref.engine.rollout import Sampling, roll_out
from mlxpref.engine.vlm import VLM
from mlxpref.training import gradients
from tests.conftest import FAMILIES, picture, tiny_model
from tests.training.test_gradients import material, settings, trained

__all__ = ["trained"]  # a fixture


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str, Callable[..., int]], list[int]]:
    """Counts what a function of a module is given, summed between two evaluations."""

    def count(module: Any, name: str, size: Callable[..., int]) -> list[int]:
        sums, whole, evaluate = [0], getattr(module, name), mx.eval

        def counting(*arguments: Any, **options: Any) -> Any:
            sums[-1] += size(*arguments, **options)
            return whole(*arguments, **options)

        def evaluating(*arrays: Any) -> None:
            evaluate(*arrays)
            if sums[-1]:
                sums.append(0)

        monkeypatch.setattr(module, name, counting)
        monkeypatch.setattr(mx, "eval", evaluating)
        return sums

    return count


def tokens_of(_: Any, block: trunk.Block, *others: Any) -> int:
    return int(block.owners.size)


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 32, 64, 65, 100, 1000, 8192, 20000])
def test_a_piece_has_no_more_tokens_than_a_device_may_be_busy_with(rows: int) -> None:
    columns = columns_of_piece(rows)
    assert rows * columns <= max(trunk._MOST, rows)
    assert rows * columns >= min(512, trunk._MOST) / 2  # nor so few that the device waits
    assert _Block(rows, 10**6).piece.columns == columns  # and the plan of memory knows
    if rows <= 64:  # as many as the settings ask for if nobody changes them
        assert columns == max(128, 512 // rows)


@pytest.mark.parametrize("way", ["whole", "tree"])
@pytest.mark.parametrize("rows", [1, 3])
def test_prompts_are_evaluated_piece_by_piece(
    way: str, rows: int, monkeypatch: pytest.MonkeyPatch, counted: Callable[..., list[int]]
) -> None:
    vlm = tiny_model("qwen3_vl")
    prompts = [vlm.prompt(picture(i, (336, 336)), picture(9, (336, 336)), "a hat", "choice", True) for i in range(rows)]
    prefill = PrefixCache(vlm).prefill if way == "tree" else vlm.prefill
    expected = np.array(prefill(prompts)[1])
    monkeypatch.setattr(trunk, "_TOGETHER", 32)
    monkeypatch.setattr(trunk, "_LEAST", 16)
    sums = counted(trunk, "run_layers", tokens_of)
    prefill = PrefixCache(vlm).prefill if way == "tree" else vlm.prefill
    found = np.array(prefill(prompts)[1])
    assert sum(sums) >= len(prompts[0]) > 100
    assert max(sums) <= 2 * max(32, rows * 16)  # one under way, and one behind it
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_is_evaluated_block_by_block_on_a_bounded_batch(
    family: str, monkeypatch: pytest.MonkeyPatch, counted: Callable[..., list[int]]
) -> None:
    vlm = tiny_model(family)
    monkeypatch.setattr(features, "_BATCH_TOKENS", 40)
    sums = counted(tower, "_attention", lambda attention, hidden, groups: int(hidden.shape[0] * hidden.shape[1]))
    vlm.features.get_all([picture(100 + i, (168, 168)) for i in range(7)])
    tokens = vlm.features.get(picture(100, (168, 168))).tokens
    merge = int(vlm.model.vision_tower.spatial_merge_size) ** 2
    assert sum(sums) == 7 * tokens * merge * len(vlm.model.vision_tower.blocks)
    assert max(sums) < (40 + tokens) * merge


def test_no_more_completions_than_a_micro_batch_are_learned_from_in_one_evaluation(
    trained: VLM, counted: Callable[..., list[int]]
) -> None:
    inputs = material(trained)
    for micro_batch in (1, 2, 4, 8):
        sums = counted(gradients, "completion_logprobs", lambda vlm, prompts, part, *others: len(part.lengths))
        gradients.policy_gradient(trained, inputs, settings(micro_batch=micro_batch))
        assert sum(sums) == len(inputs.completions.lengths)
        assert max(sums) <= micro_batch


def test_the_host_looks_every_eight_steps(counted: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step is handed to the device by itself, and no more than eight before they are waited for."""
    vlm = tiny_model("qwen2_vl")
    handed: list[int] = []
    whole = mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: (handed.append(1), whole(*arrays))[1])
    asked: list[int] = []
    advance = rollout._Batch._advance

    def advancing(self: Any, steps: int, written: int) -> None:
        before = len(handed)
        advance(self, steps, written)
        asked.append(len(handed) - before)

    monkeypatch.setattr(rollout._Batch, "_advance", advancing)
    prompt = vlm.prompt(picture(0), picture(1), "a hat", "choice", True)
    roll_out(vlm, [prompt], Sampling(max_tokens=TrainSettings().group * 3), [(0,)])
    assert asked
    assert max(asked) == rollout._STEPS == 8
