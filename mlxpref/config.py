"""Settings: each is a field of a frozen dataclass, which defines its option, its help and its key in files."""

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from mlxpref.errors import ConfigError
from mlxpref.text import UNDECODED, one_line

S = TypeVar("S")
Method = Literal["grpo", "rejection"]
LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]
Level = Literal["token", "sequence"]
DATA_HELP = "`demo`, a public data set by name, a file or folder, or owner/name of the hub."


def setting(default: Any, text: str, group: str = "", **limits: Any) -> Any:
    """A field with its default, and its option's help and its group there.

    `limits` are `minimum`, `maximum` and `choices`; `shown` is what the help says of the default, where that depends on
    more; of `several` values the option joins those of its repeats by commas; a `filled` one takes no empty text.
    """
    return field(default=default, metadata={"help": text, "group": group, **limits})


_DATA, _JUDGE, _REWARD, _STEPS = "Data", "Judge and adapter", "Reward", "Steps"
_MEASURING, _LOSS, _MEMORY = "Measuring and saving", "Loss", "Memory"
_REMOVED: dict[str, Any] = {"schedule": "cosine", "curriculum": False, "divide_by_deviation": True}
"""Settings in the run.json of earlier versions, with the values that training still follows."""


@dataclass(frozen=True)
class JudgeSettings:
    """Settings of a judge's images, reasons and answers."""

    think: bool = setting(
        True, "Reason before answering; without, the answer is read at once.",
        shown="yes, or as the adapter was trained",
    )  # fmt: skip
    samples: int = setting(1, "Completions per order: one is greedy, several are sampled.", minimum=1)
    max_tokens: int = setting(
        256,
        "Tokens of reasoning at most; a longer one is ended there.",
        minimum=1,
        shown="256, or as profile or adapter say",
    )
    max_pixels: int = setting(
        512 * 512, "Pixels of an image at most; a larger one is shrunk.", minimum=784,
        shown="262144, or the adapter's; never more than the judge's own",
    )  # fmt: skip
    seed: int = setting(0, "Seed of all random numbers.", minimum=0)
    rows: int = setting(
        32, "Completions written at the same time; fewer take less memory.", minimum=1, shown="32, or as many as fit"
    )
    profile: str = setting(
        "", "How the judge is asked: a built-in profile by name, or a TOML file.", filled=True,
        shown="the judge's own, by its folder or id",
    )  # fmt: skip
    criterion: str = setting(
        "", "What makes an image the better one, such as `the sharper eyes`, in place of what people prefer.",
        filled=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        """ConfigError for a criterion that says nothing, or is no text."""
        if self.criterion and not self.criterion.strip():
            raise ConfigError("setting criterion: it is blank; say what makes an image the better one, or leave it out")
        if UNDECODED.search(self.criterion):
            raise ConfigError("setting criterion: it is not UTF-8 text")


@dataclass(frozen=True)
class LabelSettings:
    """Settings of asking a person for preferences."""

    repeats: float = setting(
        0.1, "Share of questions that repeat an earlier pair in swapped order.", minimum=0.0, maximum=0.5
    )
    held_out: float = setting(
        0.2, "Share of the pairs that become split test; the others are train.", minimum=0.0, maximum=0.5
    )
    seed: int = setting(0, "Seed of all random numbers.", minimum=0)
    port: int = setting(0, "Port of the page on this machine; 0 is any free one.", minimum=0, maximum=65535)


@dataclass(frozen=True)
class TrainSettings:
    """Settings of training. The defaults are starting points for a real judge and were not measured on one."""

    data: str = setting("", DATA_HELP, _DATA)
    data_dir: str = setting("", "Folder with the files of a public data set, or with the images of a file.", _DATA)
    split: str = setting("train", "Part of the data.", _DATA)
    limit: int = setting(0, "Use only this many preferences; 0 is all.", _DATA, minimum=0)
    fraction: float = setting(1.0, "Share of the preferences that are learned from.", _DATA, minimum=1e-6, maximum=1.0)
    model: str = setting("", "Folder, Hugging Face id, or `demo`.", _JUDGE)
    profile: str = setting(
        "", "How the judge is asked: a built-in profile by name, or a TOML file.", _JUDGE, filled=True,
        shown="the judge's own, by its folder or id",
    )  # fmt: skip
    adapter: str = setting(
        "", "Folder of an adapter to go on from; the judge, the layers, the rank and the scale are its own.", _JUDGE
    )
    think: bool = setting(
        True, "Learn to reason; without, only the answer is learned, by its exact gradient.", _JUDGE,
        shown="yes, or as --adapter was trained",
    )  # fmt: skip
    max_tokens: int = setting(
        256, "Tokens of a rollout at most.", _JUDGE, minimum=1, shown="256, or that of --adapter; 80 for the demo"
    )
    max_pixels: int = setting(
        512 * 512, "Pixels of an image at most; a larger one is shrunk.", _JUDGE, minimum=784,
        shown="262144, or that of --adapter; never more than the judge's own",
    )  # fmt: skip
    rank: int = setting(16, "Rank of the adapter on every linear layer of the language model.", _JUDGE, minimum=1)
    lora_scale: float = setting(2.0, "Factor of the adapter's output (alpha / rank).", _JUDGE, minimum=0.0)
    reward: str = setting(
        "soft", "Reward of a rollout: soft, brier, hard, score or file.py:function; a weighted sum is "
        "soft=1,own.py:kind=0.5.", _REWARD,
    )  # fmt: skip
    format_weight: float = setting(
        0.2, "Reward of the right form, beside that of the right side.", _REWARD, minimum=0.0
    )
    read_weight: float = setting(
        1.0, "With thinking: reward of the answer that is read at once, beside those with reasons; 0 leaves it "
        "untrained.", _REWARD, minimum=0.0,
    )  # fmt: skip
    agreement: float = setting(
        0.0, "Reward of the same preference in both orders of a pair, 1 - (p - q)^2; a step then shows each pair in "
        "both.", _REWARD, minimum=0.0,
    )  # fmt: skip
    listener_weight: float = setting(
        0.0, "Reward of the right side's probability when the judge without adapter answers after the rollout's "
        "reasons.", _REWARD, minimum=0.0,
    )  # fmt: skip
    length_budget: int = setting(
        0, "Tokens that cost nothing; a longer rollout loses up to 1 at --max-tokens. 0: no budget.", _REWARD, minimum=0
    )
    method: Method = setting(
        "grpo", "Learn from rewards, or only the likelihood of completions that are right, of pairs with some in both "
        "orders.", _STEPS, choices=get_args(Method),
    )  # fmt: skip
    steps: int = setting(0, "Optimizer steps; 0 is one pass over the data.", _STEPS, minimum=0)
    comparisons: int = setting(8, "Comparisons per step.", _STEPS, minimum=1)
    group: int = setting(8, "Rollouts per comparison.", _STEPS, minimum=2)
    temperature: float = setting(1.0, "Temperature of sampling, and of the log-probabilities.", _STEPS, minimum=0.01)
    learning_rate: float = setting(1e-5, "Highest learning rate.", _STEPS, minimum=0.0)
    warmup_steps: int = setting(10, "Steps in which the learning rate rises.", _STEPS, minimum=0)
    resample: int = setting(0, "Times that a step replaces comparisons without a gradient.", _STEPS, minimum=0)
    updates_per_rollout: int = setting(
        1, "Updates with the rollouts of one step; from the second on, ratios are clipped.", _STEPS, minimum=1
    )
    seed: int = setting(0, "Seed of all random numbers.", _STEPS, minimum=0)
    held_out: float = setting(
        0.0, "Share of the preferences, by whole prompts, held out to measure training.", _MEASURING,
        minimum=0.0, maximum=0.9,
    )  # fmt: skip
    held_out_limit: int = setting(200, "Held-out preferences that are judged at most.", _MEASURING, minimum=1)
    evaluate_every: int = setting(20, "Steps between two measurements on held-out preferences.", _MEASURING, minimum=1)
    patience: int = setting(
        0, "Measurements without better accuracy that end training with the best adapter; 0 never ends.", _MEASURING,
        minimum=0,
    )  # fmt: skip
    save_every: int = setting(20, "Steps between two saves of the adapter.", _MEASURING, minimum=1)
    log_every: int = setting(
        1, "Steps between two lines of log.jsonl, with their rollouts; totals count all steps.", _MEASURING, minimum=1
    )
    report_to: str = setting(
        "", "Log to `tensorboard`, in the run's folder, or `wandb`, too, if installed; several with commas.",
        _MEASURING, several=True,
    )  # fmt: skip
    loss_type: LossType = setting("dapo", "How the tokens of a step are weighted.", _LOSS, choices=get_args(LossType))
    level: Level = setting("token", "Importance ratio per token or per sequence.", _LOSS, choices=get_args(Level))
    clip_low: float = setting(0.2, "How far the ratio may fall below 1.", _LOSS, minimum=0.0)
    clip_high: float = setting(0.2, "How far the ratio may rise above 1.", _LOSS, minimum=0.0)
    kl: float = setting(0.0, "Weight of the KL divergence from the judge without adapter.", _LOSS, minimum=0.0)
    mask_truncated: bool = setting(False, "Leave completions that ran out of tokens out of the loss.", _LOSS)
    max_grad_norm: float = setting(1.0, "Largest global norm of the gradient.", _LOSS, minimum=1e-6)
    rows: int = setting(
        64, "Completions written at the same time; fewer take less memory.", _MEMORY, minimum=1,
        shown="64, or as many as fit",
    )  # fmt: skip
    micro_batch: int = setting(
        16, "Rollouts in one backward pass; fewer take less memory.", _MEMORY, minimum=1, shown="16, or as many as fit"
    )
    recompute: bool = setting(True, "Compute activations again in the backward pass: slower, less memory.", _MEMORY)

    def __post_init__(self) -> None:
        """ConfigError for settings that contradict each other."""
        if self.length_budget >= self.max_tokens:
            raise ConfigError(f"setting length_budget: {self.length_budget} is not below max_tokens, {self.max_tokens}")
        if self.patience and not self.held_out:
            raise ConfigError("setting patience: nothing is measured without held_out; give --held-out 0.1")
        if self.listener_weight and not self.think:
            raise ConfigError(
                "setting listener_weight: without thinking there are no reasons to listen to; leave it out"
            )
        if self.method == "rejection":
            others = [name for name in ("agreement", "listener_weight", "length_budget") if getattr(self, name)]
            others += ["reward"] if self.reward not in ("soft", "hard") else []
            if others:
                raise ConfigError(
                    f"setting {others[0]}: rejection sampling has no reward but the people's side; leave it out"
                )
        if self.orders == 2 and self.comparisons % 2:
            raise ConfigError(
                f"setting comparisons: {self.comparisons} is odd, and "
                f"{'agreement' if self.agreement else 'rejection sampling'} shows each preference in both orders; give "
                "an even number"
            )

    @property
    def orders(self) -> int:
        """The orders in which a step shows each of its preferences: one or both."""
        return 2 if self.agreement or self.method == "rejection" else 1

    @property
    def rewards(self) -> str:
        """The rewards of a rollout; rejection sampling has that of the written answer."""
        return "hard" if self.method == "rejection" else self.reward

    @property
    def judging(self) -> JudgeSettings:
        """Settings for judging held-out preferences: greedy, with as many prompts at a time as in the rollouts."""
        return JudgeSettings(
            think=self.think,
            max_tokens=self.max_tokens,
            max_pixels=self.max_pixels,
            seed=self.seed,
            profile=self.profile,
            rows=max(1, min(self.comparisons, self.rows // self.group)),
        )


def settings_from(kind: type[S], values: Mapping[str, Any], where: str = "") -> S:
    """Settings of a kind from values by name; ConfigError for an unknown name, a wrong type or a value off limits.

    `where` is the file of the values, for the message. Removed settings are ignored where their value changes nothing.
    """
    settings = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    try:
        values = {name: value for name, value in values.items() if name not in _REMOVED or value != _REMOVED[name]}
        for name in values:
            if name in _REMOVED:
                raise ConfigError(f"setting {name} was removed: it is always {_REMOVED[name]!r} now; leave it out")
            if name not in settings:
                raise ConfigError(f"unknown setting {name!r}; known are {', '.join(settings)}")
        return kind(**{name: _checked(settings[name], value) for name, value in values.items()})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from error


def _checked(setting: "Field[Any]", value: Any) -> Any:
    """The value of a field, whole numbers as floats for a float field; ConfigError for an invalid value."""
    kind, limits = type(setting.default), setting.metadata
    if isinstance(value, Real) and not isinstance(value, int | float):  # one of NumPy's
        value = int(value) if isinstance(value, Integral) else float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    error = ""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        error = f"not {kind.__name__}"
    elif isinstance(value, float) and not math.isfinite(value):
        error = "not a finite number"
    elif "maximum" in limits and value > limits["maximum"]:
        error = f"above {limits['maximum']}"
    elif "minimum" in limits and value < limits["minimum"]:
        error = f"below {limits['minimum']}"
    elif "choices" in limits and value not in limits["choices"]:
        error = f"none of {', '.join(limits['choices'])}"
    if error:
        raise ConfigError(f"setting {setting.name}: {value!r} is {error}")
    return value


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, or in a run.json under `settings`, unchecked; ConfigError for any other file."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)["settings"] if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; give a TOML file of settings, or the run.json of a run") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not readable as settings: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: no table of settings")
    return values
