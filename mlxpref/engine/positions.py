"""The positions of text and images, which count on three axes: time, height, width."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def image_positions(parts: Sequence[int | tuple[int, int]], start: int = 0) -> tuple[NDArray[np.int32], int]:
    """The positions (3, L) of text and images in turn, as the Qwen-VL models count them, and the position after them.

    A part is a number of text tokens or an image's grid (height, width) in merged patches. Text counts up on all three
    axes; an image keeps the first axis and counts rows and columns on the other two, and text after it continues after
    its longer side (Qwen2-VL, arXiv 2409.12191, section 2.1).
    """
    axes, position = [], start
    for part in parts:
        if isinstance(part, tuple):
            height, width = part
            rows, columns = np.divmod(np.arange(height * width), width)
            axes.append(position + np.stack([np.zeros_like(rows), rows, columns]))  # (3, height * width)
            position += max(height, width)
        else:
            axes.append(np.broadcast_to(position + np.arange(part), (3, part)))
            position += part
    return np.concatenate(axes, axis=1).astype(np.int32), position


def text_positions(start: NDArray[np.int64], columns: int) -> NDArray[np.int32]:
    """The positions (3, B, `columns`) of text that continues each row at its next position (B,)."""
    positions = np.broadcast_to(start[:, None] + np.arange(columns), (3, len(start), columns))
    return positions.astype(np.int32)
