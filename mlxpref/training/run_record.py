"""run.json: what a run is, for who wants to know or to run it again, and what must be the same for it to go on."""

import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxpref._blas import blas_in_use
from mlxpref.config import TrainSettings, settings_from
from mlxpref.errors import ConfigError, DataError, ModelError
from mlxpref.files import write_file
from mlxpref.preferences import Preference, image_name

__all__ = [
    "RUN_RECORD",
    "check_same",
    "differences",
    "read_record",
    "record_of",
    "settings_again",
    "write_record",
]

RUN_RECORD = "run.json"

_PLACES = ("data", "data_dir", "model")
"""Settings that only say where something is: whether it is the same is seen by its fingerprint."""
_ROUNDING = ("rows", "micro_batch", "recompute")
"""Settings that trade memory for time; what they change is float addition."""
_FREE = (*_PLACES, *_ROUNDING, "save_every")


def record_of(
    settings: TrainSettings, base: Mapping[str, Any], preferences: Sequence[Preference], used: int, processes: int = 1
) -> dict[str, Any]:
    """What is needed to know, and to run again, what a run did with the data, of which it learns from `used`."""
    rows = [[p.prompt, *(image_name(image) for image in (p.a, p.b)), p.p_people, p.votes, p.group] for p in preferences]
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "settings": asdict(settings),
        "base": dict(base),
        "preferences": used,
        "data_fingerprint": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16],
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
    write_file(folder / RUN_RECORD, json.dumps(record, indent=2) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """The run.json of a folder; ConfigError where there is none that a run wrote."""
    try:
        record = json.loads((folder / RUN_RECORD).read_text(encoding="utf-8"))
        known = all(isinstance(record[name], dict) for name in ("settings", "base")) and "data_fingerprint" in record
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{folder}: no run to go on with: it has no {RUN_RECORD}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / RUN_RECORD}: not readable: {type(error).__name__}: {error}") from error
    if not known:
        raise ConfigError(f"{folder / RUN_RECORD}: not the record of a run")
    return dict(record)


def settings_again(folder: Path, record: Mapping[str, Any], given: Mapping[str, Any]) -> TrainSettings:
    """The settings of a run with those given that may change; ConfigError names the others."""
    before = settings_from(TrainSettings, record["settings"], str(folder / RUN_RECORD))
    settings = settings_from(TrainSettings, asdict(before) | dict(given))
    differing = [f.name for f in fields(settings) if getattr(settings, f.name) != getattr(before, f.name)]
    refused = [
        f"{name} {getattr(settings, name)} (it has {getattr(before, name)})" for name in differing if name not in _FREE
    ]
    if refused:
        raise ConfigError(f"{folder}: the run cannot go on with {', '.join(refused)}; leave out what differs")
    # Where a model in memory was trained, only its folder is known.
    return settings if settings.model else replace(settings, model=record["base"]["base_model"])


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with another model, other data, or other words than those of a run."""
    if before["base"].get("base", {}).get("fingerprint") != now["base"]["base"]["fingerprint"]:
        raise ModelError(
            f"{folder}: the run trains {before['base'].get('base_model')}, and {now['base']['base_model']} is not that "
            "model now; give the right one with --model"
        )
    if before["base"].get("template") != now["base"]["template"]:
        raise ModelError(
            f"{folder}: the run was started by a version of mlxpref that asks with other words; go on with that version"
        )
    if before["data_fingerprint"] != now["data_fingerprint"]:
        raise DataError(
            f"{folder}: the run learns from {before['settings']['data']}, whose preferences are not the same now; "
            "restore them, or start another run"
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What may move the last bits of results: name, then what it was and what it is."""
    pairs = [(before["settings"].get(name), now["settings"][name], name) for name in _ROUNDING]
    for part in ("versions", "machine"):
        pairs += [(before.get(part, {}).get(name, value), value, name) for name, value in now[part].items()]
    return {name: [then, value] for then, value, name in pairs if then != value}
