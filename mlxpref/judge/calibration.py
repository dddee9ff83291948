"""calibration.json: the rescaling of a judge's answers, and the judge and settings that it is for."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mlxpref.data.learned import pair_names
from mlxpref.errors import ConfigError, DataError
from mlxpref.files import cache_dir, write_file
from mlxpref.log import logger
from mlxpref.preferences import Preference
from mlxpref.ranking.temperature import TemperatureScaling
from mlxpref.text import one_line, shorten

CALIBRATION_FILE = "calibration.json"


@dataclass(frozen=True)
class JudgeConditions:
    """The conditions of a judge's soft preferences, apart from the pair; a calibration holds only for them.

    `judge` is the fingerprint of the model and its adapter, `profile` the version of the profile, with the
    user's own criterion, `method` that of the judging code. Without thinking `samples` is 1 and `max_tokens` 0.
    """

    judge: str
    profile: str
    method: int
    max_pixels: int
    think: bool
    samples: int
    max_tokens: int

    @property
    def mode(self) -> str:
        """Each of the two modes, with and without thinking, has its own calibration."""
        return "with thinking" if self.think else "without thinking"

    def differences(self, other: "JudgeConditions") -> list[str]:
        """The fields that differ in `other`, in words."""
        words = {
            "judge": "another model or adapter",
            "profile": "other words of asking, or another criterion",
            "method": "another way of judging",
        }
        names = [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]
        return [words.get(name, f"{name} {getattr(other, name)}, not {getattr(self, name)}") for name in names]


@dataclass(frozen=True)
class CalibrationMetrics:
    """The distance of soft preferences from the shares of people: less is better.

    `nll` is the cross-entropy in nats. `first_choice_rate` is of single orders: 0.5 is no position bias.
    """

    nll: float
    brier: float
    ece: float
    first_choice_rate: float


@dataclass(frozen=True)
class Calibration:
    """The rescaling of one judge's answers in one mode, and its effect.

    `rescaling` is the fit to all `pairs`. `after` is of the same pairs as `before`, each rescaled by a fit to other
    prompts, in `folds` folds. `name` is the judge's, `fingerprint` that of
    the data, `criterion` the user's own, if any, and `fitted` has the names of the pairs (`data.learned.pair_names`).
    """

    conditions: JudgeConditions
    rescaling: TemperatureScaling
    data: str
    split: str
    pairs: int
    folds: int
    before: CalibrationMetrics
    after: CalibrationMetrics
    warnings: tuple[str, ...] = ()
    name: str = ""
    fingerprint: str = ""
    fitted: str = ""
    criterion: str = ""

    @property
    def mode(self) -> str:
        """The mode of its conditions, and the user's own criterion."""
        return self.conditions.mode + (f", by “{self.criterion}”" if self.criterion else "")

    def to_json(self) -> dict[str, Any]:
        """The calibration as in calibration.json."""
        values = asdict(self)
        return values | {"remarks": values.pop("warnings")}

    def __str__(self) -> str:
        bias, temperature = self.rescaling.position_bias, self.rescaling.temperature
        return f"{self.mode}: temperature {temperature:.3g}, position bias {bias:+.2f}"


@dataclass(frozen=True)
class CalibrationFile:
    """The calibrations of one judge, at most one with thinking and one without.

    `given` says that the user named the file; one that was only found applies where it holds.
    """

    path: Path
    calibrations: tuple[Calibration, ...]
    given: bool = True

    def rescaling(self, conditions: JudgeConditions) -> TemperatureScaling:
        """The rescaling for these conditions; ConfigError where there is none."""
        remedy = "; make one with `mlxpref calibrate`, or leave it out"
        for each in self.calibrations:
            if each.conditions.think == conditions.think:
                if differences := conditions.differences(each.conditions):
                    raise ConfigError(f"{self.path}: made for {', '.join(differences)} ({conditions.mode}){remedy}")
                return each.rescaling
        raise ConfigError(f"{self.path}: has no calibration for judging {conditions.mode}{remedy}")

    def count_fitted(self, preferences: Sequence[Preference]) -> int:
        """The number of preferences that these calibrations were fitted to; warns if there are any."""
        fitted = {name for each in self.calibrations for name in each.fitted.split()}
        count = sum(name in fitted for name in pair_names(preferences)) if fitted else 0
        if count:
            logger.warning(
                f"{count} of {len(preferences)} preferences are among those that {self.path} was fitted to: its "
                "probabilities look better here than they are; calibrate or measure on another split"
            )
        return count

    def summary(self) -> dict[str, Any]:
        """The part of it for the JSON of results."""
        modes = [{"think": c.conditions.think, **asdict(c.rescaling), "pairs": c.pairs} for c in self.calibrations]
        return {"file": str(self.path), "modes": modes}

    def __repr__(self) -> str:
        return f"CalibrationFile({shorten(self.path)!r}, {'; '.join(map(str, self.calibrations))})"

    def __str__(self) -> str:
        return f"{self.path} ({'; '.join(map(str, self.calibrations))})"


def cached_calibrations() -> Path:
    """The folder in the user's cache for calibrations of judges without adapter; DataError where there is no cache."""
    return cache_dir() / "calibrations"


def read_calibrations(path: Path) -> CalibrationFile:
    """The calibrations in a file; DataError for a missing or another file."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["calibrations"]
        return CalibrationFile(path, tuple(_calibration(row) for row in rows))
    except OSError as error:
        raise DataError(f"{path}: no calibration can be read there ({error.strerror}); check the name") from error
    except (ValueError, KeyError, TypeError) as error:
        remedy = "check the name, or move the file away and calibrate again"
        raise DataError(f"{path}: not a calibration ({one_line(error)}); {remedy}") from error


def write_calibration(path: Path, calibrations: Iterable[Calibration]) -> CalibrationFile:
    """Write calibrations into a file and return its whole content.

    They replace those of the same mode. One of the other mode stays if judge, profile, method and image size are the
    same. ConfigError where the file cannot be written, DataError where it is no calibration.
    """
    new = {each.conditions.think: each for each in calibrations}
    old = read_calibrations(path).calibrations if path.exists() else ()
    same_judge = {_without_mode(each.conditions) for each in new.values()}
    by_mode = {each.conditions.think: each for each in old if _without_mode(each.conditions) in same_judge} | new
    file = CalibrationFile(path, tuple(by_mode[think] for think in sorted(by_mode)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps({"calibrations": [each.to_json() for each in file.calibrations]}, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); give another file with --output") from error
    return file


def _without_mode(conditions: JudgeConditions) -> tuple[str, str, int, int]:
    return conditions.judge, conditions.profile, conditions.method, conditions.max_pixels


def _calibration(row: Mapping[str, Any]) -> Calibration:
    """A calibration from its JSON; ValueError or TypeError where a wrong value would do harm."""
    kinds = {
        "conditions": JudgeConditions,
        "rescaling": TemperatureScaling,
        "before": CalibrationMetrics,
        "after": CalibrationMetrics,
    }
    conditions = dict(row["conditions"])
    if "template" in conditions:  # as earlier versions called it
        conditions["profile"] = conditions.pop("template")
    row = {**row, "conditions": conditions}
    parts = {name: kind(**row[name]) for name, kind in kinds.items()}
    others = {name: value for name, value in row.items() if name not in (*kinds, "remarks")}
    calibration = Calibration(**others, **parts, warnings=tuple(row.get("remarks", ())))
    temperature, bias = float(calibration.rescaling.temperature), float(calibration.rescaling.position_bias)
    if not (math.isfinite(temperature) and temperature > 0 and math.isfinite(bias)):
        raise ValueError(f"temperature {temperature} or position bias {bias} makes no sense")
    return calibration
