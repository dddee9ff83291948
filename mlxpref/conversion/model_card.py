"""The README.md of an exported adapter or model: what it is, what it was made with, how to load it anywhere."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxpref.checkpoints.files import read_json_object
from mlxpref.errors import ModelError
from mlxpref.text import plain

__all__ = ["write_card"]

_SETTINGS = ("reward", "steps", "learning_rate", "rank", "lora_scale", "group", "comparisons", "think", "seed")
"""What a reader wants to know of a run; its run.json has them all."""
_LOADING = {
    "peft": """```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained({base}), {path})
```

With mlxpref: `mlxpref rank ./images --prompt "..." --model {shell_base} --adapter PATH`.""",
    "fused": """```python
from mlx_vlm import load

model, processor = load({path})
```

With mlxpref: `mlxpref rank ./images --prompt "..." --model PATH`.""",
    "hf": """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained({path}, dtype="auto")
processor = AutoProcessor.from_pretrained({path})
```

With mlxpref, as it is: `mlxpref rank ./images --prompt "..." --model PATH`; smaller: `mlxpref convert PATH OUT`.""",
}
_WHAT = {
    "peft": "A LoRA adapter in PEFT's format",
    "fused": "A model for MLX with a LoRA adapter in its weights",
    "hf": "A model for transformers with a LoRA adapter in its weights",
}
_LIBRARY = {"peft": "peft", "fused": "mlx", "hf": "transformers"}


def write_card(folder: Path, to: str, adapter: Path, base_name: str) -> None:
    """Write the README.md of what an adapter was exported to; what its run recorded is in it, if it is there."""
    run = _recorded(adapter / "run.json")
    front = {
        "base_model": base_name,
        "library_name": _LIBRARY[to],
        "pipeline_tag": "image-text-to-text",
        "tags": ["mlxpref", "preference", "reward-model", "lora"],
    }
    # JSON is YAML, so no name can end the front matter or become another key.
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    loading = _LOADING[to].format(base=_quoted(base_name), path='"PATH"', shell_base=plain(base_name))
    parts = [
        f"---\n{head}\n---",
        f"# {plain(Path(base_name).name)}, a judge of images",
        f"{_WHAT[to]}, trained by mlxpref ([paper](https://arxiv.org/abs/2503.19948)) to say which of two images "
        f"people prefer for a prompt. The base model is {_code(base_name)}; its licence holds for this, too.",
        f"## How to load it\n\nPATH is this folder, or where it is on the hub.\n\n{loading}",
        f"## How it was made\n\n{_training(run)}",
        f"## How well it does\n\n{_accuracy(run, adapter)}",
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _training(run: Mapping[str, Any]) -> str:
    """Data and settings of the run, as a list."""
    settings = run.get("settings")
    if not isinstance(settings, dict):
        return "The adapter's folder holds no record of its training."
    rows = [f"- data: {_code(settings.get('data', 'unknown'))}, split {_code(settings.get('split', 'unknown'))}"]
    rows += [f"- {name.replace('_', ' ')}: {_code(settings[name])}" for name in _SETTINGS if name in settings]
    if isinstance(run.get("ended"), dict):
        rows.append(f"- ended after step {_code(run['ended'].get('step', 'unknown'))}")
    return "\n".join(rows)


def _accuracy(run: Mapping[str, Any], adapter: Path) -> str:
    """The last measurement on held-out preferences in the run's log, if there was one."""
    measured = None
    try:
        for line in (adapter / "log.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("held_out"), dict):
                measured = row
    except (OSError, ValueError, RecursionError):
        measured = None
    if measured is None:
        return "Not measured in this run; measure it with `mlxpref eval --data FILE --model BASE --adapter ADAPTER`."
    found = measured["held_out"]
    shown = [f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.items() if isinstance(value, float)]
    return f"On held-out preferences of its own data, after step {_code(measured.get('step'))}: {', '.join(shown)}."


def _recorded(file: Path) -> dict[str, Any]:
    try:
        return read_json_object(file) if file.is_file() else {}
    except ModelError:
        return {}


def _code(value: object) -> str:
    """A value that Markdown shows as it is."""
    return "`" + plain(value).replace("`", "'") + "`"


def _quoted(name: str) -> str:
    return json.dumps(plain(name), ensure_ascii=False)
