"""Ranking by all ordered pairs, ours beside one full prompt a pair: `python -m scripts.bench_rank [--quick]`.

The other side is what a straightforward user of mlx-vlm writes: for every ordered pair the model's own forward over
both pictures and the whole prompt, or, with thinking, its `generate_step` until the answer, one comparison after
another. It is timed on a sample of the pairs and scaled to all; its pictures are cut into patches beforehand, within
the time measured for us. The judge is the demo's own, which writes reasons; with `--family qwen3_5` it has random
weights, and its reasons are cut at their greatest length.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, permutations, product
from pathlib import Path
from typing import Any

from mlxpref._blas import preload

preload()  # before MLX is first imported

import click  # noqa: E402
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx_vlm.generate import generate_step  # noqa: E402
from PIL import Image  # noqa: E402

from mlxpref.cli.output import note  # noqa: E402
from mlxpref.config import JudgeSettings  # noqa: E402
from mlxpref.engine.vlm import VLM  # noqa: E402
from mlxpref.judge.judge import Judge  # noqa: E402
from mlxpref.judge.pair_verdict import JudgingCounts  # noqa: E402
from mlxpref.preferences import Pair  # noqa: E402
from scripts.bench_common import TEXT, median, naive_inputs, pictures, report, take_turns  # noqa: E402
from scripts.bench_models import (  # noqa: E402
    LARGEST,
    decoder_operations,
    family_option,
    load_both,
    pixels_of_a_token,
    vision_operations,
)

_SIDES = (3, 12, 24)
"""Tokens along the sides of the pictures."""
_SAMPLE = dict(zip(_SIDES, ((240, 24), (24, 8), (6, 3)), strict=True))
"""Ordered pairs that the naive side judges, without thinking and with it, by tokens along a side."""
_FEW = (6, 3)
_LARGE = 500
"""Pixels along a side from which all pairs take so long that there are fewer repetitions."""
_OURS, _NAIVE = "ours", "naive"


@dataclass(frozen=True)
class Case:
    """Square pictures, judged for all ordered pairs."""

    pixels: int
    think: bool
    images: int
    sample: int
    max_tokens: int

    @property
    def ordered_pairs(self) -> list[tuple[int, int]]:
        """All comparisons: who is shown first, who second."""
        return list(permutations(range(self.images), 2))

    def pictures(self, number: int) -> list[Image.Image]:
        """The pictures of a round."""
        return pictures(self.images, self.pixels, number, int(self.think))

    def sampled(self, number: int) -> list[tuple[int, int]]:
        """The comparisons that the naive side judges in a round."""
        pairs = self.ordered_pairs
        chosen = np.random.default_rng([1, number]).permutation(len(pairs))[: self.sample]
        return [pairs[place] for place in sorted(chosen)]


Said = tuple[str, float]
"""What was written of a comparison, and the preference for the first picture."""


@dataclass(frozen=True)
class Judged:
    """What one side said of ordered pairs, and the time that all of them take."""

    seconds: float
    said: Mapping[tuple[int, int], Said]
    vision_runs: int
    tokens: int = 0


def judge_all(vlm: VLM, case: Case, number: int) -> Judged:
    """Our side: all pairs of a round's pictures in both orders."""
    shown = case.pictures(number)
    settings = JudgeSettings(think=case.think, max_tokens=case.max_tokens, max_pixels=LARGEST)
    judge, runs = Judge(vlm, settings, "demo"), vlm.features.runs
    chosen = list(combinations(range(case.images), 2))
    started = time.perf_counter()
    verdicts = list(judge.pairs(Pair(shown[a], shown[b], TEXT) for a, b in chosen))
    seconds = time.perf_counter() - started
    said = {}
    for (a, b), verdict in zip(chosen, verdicts, strict=True):
        for order, one in (((a, b), verdict.a_shown_first[0]), ((b, a), verdict.a_shown_second[0])):
            p_first = one.p_first("soft")
            text = one.text if case.think else ""
            said[order] = ("unreadable", 0.5) if p_first is None else (text, p_first)
    return Judged(seconds, said, vlm.features.runs - runs, JudgingCounts.of(verdicts).tokens)


class Naive:
    """The other side: mlx-vlm's own model, one comparison after another."""

    def __init__(self, vlm: VLM, model: Any, processor: Any, case: Case) -> None:
        self.model, self.words, self.ends, self.case = model, vlm.tokenizer, vlm.eos_ids, case
        self._inputs = partial(naive_inputs, vlm, processor, think=case.think)

    def judge(self, number: int) -> Judged:
        """A sample of the ordered pairs of a round's pictures; its time is scaled to all of them."""
        shown = self.case.pictures(number)
        chosen = self.case.sampled(number)
        ready = [self._inputs((shown[a], shown[b])) for a, b in chosen]
        started = time.perf_counter()
        found = [self.think(inputs) if self.case.think else ([], self.read(inputs)) for inputs in ready]
        seconds = time.perf_counter() - started
        said = {pair: self.closed(inputs, *each) for pair, inputs, each in zip(chosen, ready, found, strict=True)}
        return Judged(seconds * len(self.case.ordered_pairs) / len(chosen), said, 2 * len(chosen))

    def read(self, inputs: Mapping[str, mx.array], written: Sequence[int] = ()) -> float:
        """The preference behind a prompt and what was written, which end at the answer position."""
        ids = mx.concatenate([inputs["input_ids"], mx.array([written], mx.int32)], axis=1)
        out = self.model(ids, inputs["pixel_values"], None, image_grid_thw=inputs["image_grid_thw"])
        return self.preference(out.logits[0, -1])

    def think(self, inputs: Mapping[str, mx.array]) -> tuple[list[int], float | None]:
        """The reasons that are written greedily, and the preference at the answer position if it is reached."""
        ids: list[int] = []
        text = ""
        steps = generate_step(
            inputs["input_ids"],
            self.model,
            inputs["pixel_values"],
            None,
            image_grid_thw=inputs["image_grid_thw"],
            max_tokens=self.case.max_tokens + 1,
            temperature=0.0,
            top_p=1.0,
            top_k=0,
        )
        for token, logprobs in steps:
            if self.words.streaming_reader.answer_number(text) is not None:
                return ids, self.preference(logprobs)
            if token in self.ends or len(ids) >= self.case.max_tokens:
                break
            ids.append(token)
            text += self.words.vocabulary[token]
        return ids, None

    def closed(self, inputs: Mapping[str, mx.array], ids: Sequence[int], p_first: float | None) -> Said:
        """What was written; where the answer was not reached, closed and read as ours is, to compare it."""
        if p_first is None:
            has_thought = self.words.streaming_reader.has_thought("".join(self.words.vocabulary[i] for i in ids))
            ids = [*ids, *self.words.closing_ids(has_thought)]
            p_first = self.read(inputs, ids)
        return self.words.decode(ids), p_first

    def preference(self, logits: mx.array) -> float:
        """How likely the first label is among both."""
        first, second = (mx.logsumexp(logits[mx.array(ids)]) for ids in self.words.label_ids)
        return float(np.array(mx.sigmoid(first - second)))


def bound_of(vlm: VLM, model: Any, case: Case, written: int) -> float:
    """The ratio of multiply-adds of the two ways: what counting allows, `written` tokens a comparison included.

    Naive: for every ordered pair both pictures through the vision tower, the whole prompt through the language model,
    the head at its last position. The least: every picture once; the instruction with the prompt once; the first
    picture behind it once a picture; for every ordered pair the rest, which attends to all before it, and the head.
    Tokens that are written cost both ways the same.
    """
    tokens = vlm.tokenizer.comparison(TEXT, "choice", case.think)
    image = (case.pixels // pixels_of_a_token(model)) ** 2
    start, between, after = map(len, tokens.texts)
    first = image + between
    rest = image + after
    pairs = len(case.ordered_pairs)
    vision = vision_operations(model, case.pixels)
    writing = decoder_operations(model, written, before=start + first + rest, heads=written)
    naive = pairs * (2 * vision + decoder_operations(model, start + first + rest, heads=1) + writing)
    least = case.images * (vision + decoder_operations(model, first, before=start)) + decoder_operations(model, start)
    least += pairs * (decoder_operations(model, rest, before=start + first, heads=1) + writing)
    return naive / least


def compare(ours: Sequence[Judged], naive: Sequence[Judged]) -> tuple[float | None, int, int]:
    """The largest difference of preferences where both sides wrote the same, how often they did, and of how many."""
    rounds = zip(ours, naive, strict=True)
    both = [(mine.said[pair], said) for mine, other in rounds for pair, said in other.said.items()]
    differences = [abs(mine[1] - other[1]) for mine, other in both if mine[0] == other[0]]
    return max(differences, default=None), len(differences), len(both)


def run_case(vlm: VLM, model: Any, processor: Any, case: Case, repeats: int) -> dict[str, Any]:
    """Both sides of one case in turn; the warm-up has fewer pictures."""
    few = replace(case, images=min(case.images, 4), sample=2)

    def sized(number: int) -> Case:
        return case if number else few

    runs = {
        _OURS: lambda number: judge_all(vlm, sized(number), number),
        _NAIVE: lambda number: Naive(vlm, model, processor, sized(number)).judge(number),
    }
    what = f"{case.pixels} px, {'thinking' if case.think else 'not thinking'}"
    _, kept = take_turns(runs, dict.fromkeys(runs, repeats), what)
    ours, naive = (median(kept[name], "seconds") for name in (_OURS, _NAIVE))
    written = round(median(kept[_OURS], "tokens") / len(case.ordered_pairs))
    note(f"{what}: {naive / ours:.2f} times as fast")
    difference, equal, compared = compare(kept[_OURS], kept[_NAIVE])
    return {
        "pixels": case.pixels,
        "think": case.think,
        "ratio": round(naive / ours, 3),
        "bound": round(bound_of(vlm, model, case, written), 3),
        "max_difference": difference,
        "vision_runs": max(judged.vision_runs for judged in kept[_OURS]),
        "ours_s": round(ours, 4),
        "naive_s": round(naive, 4),
        "equal_texts": equal,
        "compared": compared,
        "written_tokens": written,
        "repeats": repeats,
    }


def table_of(cases: Sequence[Mapping[str, Any]]) -> tuple[Sequence[str], list[list[object]]]:
    """A line for each case."""
    rows: list[list[object]] = []
    for case in cases:
        equal = f"{case['equal_texts']} of {case['compared']}"
        times = [f"{case[key]:.2f}" for key in ("ours_s", "naive_s", "ratio", "bound")]
        counts = [case["vision_runs"], case["written_tokens"], case["repeats"]]
        kind = "thinking" if case["think"] else "reading"
        difference = "" if case["max_difference"] is None else f"{case['max_difference']:.1e}"
        rows.append([case["pixels"], kind, *times, difference, equal, *counts])
    columns = (">pixels", "judged by", ">ours s", ">naive s", ">ratio", ">bound", ">largest difference",
               ">equal texts", ">vision runs", ">tokens written", ">repeats")  # fmt: skip
    return columns, rows


@click.command()
@family_option
@click.option("--pixels", multiple=True, type=int, help=f"Sides of the pictures; else those of {_SIDES} tokens.")
@click.option("--think", type=click.Choice(["no", "yes", "both"]), default="both", show_default=True, help="Cases.")
@click.option("--images", default=16, show_default=True, help="Pictures, of which all ordered pairs are judged.")
@click.option("--max-tokens", default=64, show_default=True, help="Tokens of reasons.")
@click.option("--repeats", default=5, show_default=True, help="Repetitions, of which the medians are taken.")
@click.option("--long-repeats", default=3, show_default=True, help=f"The same beyond {_LARGE} pixels.")
@click.option("--quick", is_flag=True, help="One small case of each kind, once: a test that everything works.")
def main(
    family: str,
    pixels: Sequence[int],
    think: str,
    images: int,
    max_tokens: int,
    repeats: int,
    long_repeats: int,
    quick: bool,
) -> None:
    """Time the judging of all ordered pairs, ours and one full prompt after another, in turn."""
    if quick:
        images, repeats = 4, 1
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        vlm, model, processor = load_both(Path(folder), family)
        unit = pixels_of_a_token(model)
        pixels = pixels or [count * unit for count in (_SIDES[:1] if quick else _SIDES)]
        for thinks, side in product([False, True] if think == "both" else [think == "yes"], pixels):
            sample = min(_SAMPLE.get(side // unit, _FEW)[thinks], images * (images - 1))
            case = Case(side, thinks, images, sample, max_tokens)
            times = min(repeats, long_repeats) if side > _LARGE else repeats
            cases.append(run_case(vlm, model, processor, case, times))
    settings = {"family": family, "images": images, "max_tokens": max_tokens,
                "repeats": [case["repeats"] for case in cases], "dtype": "float32"}  # fmt: skip
    remarks = [
        f"{images} pictures, {images * (images - 1)} ordered pairs; the naive time is that of a sample, scaled",
        "bound: the ratio of multiply-adds; difference: of preferences where both sides wrote the same",
    ]
    keys = ("pixels", "think", "ratio", "bound", "max_difference", "vision_runs", "ours_s", "naive_s")
    report("rank", settings, [{key: case[key] for key in keys} for case in cases], table_of(cases), remarks)


if __name__ == "__main__":
    main()
