"""What fits which Mac, from shapes alone: `python -m scripts.memory_table`; or, with --check, the plan beside MLX.

The table says, for training with the defaults of a real judge, the planned peak, and how far one setting at a time can
be raised within the working set that macOS recommends. Nothing in it was measured on a Mac. --judges prints the figures
of recommended.toml and convert/models.toml, from the same plan. --check runs random models of two sizes here and sets
what MLX measures beside what was planned.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxpref._blas import preload

preload()  # before MLX is first imported

import click  # noqa: E402

from mlxpref.checkpoints.families import FAMILIES  # noqa: E402
from mlxpref.checkpoints.memory import ModelSize, judging_plan, training_plan  # noqa: E402
from mlxpref.checkpoints.recommended import RecommendedJudge, recommended_judges  # noqa: E402
from mlxpref.cli.output import note, print_table, print_text  # noqa: E402
from mlxpref.config import JudgeSettings, TrainSettings  # noqa: E402
from mlxpref.engine.profile import profile_named  # noqa: E402
from scripts.memory_check import LARGE_RUNS, MODELS, RUNS, measure  # noqa: E402

_TOLERANCE = 0.25
_PREFERENCES = 1000
_IMAGES = 32
ROWS = 8
"""Completions at a time by which a judge fits a device; more are written together where there is room."""
_GIB = 1 << 30
MACS = {16: 2 / 3, 32: 2 / 3, 64: 3 / 4, 128: 3 / 4, 192: 3 / 4}
"""Unified memory in GiB, and the share of it that macOS recommends as a GPU's working set."""

LIST: dict[str, Any] = tomllib.loads(
    (Path(__file__).parents[1] / "convert" / "models.toml").read_text(encoding="utf-8")
)
"""Every model and shape of convert/models.toml."""
SHAPES: dict[str, dict[str, Any]] = LIST["shape"]
_FAMILY = "Qwen2.5-VL-"
JUDGES = [name.removeprefix(_FAMILY) for name in SHAPES if name.startswith(_FAMILY)]
"""The judges of the table."""
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


def in_bits(shape: str, bits: int | None, float_bytes: int = 2) -> ModelSize:
    """A model of a shape, quantized in groups of 64 but for its vision tower; other numbers take `float_bytes` each."""
    config = SHAPES[shape]
    return quantized_size(config, ModelSize.from_config(config, config["bytes"] // 2 * float_bytes, float_bytes), bits)


def quantized_size(config: Mapping[str, Any], model: ModelSize, bits: int | None) -> ModelSize:
    """An unquantized model of a config after its conversion; None leaves it as it is."""
    if bits is None:
        return model
    count, routers = _counts(config, model)
    # A group has a scale and an offset.
    stored = count * bits // 8 + routers * max(bits, 8) // 8 + (count + routers) // 64 * 2 * model.float_bytes
    return replace(model, weights=model.weights - (count + routers) * model.float_bytes + stored)


def _counts(config: Mapping[str, Any], model: ModelSize) -> tuple[int, int]:
    """How many weights of the language model a conversion quantizes, without and in its routers."""
    family = FAMILIES[config["model_type"]]
    text, hidden, recurrent = family.language(config), model.text[0], model.recurrent
    attention = model.attention_layers * hidden * (family.query_widths * model.query_width + 2 * model.key_width)
    states = recurrent.layers * hidden * (recurrent.channels + 2 * (recurrent.value_width + recurrent.heads))
    heads = model.vocabulary * hidden * (1 if config["tie_word_embeddings"] else 2)
    routers = family.expert_layers(text) * hidden * text.get("num_experts", 0)
    return attention + states + 3 * hidden * family.inner_width(text) + heads, routers


def quantized(name: str, bits: int) -> ModelSize:
    """A judge of the table, quantized."""
    return in_bits(_FAMILY + name, bits)


def figures(shape: str, profile: str = "mlxpref") -> dict[str, float]:
    """GB that a model of a shape takes: its files in 16 and in 4 bit, and the peaks of writing, judging and training.

    Judging is that of 32 images; training is by the default settings with the micro-batch that takes least. Either
    writes a few completions at a time, as long as the profile lets them be; `cpu` is the same in float32.
    """
    asked = profile_named(profile)
    length = asked.max_tokens or JudgeSettings().max_tokens
    judging = JudgeSettings(rows=ROWS, max_tokens=length)
    trainings = [TrainSettings(rows=ROWS, max_tokens=length, micro_batch=size) for size in MICRO_BATCHES]
    source, small = in_bits(shape, None), in_bits(shape, 4)
    text = SHAPES[shape].get("text_config", {})
    experts = 2 * text.get("num_experts", 0) * text.get("moe_intermediate_size", 0)  # gate and up are one tensor
    largest = max(source.vocabulary, experts) * source.text[0] * 2
    sizes = {"source_gb": source.weights, "converted_gb": small.weights}
    sizes["conversion_gb"] = min(small.weights, 5 * 10**9) + largest + 3 * 10**8
    for name, model in (("", small), ("cpu_", in_bits(shape, 4, 4))):
        sizes[f"judging_{name}gb"] = judging_plan(model, judging, _IMAGES, *asked.text_tokens).peak
        plans = [training_plan(model, each, _PREFERENCES, True, *asked.text_tokens) for each in trainings]
        sizes[f"training_{name}gb"] = min(plan.peak for plan in plans)
    return {name: round(size / 1e9, 1) for name, size in sizes.items()}


def shape_of(judge: RecommendedJudge) -> str | None:
    """The shape of a recommended judge, None for one whose sizes are not known."""
    (model,) = [each for each in LIST["model"] if judge.id in (each["source"], each.get("converted"))]
    shape: str | None = model.get("shape")
    return shape


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


def _print_judges() -> None:
    rows = []
    for judge in recommended_judges():
        if shape := shape_of(judge):
            rows.append({"judge": judge.id, "shape": shape, **figures(shape, judge.profile)})
    names = [name for name in rows[0] if name not in ("judge", "shape")]
    print_table(
        ("judge", *(f">{name.removesuffix('_gb').replace('_', ' ')}" for name in names)),
        [(row["judge"], *(f"{row[name]:.1f} GB" for name in names)) for row in rows],
    )
    print_text(
        f"planned from shapes (convert/models.toml), not measured; judging: {_IMAGES} images, the default settings; "
        f"{ROWS} completions at a time, as long as the profile lets them be"
    )
    print_text(json.dumps({"judges": rows}))


def _side(pixels: int | None) -> str:
    return f"{round(pixels**0.5)} x {round(pixels**0.5)}" if pixels else ""


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _check() -> bool:
    cases = []
    for model in MODELS:
        for run, found in measure(model, RUNS if model.name.endswith("demo's size") else LARGE_RUNS):
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
@click.option("--judges", is_flag=True, help="Print what each recommended judge takes.")
def main(check: bool, judges: bool) -> None:
    """Print what fits which Mac."""
    if judges:
        _print_judges()
    elif not check:
        _print_what_fits()
    elif not _check():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
