"""Which profile a judge is asked by, and what its user is told of it."""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from mlxpref.checkpoints.files import PROFILE_FILE, source_of
from mlxpref.checkpoints.resolve import is_hub_id
from mlxpref.engine.profile import Profile, built_in_profiles, own_profile, profile_named, read_profile
from mlxpref.errors import DataError
from mlxpref.files import cache_dir
from mlxpref.log import logger


def profile_of(given: str, name: str, folder: Path, adapter: Path | None = None) -> Profile:
    """The profile of the model in a folder, which the user calls `name`, with an adapter; see `find_profile`.

    Says which it is, if it is not our own, and once what its user should know.
    """
    profile = find_profile(given, (adapter, folder), (name, source_of(folder)))
    if profile.version() != own_profile().version():
        logger.info(f"asked by the profile {profile.name}")
    if profile.note and _is_first_use(profile):
        logger.warning(f"profile {profile.name}: {profile.note}; {profile.place}")
    return profile


def _is_first_use(profile: Profile) -> bool:
    """Whether a profile was not used before on this machine, as far as the user's cache tells."""
    try:
        mark = cache_dir() / "profiles" / profile.version()
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    except (DataError, OSError):  # no cache: better twice than never
        return True
    return True


def find_profile(given: str, folders: Sequence[Path | None], names: Sequence[str]) -> Profile:
    """The profile of a judge: the given one, else that in a folder, else the one for the model's names, else our own.

    `folders` are those of its adapter and its model, `names` its hub id and what it was converted from.
    """
    if given:
        return profile_named(given)
    for folder in folders:
        if folder is not None and (folder / PROFILE_FILE).is_file():
            return read_profile(folder / PROFILE_FILE)
    for profile in built_in_profiles().values():
        if any(_is_model(name, pattern) for name in names for pattern in profile.models):
            return profile
    return own_profile()


def _is_model(name: str, pattern: str) -> bool:
    """Whether a name is that of a model: a hub id, with or without revision, or a folder that is called like one."""
    plain = (name.partition("@")[0] if is_hub_id(name) else name).lower().rstrip("/")
    return fnmatch(plain.rpartition("/")[2], pattern.lower().rpartition("/")[2])
