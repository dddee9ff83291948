"""Custom rewards: a function in a Python file, `--reward rewards.py:helpful`, alone or with other rewards.

The function is called once a group and returns one finite number a rollout:

    def helpful(texts, p_first, prompt, images, y):
        return [float("because" in text) for text in texts]

`texts` are the completions, `p_first` their probabilities for the first image (None if unreadable), `prompt` the
images' prompt, `images` the two in the order shown (PIL, RGB), and `y` the share of people who prefer the first. A
function with these parameters, or with **keywords, also gets `tokens`, the length of each completion, and `preference`,
the pair in the data (`mlxpref.preferences.Preference`).

The policy gradient covers all tokens, but not `p_first`. Alone or with `hard` the texts contain sampled answers; with
`soft` or `brier` (`--reward soft=1,rewards.py:helpful=0.5`) they end with `<answer>`, as the answer is integrated out.
The file's prints go to stderr: stdout is for results.
"""

import inspect
import math
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxpref.data.images import load_image
from mlxpref.errors import ConfigError, MlxprefError
from mlxpref.files import sha256_of
from mlxpref.training.rewards import CustomReward, RewardMix, RewardPart
from mlxpref.training.sampler import TrainingComparison
from mlxpref.verdict import Verdict


def load_rewards(text: str) -> RewardMix:
    """Return the mix in `--reward`, with the functions of its custom rewards.

    ConfigError where the text is no mix, or a custom reward cannot be loaded.
    """
    mix = RewardMix.parse(text)
    functions = {name: load_reward(name) for name in mix.custom}
    short = {name: Path(name).name for name in mix.custom}  # the log needs no folders
    names = short if len(set(short.values())) == len(short) else {}
    return RewardMix(tuple(RewardPart(names.get(p.name, p.name), p.weight, functions.get(p.name)) for p in mix.parts))


def reward_fingerprint(text: str) -> list[list[Any]]:
    """Return what determines a mix: its rewards and weights, of custom ones the file's content and the function."""
    parts = []
    for name, weight, _ in RewardMix.parse(text).parts:
        file, _, function = name.rpartition(":")
        try:
            parts.append([f"{sha256_of(Path(file))}:{function}" if file else name, weight])
        except OSError as error:
            raise ConfigError(f"reward {name}: {file}: cannot be read ({error.strerror})") from error
    return parts


def load_reward(name: str) -> CustomReward:
    """Return the reward `file.py:function`; ConfigError where there is none or the file cannot be run."""
    file, _, function_name = name.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not function_name.isidentifier():
        raise ConfigError(f"reward {name!r}: neither soft, brier, hard or score nor a file.py:function")
    if not path.is_file():
        raise ConfigError(f"reward {name}: no such file {path}")
    function = _run_file(path).get(function_name)
    if not callable(function):
        raise ConfigError(f"reward {name}: {path} has no function {function_name}")
    try:
        parameters = inspect.signature(function).parameters
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    except (TypeError, ValueError):  # a callable without a known signature
        parameters, takes_any = {}, False  # type: ignore[assignment]

    def reward(comparison: TrainingComparison, verdicts: Sequence[Verdict]) -> list[float]:
        arguments = {
            "texts": [v.text for v in verdicts],
            "p_first": [v.p_first("soft") for v in verdicts],
            "prompt": comparison.prompt,
            "images": (load_image(comparison.first), load_image(comparison.second)),
            "y": comparison.y,
        }
        optional = {"tokens": [v.tokens for v in verdicts], "preference": comparison.preference}
        arguments |= {name: value for name, value in optional.items() if takes_any or name in parameters}
        try:
            result = function(**arguments)
        except Exception as error:
            raise MlxprefError(f"{_line_of(error, path)}: the reward raised {type(error).__name__}: {error}") from error
        return _checked(result, len(verdicts), name)

    return reward


def _run_file(path: Path) -> dict[str, Any]:
    """Run a Python file and return its names, without an import that would leave a module behind."""
    try:
        return runpy.run_path(str(path), {"print": _print}, run_name=f"mlxpref_reward_{path.stem}")
    except Exception as error:
        raise ConfigError(f"{_line_of(error, path)}: cannot be run: {type(error).__name__}: {error}") from error


def _print(*values: object, **options: Any) -> None:
    """Print to stderr unless there is a `file`."""
    options.setdefault("file", sys.stderr)
    print(*values, **options)


def _line_of(error: Exception, path: Path) -> str:
    """Return the file with its last line in the error's traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) in (path, path.absolute())]
    line = lines[-1] if lines else getattr(error, "lineno", None)
    return f"{path}:{line}" if line else str(path)


def _checked(values: Any, count: int, name: str) -> list[float]:
    """Return a custom reward's values as numbers; MlxprefError unless they are `count` finite ones."""
    try:
        rewards = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise MlxprefError(f"reward {name}: it must return {count} numbers, not {values!r:.100}") from error
    if len(rewards) != count or not all(map(math.isfinite, rewards)):
        raise MlxprefError(f"reward {name}: it must return {count} finite numbers, not {rewards!r:.100}")
    return rewards
