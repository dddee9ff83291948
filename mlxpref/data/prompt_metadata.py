"""The prompt in an image's metadata, as image generators write it."""

import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import iTXt

from mlxpref.data.comfyui import prompt_in_graph
from mlxpref.data.images import PIXEL_LIMIT
from mlxpref.errors import DataError
from mlxpref.text import one_line

_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "JPEG2000", "GIF", "BMP", "PPM")
_NEGATIVE = re.compile(r"^[ \t]*Negative prompt:", re.M)
_SETTINGS = re.compile(r"^[ \t]*(?:Steps: ?\d+|Size: ?\d+x\d+)(?=,|[ \t]*\r?$)", re.M)
_MODEL, _EXIF, _USER_COMMENT = 0x0110, 0x8769, 0x9286
_COMMENT_IN_XMP = "{http://ns.adobe.com/exif/1.0/}UserComment"


def prompt_in_image(path: Path) -> str | None:
    """The positive prompt in an image's metadata, or None if there is none.

    It reads PNG text and EXIF of AUTOMATIC1111, Forge, SD.Next, Fooocus, SwarmUI, InvokeAI, NovelAI and ComfyUI, and
    EXIF and XMP of Draw Things, and returns the first prompt. It decodes pixels only if there is no text before them.
    DataError, which continues the file's name, for unusable metadata.
    """
    problem: DataError | None = None
    for decode in (False, True):
        for read, text in _readings(*_metadata(path, decode)):
            try:
                if (prompt := read(text)) is not None:
                    return prompt
            except DataError as error:
                problem = problem or error
    if problem is not None:
        raise problem
    return None


def prompt_in_infotext(text: str) -> str | None:
    """The positive prompt of AUTOMATIC1111's text: the lines above the negative prompt or the last settings.

    None if the text has neither. A prompt's own line that begins with "Negative prompt:" ends it, as in AUTOMATIC1111:
    the format is ambiguous.
    """
    if negative := _NEGATIVE.search(text):
        return text[: negative.start()]
    settings = list(_SETTINGS.finditer(text))
    return text[: settings[-1].start()] if settings else None


def _metadata(path: Path, decode: bool) -> tuple[dict[str, str], dict[int, Any]]:
    """The texts and the EXIF tags of an image; with `decode`, those behind a PNG's pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with path.open("rb") as file, Image.open(file, formats=_FORMATS) as image:
                if not decode:  # Pillow decodes a PNG to look for EXIF behind its pixels
                    return _texts(image), _exif(image) if image.format != "PNG" or "exif" in image.info else {}
                if image.format != "PNG" or image.width * image.height > PIXEL_LIMIT:
                    return {}, {}
                image.load()
                return _texts(image), _exif(image)
        except UnidentifiedImageError as error:
            raise DataError("is not an image of a format whose metadata is read; name its prompt in a file") from error
        except Exception as error:
            # Pillow raises errors of many types, such as ValueError for text that unpacks to more than 1 MiB.
            raise DataError(f"has metadata that cannot be read ({one_line(error)})") from error


def _texts(image: Image.Image) -> dict[str, str]:
    """The texts of an image by name; corrects PNG text in UTF-8, which tools write instead of Latin-1."""
    texts: dict[str, str] = {}
    for name, value in image.info.items():
        if isinstance(value, bytes) and name == "xmp":
            value = value.decode(errors="replace")
        if isinstance(value, str):
            if not isinstance(value, iTXt):
                with suppress(UnicodeError):
                    value = value.encode("latin-1").decode()
            texts["xmp" if name == "XML:com.adobe.xmp" else str(name)] = str(value)
    return texts


def _exif(image: Image.Image) -> dict[int, Any]:
    """The EXIF tags of an image, with those about the photograph; damaged EXIF counts as none."""
    with suppress(Exception):
        exif = image.getexif()
        return {**exif.get_ifd(_EXIF), **exif}
    return {}


def _readings(texts: dict[str, str], exif: dict[int, Any]) -> Iterator[tuple[Callable[[str], str | None], str]]:
    """The texts that may hold the prompt, each with its reader, the usual ones first."""
    if "parameters" in texts:
        yield _all_or_stated, texts["parameters"]
    if "invokeai_metadata" in texts:
        yield _stated, texts["invokeai_metadata"]
    if texts.get("Software", "").startswith("NovelAI"):
        yield _stated, texts.get("Comment", "")
        yield _all_or_stated, texts.get("Description", "")
    if "prompt" in texts:
        yield _all_or_stated, texts["prompt"]
    if isinstance(value := exif.get(_MODEL), str) and value.startswith("prompt:"):  # ComfyUI's WebP and AVIF
        yield _stated, value.removeprefix("prompt:")
    if isinstance(comment := exif.get(_USER_COMMENT), bytes | str):
        yield _stated, _user_comment(comment)
    if "xmp" in texts:
        yield _in_xmp, texts["xmp"]


def _all_or_stated(text: str) -> str | None:
    """The prompt in a text, or all of the text if its form is unknown."""
    plain = text.strip()
    if re.match(r'\{\s*("|\})', plain):  # JSON; {red|blue} is a choice in a prompt
        return _stated(text)
    prompt = prompt_in_infotext(plain)
    return plain or None if prompt is None else prompt


def _stated(text: str) -> str | None:
    """The prompt in a text: JSON of some tool, or AUTOMATIC1111's form."""
    text = text.strip("\0 \t\r\n")
    if not text.startswith("{"):
        return prompt_in_infotext(text)
    try:
        return _in_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        if (prompt := prompt_in_infotext(text)) is not None:  # of a prompt like {red|blue} cubes
            return prompt
        raise DataError("has metadata that is not valid JSON") from error


def _in_json(value: dict[str, Any]) -> str | None:
    """The prompt in the JSON of SwarmUI, InvokeAI, Draw Things, Fooocus and NovelAI, or in a ComfyUI graph."""
    swarm = value.get("sui_image_params")
    caption = _at(value, "v4_prompt", "caption", "base_caption")
    candidates = (_at(swarm, "prompt"), value.get("positive_prompt"), value.get("c"), value.get("prompt"), caption)
    for prompt in candidates:
        if isinstance(prompt, str):
            return prompt
    for graph in (value.get("prompt"), value):
        if isinstance(graph, dict) and (prompt := prompt_in_graph(graph)) is not None:
            return prompt
    return None


def _at(value: Any, *names: str) -> Any:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _user_comment(comment: bytes | str) -> str:
    """EXIF's comment: eight bytes that name the encoding, and text.

    UNICODE is UTF-16 in either byte order; it returns the reading with more ASCII, since settings and JSON are full of
    it.
    """
    if isinstance(comment, str):
        return comment
    code, text = comment[:8], comment[8:]
    if code == b"UNICODE\0":
        readings = [text.decode(order, "replace") for order in ("utf-16-be", "utf-16-le")]
        return max(readings, key=lambda reading: sum(c.isascii() for c in reading)).lstrip("\ufeff")
    if code in (b"ASCII\0\0\0", b"JIS\0\0\0\0\0", bytes(8)):
        return text.decode(errors="replace")
    return comment.decode(errors="replace")


def _in_xmp(packet: str) -> str | None:
    """The prompt in the comment of an XMP packet, which Draw Things writes."""
    if "<!DOCTYPE" in packet or "<!ENTITY" in packet:  # a few of these can unpack to gigabytes
        raise DataError("has XMP metadata that defines entities, which is not read")
    if _COMMENT_IN_XMP.rpartition("}")[2] not in packet:
        return None
    try:
        root = ElementTree.fromstring(packet.strip("\0 \n\ufeff"))
    except ElementTree.ParseError as error:
        raise DataError("has XMP metadata that is not valid XML") from error
    for element in root.iter():
        comment = "".join(element.itertext()) if element.tag == _COMMENT_IN_XMP else element.get(_COMMENT_IN_XMP)
        if comment and (prompt := _stated(comment)) is not None:
            return prompt
    return None
