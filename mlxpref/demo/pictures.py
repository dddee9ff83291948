"""The demo's pictures: one coloured shape each, clean or spoiled by noise, blur or blocks."""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 80, 215),
    "yellow": (235, 205, 40),
    "purple": (140, 50, 170),
    "orange": (240, 130, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
QUALITIES = ("clean", "noisy", "blurry", "blocky")
SIZE = 84
"""Width and height in pixels: six by six patches of the demo judge, nine tokens."""
_OVERSAMPLING = 2
_W = 0.33  # half the width of a cross's arms
_CORNERS = {
    "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "triangle": ((0, -1), (0.95, 0.8), (-0.95, 0.8)),
    "cross": (
        *((-_W, -1), (_W, -1), (_W, -_W), (1, -_W), (1, _W), (_W, _W)),
        *((_W, 1), (-_W, 1), (-_W, _W), (-1, _W), (-1, -_W), (-_W, -_W)),
    ),
}
"""Corners of the shapes, clockwise, in radii from the centre."""


class PictureSpec(NamedTuple):
    """The content of a picture; the rendering adds random place, size, shade and background."""

    colour: str
    shape: str
    quality: str


def render(spec: PictureSpec, rng: np.random.Generator) -> Image.Image:
    """Draw one picture: RGB, SIZE by SIZE."""
    side = SIZE * _OVERSAMPLING
    background = tuple(int(v) for v in rng.integers(170, 256, 3))
    image = Image.new("RGB", (side, side), background)
    radius = rng.uniform(0.24, 0.36) * side
    x, y = rng.uniform(radius + 4, side - radius - 4, 2)
    shade = rng.integers(-22, 23, 3)
    fill = tuple(int(np.clip(base + delta, 0, 255)) for base, delta in zip(COLOURS[spec.colour], shade, strict=True))
    _draw_shape(ImageDraw.Draw(image), spec.shape, x, y, radius, fill)
    image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return _spoil(image, spec.quality, rng)


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: tuple[int, ...]
) -> None:
    """Draw the shape with a dark outline, whose sharpness tells good pictures from spoiled ones."""
    outline = tuple(v // 3 for v in fill)
    line = 2 * _OVERSAMPLING
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill, outline=outline, width=line)
    else:
        corners = [(x + dx * radius, y + dy * radius) for dx, dy in _CORNERS[shape]]
        draw.polygon(corners, fill=fill, outline=outline, width=line)


def _spoil(image: Image.Image, quality: str, rng: np.random.Generator) -> Image.Image:
    """The picture in its quality: unchanged, noisy, blurry or blocky."""
    if quality == "blurry":
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(2.0, 3.5)))
    if quality == "blocky":
        blocks = SIZE // int(rng.choice([9, 12]))
        small = image.resize((blocks, blocks), Image.Resampling.BOX)
        return small.resize((SIZE, SIZE), Image.Resampling.NEAREST)
    if quality == "noisy":
        pixels = np.asarray(image, np.float32)
        noise = rng.normal(0, rng.uniform(22, 45), pixels.shape)
        return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))
    return image
