"""run.json: the record of a run for its repetition, and the checks before it resumes."""

import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxpref._blas import blas_in_use
from mlxpref.config import TrainSettings, read_settings, settings_from
from mlxpref.data.catalog import CATALOG, catalog_name
from mlxpref.data.find_images import locate
from mlxpref.data.learned import Digests, count_changed, read_learned
from mlxpref.demo import TRAINING
from mlxpref.engine.adapters import ADAPTER_WEIGHTS, base_name, profile_version, trained_settings
from mlxpref.engine.peft import PEFT_WEIGHTS
from mlxpref.engine.profile import OWN
from mlxpref.errors import ConfigError, DataError, ModelError
from mlxpref.files import sha256_of, write_file
from mlxpref.log import logger
from mlxpref.preferences import Preference, data_fingerprint
from mlxpref.text import one_line
from mlxpref.training.custom_reward import reward_fingerprint
from mlxpref.training.rewards import RewardMix

RUN_RECORD = "run.json"

_PLACES = ("data", "data_dir", "model", "adapter")
"""Settings that are files or folders: fingerprints compare the content."""
_NAMES = {"data": ("demo", *CATALOG), "model": ("demo",)}
"""What is no file or folder in these settings, whatever is called so."""
_ROUNDING = ("rows", "micro_batch", "recompute")
"""Settings that trade memory for time; they change only the order of float additions."""


def record_of(
    folder: Path,
    settings: TrainSettings,
    base: Mapping[str, Any],
    preferences: Sequence[Preference],
    used: int,
    processes: int = 1,
) -> dict[str, Any]:
    """Return the record to understand and repeat a run in a folder that learns from `used` of the preferences."""
    return {
        "folder": str(folder.absolute()),
        "id": secrets.token_hex(6),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "settings": asdict(settings),
        "base": dict(base),
        "preferences": used,
        "data_fingerprint": data_fingerprint(preferences),
        "reward_fingerprint": reward_fingerprint(settings.reward),
        "adapter_fingerprint": _weights_fingerprint(settings.adapter),
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


def in_whole(settings: TrainSettings) -> TrainSettings:
    """Return settings with whole paths, which mean the same in any folder."""

    def whole(name: str) -> str:
        with suppress(RuntimeError):  # no such user
            if path := locate(str(Path(name).expanduser())):
                path = path.absolute()  # symbolic links stay, as they may lead elsewhere tomorrow
                return str(path.parent.resolve() / path.name if ".." in path.parts else path)
        return name

    return _with_places(settings, whole)


def chosen_settings(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return the settings of a new run that are no defaults: the given values, in a file `where`, and some others.

    These are those that a given adapter was trained with. The demo judge brings its own, as those for real judges teach
    it nothing; their `limit` and `steps` are for its own data. ConfigError for what is no setting.
    """
    adapter = Path(values["adapter"]).expanduser() if values.get("adapter") else None
    own: dict[str, Any] = {}
    if (values.get("model") or (base_name(adapter) if adapter else os.environ.get("MLXPREF_MODEL"))) == "demo":
        unsuitable = {"data", "model"} if values.get("data") == "demo" else {"data", "model", "limit", "steps"}
        own = {name: value for name, value in read_settings(TRAINING).items() if name not in {*unsuitable, *values}}
        if shown := ", ".join(f"{name} {value}" for name, value in own.items()):
            logger.info(f"the demo judge learns with settings of its own, where none are given: {shown}")
    learned = trained_settings(adapter) if adapter else {}
    own |= {name: learned[name] for name in ("think", "max_pixels", "max_tokens") if name in learned}
    chosen = own | dict(values)
    settings_from(TrainSettings, chosen, where)
    return chosen


def resumed_settings(folder: Path, record: Mapping[str, Any], given: Mapping[str, Any]) -> TrainSettings:
    """Return a run's settings with the `given` ones that may change; ConfigError names the others.

    What is missing where it was is looked for beside the run, as a folder with both may have been moved.
    """

    def found(name: str) -> str:
        if not Path(name).is_absolute() or Path(name).exists():
            return name
        moved = Path(os.path.normpath(folder.absolute() / os.path.relpath(name, record.get("folder", folder))))
        return str(moved) if moved.exists() else name

    # Runs of versions without `read_weight` did not train the answer that is read at once.
    recorded = {"read_weight": 0.0} | record["settings"]
    before = settings_from(TrainSettings, recorded, str(folder / RUN_RECORD))
    before = in_whole(_with_places(before, found))
    settings = in_whole(settings_from(TrainSettings, asdict(before) | dict(given)))
    # The profile's version is compared, not its name.
    may_differ = {*_PLACES, *_ROUNDING, "save_every", "log_every", "steps", "report_to", "profile"}
    reward = record.get("reward_fingerprint")  # not of earlier versions
    if reward and reward == reward_fingerprint(settings.reward):
        may_differ.add("reward")
    elif reward and settings.reward == before.reward:
        raise ConfigError(
            f"{folder}: the reward {settings.reward} is not the same now; restore it, or start another run, with "
            f"--adapter {folder} from here"
        )
    differences = [
        f"{name} {value} (it has {getattr(before, name)})"
        for name, value in asdict(settings).items()
        if value != getattr(before, name) and name not in may_differ
    ]
    if differences:
        raise ConfigError(f"{folder}: the run cannot continue with {', '.join(differences)}; leave out what differs")
    # Of a model from memory only the folder is known.
    return settings if settings.model else replace(settings, model=record["base"]["base_model"])


def _with_places(settings: TrainSettings, change: Callable[[str], str]) -> TrainSettings:
    """The settings with another name for each file and folder, also those of custom rewards."""
    values = {name: getattr(settings, name) for name in _PLACES}
    values = {
        name: change(value)
        for name, value in values.items()
        if value and catalog_name(value) not in _NAMES.get(name, ())
    }
    parts = []
    for name, weight, _ in RewardMix.parse(settings.reward).parts:
        file, colon, function = name.rpartition(":")
        parts.append(f"{change(file) if file else ''}{colon}{function}={weight}")
    if ":" in settings.reward and all(part.count(",") == 0 for part in parts):  # a comma would separate rewards
        values["reward"] = ",".join(parts)
    return replace(settings, **values)


def _weights_fingerprint(adapter: str) -> str:
    """The digest of an adapter's weights, nothing where there are none."""
    files = [Path(adapter) / name for name in (ADAPTER_WEIGHTS, PEFT_WEIGHTS)] if adapter else []
    return next((sha256_of(file) for file in files if file.is_file()), "")


def check_resumable(
    folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], digests: Digests, needs_adapter: bool
) -> None:
    """Raise ModelError or DataError for another model, profile, data or adapter to go on from than those of a run.

    `digests` are of the data now. The adapter is compared only if the run `needs_adapter`, as nothing was saved yet.
    """
    if before["base"].get("base", {}).get("fingerprint") != now["base"]["base"]["fingerprint"]:
        raise ModelError(
            f"{folder}: the run trains {before['base'].get('base_model')}, and {now['base']['base_model']} is not that "
            "model now; give the right one with --model"
        )
    if profile_version(before["base"]) != profile_version(now["base"]):
        name = before["base"].get("profile", {}).get("name", OWN)
        raise ModelError(
            f"{folder}: the run asks by the profile {name}, and {now['base']['profile']['name']} asks in other words "
            "now; leave out --profile, restore what changed, or start another run"
        )
    if needs_adapter and before.get("adapter_fingerprint", "") != now["adapter_fingerprint"]:
        raise ModelError(
            f"{folder}: the run goes on from the adapter {before['settings'].get('adapter')}, which is not the same "
            "now; restore it, or start another run"
        )
    learned = read_learned(folder)  # runs of earlier versions have none
    is_same = before["data_fingerprint"] == now["data_fingerprint"]
    changed = count_changed(learned[0], digests) if learned else 0 if is_same else now["preferences"]
    if changed:
        raise DataError(
            f"{folder}: the run learns from {before['settings']['data']}, whose preferences are not the same now "
            f"({changed} differ in words or images); restore them, or start another run"
        )


def changed_since(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the differences that may change the last bits of results: by name, the old and the new value."""
    pairs = [(name, before["settings"].get(name), now["settings"][name]) for name in _ROUNDING]
    for part in ("versions", "machine"):
        pairs += [(name, before.get(part, {}).get(name, value), value) for name, value in now[part].items()]
    return {name: [earlier, value] for name, earlier, value in pairs if earlier != value}
