"""Results as HTML for a notebook: a few small pictures with their places and reasons, on light and dark pages."""

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from mlxpref.data.thumbnails import try_thumbnail
from mlxpref.preferences import ImageLike
from mlxpref.text import shorten

if TYPE_CHECKING:
    from mlxpref.judge.pair_verdict import PairVerdict
    from mlxpref.judge.ranking_result import Ranking

_SHOWN = 20
"""The number of best images in a ranking's table: a notebook keeps every picture that it shows."""
_SIDE, _BYTES = 96, 5_000
_LINES = 10
_CELL = 'style="text-align:left;vertical-align:top"'


def ranking_html(ranking: "Ranking") -> str:
    """A table of the best images with pictures and reasons, and the warnings; under 300 kB for any ranking."""
    rows = [
        (
            str(entry.rank),
            _picture(ranking.images[entry.index]),
            _text(entry.short_name, 60),
            f"{entry.strength:+.2f}<br>{entry.low:+.2f} to {entry.high:+.2f}",
            _text(entry.reason or "", 500),
        )
        for entry in ranking[:_SHOWN]
    ]
    more = [f"and {len(ranking) - _SHOWN} more"] if len(ranking) > _SHOWN else []
    title = f"{ranking.title}: {len(ranking)} images, {len(ranking.pairs)} pairs"
    columns = ("rank", "", "image", "strength<br>95 % interval", "reason")
    return _block(title, _table(columns, rows), [*more, *ranking.warnings])


def pair_html(verdict: "PairVerdict") -> str:
    """Both pictures with the probabilities that people prefer them, and a reason of each order."""
    images = (verdict.pair.a, verdict.pair.b) if verdict.pair else (None, None)
    columns = [f"{name}: {100 * p:.1f} %" for name, p in (("a", verdict.p_a), ("b", 1 - verdict.p_a))]
    pictures = [tuple(_picture(image) for image in images)] if verdict.pair else []
    orders = (("a shown first", verdict.a_shown_first), ("b shown first", verdict.a_shown_second))
    reasons = [f"{order}: {samples[0].reasoning}" for order, samples in orders if samples and samples[0].reasoning]
    title = f"“{verdict.pair.prompt}”" if verdict.pair and verdict.pair.prompt else "which image people prefer"
    return _block(title, _table(columns, pictures), reasons)


def _picture(image: ImageLike | None) -> str:
    """A small picture, or words where its file is gone."""
    small = try_thumbnail(image, _SIDE, limit=_BYTES)
    return f'<img src="{small.uri}" width="{small.width}" height="{small.height}">' if small else "no picture"


def _text(text: str, limit: int) -> str:
    return escape(shorten(text, limit))


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "".join(f"<th {_CELL}>{column}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td {_CELL}>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _block(title: str, table: str, lines: Iterable[str]) -> str:
    """A title, a table, and lines of text below it."""
    below = "".join(f"<div>{_text(line, 500)}</div>" for line in list(lines)[:_LINES])
    return f"<div><b>{_text(title, 300)}</b>{table}{below}</div>"
