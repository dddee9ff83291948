"""A step of GRPO, ours beside mlx-vlm's own trainer: `python -m scripts.bench_grpo [--family qwen3_5] [--quick]`.

Both sides train equal random weights (float32, about the demo judge's size) with an adapter on the linear layers that
training adapts, on one pair of pictures. A step is: write a group of completions, the vision tower included; the
gradient; the optimizer. The peer's step is its trainer's own, from its batches to `apply_gradient_step`, with its own
defaults; pictures are cut into patches beforehand for the peer, and within the time measured for us.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from mlxpref._blas import preload

preload()  # before MLX is first imported

import click  # noqa: E402
import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from mlxpref.cli.output import note  # noqa: E402
from mlxpref.config import TrainSettings  # noqa: E402
from mlxpref.engine.completion import Sampling  # noqa: E402
from mlxpref.engine.logprobs import Completions  # noqa: E402
from mlxpref.engine.rollout import Prefill, roll_out  # noqa: E402
from mlxpref.engine.vlm import VLM, ComparisonInput  # noqa: E402
from mlxpref.training.gradients import policy_gradient  # noqa: E402
from mlxpref.training.loss import LossInputs  # noqa: E402
from mlxpref.training.rewards import RewardMix  # noqa: E402
from scripts.bench_common import (  # noqa: E402
    TEXT,
    PeerTrainer,
    Tokens,
    idle_optimizer,
    median,
    naive_inputs,
    pictures,
    report,
    take_turns,
    watched,
)
from scripts.bench_models import (  # noqa: E402
    attach_equal_adapters,
    family_option,
    give_random_weights,
    load_both,
    named,
    pixels_of_a_token,
)

_SIDES = (11, 23)
"""Tokens along the sides of the pictures."""
_LARGE = 500
"""Pixels along a side from which a step of the peer takes so long that it gets fewer repetitions."""
_OURS, _RECOMPUTING, _PEER = "ours", "ours, recomputing", "mlx-vlm"
Written = tuple[list[ComparisonInput], Completions]
"""Prompts, and the completions of all of them."""


@dataclass(frozen=True)
class Case:
    """Pairs of square pictures, and a group of completions of one length for each."""

    pixels: int
    tokens: int
    group: int
    comparisons: int = 1

    def pictures(self, number: int, side: int = 0) -> list[Image.Image]:
        """The pictures of a round; each side of ours has its own, so that none is in memory."""
        return pictures(2 * self.comparisons, self.pixels, self.tokens, number, side)

    @property
    def advantages(self) -> mx.array:
        """What the completions earned: anything will do, as long as it is the same for both sides."""
        return mx.array(np.random.default_rng(1).standard_normal(self.comparisons * self.group), mx.float32)


@dataclass(frozen=True)
class Step:
    """What one step took; tokens and images are those that ran through the language model and the vision tower."""

    rollout_s: float
    update_s: float
    vision_runs: int
    prefill_tokens: int
    trained_tokens: int
    peak_bytes: int

    @property
    def step_s(self) -> float:
        """The whole step."""
        return self.rollout_s + self.update_s


class Ours:
    """The rollouts and the update of a training step, as `Trainer` makes them."""

    def __init__(self, vlm: VLM, case: Case, **changes: Any) -> None:
        self.vlm, self.model, self.case = vlm, vlm.model, case
        sizes: dict[str, Any] = {"group": case.group, "max_tokens": case.tokens, "comparisons": case.comparisons}
        self.settings = TrainSettings(reward="hard", loss_type="grpo", **sizes, **changes)
        self.optimizer = idle_optimizer(vlm.model)

    @property
    def encoded(self) -> int:
        """Pictures that went through the vision tower so far."""
        return self.vlm.features.runs

    def prepare(self, number: int) -> list[Image.Image]:
        """The pictures of a round."""
        return self.case.pictures(number, int(self.settings.recompute))

    def write(self, prepared: list[Image.Image], prefill: Prefill | None = None) -> tuple[Written, list[int]]:
        """The groups of completions, and their lengths; see `roll_out` for `prefill`."""
        self.vlm.features.get_all(prepared)
        pairs = zip(prepared[::2], prepared[1::2], strict=True)
        prompts = [self.vlm.input(first, second, TEXT, "choice", think=True) for first, second in pairs]
        sampling = Sampling(self.case.group, 1.0, self.case.tokens, until="end", close=False)
        keys = [(place,) for place in range(len(prompts))]
        groups = roll_out(self.vlm, prompts, sampling, keys, self.settings.rows, prefill)
        completions = Completions.of([rollout.tokens for group in groups for rollout in group])
        return (prompts, completions), completions.lengths.tolist()

    def update(self, written: Written) -> None:
        """One step of the optimizer."""
        loss, gradient = self.gradient(*written)
        gradient, norm = optim.clip_grad_norm(gradient, self.settings.max_grad_norm)
        mx.eval(loss, norm)
        self.optimizer.update(self.model, gradient)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)

    def gradient(self, prompts: list[ComparisonInput], completions: Completions) -> tuple[mx.array, Any]:
        """The loss of completions and its gradient."""
        result = policy_gradient(self.vlm, self.inputs(prompts, completions), self.settings)
        return result.loss, result.gradient

    def inputs(self, prompts: list[ComparisonInput], completions: Completions) -> LossInputs:
        """What the loss of completions takes."""
        mask = mx.array(completions.mask)
        nothing = mx.zeros(len(completions.lengths))
        return LossInputs(
            prompts=prompts,
            completions=completions,
            mix=RewardMix.parse(self.settings.reward),
            mask=mask,
            weights=mask / mask.size,
            answer_weights=nothing,
            advantages=self.case.advantages,
            y=nothing,
            form=nothing,
        )


def timed_step(side: Any, case: Case, number: int) -> Step:
    """One step of a side in a round, whose completions must all have the full length."""
    prepared, encoded = side.prepare(number), side.encoded
    norm = side.model.language_model.model.layers[0].input_layernorm
    written, trained = Tokens(), Tokens()
    started = time.perf_counter()
    with watched(norm, written.see):
        completions, lengths = side.write(prepared)
    middle = time.perf_counter()
    mx.reset_peak_memory()
    with watched(norm, trained.see):
        side.update(completions)
    ended = time.perf_counter()
    peak = int(mx.get_peak_memory())
    if set(lengths) != {case.tokens}:
        raise RuntimeError(f"completions of {sorted(set(lengths))} tokens instead of {case.tokens}: change the seed")
    return Step(middle - started, ended - middle, side.encoded - encoded, written.in_blocks, trained.all, peak)


def gradient_error(ours: Ours, peer: PeerTrainer) -> float:
    """The largest relative difference of the two gradients over all tensors, for the same completions."""
    (prompts, completions), _ = ours.write(ours.case.pictures(0))
    prepared = peer.prepare(0)
    if prepared["input_ids"].tolist() != prompts[0].ids.tolist():
        raise RuntimeError("the sides read different prompts")
    silence = ours.vlm._suppression
    try:
        # The peer's policy may say placeholders of images, ours may not: compared where both may.
        ours.vlm._suppression = mx.zeros_like(silence)
        found = dict(named(ours.gradient(prompts, completions)[1]))
        mx.eval(found)
    finally:
        ours.vlm._suppression = silence
    errors = []
    for name, wanted in named(peer.gradient(prepared, mx.array(completions.tokens), ours.case.advantages)):
        size = np.linalg.norm(np.array(wanted, np.float64))
        if size > 1e-12:
            errors.append(float(np.linalg.norm(np.array(found[name] - wanted, np.float64)) / size))
    return max(errors)


def full_sequences_peak(peer: PeerTrainer, case: Case) -> int:
    """Peak bytes of the gradient of all sequences of a group in one batch through mlx-vlm's model.

    The pictures are encoded once, before what is measured: the difference is that of the language model.
    """
    model, inputs = peer.model, peer.inputs_of(0)
    grids, start = inputs["image_grid_thw"], inputs["input_ids"].shape[1] - 1
    encoded = model.vision_tower(inputs["pixel_values"], grids)
    features = encoded[0] if isinstance(encoded, tuple) else encoded  # Qwen3-VL's tower returns deepstack levels, too
    tokens = mx.array(np.random.default_rng(0).integers(0, 256, (case.group, case.tokens)), mx.int32)
    ids = mx.concatenate([mx.repeat(inputs["input_ids"], case.group, 0), tokens], axis=1)[:, :-1]
    embedded = model.get_input_embeddings(
        ids,
        inputs["pixel_values"],
        image_grid_thw=mx.tile(grids, (case.group, 1)),
        cached_image_features=mx.tile(features, (case.group, 1)),
    )
    mx.eval(embedded.inputs_embeds, embedded.position_ids)

    def objective(model: Any) -> mx.array:
        logits = model.language_model(ids, embedded.inputs_embeds, position_ids=embedded.position_ids).logits
        logits = logits[:, start:]
        said = mx.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - mx.logsumexp(logits, axis=-1)
        return -(said * case.advantages[:, None]).mean()

    mx.reset_peak_memory()
    model.train()  # in which recurrent layers have a gradient on every device
    mx.eval(nn.value_and_grad(model, objective)(model))
    model.eval()
    return int(mx.get_peak_memory())


def run_case(vlm: VLM, model: Any, processor: Any, case: Case, rounds: Mapping[str, int]) -> dict[str, Any]:
    """All sides of one case in turn: medians of the times, what was counted in the warm-up, and the gradients."""

    def inputs_of(number: int) -> dict[str, mx.array]:
        return naive_inputs(vlm, processor, case.pictures(number), think=True)

    ours = {name: Ours(vlm, case, recompute=name == _RECOMPUTING) for name in (_OURS, _RECOMPUTING)}
    peer = PeerTrainer(model, inputs_of, case.group, case.tokens)
    what = f"{case.pixels} px, {case.tokens} tokens"
    sides: dict[str, Any] = {**ours, _PEER: peer}
    warm_up, kept = take_turns({name: partial(timed_step, side, case) for name, side in sides.items()}, rounds, what)
    # A recomputed token runs twice, but is one token.
    trained = {_RECOMPUTING: warm_up[_OURS].trained_tokens}
    found = {
        name: asdict(warm_up[name])
        | {key: round(median(steps, key), 4) for key in ("rollout_s", "update_s")}
        | {"step_s": median(steps, "step_s"), "peak_bytes": int(median(steps, "peak_bytes"))}
        | {"trained_tokens": trained.get(name, warm_up[name].trained_tokens), "repeats": len(steps)}
        for name, steps in kept.items()
    }
    note(f"{what}: {found[_PEER]['step_s'] / found[_OURS]['step_s']:.2f} times as fast; gradients and memory")
    return {
        "prompt_tokens": peer.inputs_of(0)["input_ids"].size,
        "completion_tokens": case.tokens,
        "gradient_error": max(gradient_error(side, peer) for side in ours.values()),
        "full_peak": full_sequences_peak(peer, case),
        "sides": found,
    }


def to_json(case: Mapping[str, Any], chosen: str) -> dict[str, Any]:
    """One case as the last line has it, with the side of ours that was chosen."""
    ours, peer = case["sides"][chosen], case["sides"][_PEER]
    ratios = {
        f"{name}_ratio": round(peer[f"{name}_s"] / ours[f"{name}_s"], 3) for name in ("step", "rollout", "update")
    }
    shown = {
        name: {k: v for k, v in side.items() if k not in ("step_s", "repeats")}
        for name, side in (("ours", ours), ("peer", peer))
    }
    return {
        "prompt_tokens": case["prompt_tokens"],
        "completion_tokens": case["completion_tokens"],
        **ratios,
        "peak_ratio": round(case["full_peak"] / ours["peak_bytes"], 3),
        "gradient_error": case["gradient_error"],
        **shown,
    }


def table_of(cases: Sequence[Mapping[str, Any]]) -> tuple[Sequence[str], list[list[object]]]:
    """A line for each side of each case, with how many times faster than the peer it is."""
    rows: list[list[object]] = []
    for case in cases:
        peer = case["sides"][_PEER]
        for name, side in case["sides"].items():
            times = [f"{side[f'{part}_s']:.3f}" for part in ("rollout", "update", "step")]
            ratios = [f"{peer[f'{part}_s'] / side[f'{part}_s']:.2f}" for part in ("rollout", "update", "step")]
            peak = [f"{side['peak_bytes'] / 1e6:.0f}", f"{case['full_peak'] / side['peak_bytes']:.2f}"]
            counts = [side[key] for key in ("vision_runs", "prefill_tokens", "trained_tokens", "repeats")]
            rows.append([case["prompt_tokens"], case["completion_tokens"], name, *times, *ratios, *peak, *counts])
    columns = (">prompt", ">completion", "side", ">rollout s", ">update s", ">step s", ">rollout x", ">update x",
               ">step x", ">peak MB", ">peak x", ">vision", ">prefill", ">trained", ">repeats")  # fmt: skip
    return columns, rows


@click.command()
@family_option
@click.option("--pixels", multiple=True, type=int, help=f"Sides of the pictures; else those of {_SIDES} tokens.")
@click.option("--tokens", multiple=True, default=(64, 128), show_default=True, help="Lengths of the completions.")
@click.option("--group", default=8, show_default=True, help="Completions of the pair.")
@click.option("--rank", default=16, show_default=True, help="Rank of the adapter.")
@click.option("--repeats", default=5, show_default=True, help="Repetitions, of which the medians are taken.")
@click.option("--long-repeats", default=3, show_default=True, help=f"The same for the peer beyond {_LARGE} pixels.")
@click.option("--recompute/--no-recompute", default=False, help="Which of ours the JSON shows; the table has both.")
@click.option("--quick", is_flag=True, help="One small case, once: a test that everything works.")
def main(
    family: str,
    pixels: Sequence[int],
    tokens: Sequence[int],
    group: int,
    rank: int,
    repeats: int,
    long_repeats: int,
    recompute: bool,
    quick: bool,
) -> None:
    """Time a step of GRPO, ours and that of mlx-vlm's trainer, in turn."""
    if quick:
        tokens, group, repeats = (8,), 2, 1
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        vlm, model, processor = load_both(Path(folder), family)
        pixels = pixels or [count * pixels_of_a_token(model) for count in ((3,) if quick else _SIDES)]
        give_random_weights(vlm, model)
        attach_equal_adapters(vlm, model, rank)
        for side, length in product(pixels, tokens):
            few = min(repeats, long_repeats) if side > _LARGE else repeats
            rounds = {_OURS: repeats, _RECOMPUTING: repeats, _PEER: few}
            cases.append(run_case(vlm, model, processor, Case(side, length, group), rounds))
    settings = {"family": family, "pixels": pixels, "group": group, "rank": rank, "recompute": recompute,
                "repeats": repeats, "peer_repeats": [case["sides"][_PEER]["repeats"] for case in cases],
                "loss_type": "grpo", "temperature": 1.0, "dtype": "float32"}  # fmt: skip
    remarks = [
        "x: the peer's time over this side's; peak x: the peak of all sequences in one batch over this side's update",
        "gradients, largest relative difference of a tensor: "
        + ", ".join(f"{case['gradient_error']:.1e}" for case in cases),
    ]
    shown = [to_json(case, _RECOMPUTING if recompute else _OURS) for case in cases]
    report("grpo", settings, shown, table_of(cases), remarks)


if __name__ == "__main__":
    main()
