"""Settings: one frozen dataclass field each, from which option, help, TOML key and record come."""

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from mlxpref.errors import ConfigError

__all__ = [
    "JudgeSettings",
    "LabelSettings",
    "Level",
    "LossType",
    "TrainSettings",
    "read_settings",
    "setting",
    "settings_from",
]

S = TypeVar("S")
LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]
Level = Literal["token", "sequence"]


def setting(default: Any, text: str, **limits: Any) -> Any:
    """A field with its default, the help text of its option, and its limits (`minimum`, `maximum`, `choices`)."""
    return field(default=default, metadata={"help": text, **limits})


@dataclass(frozen=True)
class JudgeSettings:
    """How a judge looks, thinks and answers."""

    think: bool = setting(True, "Write reasons before answering; without, the answer is read at once.")
    samples: int = setting(1, "Completions an order: one is greedy, several are sampled.", minimum=1)
    max_tokens: int = setting(256, "Tokens of reasoning; then it is closed and read.", minimum=1)
    max_pixels: int = setting(512 * 512, "Pixels that an image is shrunk to, aspect ratio kept.", minimum=784)
    seed: int = setting(0, "Seed of every random number.", minimum=0)
    rows: int = setting(32, "Completions written together; fewer take less memory.", minimum=1)


@dataclass(frozen=True)
class LabelSettings:
    """How a person is asked for preferences."""

    repeats: float = setting(
        0.1, "Share of questions that repeat an earlier pair in swapped order.", minimum=0.0, maximum=0.5
    )
    held_out: float = setting(
        0.2, "Share of the pairs that measure, as split test; the others are train.", minimum=0.0, maximum=0.5
    )
    seed: int = setting(0, "Seed of every random number.", minimum=0)
    port: int = setting(0, "Port of the page on this machine; 0 takes a free one.", minimum=0, maximum=65535)


@dataclass(frozen=True)
class TrainSettings:
    """How a judge is trained. The defaults are starting points for a real judge; they were not measured on one."""

    data: str = setting(
        "",
        "`demo`, imagereward, hpdv2, pickapic, pickapic_v1, hpdv3, a .jsonl, .csv or .tsv file of rows with prompt, a, "
        "b and p_a, or a folder with preferred/ and rejected/.",
    )
    data_dir: str = setting("", "Folder with the files of a public data set.  [default: the Hugging Face cache]")
    split: str = setting("train", "Which part of the data.")
    limit: int = setting(0, "Use only this many preferences; 0 is all.", minimum=0)
    fraction: float = setting(1.0, "Share of the preferences to learn from.", minimum=1e-6, maximum=1.0)
    model: str = setting("", "Folder, Hugging Face id, or `demo`.")
    reward: str = setting(
        "soft",
        "What rollouts earn: soft, brier, hard, score or file.py:function; several as in soft=1,own.py:kind=0.5.",
    )
    steps: int = setting(0, "Optimizer steps; 0 is one pass over the data.", minimum=0)
    comparisons: int = setting(8, "Comparisons a step.", minimum=1)
    group: int = setting(8, "Rollouts of a comparison.", minimum=2)
    think: bool = setting(True, "Learn to reason; without, only the answer is learned, exactly and without rollouts.")
    max_tokens: int = setting(256, "Tokens of a rollout.", minimum=1)
    max_pixels: int = setting(512 * 512, "Pixels that an image is shrunk to, aspect ratio kept.", minimum=784)
    temperature: float = setting(1.0, "Temperature of sampling and scoring.", minimum=0.01)
    learning_rate: float = setting(1e-5, "Highest learning rate.", minimum=0.0)
    warmup_steps: int = setting(10, "Steps of rising learning rate.", minimum=0)
    rank: int = setting(16, "Rank of the adapter on every linear layer of the language model.", minimum=1)
    lora_scale: float = setting(2.0, "What the adapter's product is multiplied by (alpha / rank).", minimum=0.0)
    format_weight: float = setting(0.2, "What the right form earns beside the right side.", minimum=0.0)
    length_budget: int = setting(
        0, "Tokens that cost nothing; what is longer loses up to 1 at --max-tokens. 0 is no budget.", minimum=0
    )
    mask_truncated: bool = setting(False, "Learn nothing from what completions wrote that ran out of tokens.")
    resample: int = setting(0, "Times a step replaces comparisons that teach nothing by others.", minimum=0)
    updates_per_rollout: int = setting(
        1, "Updates with the rollouts of a step; from the second on, ratios are clipped.", minimum=1
    )
    save_every: int = setting(20, "Steps between two savings of the adapter.", minimum=1)
    held_out: float = setting(
        0.0, "Share of the preferences kept out of training to measure it, whole prompts.", minimum=0.0, maximum=0.9
    )
    held_out_limit: int = setting(200, "Held-out preferences that are judged at most.", minimum=1)
    evaluate_every: int = setting(20, "Steps between two measurements with the held-out preferences.", minimum=1)
    patience: int = setting(
        0,
        "Measurements without a better accuracy that end training, with the best adapter; 0 never ends.",
        minimum=0,
    )
    loss_type: LossType = setting("dapo", "How tokens are weighted.", choices=get_args(LossType))
    level: Level = setting("token", "Importance ratios a token or a sequence.", choices=get_args(Level))
    clip_low: float = setting(0.2, "How far the ratio may fall below 1.", minimum=0.0)
    clip_high: float = setting(0.2, "How far the ratio may rise above 1.", minimum=0.0)
    kl: float = setting(0.0, "Weight of the divergence from the judge without adapter.", minimum=0.0)
    rows: int = setting(64, "Completions written together; fewer take less memory.", minimum=1)
    micro_batch: int = setting(16, "Rollouts learned from together; fewer take less memory, nothing else.", minimum=1)
    recompute: bool = setting(True, "Make activations again in the backward pass: more work, much less memory.")
    max_grad_norm: float = setting(1.0, "Global norm that gradients are clipped to.", minimum=1e-6)
    seed: int = setting(0, "Seed of every random number.", minimum=0)

    @property
    def judging(self) -> JudgeSettings:
        """How held-out preferences are judged: greedily, as many prompts at a time as the rollouts have."""
        return JudgeSettings(
            think=self.think,
            max_tokens=self.max_tokens,
            max_pixels=self.max_pixels,
            seed=self.seed,
            rows=max(1, min(self.comparisons, self.rows // self.group)),
        )


def settings_from(kind: type[S], values: Mapping[str, Any], where: str = "") -> S:
    """Settings of a kind from names and values, checked: unknown names, wrong types and limits are a ConfigError.

    `where` names the file that they come from.
    """
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    prefix = f"{where}: " if where else ""
    checked = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{prefix}unknown setting {name!r}; known are {', '.join(known)}")
        wanted, limits = type(known[name].default), known[name].metadata
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise ConfigError(f"{prefix}setting {name}: {value!r} is not {wanted.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{prefix}setting {name}: {value!r} is not a finite number")
        if "maximum" in limits and value > limits["maximum"]:
            raise ConfigError(f"{prefix}setting {name}: {value!r} is above {limits['maximum']}")
        if "minimum" in limits and not value >= limits["minimum"]:
            raise ConfigError(f"{prefix}setting {name}: {value!r} is below {limits['minimum']}")
        if "choices" in limits and value not in limits["choices"]:
            raise ConfigError(f"{prefix}setting {name}: {value!r} is none of {', '.join(limits['choices'])}")
        checked[name] = value
    settings = kind(**checked)
    if isinstance(settings, TrainSettings):
        _check_together(settings, prefix)
    return settings


def _check_together(settings: TrainSettings, prefix: str) -> None:
    """Refuse settings of which one makes no sense beside another."""
    if settings.length_budget >= settings.max_tokens:
        raise ConfigError(
            f"{prefix}setting length_budget: {settings.length_budget} is not below max_tokens, {settings.max_tokens}"
        )
    if settings.patience and not settings.held_out:
        raise ConfigError(f"{prefix}setting patience: nothing is measured without held_out; give --held-out 0.1")


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that a file names: TOML keys, or the `settings` of a run.json."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)["settings"] if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; give a TOML file of settings, or the run.json of a run") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not readable as settings: {type(error).__name__}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: no table of settings")
    return values
