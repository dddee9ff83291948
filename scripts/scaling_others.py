"""A ranking against the number of images, and a conversion against the size of a checkpoint: for `scripts.scaling`."""

import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlxpref._blas import preload

preload()  # before MLX is first imported

import mlx.core as mx  # noqa: E402

from mlxpref.checkpoints import bounds  # noqa: E402
from mlxpref.checkpoints.checkpoint import Checkpoint  # noqa: E402
from mlxpref.cli.output import note  # noqa: E402
from mlxpref.config import JudgeSettings  # noqa: E402
from mlxpref.conversion import convert as conversion  # noqa: E402
from mlxpref.conversion.quantize import Recipe  # noqa: E402
from mlxpref.conversion.writer import is_finite  # noqa: E402
from mlxpref.files import sync  # noqa: E402
from mlxpref.judge.judge import Judge  # noqa: E402
from mlxpref.ranking.covariance import DENSE_IMAGES  # noqa: E402
from mlxpref.ranking.pair_selection import default_round, pair_budget  # noqa: E402
from scripts.bench_common import TEXT, pictures  # noqa: E402
from scripts.bench_models import pixels_of_a_token  # noqa: E402
from scripts.bench_rank import Case, Naive  # noqa: E402
from scripts.conversion_memory import SIZES, forget_peak, make_checkpoint, memory, run_theirs  # noqa: E402
from scripts.memory_check import Model, random_judge  # noqa: E402
from scripts.ranking_scale import in_a_process  # noqa: E402
from scripts.scaling_bounds import Counts, Machine, Work, counted, least_seconds  # noqa: E402
from scripts.several import alone  # noqa: E402

__all__ = ["convert_points", "rank_points", "reading_works"]

Row = dict[str, Any]
_SAMPLED = 4
"""Ordered pairs that the peer reads, from which its time for all comparisons follows."""
_FAMILY = "qwen2_5_vl"
_LAYER = 0.09
"""GB of a layer of this family's `SIZES`."""
_SHARD = 200
"""MB of a file that a conversion writes."""


def rank_points(model: Model, side: int, images: Sequence[int], simulated: Sequence[int]) -> dict[str, Any]:
    """Rankings by reading of more and more pictures, `side` tokens along each side; and what is outside the model.

    The latter is of simulated answers, in processor seconds. The peer is mlx-vlm with one full prompt a comparison.
    """
    vlm = random_judge(model)
    # No blank is likely at an answer: the judge would write on.
    vlm.model.language_model.model.embed_tokens.weight[mx.array([*vlm.tokenizer.blank_ids])] = 0
    pixels = side * pixels_of_a_token(vlm.model)
    judge = Judge(vlm, JudgeSettings(think=False, max_pixels=pixels**2), "random")
    counts, machine = Counts(vlm.model), Machine(vlm.model)
    judge.rank(pictures(4, pixels, 1), TEXT, "none")  # the first one loads libraries
    processor = SimpleNamespace(image_processor=vlm.features.processor)
    points = list[Row]()
    for count in images:
        shown = pictures(count, pixels, count)
        vlm.features.limit(bounds.FEATURE_BYTES)
        before = int(mx.get_active_memory())
        mx.reset_peak_memory()
        started = time.perf_counter()
        ranking = judge.rank(shown, TEXT, "none")
        seconds = time.perf_counter() - started
        peak = int(mx.get_peak_memory()) - before
        comparisons, vision_runs = ranking.comparisons, ranking.vision_runs
        if ranking.tokens:
            raise RuntimeError(f"the judge wrote {ranking.tokens} tokens")
        with counted() as operations:
            vlm.features.limit(bounds.FEATURE_BYTES)
            judge.rank(shown, TEXT, "none")
        works = [counts.vision(vision_runs, pixels), *reading_works(counts, vlm.tokenizer, side, count, comparisons)]
        machine.look(works)
        case = Case(pixels, False, count, _SAMPLED, 1)
        peer_s = Naive(vlm, vlm.model, processor, case).judge(1).seconds
        points.append(
            {
                "images": count,
                "comparisons": comparisons,
                "vision_runs": vision_runs,
                **machine.costs(seconds, operations.count, works),
                "peak": peak,
                "peer_s": round(peer_s * comparisons / len(case.ordered_pairs), 4),
            }
        )
        note(f"rank: {count} images, {comparisons} comparisons: {seconds:.2f} s, bound {points[-1]['bound_s']:.2f}")
    return {"judge": model.name, "side": side, "points": points, "simulated": _outside(simulated, machine)}


def reading_works(counts: Counts, tokenizer: Any, side: int, images: int, comparisons: int) -> list[Work]:
    """The work of comparisons that are read: the prompt once, each first image once behind it, and each rest."""
    start, between, after = map(len, tokenizer.comparison(TEXT, "choice", False).texts)
    first, rest, size = side**2 + between, side**2 + after, bounds.TARGET_TOKENS
    return [
        counts.tokens(1, start, 0, start, start, 0),
        counts.tokens(images, first, start, size, start + first, 0),
        counts.tokens(comparisons, rest, start + first, size, start + first + rest, comparisons),
    ]


def _outside(images: Sequence[int], machine: Machine) -> list[Row]:
    """The processor seconds of simulated rankings, and the least: a factor and the inverse of the precision a round.

    That is of `DENSE_IMAGES` images at the most; of more the precision is sparse.
    """
    rows = list[Row]()
    for count in images:
        (row,) = in_a_process(["--images", str(count), "--alone"])
        rows.append(row)
        rounds = -(-pair_budget(count) // default_round(count))
        # N^3 / 6 multiply-adds for the factor, N^3 / 3 for the inverse.
        products = Work(min(count, bounds.TARGET_TOKENS), 1, rounds * count**3 / 2, 0, 0, 0, 0)
        row["seconds"] = round(sum(row[name] for name in ("rounds_s", "fit_s", "round_s", "settled_s", "rest_s")), 3)
        machine.look([products])
        row["bound_s"] = machine.costs(0, 0, [products])["bound_s"] if count <= DENSE_IMAGES else None
        note(f"rank, simulated: {count} images: {row['seconds']:.2f} s outside the model")
    return rows


def convert_points(gigabytes: Sequence[float], recipes: Sequence[str]) -> list[Row]:
    """Conversions of larger and larger checkpoints, ours and mlx-vlm's, beside a copy of the checkpoint's files.

    Each is in a process of its own, and ends where all is written: ours would go on and verify. Peaks are of resident
    memory above the imports; the bound is the bytes that are read and written, at the speed of the copy, which ends as
    ours does with all on the disk.
    """
    rows = list[Row]()
    for size in gigabytes:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            sizes = SIZES[_FAMILY] | {"num_hidden_layers": max(1, round(size / _LAYER))}
            make_checkpoint(folder / "source", _FAMILY, sizes, 500_000_000)
            tensors = [tensor.size for tensor in Checkpoint.open(folder / "source").tensors.values()]
            started = time.perf_counter()
            shutil.copytree(folder / "source", folder / "copy")
            for file in (folder / "copy").iterdir():
                sync(file)
            copied_a_second = 2 * sum(tensors) / (time.perf_counter() - started)
            shutil.rmtree(folder / "copy")
            for recipe in recipes:
                ours = alone(written, folder / "source", folder / "ours", recipe)
                peer = alone(run_theirs, folder / "source", folder / "theirs", recipe, 0)
                shutil.rmtree(folder / "theirs")
                row = {"bytes": sum(tensors), "largest_tensor": max(tensors), "recipe": recipe, **ours}
                row["bound_s"] = round((sum(tensors) + ours["written"]) / copied_a_second, 4)
                row |= {"computing_s": round(sum(tensors) / 2 * _number_s(recipe), 4)}
                row |= {"copied_a_second": round(copied_a_second)}
                rows.append(row | {"peer_s": peer["seconds"], "peer_peak": peer["writing"]})
                note(f"convert: {sum(tensors) / 1e9:.2f} GB, {recipe}: {row['seconds']:.1f} s")
    return rows


def _number_s(recipe: str) -> float:
    """Seconds that MLX takes for a number: to quantize it, or to see whether it is finite."""
    weight = mx.zeros((1 << 11, 1 << 11), mx.bfloat16)
    mx.eval(weight)
    if recipe == "none":
        return least_seconds(lambda: [mx.array(is_finite(weight))]) / weight.size
    return least_seconds(lambda: list(mx.quantize(weight, 64, int(recipe)))) / weight.size


def written(source: Path, output: Path, recipe: str) -> Row:
    """`mlxpref convert` until all is written, in this process: seconds, peak bytes and bytes written."""
    import mlx_vlm.utils  # noqa: F401  part of the baseline

    found: Row = {}

    def written_now(folder: Path, *_: Any) -> None:
        found["seconds"] = round(time.perf_counter() - started, 2)
        found["peak"] = memory("VmHWM") - baseline
        found["written"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        raise _Written

    setattr(conversion, "verify", written_now)  # noqa: B010  where writing ends
    baseline = memory("VmRSS")
    forget_peak()
    started = time.perf_counter()
    with suppress(_Written):
        conversion.convert(source, output, Recipe.named(recipe), shard_size=_SHARD * 10**6)
    return found


class _Written(Exception):  # noqa: N818  no error
    """All is written."""
