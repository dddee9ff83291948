"""The update with shared prompts beside torch's, through full sequences; see scripts/make_golden.py."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxpref.config import TrainSettings
from mlxpref.engine.logprobs import Completions, PromptState, prefill
from mlxpref.engine.lora import adapter_weights, attach_lora, lora_targets
from mlxpref.engine.vlm import VLM, ComparisonInput, load_vlm
from mlxpref.training.gradients import GradientResult, policy_gradient
from mlxpref.training.loss import LossInputs
from mlxpref.training.rewards import RewardMix
from tests.conftest import GOLDEN
from tests.engine.test_vlm import golden_input

CLOSE = 1e-4
"""How far a gradient may be from torch's, over the length of torch's: the rounding of float32.

Measured: 2.6e-5 at most. Torch in float32 is 1.5e-5 from torch in float64, and we are 2.0e-5 from that.
"""
SETTINGS = ("temperature", "clip_low", "clip_high", "kl", "format_weight")
INPUTS = ("weights", "answer_weights", "advantages", "y", "reference", "old")


@pytest.fixture
def update(family: str) -> dict[str, Any]:
    """One update of the tiny checkpoint of a family: what was given, and what torch found."""
    with np.load(GOLDEN / family / "gradient.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@cache
def with_layers(family: str, rank: int, scale: float) -> VLM:
    """A model with layers for an adapter; loaded anew, as it is changed."""
    vlm = load_vlm(GOLDEN / family, 512 * 512)
    attach_lora(vlm.model, lora_targets(vlm.model), rank, scale)
    return vlm


def parts(update: dict[str, Any], kind: str) -> dict[str, Any]:
    """The arrays of a kind by the names of the adapter's matrices."""
    return {name.removeprefix(kind): array for name, array in update.items() if name.startswith(kind)}


def descent(family: str, update: dict[str, Any], golden: dict[str, Any], **how: Any) -> GradientResult:
    """What we find, given the same."""
    vlm = with_layers(family, int(update["rank"]), float(update["scale"]))
    weights = {name: mx.array(matrix) for name, matrix in parts(update, "weight:").items()}
    assert set(weights) == set(adapter_weights(vlm.model))
    vlm.model.load_weights(list(weights.items()), strict=False)
    assert vlm.suppressed_ids == update["silent"].tolist()
    first, second = update["label_ids"].tolist()
    assert (first[0], second[0]) == (*vlm.tokenizer.encode_template_text("1"), *vlm.tokenizer.encode_template_text("2"))
    vlm.tokenizer.label_ids = tuple(first), tuple(second)
    completions = Completions(update["tokens"], update["lengths"])
    inputs = LossInputs(
        prompts=[golden_input(vlm, golden)],
        completions=completions,
        mix=RewardMix.parse("soft"),
        mask=mx.array(completions.mask),
        form=mx.full(len(completions.lengths), float(update["format_weight"])),
        **{name: mx.array(update[name]) for name in INPUTS},
    )
    how |= {name: float(update[name]) for name in SETTINGS}
    return policy_gradient(vlm, inputs, TrainSettings(reward="soft", level="token", **how))


def distances(result: GradientResult, update: dict[str, Any]) -> dict[str, float]:
    """How far the gradient of each matrix is from torch's, over the length of torch's."""
    ours, theirs = dict(tree_flatten(result.gradient)), parts(update, "gradient:")
    assert set(ours) == set(theirs)
    return {name: float(np.linalg.norm(ours[name] - g) / np.linalg.norm(g)) for name, g in theirs.items()}


@pytest.mark.parametrize(("micro_batch", "recompute"), [(1, True), (2, False), (99, True)])
def test_loss_logprobs_and_gradients_equal_torch(
    family: str, update: dict[str, Any], golden: dict[str, Any], micro_batch: int, recompute: bool
) -> None:
    result = descent(family, update, golden, micro_batch=micro_batch, recompute=recompute)
    assert abs(result.loss.item() - update["loss"]) < 1e-4
    assert result.measurements[0].item() == update["clipped"]
    assert np.abs(np.array(result.logprobs) - update["logprobs"]).max() < 1e-4
    far = {name: distance for name, distance in distances(result, update).items() if distance > CLOSE}
    assert not far


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("scale", 1.499),
        ("kl", 0.0),
        ("temperature", 1.0),
        ("clip_low", 0.28),
        ("clip_high", 0.2),
        ("format_weight", 0.0),
        ("answer_weights", np.full(3, 1 / 16, np.float32)),
        ("y", np.full(3, 0.2, np.float32)),
    ],
)
def test_every_part_of_the_loss_matters(
    family: str, update: dict[str, Any], golden: dict[str, Any], what: str, value: Any
) -> None:
    result = descent(family, update | {what: value}, golden)
    assert max(distances(result, update).values()) > 10 * CLOSE


@pytest.mark.parametrize("micro_batch", [1, 99])
def test_gradient_through_the_prompt_matters(
    family: str, update: dict[str, Any], golden: dict[str, Any], micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(vlm: VLM, prompts: Sequence[ComparisonInput], recompute: bool = True) -> PromptState:
        result = prefill(vlm, prompts, recompute)
        return result.with_arrays([mx.stop_gradient(array) for array in result.arrays])

    monkeypatch.setattr("mlxpref.training.gradients.prefill", stopped)
    result = descent(family, update, golden, micro_batch=micro_batch)
    assert abs(result.loss.item() - update["loss"]) < 1e-4
    assert min(distances(result, update).values()) > 10 * CLOSE
