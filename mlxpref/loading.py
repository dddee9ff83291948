"""From a name to a judge: find or download the checkpoint, load it, put the adapter on."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlxpref.adapters import load_adapter, mismatches
from mlxpref.advice import plan_judging
from mlxpref.config import JudgeSettings, settings_from
from mlxpref.judge import Judge
from mlxpref.models import resolve_model
from mlxpref.vlm import check_folder, load_vlm

__all__ = ["load_judge"]


def load_judge(
    model: str | None,
    adapter: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    agree: Callable[[str], bool] = lambda question: False,
    say: Callable[[str], None] = lambda line: None,
    images: int | None = None,
) -> Judge:
    """Load a judge by name; see `resolve_model` for names, `agree` and `say`.

    A ConfigError says what to change where it would not fit the device while it judges pairs of `images` images, by
    default as many as make a full batch.
    """
    chosen = settings_from(JudgeSettings, settings or {})
    name, path = resolve_model(model, agree, say)
    check_folder(path)
    plan_judging(path, chosen, images or chosen.rows)
    vlm = load_vlm(path, chosen.max_pixels)
    if adapter is not None:
        load_adapter(vlm.model, adapter)
        for line in mismatches(adapter, path):
            say(line)
    return Judge(vlm, chosen, name, adapter)
