"""The parts of image files beside the pixels: they hold the prompt, and damage to them must not lose a picture."""

import os
import random
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Literal, NamedTuple

_PNG = b"\x89PNG\r\n\x1a\n"
EXIF = {b"eXIf", b"EXIF", b"\xff\xe1"}
"""The names of parts with EXIF: in PNG, WebP and JPEG."""
_JPEG_END = b"\xff\xd9"
_JPEG_FRAMES = {b"\xff" + bytes([number]) for number in range(0xC0, 0xD0) if number not in (0xC4, 0xC8, 0xCC)}
_PNG_PIXELS = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
_WEBP_PIXELS = {b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"}
# Size, colours, compression and place of the pixels, orientation, and where the EXIF of the photograph is.
_TIFF_PIXELS = {*range(254, 267), *range(273, 280), 284, 292, 293, 317, *range(320, 326), *range(338, 342), 347}
_TIFF_PIXELS |= {*range(529, 533), 34665}
_FILLERS = 4


class Part(NamedTuple):
    """A part of a file: its name, its content, how it stands in the file, and whether all of it is there."""

    name: bytes
    content: bytes
    raw: bytes
    is_whole: bool


def parts(file: bytes) -> Iterator[Part]:
    """The chunks of a PNG or WebP file, or the segments of a JPEG file up to its pixels, which are the last one.

    Checksums are not compared. Nothing for other formats.
    """
    if file.startswith(b"\xff\xd8"):
        yield from _jpeg_segments(file)
        return
    is_png = file.startswith(_PNG)
    if not is_png and (file[:4], file[8:12]) != (b"RIFF", b"WEBP"):
        return
    place = 8 if is_png else 12
    while place + 8 <= len(file):
        first, second = file[place : place + 4], file[place + 4 : place + 8]
        name, length = (second, int.from_bytes(first)) if is_png else (first, int.from_bytes(second, "little"))
        content = file[place + 8 : place + 8 + length]
        end = place + length + (12 if is_png else 8 + length % 2)
        yield Part(name, content, file[place:end], len(content) == length)
        place = end


def _jpeg_segments(file: bytes) -> Iterator[Part]:
    place = 2
    while marker := re.compile(rb"[^\xff]*\xff+([^\xff])").match(file, place):
        start, place = marker.start(1) - 1, marker.end()
        name = file[start:place]
        if name == b"\xff\xda":
            yield Part(name, file[place:], file[start:], True)
            return
        if b"\xff\xd0" <= name <= _JPEG_END or name in (b"\xff\x00", b"\xff\x01"):  # without a content
            continue
        length = max(int.from_bytes(file[place : place + 2]), 2)
        yield Part(name, file[place + 2 : place + length], file[start : place + length], place + length <= len(file))
        place += length


def check_png_pixels(file: BinaryIO) -> None:
    """OSError if a PNG's pixels do not have their checksum: Pillow does not compare it, and may decode anything."""
    file.seek(len(_PNG))
    while len(head := file.read(8)) == 8:
        name, length = head[4:], int.from_bytes(head[:4])
        if name != b"IDAT":
            file.seek(length + 4, os.SEEK_CUR)
            continue
        content, checksum = file.read(length), file.read(4)
        if len(checksum) == 4 and zlib.crc32(content, zlib.crc32(name)) != int.from_bytes(checksum):
            raise OSError("the pixels have another checksum")


def without_extras(file: bytes) -> list[bytes]:
    """A damaged image file without what stands beside its pixels, except EXIF, which says how it is turned.

    A JPEG without its end is completed in several ways: all give the same picture if it has all its pixels, because
    else the pixels depend on what was appended. Pixels are never mended.
    """
    if file.startswith(_PNG):
        return [_png_pixels(file)]
    if file.startswith(b"RIFF"):
        return [_webp_pixels(file)]
    if file.startswith(b"\xff\xd8"):
        return _jpeg_pixels(file)
    if file[:4] in (b"II*\0", b"MM\0*"):
        return [_tiff_pixels(file)]
    if file[4:8] == b"ftyp":  # AVIF: another name, so that the decoder does not read it
        return [re.sub(rb"(infe.{8})Exif", rb"\1none", file, flags=re.S)]
    if file[4:8] == b"jP  ":  # JPEG 2000: its decoder finds missing pixels itself
        return [file + _JPEG_END]
    return [file]


def _png_pixels(file: bytes) -> bytes:
    chunks = list(parts(file))
    colours = chunks[0].content[9:10] if chunks else b""
    shortest = {b"tRNS": {b"\0": 2, b"\2": 6}.get(colours, 0), b"eXIf": 1}
    kept = [_PNG]
    for name, content, raw, is_whole in chunks:
        if name in _PNG_PIXELS:
            kept.append(raw)
        elif name in shortest and is_whole and len(content) >= shortest[name]:
            kept.append(raw[:-4] + zlib.crc32(name + content).to_bytes(4))
    return b"".join(kept)


def _webp_pixels(file: bytes) -> bytes:
    kept = []
    names = {name for name, *_ in parts(file)}
    for name, content, _, is_whole in parts(file):
        if name == b"VP8X" and content:  # flags: alpha, animation, EXIF
            content = bytes([content[0] & 0x12 | (8 if b"EXIF" in names else 0)]) + content[1:]
        if name == b"EXIF" or (name in _WEBP_PIXELS and is_whole):
            kept.append(name + len(content).to_bytes(4, "little") + content + b"\0" * (len(content) % 2))
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def _tiff_pixels(file: bytes) -> bytes:
    """A TIFF whose first directory has only the entries that its pixels need."""
    order: Literal["little", "big"] = "little" if file.startswith(b"II") else "big"
    start = int.from_bytes(file[4:8], order)
    count = int.from_bytes(file[start : start + 2], order)
    entries = [file[place : place + 12] for place in range(start + 2, start + 2 + 12 * count, 12)]
    kept = [entry for entry in entries if int.from_bytes(entry[:2], order) in _TIFF_PIXELS]
    directory = len(kept).to_bytes(2, order) + b"".join(kept) + bytes(4)
    return file[:start] + directory + file[start + len(directory) :]


def _jpeg_pixels(file: bytes) -> list[bytes]:
    file = file if file.endswith(_JPEG_END) else file.rstrip(b"\0")  # an unfinished download may be full of zeros
    kept = [b"\xff\xd8"]
    for name, content, raw, _ in parts(file):
        is_exif = name in EXIF and content.startswith(b"Exif\0")
        is_adobe = name == b"\xff\xee" and content.startswith(b"Adobe") and len(content) >= 12  # the kind of colours
        if is_exif or is_adobe or not (b"\xff\xe0" <= name <= b"\xff\xef" or name == b"\xff\xfe"):
            kept.append(raw)
    pixels = b"".join(kept)
    if pixels.endswith(_JPEG_END):
        return [pixels]
    if not _has_all_scans(pixels):
        return []
    pixels = pixels.rstrip(b"\xff")
    return [pixels + _filler(seed) + _JPEG_END for seed in range(_FILLERS)]


def _filler(seed: int) -> bytes:
    """Random pixel data, first without restart markers, then with each, because a decoder waits for the next one.

    The first marker differs: a decoder skips data behind one that is slightly ahead.
    """
    data = random.Random(seed)
    pieces = [data.randbytes(64).replace(b"\xff", b"\x55") for _ in range(20)]
    marked = (b"\xff" + bytes([0xD0 + (2 * seed + number) % 8]) + piece for number, piece in enumerate(pieces[4:]))
    return b"".join([*pieces[:4], *marked])


def _has_all_scans(file: bytes) -> bool:
    """Whether the scans of a JPEG, if they are whole, give every coefficient of every colour to its last bit."""
    segments = list(parts(file))
    frame = next((segment for segment in segments if segment.name in _JPEG_FRAMES), None)
    if frame is None or segments[-1].name != b"\xff\xda":
        return False
    missing = {(colour, place) for colour in frame.content[6::3] for place in range(64)}
    for scan in re.finditer(rb"\xff\xda..(.)", segments[-1].raw, re.S):
        colours = 2 * scan[1][0]
        header = segments[-1].raw[scan.end() : scan.end() + colours + 3]
        if len(header) == colours + 3:
            first, last, bits = header[colours:] if frame.name > b"\xff\xc1" else (0, 63, 0)
            if bits % 16 == 0:
                missing -= {(colour, place) for colour in header[:colours:2] for place in range(first, last + 1)}
    return not missing
