"""Image features on disk: a later epoch, a resumed run and the next run on the same images run no vision tower.

They are those of `rank` and `eval`, beside the store in the user's cache.
"""

from mlxpref.checkpoints.memory import model_size
from mlxpref.disk_cache import LEAST, DiskCache
from mlxpref.judge.fingerprint import Fingerprint
from mlxpref.log import logger
from mlxpref.text import format_bytes
from mlxpref.training.trainer import Trainer

_CERTAIN = 0.9
"""The part of what may fit that is kept: the size is an estimate, and what does not fit removes what is needed."""


def keep_features(disk: DiskCache, trainer: Trainer) -> None:
    """Let the features of a run's images come from disk and stay there, of more than fit always the same ones.

    The mean size of the images that were decoded tells how many fit; a message says it, where these are not all.
    """
    vlm, images = trainer.vlm, _images_shown(trainer)
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


def _images_shown(trainer: Trainer) -> int:
    """The most images that a run shows: two for each preference, but none twice of those in files."""
    settings = trainer.settings
    shown = trainer.step_count * settings.comparisons // settings.orders * (1 + settings.resample)
    shown = min(shown, len(trainer.preferences)) + len(trainer.held_out.preferences)
    return min(trainer.left_out.images or 2 * shown, 2 * shown)  # none in files: all are in memory
