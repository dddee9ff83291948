"""The demo's pictures: one coloured shape each, clean or spoiled by noise, blur or blocks."""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

__all__ = ["COLOURS", "QUALITIES", "SHAPES", "SIZE", "PictureSpec", "render"]

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


class PictureSpec(NamedTuple):
    """What a picture shows; the rendering adds place, size, shade and background by chance."""

    colour: str
    shape: str
    quality: str

    def matches(self, colour: str, shape: str) -> bool:
        """Whether the picture shows what a prompt of this colour and shape asks for."""
        return self.colour == colour and self.shape == shape


def render(look: PictureSpec, rng: np.random.Generator) -> Image.Image:
    """Draw one picture of a look: RGB, SIZE by SIZE."""
    side = SIZE * _OVERSAMPLING
    background = tuple(int(v) for v in rng.integers(170, 256, 3))
    image = Image.new("RGB", (side, side), background)
    radius = rng.uniform(0.24, 0.36) * side
    x, y = rng.uniform(radius + 4, side - radius - 4, 2)
    shade = rng.integers(-22, 23, 3)
    fill = tuple(int(np.clip(base + delta, 0, 255)) for base, delta in zip(COLOURS[look.colour], shade, strict=True))
    _draw_shape(ImageDraw.Draw(image), look.shape, x, y, radius, fill)
    image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return _spoil(image, look.quality, rng)


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: tuple[int, ...]
) -> None:
    """Draw the shape with a dark outline: its sharpness is what tells good pictures from spoiled ones."""
    outline = tuple(v // 3 for v in fill)
    line = 2 * _OVERSAMPLING
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill, outline=outline, width=line)
        return
    if shape == "square":
        half = 0.85 * radius
        corners = [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
    elif shape == "triangle":
        corners = [
            (x, y - radius),
            (x + 0.95 * radius, y + 0.8 * radius),
            (x - 0.95 * radius, y + 0.8 * radius),
        ]
    else:
        r, w = radius, 0.33 * radius
        turns = [
            (-w, -r),
            (w, -r),
            (w, -w),
            (r, -w),
            (r, w),
            (w, w),
            (w, r),
            (-w, r),
            (-w, w),
            (-r, w),
            (-r, -w),
        ]
        corners = [(x + dx, y + dy) for dx, dy in [*turns, (-w, -w)]]
    draw.polygon(corners, fill=fill, outline=outline, width=line)


def _spoil(image: Image.Image, quality: str, rng: np.random.Generator) -> Image.Image:
    """The picture as its quality has it: unchanged, noisy, blurry or blocky."""
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
