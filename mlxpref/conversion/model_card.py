"""The README.md of an exported adapter or model: its kind, its training, and how to load it."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxpref.checkpoints.files import ADAPTER_CONFIG, PROFILE_FILE, read_json_object
from mlxpref.checkpoints.resolve import is_hub_id
from mlxpref.config import JudgeSettings
from mlxpref.conversion.verify import public_name
from mlxpref.engine.adapters import trained_settings
from mlxpref.engine.profile import PROMPT_SLOT, Profile
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


def write_card(folder: Path, to: str, adapter: Path, base_name: str, profile: Profile) -> None:
    """Write the README.md of an exported adapter, asked by a profile, with its run's records, if any."""
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
        profile=profile,
        keeps_profile=(folder / PROFILE_FILE).is_file(),
        **_asking(profile),
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


def _asking(profile: Profile) -> dict[str, Any]:
    """How a judge is asked and read by its profile, in Python's text and in words."""
    labels, at_once = [label[0] for label in profile.labels], profile.closings(at_once=True)
    lead, first = _text(profile.lead), _text(labels[0])
    if profile.is_point:
        names = ", ".join(profile.aspects)
        writes = f"its reasons in {len(profile.aspects)} sections ({names}), and {lead} in each"
        reading = (
            "their expectation is the score of that section, and the mean of the sections is the score of the image. "
            "The image with the higher score is the better one; the difference does not say how many people prefer it."
        )
    else:
        reasons = "its reasons, then "
        if profile.think_end:
            begin = f"between {_text(profile.think_begin)} and" if profile.think_begin else "up to"
            reasons = f"its reasons {begin} {_text(profile.think_end)}, then "
        writes = f"{reasons if profile.thinks else ''}{lead}"
        if profile.counts == "last":
            writes += ", of which the last one counts"
        half = f", with half of that of {_text(profile.tie[0])}, a tie," if profile.tie else ""
        reading = f"the share of {first} in their sum{half} is the preference for image 1."
        if profile.tie_opening:
            reading += (
                f" A tie begins with {_text(profile.tie_opening[0])} in place of {lead}: its probability there, T, is "
                "split evenly, so the preference is (1 - T) times that share, and T / 2."
            )
    return {
        "messages": json.dumps(profile.messages(), ensure_ascii=False, indent=1).replace(PROMPT_SLOT, "PROMPT"),
        "switches": "".join(f", {name}={value!r}" for name, value in profile.chat_template.items()),
        "writes": writes,
        "reading": reading,
        "labels": labels,
        "at_once": at_once,
        "first_at_once": repr(at_once[0]),
        "label_texts": _text(*labels),
        "at_once_texts": _text(*at_once),
        "closing_texts": _text(*profile.closings()),
    }


def _text(*texts: str) -> str:
    """Texts as Python writes them, in Markdown's backticks."""
    longest = max(len(run) for text in texts for run in re.findall("`*", text))
    fence = "`" * (longest + 1)
    return ", ".join(f"{fence}{text!r}{fence}" for text in texts)


def _code(value: object) -> str:
    """A value as text for Markdown's backticks."""
    return plain(value).replace("`", "'")
