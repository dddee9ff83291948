"""The README.md of an exported adapter or model: its kind, its training, and how to load it."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxpref.checkpoints.files import ADAPTER_CONFIG, read_json_object
from mlxpref.checkpoints.resolve import is_hub_id
from mlxpref.config import JudgeSettings
from mlxpref.conversion.verify import public_name
from mlxpref.engine.adapters import trained_settings
from mlxpref.engine.profile import PROMPT_SLOT, own_profile
from mlxpref.errors import ModelError
from mlxpref.text import plain

_SETTINGS = (
    "data", "split", "reward", "steps", "learning_rate", "rank", "lora_scale", "group", "comparisons", "think", "seed",
)  # fmt: skip
"""The settings of a run for the card; run.json has them all."""
_EXPORTS = {
    "peft": ("peft", "A LoRA adapter in PEFT's format"),
    "fused": ("mlx", "A model for MLX with a LoRA adapter in its weights"),
    "hf": ("transformers", "A model for transformers with a LoRA adapter in its weights"),
}
"""By the target of the export: the library that loads it, and its description."""


def write_card(folder: Path, to: str, adapter: Path, base_name: str) -> None:
    """Write the README.md of an exported adapter, with its run's records, if any."""
    from huggingface_hub import ModelCard, ModelCardData

    name, (library, what) = plain(public_name(base_name)), _EXPORTS[to]
    record = _record(adapter / "run.json")
    settings = record["settings"]
    when, held_out = _measurement(adapter, bool(settings.get("patience")))
    tags = ["mlxpref", "preference", "reward-model", "lora"]
    base_id = name.partition("@")[0] if is_hub_id(name) else None  # the hub refuses a card with any other
    card = ModelCard.from_template(
        ModelCardData(base_model=base_id, library_name=library, pipeline_tag="image-text-to-text", tags=tags),
        template_path=str(Path(__file__).with_suffix(".md.jinja")),
        to=to,
        base=_code(name),
        title=Path(name).name,
        what=what,
        quoted=json.dumps(name, ensure_ascii=False),
        messages=json.dumps(own_profile().messages(), ensure_ascii=False, indent=1).replace(PROMPT_SLOT, "PROMPT"),
        no_thinking=own_profile().at_once,
        closing=own_profile().closing,
        trained=_trained(settings | trained_settings(adapter)),
        settings=_settings(record),
        when=when,
        held_out=held_out,
    )
    card.save(folder / "README.md")


def _record(file: Path) -> dict[str, Any]:
    """A run's record, with its settings and its end; both are empty without one."""
    try:
        record = read_json_object(file)
    except ModelError:
        record = {}
    parts = {name: record.get(name) for name in ("settings", "ended")}
    return {name: part if isinstance(part, dict) else {} for name, part in parts.items()}


def _trained(settings: Mapping[str, Any]) -> str:
    """A sentence about how the judge was asked in training."""
    pixels = settings.get("max_pixels", JudgeSettings().max_pixels)
    way = {True: "to think first", False: "to answer at once"}.get(settings.get("think", ...))
    shrunk = f"Images are shrunk to at most {_code(pixels)} pixels"
    return f"It was trained {way}. {shrunk}, as in training." if way else f"{shrunk}, as mlxpref does by default."


def _settings(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The settings in a run's record, by name, and its last step."""
    settings, ended = record["settings"], record["ended"]
    rows = [(name.replace("_", " "), _code(public_name(settings[name]))) for name in _SETTINGS if name in settings]
    return rows + ([("ended after step", _code(ended["step"]))] if "step" in ended else [])


def _measurement(adapter: Path, patience: bool) -> tuple[str, list[tuple[str, float]]]:
    """The held-out measurement of a run's kept adapter, or the last one before: when it was, and its numbers."""
    rows, before, kept = [], [], None
    with suppress(OSError, ValueError, RecursionError, ModelError, AttributeError, KeyError, TypeError):
        rows = [json.loads(line) for line in (adapter / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        kept = read_json_object(adapter / ADAPTER_CONFIG).get("step")  # earlier versions did not write it
        rows = [row for row in rows if row.get("held_out") and row["step"]]
        before = [row for row in rows if kept is None or row["step"] <= kept]
    if not before:
        return "", []
    step, metrics = before[-1]["step"], before[-1]["held_out"]
    when = f"after step `{_code(step)}`"
    if patience:
        when += f", the best of {len(rows)} measurements"
    elif kept not in (None, step):
        when += f" (this adapter is of step `{_code(kept)}`)"
    return when, [(name.replace("_", " "), value) for name, value in metrics.items() if isinstance(value, float)]


def _code(value: object) -> str:
    """A value as text for Markdown's backticks."""
    return plain(value).replace("`", "'")
