"""The work of the commands `eval` and `calibrate` as functions, with the same results."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, overload

from mlxpref.config import JudgeSettings, settings_from
from mlxpref.data.image_cache import ImageCache
from mlxpref.data.inputs import PreferencesInput, check_model, preferences_from
from mlxpref.data.learned import count_learned, has_learned
from mlxpref.data.left_out import LeftOut
from mlxpref.data.load import Preferences, check_preferences, load_outside_test, load_preferences
from mlxpref.errors import ConfigError, MlxprefError
from mlxpref.files import expand
from mlxpref.judge import calibrate as fitting
from mlxpref.judge.calibration import CalibrationFile, read_calibrations, write_calibration
from mlxpref.judge.compare_judges import JudgeComparison, JudgeResult, compare_judges
from mlxpref.judge.diagnostics import answer_warnings
from mlxpref.judge.evaluation import Evaluation, EvaluationSpec
from mlxpref.judge.judge import Judge
from mlxpref.judge.loading import calibrated, calibration_path, load_judge
from mlxpref.judge.protocols import VALIDATION_SPLIT, protocol_named, protocol_of, usual_strategy
from mlxpref.judge.strategies import StrategyVariant, compare_strategies
from mlxpref.log import logger
from mlxpref.preferences import Preference
from mlxpref.verdict import STRATEGIES, Strategy


@overload
def evaluate(judge: Judge | str | Path | None, data: PreferencesInput, *args: Any, **named: Any) -> Evaluation: ...
@overload
def evaluate(
    judge: Iterable[Judge | str | Path], data: PreferencesInput, *args: Any, **named: Any
) -> JudgeComparison: ...
def evaluate(
    judge: Judge | str | Path | Iterable[Judge | str | Path] | None,
    data: PreferencesInput,
    split: str | None = None,
    limit: int | None = None,
    *,
    strategy: Strategy | None = None,
    protocol: str | None = None,
    tie_threshold: float | None = None,
    data_dir: str | Path | None = None,
    adapter: str | Path | None = None,
    calibration: str | Path | bool = False,
    **settings: Any,
) -> Evaluation | JudgeComparison:
    """Measure a judge's agreement with people, as `mlxpref eval`: `evaluate(judge, "pairs.jsonl").metrics.accuracy`.

    `judge` is one, or a name as for `load`, which `adapter` and `settings` go with. Several, a list or a generator, are
    measured one after the other on the same pairs; the result is then a sequence of rows with `name`, `evaluation` and
    `minus_first`. `data` is a data set's name, a file or folder, or a list of `Preference`s, or of dicts like the rows
    of a file. `split` is by default test, or all of data without splits; `strategy` is the protocol's, `soft` or, of
    MMRB2, `select`. The judge's own calibration is left off, unless `calibration` is True or a file. ConfigError,
    DataError or ModelError for what cannot be measured.
    """
    if strategy is not None and strategy not in STRATEGIES:
        raise ConfigError(f"strategy {strategy!r}: known are {', '.join(STRATEGIES)}")
    several = isinstance(judge, Iterable) and not isinstance(judge, str)
    if several and not (adapter is None and isinstance(calibration, bool)):
        raise ConfigError(
            "adapter and calibration are of one judge: load each of several with its own, as in "
            "(mlxpref.load(name, adapter) for name, adapter in judges)"
        )
    folder = Path(expand(data_dir)) if data_dir else None
    # A single judge is loaded before the data are read.
    single = None if several else calibrated(judge_from(judge, adapter, settings), calibration)  # type: ignore[arg-type]
    name, preferences = preferences_from(data, split, limit, folder)
    protocol = protocol or protocol_of(name)
    spec = EvaluationSpec(name, preferences.split, strategy or usual_strategy(protocol), protocol, tie_threshold)
    validation = tie_validation(spec, preferences, limit, folder)
    cache = single.vlm.features.images if single else ImageCache(settings.get("max_pixels", JudgeSettings.max_pixels))
    left_out = check_preferences(name, [*preferences, *validation], cache)
    if single is not None:
        return _measure(single, preferences, spec, validation, left_out).comparison.rows[0].evaluation

    def load_and_measure(judge: Judge | str | Path, preferences: Sequence[Preference]) -> JudgeResult:
        loaded = calibrated(judge_from(judge, None, settings), calibration)
        if not isinstance(judge, Judge):  # each image is decoded once for all
            loaded.vlm.features.images = cache
        return _measure(loaded, preferences, spec, validation, left_out)

    return compare_judges(judge, load_and_measure, preferences, spec)  # type: ignore[arg-type]


def _measure(
    judge: Judge,
    preferences: Sequence[Preference],
    spec: EvaluationSpec,
    validation: Sequence[Preference],
    left_out: LeftOut,
) -> JudgeResult:
    """Judge preferences by the strategy of `spec`; warns of what the judge has seen before, and of its answers."""
    assert spec.strategy is not None
    count_learned(judge.folders, preferences)
    if judge.calibration is not None:
        judge.calibration.count_fitted(preferences)
    think = judge.settings.think
    variant = StrategyVariant(spec.strategy, think, judge.settings.samples if think else 1)
    comparison = compare_strategies(judge, preferences, spec, [variant], validation, left_out)
    if spec.strategy == "soft":
        for line in answer_warnings(comparison.rows[0].evaluation.verdicts):
            logger.warning(line)
    return JudgeResult(judge.name, judge.adapter, comparison)


def calibrate(
    judge: Judge | str | Path | None,
    data: PreferencesInput,
    split: str | None = None,
    limit: int | None = None,
    *,
    think: bool | None = None,
    output: str | Path | None = None,
    data_dir: str | Path | None = None,
    adapter: str | Path | None = None,
    **settings: Any,
) -> CalibrationFile:
    """Fit a judge's probabilities to what people prefer, and write the fit, as `mlxpref calibrate`.

    `load` applies it from then on, unless it went into another `output`. `think` None fits judging with thinking and
    without, or only without for an adapter that learned only that; the other arguments are those of `evaluate`, but
    `split` is by default one that `evaluate` does not use, of validation, heldout and train, if the data have any. Use
    preferences that the judge was not trained on.
    """
    loaded = replace(judge_from(judge, adapter, settings), calibration=None)
    given, folder = list(data) if isinstance(data, Iterator) else data, Path(expand(data_dir)) if data_dir else None

    def load(usual: str) -> tuple[str, Preferences]:
        return preferences_from(given, split, limit, folder, usual)

    learned = loaded.adapter is not None or has_learned(loaded.folders)
    name, preferences = load("test") if split else load_outside_test(load, learned)
    left_out = check_preferences(name, preferences, loaded.vlm.features.images)
    count_learned(loaded.folders, preferences)
    path = Path(expand(output)) if output else calibration_path(loaded)
    if path.exists():
        read_calibrations(path)  # another file is an error before the work
    fits = [
        fitting.calibrate(loaded, preferences, name, preferences.split, mode, left_out)
        for mode in fitting.modes_of(loaded, think)
    ]
    return write_calibration(path, fits)


def judge_from(judge: Judge | str | Path | None, adapter: str | Path | None, settings: Mapping[str, Any]) -> Judge:
    """A judge by name with its adapter, or one that is loaded already; in either case with other settings."""
    if not isinstance(judge, Judge):
        check_model(judge, "(judge, data)")
        return load_judge(
            expand(judge) if judge is not None else None, Path(expand(adapter)) if adapter else None, settings
        )
    if adapter is not None or {"max_pixels", "profile"} & settings.keys():
        names = "adapter, profile and max_pixels"
        raise ConfigError(f"{names} are chosen when a judge is loaded: give them to mlxpref.load")
    return replace(judge, settings=settings_from(JudgeSettings, asdict(judge.settings) | dict(settings)))


def tie_validation(
    spec: EvaluationSpec, preferences: Sequence[Preference], limit: int | None, data_dir: Path | None
) -> list[Preference]:
    """The preferences for choosing a tie threshold; empty if none is needed or one is given."""
    if not protocol_named(spec.protocol).ties or spec.tie_threshold is not None:
        return []
    try:
        validation = load_preferences(spec.data, VALIDATION_SPLIT, limit, data_dir=data_dir)
    except MlxprefError as error:
        raise type(error)(
            f"{error}; --protocol {spec.protocol} chooses its tie threshold there: or give --tie-threshold"
        ) from error
    if validation == list(preferences):
        raise ConfigError(
            f"--protocol {spec.protocol} chooses its tie threshold on other preferences, the split {VALIDATION_SPLIT}, "
            f"and {spec.data} has none of its own; give --tie-threshold"
        )
    logger.info(
        f"the tie threshold is chosen on {len(validation)} preferences of {VALIDATION_SPLIT}, which are judged first"
    )
    return validation
