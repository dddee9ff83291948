"""The ranking as stars: `xmp:Rating` 1 to 5 in sidecars beside the images, merged with what is there."""

import codecs
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lxml import etree
from numpy.typing import NDArray
from scipy.special import ndtr

from mlxpref.data.find_images import IMAGE_NAME
from mlxpref.errors import DataError
from mlxpref.files import read_file, replacing
from mlxpref.judge.ranking_result import Ranking
from mlxpref.ranking.covariance import Covariance
from mlxpref.text import counted, few, short_names

STARS_RULE = (
    "stars by the share of the other images that an image is expected to beat: 5 from 90 %, 4 from 70 %, 3 from 30 %, "
    "2 from 10 %, else 1; an uncertain image has about half, 3 stars"
)
REJECT = -1
"""The rating of an image that a person sorted out."""
_LEAST_SHARES = (0.1, 0.3, 0.7, 0.9)

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_XMP = "http://ns.adobe.com/xap/1.0/"
_RATING = f"{{{_XMP}}}Rating"
_DESCRIPTION = f"{{{_RDF}}}Description"
_EMPTY = f"""<?xml version="1.0" encoding="UTF-8"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="{_RDF}">
  <rdf:Description rdf:about="" xmlns:xmp="{_XMP}"/>
 </rdf:RDF>
</x:xmpmeta>
""".encode()

etree.register_namespace("xmp", _XMP)  # the prefix where a sidecar has none for it


@dataclass(frozen=True)
class Rating:
    """The stars of an image for a sidecar; `error` says why the sidecar stayed as it was.

    `before` is the rating that the sidecar had (a `REJECT` stays): None for none, for 0, which means none, and
    with an `error`.
    """

    image: Path
    stars: int
    sidecar: Path
    error: str | None = None
    before: int | None = None


def write_ratings(ranking: Ranking) -> list[Rating]:
    """Write `xmp:Rating` of every image that is a file into its sidecars, best first; see `STARS_RULE`.

    A sidecar that exists, `a.xmp` or `a.jpg.xmp` beside `a.jpg`, keeps everything else. A new one is `a.xmp`, the name
    in Adobe's specification, or `a.jpg.xmp` where another image in the folder would share it. A sidecar that rejects
    its image stays as it is; so does one that cannot be read or written, and its `Rating` has the error.
    """
    stars = stars_of(ranking)
    places: dict[Path, int] = {}
    for entry in ranking:
        if entry.path is not None:
            places.setdefault(entry.path, stars[entry.index])
    folders = {folder: _Folder(folder) for folder in {path.parent for path in places}}
    ratings = []
    for image, count in places.items():
        for sidecar in folders[image.parent].sidecars(image):
            before = error = None
            try:
                before = _write(sidecar, count)
            except DataError as reason:
                error = f"{sidecar}: {reason}"
            ratings.append(Rating(image, count, sidecar, error, before))
    return ratings


def ratings_in_words(ratings: Sequence[Rating]) -> list[str]:
    """A line about the sidecars that could not be rated, and one about the others, if any; each names a few."""
    errors = [rating.error for rating in ratings if rating.error]
    rejects = sum(rating.before == REJECT for rating in ratings)
    names = short_names([str(rating.sidecar) for rating in ratings])
    others = [
        f"{name} {rating.before} -> {rating.stars}"
        for name, rating in zip(names, ratings, strict=True)
        if rating.before not in (None, REJECT, rating.stars)
    ]
    summary = [f"{counted(len(ratings) - len(errors) - rejects, 'sidecar')} rated"]
    summary += [f"{len(others)} had another rating: {few(others, 5)}"] if others else []
    summary += [f"{counted(rejects, 'reject')} (rating {REJECT}) left as before"] if rejects else []
    failures = [f"{counted(len(errors), 'sidecar')} not rated: {few(errors, 3, ' | ')}"] if errors else []
    return failures if len(errors) == len(ratings) else [*failures, "; ".join([*summary, STARS_RULE])]


def stars_of(ranking: Ranking) -> list[int]:
    """1 to 5 stars of each image by number, from the posterior of strengths; see `STARS_RULE`."""
    fit = ranking.strengths.fit
    shares = expected_shares(fit.strengths, fit.covariance)
    return [1 + int(count) for count in np.searchsorted(_LEAST_SHARES, np.round(shares, 9), side="right")]


def expected_shares(strengths: NDArray[np.float64], covariance: Covariance) -> NDArray[np.float64]:
    """The expected share of the others that each image beats, under the normal posterior: (N,) -> (N,)."""
    deviations = (np.sqrt(np.maximum(covariance.row(image), 1e-18)) for image in range(len(strengths)))
    beaten = [ndtr((own - strengths) / each).sum() for own, each in zip(strengths, deviations, strict=True)]
    return (np.array(beaten) - 0.5) / (len(strengths) - 1)  # 0.5 for itself


class _Folder:
    """The names of a folder, to choose those of sidecars, whatever their case."""

    def __init__(self, folder: Path) -> None:
        names = list[str]()
        with suppress(OSError):  # a folder that is gone: the writing says so
            names = sorted(path.name for path in folder.iterdir())
        self.names = {name.casefold(): name for name in names}
        self.stems = Counter(Path(name).stem for name in self.names if IMAGE_NAME.search(name))

    def sidecars(self, image: Path) -> list[Path]:
        """Those of an image that exist, else the name of a new one."""
        own, shared = f"{image.name}.xmp", f"{image.stem}.xmp"
        names = [own] if self.stems[image.stem.casefold()] > 1 else [shared, own]
        found = [self.names[name.casefold()] for name in names if name.casefold() in self.names]
        return [image.with_name(name) for name in found or names[:1]]


def _write(sidecar: Path, stars: int) -> int | None:
    """Set the rating in a sidecar, and return the earlier one; DataError, which continues its name, if that fails."""
    place = Path(os.path.realpath(sidecar))  # a link stays a link
    exists = os.path.lexists(place)
    content = read_file(place) if exists else _EMPTY
    rated, before = with_rating(content, stars)
    if rated == content:
        return before
    try:
        if exists and not place.stat().st_mode & 0o222:
            raise DataError("is read-only, so its rating stays as it is")
        with replacing(place) as temporary:
            temporary.write_bytes(rated)
            if exists:
                shutil.copymode(place, temporary)
    except OSError as error:
        raise DataError(f"cannot be written ({error.strerror}); check the folder's permissions") from error
    return before


def with_rating(content: bytes, stars: int) -> tuple[bytes, int | None]:
    """XMP with another rating and nothing else changed, and the earlier rating; see `Rating`.

    XMP that rejects its image stays as it is. DataError, which continues its name, for what is no XMP.
    """
    parser = etree.XMLParser(resolve_entities=False, no_network=True, strip_cdata=False, remove_blank_text=False)
    try:
        document = etree.fromstring(content, parser).getroottree()
    except etree.XMLSyntaxError as error:
        raise DataError(f"is no XML ({error.msg}); repair or remove it") from error
    if document.docinfo.internalDTD is not None:
        raise DataError("has a document type, which XMP never has; remove that")
    root = document.getroot()
    graph = root if root.tag == f"{{{_RDF}}}RDF" else root.find(f"{{{_RDF}}}RDF")
    if graph is None:
        raise DataError("has no rdf:RDF, so it is no XMP; repair or remove it")
    before = _rate(graph, stars)
    if before in (stars, REJECT):
        return content, before
    encoding = document.docinfo.encoding or "UTF-8"
    mark = codecs.BOM_UTF8 if content.startswith(codecs.BOM_UTF8) else b""
    declared = "<?xml ".encode(encoding)[-10:] in content[:40]
    rated: bytes = etree.tostring(document, encoding=encoding, xml_declaration=declared)
    return mark + rated, before


def _rate(graph: etree._Element, stars: int) -> int | None:
    """Set every rating in the descriptions of a graph, in the first one where there is none; the earlier rating.

    A graph with a reject stays as it is. Of several ratings the earlier one is the first that differs from `stars`.
    """
    descriptions = graph.findall(_DESCRIPTION) or [etree.SubElement(graph, _DESCRIPTION, {f"{{{_RDF}}}about": ""})]
    attributes = [each for each in descriptions if _RATING in each.attrib]
    elements = [each for description in descriptions for each in description.findall(_RATING)]
    elements = [next(each.iter(f"{{{_RDF}}}value"), each) for each in elements]  # the value of one with qualifiers
    if any(len(each) for each in elements):
        raise DataError("has an xmp:Rating that is no number; repair that")
    if not attributes and not elements:
        attributes = descriptions[:1]
    texts = [each.get(_RATING) for each in attributes] + [each.text for each in elements]
    values = [_number(text or "") for text in texts]
    if REJECT in values:
        return REJECT
    for description in attributes:
        description.set(_RATING, str(stars))
    for element in elements:
        element.text = str(stars)
    if {*values} == {stars}:
        return stars
    return next((value for value in values if value not in (0, stars)), None)


def _number(text: str) -> int:
    """The rating in a text, which may be a real number; 0 for none."""
    try:
        return round(float(text.strip() or 0))
    except (ValueError, OverflowError) as error:
        raise DataError("has an xmp:Rating that is no number; repair that") from error
