"""run.json: the record of a run for its repetition, and the checks before it resumes."""

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxpref._blas import blas_in_use
from mlxpref.config import TrainSettings, settings_from
from mlxpref.errors import ConfigError, DataError, ModelError
from mlxpref.files import write_file
from mlxpref.preferences import Preference, data_fingerprint
from mlxpref.text import one_line

RUN_RECORD = "run.json"

_LOCATIONS = ("data", "data_dir", "model")
"""Settings that are places: fingerprints compare the content."""
_ROUNDING = ("rows", "micro_batch", "recompute")
"""Settings that trade memory for time; they change only the order of float additions."""


def record_of(
    settings: TrainSettings, base: Mapping[str, Any], preferences: Sequence[Preference], used: int, processes: int = 1
) -> dict[str, Any]:
    """Return the record to understand and repeat a run that learns from `used` of the preferences."""
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "settings": asdict(settings),
        "base": dict(base),
        "preferences": used,
        "data_fingerprint": data_fingerprint(preferences),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("mlxpref", "mlx", "mlx-lm", "mlx-vlm", "transformers")},
        },
        "machine": {
            "platform": f"{platform.system()} {platform.machine()}",
            "device": f"{mx.default_device().type.name} {mx.device_info().get('device_name', '')}".strip(),
            **blas_in_use(),
            "processes": processes,
        },
    }


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the run.json of a folder."""
    write_file(folder / RUN_RECORD, json.dumps(record, indent=2) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """Return the run.json of a folder; ConfigError if there is no run's record."""
    file = folder / RUN_RECORD
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        is_record = (
            all(isinstance(record[name], dict) for name in ("settings", "base")) and "data_fingerprint" in record
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{folder}: no run to continue: it has no {RUN_RECORD}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: not readable: {one_line(error)}") from error
    if not is_record:
        raise ConfigError(f"{file}: not the record of a run")
    return record


def resumed_settings(folder: Path, record: Mapping[str, Any], given: Mapping[str, Any]) -> TrainSettings:
    """Return a run's settings with the `given` ones that may change; ConfigError names the others."""
    before = asdict(settings_from(TrainSettings, record["settings"], str(folder / RUN_RECORD)))
    settings = settings_from(TrainSettings, before | dict(given))
    differences = [
        f"{name} {value} (it has {before[name]})"
        for name, value in asdict(settings).items()
        if value != before[name] and name not in (*_LOCATIONS, *_ROUNDING, "save_every")
    ]
    if differences:
        raise ConfigError(f"{folder}: the run cannot continue with {', '.join(differences)}; leave out what differs")
    # Of a model from memory only the folder is known.
    return settings if settings.model else replace(settings, model=record["base"]["base_model"])


def check_resumable(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ModelError or DataError for another model, template or data than those of a run."""
    if before["base"].get("base", {}).get("fingerprint") != now["base"]["base"]["fingerprint"]:
        raise ModelError(
            f"{folder}: the run trains {before['base'].get('base_model')}, and {now['base']['base_model']} is not that "
            "model now; give the right one with --model"
        )
    if before["base"].get("template") != now["base"]["template"]:
        raise ModelError(
            f"{folder}: the run was started by a version of mlxpref with another template; use that version"
        )
    if before["data_fingerprint"] != now["data_fingerprint"]:
        raise DataError(
            f"{folder}: the run learns from {before['settings']['data']}, whose preferences are not the same now; "
            "restore them, or start another run"
        )


def changed_since(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the differences that may change the last bits of results: by name, the old and the new value."""
    pairs = [(name, before["settings"].get(name), now["settings"][name]) for name in _ROUNDING]
    for part in ("versions", "machine"):
        pairs += [(name, before.get(part, {}).get(name, value), value) for name, value in now[part].items()]
    return {name: [earlier, value] for name, earlier, value in pairs if earlier != value}
