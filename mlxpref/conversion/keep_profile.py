"""The profile that a written folder keeps: how its judge is asked, beside its weights."""

from pathlib import Path

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.files import PROFILE_FILE
from mlxpref.engine.find_profile import profile_of
from mlxpref.engine.profile import Profile, own_profile, read_profile
from mlxpref.engine.tokenizer import ComparisonTokenizer
from mlxpref.errors import MlxprefError, ModelError
from mlxpref.files import write_file
from mlxpref.text import one_line


def profile_to_keep(given: Profile | None, name: str, source: Path, adapter: Path | None = None) -> Profile | None:
    """The given profile, else that of the source or its adapter, see `profile_of`; None for our own by default.

    `name` is the user's name for the source.
    """
    profile = given or profile_of("", name, source, adapter)
    return profile if given or profile is not own_profile() else None


def check_profile(source: Checkpoint, profile: Profile) -> None:
    """ConfigError or ModelError, before the work, if a checkpoint's tokenizer cannot ask and read by a profile."""
    from mlx_vlm import utils

    try:
        with source.readable() as view:
            utils.get_model_and_args(utils.load_config(view))  # imports the model's own processor
            processor = utils.load_processor(view, trust_remote_code=False)
        tokenizer = ComparisonTokenizer(processor.tokenizer, source.config["image_token_id"], profile)
        _ = tokenizer.label_ids
        tokenizer.comparison("a", "choice", profile.thinks)
    except MlxprefError:
        raise
    except Exception as error:  # a damaged tokenizer raises anything
        raise ModelError(f"{source.folder}: its tokenizer cannot be loaded: {one_line(error)}") from error


def write_profile(folder: Path, profile: Profile | None) -> None:
    """Write the profile, if any, into a folder."""
    if profile is not None:
        write_file(folder / PROFILE_FILE, profile.text())


def check_written(folder: Path, profile: Profile) -> None:
    """ModelError unless a folder's own profile, if it has one, asks as `profile` does."""
    file = folder / PROFILE_FILE
    if file.is_file() and read_profile(file).version() != profile.version():
        raise ModelError(f"{PROFILE_FILE} asks in another way than the profile {profile.name}")
