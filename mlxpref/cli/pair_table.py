"""Prints the verdict on a pair for people, and gives it as JSON."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlxpref.cli.output import print_text
from mlxpref.cli.tables import cut, percent
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.text import short_names


def pair_to_json(a: Path, b: Path, verdict: PairVerdict) -> dict[str, Any]:
    """One pair of the JSON of `rank`, with the text of every sample."""
    samples = [
        {"first": first, "p_first": each.p_first("soft")}
        | {name: getattr(each, name) for name in ("label_mass", "closed", "tokens", "text")}
        for first, order in (("a", verdict.a_shown_first), ("b", verdict.a_shown_second))
        for each in order
    ]
    return {"a": str(a), "b": str(b), **verdict.to_json(), "samples": samples}


def print_pair(a: Path, b: Path, verdict: PairVerdict, warnings: Iterable[str] = ()) -> None:
    """Print the preferred image, its probability, the judge's reasons in both orders, and warnings."""
    if verdict.scores is None:
        _print_orders(a, b, verdict)
    else:
        _print_scores(a, b, verdict, verdict.scores)
    for warning in warnings:
        print_text(f"note: {warning}")


def _print_scores(a: Path, b: Path, verdict: PairVerdict, scores: tuple[float, float]) -> None:
    """Print the image with the higher score, its probability if a temperature was fitted, both scores and reasons."""
    names = short_names([str(a), str(b)])
    images = [(a, names[0], scores[0], verdict.a_shown_first), (b, names[1], scores[1], verdict.a_shown_second)]
    (one, *_), (other, *_) = best = sorted(images, key=lambda image: -image[2])
    p = max(verdict.p_a, 1 - verdict.p_a)
    sure = f", {percent(p)}" if verdict.rescaling else ""
    print_text(
        f"undecided between {a} and {b}: both have the same score"
        if scores[0] == scores[1]
        else f"{one} is preferred to {other} by its score{sure}"
    )
    for _, name, score, verdicts in best:
        print_text(f"  {name}: score {score:.2f}")
        for each in verdicts:
            # In the order where it is shown first, its own reasons come first, too.
            if own := each.reasoning.removeprefix("Image 1: ").partition(" Image 2: ")[0]:
                print_text(f"    {cut(own)}")


def _print_orders(a: Path, b: Path, verdict: PairVerdict) -> None:
    """Print the preferred image, its probability, and the judge's reasons in both orders."""
    names = short_names([str(a), str(b)])
    orders = [(verdict.p_a_shown_first, verdict.a_shown_first), (verdict.p_a_shown_second, verdict.a_shown_second)]
    subject = ""
    if math.isclose(verdict.p_a, 0.5, abs_tol=1e-6):
        is_read = any(each.p_first("soft") is not None for each in verdict.verdicts)
        why = "50 % for either, the judge cannot tell them apart" if is_read else "no completion could be read"
        print_text(f"undecided between {a} and {b}: {why}")
        subject = f"{names[0]} "
    elif verdict.p_a > 0.5:
        print_text(f"{a} is preferred to {b}, {percent(verdict.p_a)}")
    else:
        print_text(f"{b} is preferred to {a}, {percent(1 - verdict.p_a)}")
        orders.reverse()
    for place, (p_a, verdicts) in enumerate(orders, 1):
        print_text(f"  {subject}as image {place}: {percent(p_a if p_a is None or verdict.p_a >= 0.5 else 1 - p_a)}")
        for each in verdicts:
            if each.reasoning:
                print_text(f"    {cut(each.reasoning)}")
    if verdict.p_tie is not None:
        print_text(f"  a tie: {percent(verdict.p_tie)}, counted half for each")
