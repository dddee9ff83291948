"""Rewards of one's own: a function in a Python file, `--reward rewards.py:helpful`, alone or beside others.

The function is called once a group and returns one finite number a rollout:

    def helpful(texts, p_first, prompt, images, y):
        return [float("because" in text) for text in texts]

`texts` are the completions, `p_first` the probabilities that each gives to the first image (None where it cannot be
read), `prompt` what the images were made for, `images` the two as they were shown (PIL, RGB), and `y` the share of
people who prefer the first. A function that names them, or takes any keyword, also gets `tokens`, how many tokens each
completion took, and `preference`, the pair as it stands in the data (`mlxpref.preferences.Preference`).

The policy gradient goes through all tokens, and none through `p_first`. Alone or beside `hard` the answers are sampled
and stand in the texts; beside `soft` or `brier` (`--reward soft=1,rewards.py:helpful=0.5`) the texts end with
`<answer>`, as the answer is integrated out.
"""

import contextlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mlxpref.data.images import load_image
from mlxpref.errors import ConfigError, MlxprefError
from mlxpref.training.rewards import reward_mix
from mlxpref.training.sampler import TrainingComparison
from mlxpref.verdict import Verdict

__all__ = ["CustomReward", "load_reward", "load_rewards"]

CustomReward = Callable[[TrainingComparison, Sequence[Verdict]], list[float]]
"""What a group was shown, and its verdicts; one reward each."""


def load_rewards(text: str) -> dict[str, CustomReward]:
    """The rewards of a mix that are not ours, by name; ConfigError where the mix or one of them is none."""
    return {name: load_reward(name) for name in reward_mix(text).own}


def load_reward(name: str) -> CustomReward:
    """The reward `file.py:function`; ConfigError where there is none or the file cannot be run."""
    place, _, function_name = name.rpartition(":")
    path = Path(place)
    if path.suffix != ".py" or not function_name.isidentifier():
        raise ConfigError(f"reward {name!r}: neither soft, brier, hard or score nor a file.py:function")
    if not path.is_file():
        raise ConfigError(f"reward {name}: no such file {path}")
    function = getattr(_run_file(path), function_name, None)
    if not callable(function):
        raise ConfigError(f"reward {name}: {path} has no function {function_name}")

    more = _more_that_it_takes(function)

    def reward(lesson: TrainingComparison, verdicts: Sequence[Verdict]) -> list[float]:
        comparison = lesson.comparison
        given = {
            "texts": [v.text for v in verdicts],
            "p_first": [v.p_first("soft") for v in verdicts],
            "prompt": comparison.prompt,
            "images": (load_image(comparison.first), load_image(comparison.second)),
            "y": lesson.y,
        }
        offered = {"tokens": [v.tokens for v in verdicts], "preference": lesson.preference}
        given |= {name: offered[name] for name in more}
        try:
            # What the function prints belongs to the notes: stdout is for results.
            with contextlib.redirect_stdout(sys.stderr):
                found = function(**given)
        except Exception as error:
            raise MlxprefError(f"{_line_of(error, path)}: the reward raised {type(error).__name__}: {error}") from error
        return _checked(found, len(verdicts), name)

    return reward


def _more_that_it_takes(function: Callable[..., Any]) -> list[str]:
    """What a function is given beside what every function is given: those that came later, where it has a place."""
    try:
        taken = inspect.signature(function).parameters
    except (TypeError, ValueError):  # it does not say
        return []
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
    return [name for name in ("tokens", "preference") if anything or name in taken]


def _run_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"mlxpref_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{_line_of(error, path)}: cannot be run: {type(error).__name__}: {error}") from error
    return module


def _line_of(error: Exception, path: Path) -> str:
    """The file with the last of its lines that the error passed through."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path.absolute()]
    lines = lines or [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
    line = lines[-1] if lines else getattr(error, "lineno", None)
    return f"{path}:{line}" if line else str(path)


def _checked(found: Any, count: int, name: str) -> list[float]:
    try:
        rewards = [float(reward) for reward in found]
    except (TypeError, ValueError) as error:
        raise MlxprefError(f"reward {name}: it must return {count} numbers, not {found!r:.100}") from error
    if len(rewards) != count or not all(map(math.isfinite, rewards)):
        raise MlxprefError(f"reward {name}: it must return {count} finite numbers, not {rewards!r:.100}")
    return rewards
