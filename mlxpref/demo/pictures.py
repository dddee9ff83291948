"""The demo's pictures: a circle, a square, a triangle and a cross, each of one colour, on a grid of nine cells."""

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
QUALITIES = ("clean", "noisy", "blurry")
"""The looks of a picture, the best first."""
GRID = 3
CELL = 28
"""Width and height of a cell in pixels: two by two patches of the demo judge, one token."""
SIZE = GRID * CELL
_OVERSAMPLING = 3
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
    """The content of a picture: the colour of each shape, and its quality. The rendering adds places and shades."""

    circle: str
    square: str
    triangle: str
    cross: str
    quality: str = QUALITIES[0]

    def colour(self, shape: str) -> str:
        """The colour of a shape."""
        return self[SHAPES.index(shape)]


def render(spec: PictureSpec, rng: np.random.Generator) -> Image.Image:
    """Draw one picture with the shapes in random cells: RGB, SIZE by SIZE."""
    return draw(spec, place_shapes(rng), rng)


def place_shapes(rng: np.random.Generator) -> tuple[int, ...]:
    """A random cell for each of SHAPES, counted row by row from the top left."""
    return tuple(int(cell) for cell in rng.permutation(GRID * GRID)[: len(SHAPES)])


def draw(spec: PictureSpec, cells: tuple[int, ...], rng: np.random.Generator) -> Image.Image:
    """Draw one picture with each of SHAPES in its cell; size, place in the cell, shade and background are random."""
    side = SIZE * _OVERSAMPLING
    image = Image.new("RGB", (side, side), tuple(int(v) for v in rng.integers(170, 256, 3)))
    canvas = ImageDraw.Draw(image)
    for shape, cell in zip(SHAPES, cells, strict=True):
        row, column = divmod(cell, GRID)
        centre = (np.array([column, row]) + 0.5) * CELL + rng.uniform(-2, 2, 2)
        shade = rng.integers(-22, 23, 3)
        base = COLOURS[spec.colour(shape)]
        fill = tuple(int(np.clip(value + delta, 0, 255)) for value, delta in zip(base, shade, strict=True))
        x, y = (centre * _OVERSAMPLING).tolist()
        _draw_shape(canvas, shape, x, y, rng.uniform(8.5, 11.5) * _OVERSAMPLING, fill)
    return _spoil(image.resize((SIZE, SIZE), Image.Resampling.BOX), spec.quality, rng)


def _draw_shape(
    canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: tuple[int, ...]
) -> None:
    """Draw the shape with a dark outline, whose sharpness tells good pictures from spoiled ones."""
    outline = tuple(v // 3 for v in fill)
    line = round(1.5 * _OVERSAMPLING)
    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill, outline=outline, width=line)
    else:
        corners = [(x + dx * radius, y + dy * radius) for dx, dy in _CORNERS[shape]]
        canvas.polygon(corners, fill=fill, outline=outline, width=line)


def _spoil(image: Image.Image, quality: str, rng: np.random.Generator) -> Image.Image:
    """The picture in its quality: unchanged, noisy or blurry."""
    if quality == "blurry":
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(1.2, 1.8)))
    if quality == "noisy":
        pixels = np.asarray(image, np.float32)
        noise = rng.normal(0, rng.uniform(20, 35), pixels.shape)
        return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))
    return image
