"""What fits which Mac, from shapes alone: `python -m scripts.memory_table`; or, with --check, the plan beside MLX.

The table says, for training with the defaults of a real judge, the planned peak, and how far one setting at a time can
be raised within the working set that macOS recommends. Nothing in it was measured on a Mac. --check runs random models
of two sizes here and sets what MLX measures beside what was planned.
"""

import json
from dataclasses import replace
from typing import Any

from mlxpref._blas import preload

preload()  # before MLX is first imported

import click  # noqa: E402

from mlxpref.checkpoints.memory import ModelSize, training_plan  # noqa: E402
from mlxpref.cli.output import note, print_table, print_text  # noqa: E402
from mlxpref.config import TrainSettings  # noqa: E402
from scripts.memory_check import LARGE_RUNS, MODELS, RUNS, measure  # noqa: E402

_TOLERANCE = 0.25
_PREFERENCES = 1000
_GIB = 1 << 30
MACS = {16: 2 / 3, 32: 2 / 3, 64: 3 / 4, 128: 3 / 4, 192: 3 / 4}
"""Unified memory in GiB, and the share of it that macOS recommends as a GPU's working set."""

_VISION = {"hidden_size": 1280, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2}


# The last is what the weights take in bfloat16: total_size in model.safetensors.index.json.
JUDGES = {
    name: ModelSize.from_config(
        {
            "model_type": "qwen2_5_vl", "hidden_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": key_heads, "intermediate_size": inner,
            "vocab_size": vocabulary, "vision_config": _VISION | {"intermediate_size": vision_inner},
        },
        published,
    )
    for name, hidden, layers, heads, key_heads, inner, vocabulary, vision_inner, published in (
        ("3B", 2048, 36, 16, 2, 11008, 151936, 3420, 7509245952),
        ("7B", 3584, 28, 28, 4, 18944, 152064, 3420, 16584333312),
        ("32B", 5120, 64, 40, 8, 27648, 152064, 3456, 66905436672),
    )
}  # fmt: skip
"""Qwen2.5-VL in bfloat16, as the configs state it."""
TIED = ("3B",)
MICRO_BATCHES = (16, 8, 4, 2, 1)
LADDERS: dict[str, list[int]] = {
    "group": [2, 4, 8, 16, 32, 64],
    "max_pixels": [side**2 for side in (224, 336, 448, 512, 672, 896, 1120, 1344)],
    "max_tokens": [64, 128, 256, 512, 1024, 2048],
}


def peak(checkpoint: ModelSize, working_set: float, **changes: Any) -> tuple[int, int]:
    """The planned peak, and the largest micro-batch with which it fits; where none fits, the peak of the smallest."""
    planned = 0, 0
    for size in MICRO_BATCHES:
        settings = replace(TrainSettings(), micro_batch=size, **changes)
        planned = training_plan(checkpoint, settings, _PREFERENCES).peak, size
        if planned[0] <= working_set:
            break
    return planned


def quantized(name: str, bits: int) -> ModelSize:
    """A judge whose language model is quantized in groups of 64."""
    judge = JUDGES[name]
    hidden, inner, _ = judge.text
    layer = 2 * hidden * (judge.query_width + judge.key_width) + 3 * hidden * inner
    count = judge.layers * layer + judge.vocabulary * hidden * (1 if name in TIED else 2)
    # A group has a scale and an offset of 2 bytes each.
    return replace(judge, weights=judge.weights - 2 * count + count * bits // 8 + count // 64 * 4)


def what_fits() -> list[dict[str, Any]]:
    """A row for each Mac, judge and number of bits."""
    rows = []
    for memory, share in MACS.items():
        for name in JUDGES:
            for bits in (4, 8):
                checkpoint, working_set = quantized(name, bits), int(memory * share * _GIB)
                needed, size = peak(checkpoint, working_set)
                row: dict[str, Any] = {"mac_gib": memory, "working_set_bytes": working_set, "judge": name, "bits": bits}
                row |= {"weights_bytes": checkpoint.weights, "peak_bytes": needed, "micro_batch": size}
                for setting, ladder in LADDERS.items():
                    fitting = [v for v in ladder if peak(checkpoint, working_set, **{setting: v})[0] <= working_set]
                    row[setting] = max(fitting, default=None)
                rows.append(row)
    return rows


def _print_what_fits() -> None:
    rows = what_fits()
    print_table(
        ("Mac", ">working set", "judge", ">weights", ">peak", ">micro-batch", ">group", ">pixels", ">tokens"),
        [
            (
                f"{row['mac_gib']} GB", _gigabytes(row["working_set_bytes"]), f"{row['judge']}, {row['bits']} bit",
                _gigabytes(row["weights_bytes"]), _gigabytes(row["peak_bytes"]),
                row["micro_batch"] if row["peak_bytes"] <= row["working_set_bytes"] else "does not fit",
                row["group"] or "", _side(row["max_pixels"]), row["max_tokens"] or "",
            )
            for row in rows
        ],
    )  # fmt: skip
    print_text(
        "training with the defaults (512 x 512 pixels, groups of 8, 256 tokens) and the largest micro-batch that fits; "
        "the last three columns are the most that one setting can be while the others stay; "
        "planned from shapes, not measured on a Mac"
    )
    print_text(json.dumps({"table": rows}))


def _side(pixels: int | None) -> str:
    return f"{round(pixels**0.5)} x {round(pixels**0.5)}" if pixels else ""


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _check() -> bool:
    cases = []
    for model in MODELS:
        for run, found in measure(model, RUNS if model is MODELS[0] else LARGE_RUNS):
            note(f"{model.name}, {run.pixels} px, {run.name}: {found.error:+.1%}")
            cases.append((model, run, found))
    print_table(
        ("model", ">pixels", "run", ">planned MB", ">measured MB", ">error", ">without weights"),
        [
            (
                model.name, run.pixels, run.name, f"{found.plan.peak / 1e6:.0f}", f"{found.peak / 1e6:.0f}",
                f"{found.error:+.1%}", f"{found.error_without_weights:+.1%}",
            )
            for model, run, found in cases
        ],
    )  # fmt: skip
    worst = max((abs(found.error) for _, _, found in cases))
    print_text(json.dumps({"worst_error": round(worst, 4), "tolerance": _TOLERANCE}))
    return worst <= _TOLERANCE


@click.command()
@click.option("--check", is_flag=True, help="Run random models here, and fail where the plan is off by more than 25 %.")
def main(check: bool) -> None:
    """Print what fits which Mac."""
    if not check:
        _print_what_fits()
    elif not _check():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
