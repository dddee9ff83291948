"""Image features on disk: a later epoch, a resumed run and the next run on the same images run no vision tower.

They are those of `rank` and `eval`, beside the store in the user's cache.
"""

from contextlib import suppress

from mlxpref.checkpoints.memory import model_size
from mlxpref.disk_cache import LEAST, DiskCache
from mlxpref.engine.image_features import features_on_disk
from mlxpref.engine.vlm import VLM
from mlxpref.errors import DataError
from mlxpref.judge.fingerprint import Fingerprint
from mlxpref.judge.store import default_store_path
from mlxpref.log import logger
from mlxpref.text import format_bytes

_CERTAIN = 0.9
"""The part of what may fit that is kept: the size is an estimate, and what does not fit removes what is needed."""


def feature_disk() -> DiskCache | None:
    """The place for features; None without one, or where $MLXPREF_FEATURES_GB is 0; ConfigError for no number."""
    with suppress(DataError):
        return features_on_disk(default_store_path())
    return None


def keep_features(disk: DiskCache, vlm: VLM, images: int) -> None:
    """Let the features of so many images come from disk and stay there, of more than fit always the same ones.

    The mean size of the images that were decoded tells how many fit; a message says it, where these are not all.
    """
    size, pixels, room = model_size(vlm.checkpoint), vlm.features.images.mean_pixels, disk.room
    each = max(LEAST, size.image_tokens(int(pixels)) * size.image_width * size.float_bytes)
    share = room / max(1, images * each)
    if 0 < share < 1:
        share *= _CERTAIN
        logger.info(
            f"{disk.folder}: features of about {int(share * images):,} of {images:,} images fit "
            f"in {format_bytes(room)} (MLXPREF_FEATURES_GB), always of the same ones; each epoch encodes the others"
        )
    vlm.features.keep_in(disk, Fingerprint(vlm).tower(), share)
