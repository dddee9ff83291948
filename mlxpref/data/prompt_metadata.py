"""The prompt in an image's metadata, as image generators write it."""

import html
import io
import json
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from mlxpref.data.comfyui import prompt_in_graph
from mlxpref.data.containers import EXIF, Part, parts, without_extras
from mlxpref.data.images import open_image
from mlxpref.errors import DataError
from mlxpref.files import read_file
from mlxpref.text import one_line

TEXT_LIMIT = 64 << 20
"""The most bytes of an image's compressed texts together."""
_NEGATIVE = re.compile(r"^[ \t]*Negative prompt:", re.M)
_SETTINGS = re.compile(r"^[ \t]*(?:Steps: ?\d+|Size: ?\d+x\d+)(?=,|[ \t]*\r?$)", re.M)
_USER_COMMENT, _WINDOWS_TEXTS = 0x9286, range(0x9C9B, 0x9CA0)
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
# The places where tools write prompts, in the order in which they are looked through; then all others.
_PLACES = ("parameters", "invokeai_metadata", "Comment", "Description", "prompt", "sd-metadata", "Dream")
_Text = tuple[str, str | None]
"""The name of a text and the text, or None where it is too long."""


def prompt_in_image(path: Path) -> str | None:
    """The positive prompt in an image's metadata, or None if there is none.

    It reads what AUTOMATIC1111, Forge, SD.Next, Fooocus, SwarmUI, InvokeAI, NovelAI, Draw Things and ComfyUI write, in
    PNG text, EXIF, XMP and comments of any format, and returns the first prompt. It decodes no pixels.
    DataError, which continues the file's name, for unusable metadata.
    """
    problem: DataError | None = None
    for read, text in _readings(_texts(path)):
        try:
            if text is None:
                raise DataError(f"has a text in its metadata that unpacks to more than {TEXT_LIMIT >> 20} MiB")
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


def _texts(path: Path) -> list[_Text]:
    """The texts beside the pixels of an image, in the order of the file; damaged ones are left out."""
    content = read_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        texts, room = list[_Text](), TEXT_LIMIT
        for piece in (pieces := list(parts(content))):
            for name, text in _texts_of(piece, room):
                texts.append((name, text))
                room -= len(text or "")
        if pieces:
            return texts
        with suppress(Exception):
            return _texts_of_other_formats(content)
        try:
            return _texts_of_other_formats(without_extras(content)[0])
        except UnidentifiedImageError as error:
            raise DataError("is not an image of a format whose metadata is read; name its prompt in a file") from error
        except Exception as error:  # Pillow raises errors of many types
            raise DataError(f"has metadata that cannot be read ({one_line(error)})") from error


def _texts_of(piece: Part, room: int) -> Iterator[_Text]:
    """The texts in a part of a PNG, JPEG or WebP file."""
    name, content = piece.name, piece.content
    if name in (b"tEXt", b"zTXt", b"iTXt"):
        yield from _png_text(name, content, room)
    elif name == b"\xff\xfe":
        yield "comment", _decoded(content)
    elif name == b"XMP " or content.startswith(_XMP):
        yield "xmp", content.removeprefix(_XMP).decode(errors="replace")
    elif name in EXIF:
        exif = Image.Exif()
        with suppress(Exception):
            # Zeros let Pillow read a value that is cut.
            exif.load(b"Exif\0\0" + content.removeprefix(b"Exif\0\0") + bytes(1 << 16))
        yield from _exif_texts(exif)


def _png_text(kind: bytes, content: bytes, room: int) -> Iterator[_Text]:
    """The text in a chunk of a PNG, unpacked; many tools write UTF-8 where the format has Latin-1."""
    name, _, value = content.partition(b"\0")
    is_packed = kind == b"zTXt"
    if kind == b"iTXt":
        is_packed = value[:1] == b"\1"
        value = value[2:].split(b"\0", 2)[-1]
    elif is_packed:
        value = value[1:]
    if is_packed:
        unpacker = zlib.decompressobj()
        with suppress(zlib.error):
            value = unpacker.decompress(value, max(1, room))
            if unpacker.unconsumed_tail:
                yield name.decode("latin-1"), None
                return
    if name == b"Raw profile type exif":  # ImageMagick's: three lines, then hexadecimal
        with suppress(ValueError):
            profile = bytes.fromhex(b"".join(value.split(b"\n")[3:]).decode("ascii"))
            yield from _texts_of(Part(b"eXIf", profile, b"", True), room)
        return
    yield ("xmp" if name == b"XML:com.adobe.xmp" else name.decode("latin-1")), _decoded(value)


def _exif_texts(exif: Image.Exif) -> Iterator[_Text]:
    """The texts of all EXIF tags, those about the photograph first; damaged EXIF counts as none."""
    tags: dict[int, Any] = {}
    for read in (lambda: exif.get_ifd(0x8769), lambda: exif):
        with suppress(Exception):
            tags.update(read())
    for tag, value in tags.items():
        if tag == _USER_COMMENT and isinstance(value, bytes | str):
            yield "UserComment", _user_comment(value)
        elif tag in _WINDOWS_TEXTS and isinstance(value, bytes | tuple):
            yield "XP", bytes(value).decode("utf-16-le", "replace")
        elif isinstance(value, str):
            yield "EXIF", _decoded(value.encode("latin-1", "replace"))


def _texts_of_other_formats(content: bytes) -> list[_Text]:
    with open_image(io.BytesIO(content)) as image:
        info = {str(name): value for name, value in image.info.items() if isinstance(value, str | bytes)}
        texts: list[_Text] = [
            (name, value if isinstance(value, str) else _decoded(value))
            for name, value in info.items()
            if name not in ("exif", "icc_profile")
        ]
        return [*_exif_texts(image.getexif()), *texts]


def _decoded(text: bytes) -> str:
    with suppress(UnicodeError):
        return text.decode()
    return text.decode("latin-1")


def _readings(texts: list[_Text]) -> Iterator[tuple[Callable[[str], str | None], str | None]]:
    """The texts that may hold the prompt, each with its reader, the usual places first."""
    by_novelai = any(name == "Software" and (text or "").startswith("NovelAI") for name, text in texts)
    readers: dict[str, Callable[[str], str | None]] = {"Dream": _in_dream, "xmp": _in_xmp}
    readers |= dict.fromkeys(("parameters", "prompt", *(["Description"] if by_novelai else [])), _all_or_stated)
    order = {name: place for place, name in enumerate(_PLACES)}
    for name, text in sorted(texts, key=lambda item: order.get(item[0], len(order))):
        if name != "workflow":  # ComfyUI's graph as it was drawn
            yield readers.get(name, _stated), text


def _all_or_stated(text: str) -> str | None:
    """The prompt in a text, or all of the text if its form is unknown."""
    plain = text.strip()
    if re.match(r'\{\s*("|\})', plain):  # JSON; {red|blue} is a choice in a prompt
        return _stated(text)
    prompt = prompt_in_infotext(plain)
    return plain or None if prompt is None else prompt


def _stated(text: str) -> str | None:
    """The prompt in a text: JSON of some tool, or AUTOMATIC1111's form."""
    text = re.sub(r"^\s*(prompt|parameters)\s*:\s*(?=\{)", "", text.strip("\0 \t\r\n"), flags=re.I)
    if not text.startswith("{"):
        return prompt_in_infotext(text)
    try:
        return _in_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        if (prompt := prompt_in_infotext(text)) is not None:  # of a prompt like {red|blue} cubes
            return prompt
        raise DataError("has metadata that is not valid JSON") from error


def _in_json(value: dict[str, Any]) -> str | None:
    """The prompt in the JSON of a tool: as text, in a ComfyUI graph, or in a text inside that has one of the forms."""
    candidates = (
        _at(value, "sui_image_params", "prompt"),  # SwarmUI
        value.get("positive_prompt"),  # InvokeAI
        value.get("c"),  # Draw Things
        value.get("prompt"),  # Fooocus, NovelAI and others
        value.get("Prompt"),
        _at(value, "v4_prompt", "caption", "base_caption"),  # NovelAI
    )
    for prompt in candidates:
        if isinstance(prompt, str) and not re.match(r'\{\s*"', prompt):
            return prompt
    if (prompt := _in_old_invokeai(_at(value, "image", "prompt"))) is not None:
        return prompt
    for graph in (value.get("prompt"), value):
        if isinstance(graph, dict) and (prompt := prompt_in_graph(graph)) is not None:
            return prompt
    by_novelai = str(value.get("Software")).startswith("NovelAI") or str(value.get("Source")).startswith("NovelAI")
    for text in value.values():
        with suppress(DataError):  # of a text like {red|blue}
            if isinstance(text, str) and (prompt := _stated(text)) is not None:
                return prompt
    return value["Description"] if by_novelai and isinstance(value.get("Description"), str) else None


def _in_old_invokeai(prompt: Any) -> str | None:
    """The positive part of a prompt of InvokeAI 1 and 2: a text, or texts with weights; [...] is negative."""
    if isinstance(prompt, list):
        texts = [_at(part, "prompt") for part in prompt]
        prompt = ", ".join(text for text in texts if isinstance(text, str)) or None
    return re.sub(r"\s*\[[^\[\]]*\]", "", prompt) if isinstance(prompt, str) else None


def _in_dream(text: str) -> str | None:
    """The prompt in a command of InvokeAI 1 and 2, before its options, with or without quotation marks."""
    command = re.match(r'\s*"(.*?)"(?:\s+-|\s*$)', text, re.S) or re.match(r"(.*?)\s+-[A-Za-z]", text, re.S)
    return _in_old_invokeai(command[1]) if command else None


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
    if code == b"UNICODE\0" and b"\0" in text:  # else a tool wrote UTF-8
        readings = [text.decode(order, "replace") for order in ("utf-16-be", "utf-16-le")]
        return max(readings, key=lambda reading: sum(c.isascii() for c in reading)).lstrip("\ufeff")
    if code in (b"UNICODE\0", b"ASCII\0\0\0", b"JIS\0\0\0\0\0", bytes(8)):
        return text.decode(errors="replace")
    return comment.decode(errors="replace")


def _in_xmp(packet: str) -> str | None:
    """The prompt in any text or attribute of an XMP packet, also of a broken one; Draw Things writes EXIF's comment."""
    for texts in re.findall(r"""(?<=>)([^<>]+)|="([^"]*)"|='([^']*)'""", packet):
        if (prompt := _stated(html.unescape("".join(texts)))) is not None:
            return prompt
    return None
