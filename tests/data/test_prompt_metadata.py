import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mlxpref.data.prompt_metadata import prompt_in_image, prompt_in_infotext
from mlxpref.errors import DataError
from tests.data.test_images import png_header

SETTINGS = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x512, Model hash: 45dee52b"
INFOTEXT = f"a red cube, 4k\non grass\nNegative prompt: ugly,\nSteps: many\n{SETTINGS}"
SMALL = Image.new("RGB", (8, 8), "red")


def png(path: Path, text: dict[str, str | bytes] | None = None, compressed: bool = False, **options: Any) -> Path:
    """A PNG with these texts: str as Pillow sees fit, bytes as they are, Latin-1 by the format's rule."""
    info = PngInfo()
    for name, value in (text or {}).items():
        if isinstance(value, bytes):
            info.add(b"tEXt", name.encode() + b"\0" + value)
        else:
            info.add_text(name, value, compressed)
    SMALL.save(path, "PNG", pnginfo=info, **options)
    return path


def commented(path: Path, comment: bytes | str, tag: int = 0x9286, in_photograph: bool = True) -> Path:
    """An image with this EXIF comment."""
    exif = Image.Exif()
    (exif.get_ifd(0x8769) if in_photograph else exif)[tag] = comment
    SMALL.save(path, exif=exif.tobytes())  # Pillow takes the object for empty if only the photograph has tags
    return path


def problem(read: Callable[..., object], *arguments: object, kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as caught:
        read(*arguments)
    return str(caught.value)


# AUTOMATIC1111 and its descendants


def test_the_form_of_automatic1111() -> None:
    assert prompt_in_infotext(INFOTEXT) == "a red cube, 4k\non grass\n"
    assert prompt_in_infotext(f"a red cube\n{SETTINGS}") == "a red cube\n"
    assert (
        prompt_in_infotext(f"how to dance\nSteps: 3, and a turn\n{SETTINGS}") == "how to dance\nSteps: 3, and a turn\n"
    )
    assert prompt_in_infotext("a cube\nSteps: 9, Size: 8x8\nTemplate: {a|the} cube") == "a cube\n"
    assert prompt_in_infotext("a cube\nNegative prompt: ball") == "a cube\n"
    assert prompt_in_infotext(SETTINGS) == ""
    assert prompt_in_infotext("a cube\nin Steps: 3") is None


def is_utf8(text: str) -> bool:
    """Whether the bytes of this text in Latin-1 are UTF-8."""
    try:
        return bool(text.encode("latin-1").decode())
    except UnicodeError:
        return False


lines = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30)


@given(st.lists(lines, min_size=1, max_size=4), st.none() | lines)
@settings(max_examples=60, deadline=None)
def test_metadata_of_automatic1111(tmp_path: Path, said: list[str], negative: str | None) -> None:
    prompt = "\n".join(line for line in said if not line.strip().startswith("Negative prompt:"))
    text = "\n".join([prompt, *([f"Negative prompt: {negative}"] if negative is not None else []), SETTINGS])
    # These bytes mean "Ã©" by the format and "é" by most who write them: the latter is what is read.
    assume(text.isascii() or not is_utf8(text))
    path = png(tmp_path / "a.png", {"parameters": text})
    result = prompt_in_image(path)
    assert result is not None
    assert result.strip() == prompt.strip()
    comment = b"UNICODE\0" + text.encode("utf-16-be")
    result = prompt_in_image(commented(tmp_path / "a.jpg", comment))
    assert result is not None
    assert result.strip() == prompt.strip()


@pytest.mark.parametrize("suffix", ["jpg", "webp", "png", "tif"])
@pytest.mark.parametrize(
    ("code", "encoding"),
    [
        (b"UNICODE\0", "utf-16-be"),
        (b"UNICODE\0", "utf-16-le"),
        (b"UNICODE\0", "utf-16"),
        (b"ASCII\0\0\0", "utf-8"),
        (bytes(8), "utf-8"),
        (b"", "utf-8"),
    ],
)
def test_encodings_of_exif_comments(tmp_path: Path, suffix: str, code: bytes, encoding: str) -> None:
    path = commented(tmp_path / f"a.{suffix}", code + INFOTEXT.replace("cube", "立方体 é").encode(encoding))
    assert prompt_in_image(path) == "a red 立方体 é, 4k\non grass\n"


def test_other_comments_are_no_prompts(tmp_path: Path) -> None:
    assert prompt_in_image(commented(tmp_path / "a.jpg", b"ASCII\0\0\0Screenshot")) is None
    assert prompt_in_image(png(tmp_path / "a.png", {"Comment": "made with GIMP", "Description": "a cube"})) is None
    assert prompt_in_image(png(tmp_path / "a.png")) is None


def test_text_chunks_of_a_png(tmp_path: Path) -> None:
    for value in ("a café", "a café".encode(), "a café".encode("latin-1")):  # Pillow writes the first as Latin-1
        assert prompt_in_image(png(tmp_path / "a.png", {"parameters": value})) == "a café"
    for value in ("立方体", "立方体".encode()):
        assert prompt_in_image(png(tmp_path / "a.png", {"parameters": value})) == "立方体"
    assert prompt_in_image(png(tmp_path / "a.png", {"parameters": INFOTEXT}, compressed=True)) is not None
    assert prompt_in_image(png(tmp_path / "a.png", {"parameters": "{red|blue} cube"})) == "{red|blue} cube"
    assert prompt_in_image(png(tmp_path / "a.png", {"parameters": "{red|blue}\n" + SETTINGS})) == "{red|blue}\n"


def test_text_and_exif_behind_the_pixels_are_read(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = INFOTEXT.encode()
    for path in (png(tmp_path / "a.png", {"parameters": INFOTEXT}), png(tmp_path / "b.png", exif=exif.tobytes())):
        data = path.read_bytes()
        start, stop = (
            33,
            data.index(b"IDAT") - 4,
        )  # what stands between the header, which Pillow needs first, and pixels
        path.write_bytes(data[:start] + data[stop:-12] + data[start:stop] + data[-12:])
        with Image.open(path) as image:
            assert not image.info
        assert prompt_in_image(path) == "a red cube, 4k\non grass\n"


# other tools


@pytest.mark.parametrize(
    "text",
    [
        {"parameters": json.dumps({"sui_image_params": {"prompt": "a cube", "negativeprompt": "ball"}})},
        {"parameters": json.dumps({"prompt": "a cube", "full_prompt": ["a cube, 4k"]}), "fooocus_scheme": "fooocus"},
        {"invokeai_metadata": json.dumps({"positive_prompt": "a cube", "negative_prompt": "ball"}), "workflow": "{}"},
        {"Software": "NovelAI", "Description": "a cube", "Comment": json.dumps({"uc": "ball", "steps": 28})},
        {"Software": "NovelAI", "Description": "?", "Comment": json.dumps({"prompt": "a cube", "uc": "ball"})},
        {"Software": "NovelAI", "Comment": json.dumps({"v4_prompt": {"caption": {"base_caption": "a cube"}}})},
        {"Software": "NovelAI", "Description": "a cube", "Comment": "{broken"},
        {"prompt": "a cube"},
    ],
)
def test_metadata_of_other_tools_is_read(tmp_path: Path, text: dict[str, str | bytes]) -> None:
    assert prompt_in_image(png(tmp_path / "a.png", text)) == "a cube"


XMP = """<?xpacket begin="\ufeff"?><x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:exif="http://ns.adobe.com/exif/1.0/"ATTRIBUTE>
   <dc:description><rdf:Alt><rdf:li xml:lang="x-default">a cube&#xA;-ball</rdf:li></rdf:Alt></dc:description>
   <xmp:CreatorTool>Draw Things</xmp:CreatorTool>ELEMENT
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta><?xpacket end="w"?>"""
COMMENT = '{"c":"a &lt;red&gt; cube &amp; é\\nball","uc":"ugly","steps":8}'
ELEMENT = f'<exif:UserComment><rdf:Alt><rdf:li xml:lang="x-default">{COMMENT}</rdf:li></rdf:Alt></exif:UserComment>'


def xmp(element: str = "", attribute: str = "") -> str:
    return XMP.replace("ELEMENT", element).replace("ATTRIBUTE", attribute)


@pytest.mark.parametrize("packet", [xmp(ELEMENT), xmp(attribute=f" exif:UserComment='{COMMENT}'")])
def test_xmp_of_draw_things_is_read(tmp_path: Path, packet: str) -> None:
    expected = "a <red> cube & é\nball"
    itxt = PngInfo()
    itxt.add_itxt("XML:com.adobe.xmp", packet)
    SMALL.save(tmp_path / "a.png", pnginfo=itxt)
    assert prompt_in_image(tmp_path / "a.png") == expected
    for suffix in ("jpg", "webp"):
        SMALL.save(tmp_path / f"a.{suffix}", xmp=packet.encode())
        assert prompt_in_image(tmp_path / f"a.{suffix}") == expected
    comment = b"ASCII\0\0\0" + json.dumps({"c": "a cube"}).encode()
    assert prompt_in_image(commented(tmp_path / "b.jpg", comment)) == "a cube"


def test_xmp_that_is_broken_or_a_bomb_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    for packet, message in (
        (xmp(ELEMENT)[:-40], "not valid XML"),
        ('<!DOCTYPE x [<!ENTITY a "b">]>' + xmp(ELEMENT), "defines entities"),
        (xmp(ELEMENT.replace('"uc"', "uc")), "not valid JSON"),
    ):
        SMALL.save(path, xmp=packet.encode())
        assert message in problem(prompt_in_image, path)
    SMALL.save(path, xmp=xmp().encode())
    assert prompt_in_image(path) is None


# malformed files


@pytest.mark.parametrize("name", ["parameters", "invokeai_metadata", "prompt"])
def test_malformed_json_is_an_error(tmp_path: Path, name: str) -> None:
    for text in (
        '{"a": ',
        '{"prompt": 3}',
        '{"prompt": null}',
        '{"a":' * 100_000,
        '{"3": {"inputs": {"positive": [[]]}}}',
    ):
        path = png(tmp_path / "a.png", {name: text})
        try:
            assert prompt_in_image(path) is None
        except DataError as error:
            assert str(error) == "has metadata that is not valid JSON"  # noqa: PT017


def test_text_bomb_is_an_error(tmp_path: Path) -> None:
    info = PngInfo()
    info.add(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(50_000_000)))
    SMALL.save(tmp_path / "a.png", pnginfo=info)
    assert "cannot be read (ValueError: Decompressed data too large" in problem(prompt_in_image, tmp_path / "a.png")


def test_damaged_files_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("a red cube")
    assert "is not an image of a format whose metadata is read" in problem(prompt_in_image, path)
    path.write_bytes(png_header(12_000, 12_000))  # too large to be decoded in search of text
    assert prompt_in_image(path) is None
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12rubbish"
    assert prompt_in_image(png(path, {"parameters": "a cube"}, exif=exif)) == "a cube"


@given(st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_any_bytes_as_metadata(tmp_path: Path, content: bytes) -> None:
    for path in (
        png(
            tmp_path / "a.png",
            {"parameters": content.replace(b"\0", b""), "prompt": b"{" + content.replace(b"\0", b"")},
        ),
        commented(tmp_path / "a.jpg", b"UNICODE\0" + content),
    ):
        try:
            assert isinstance(prompt_in_image(path), str | None)
        except DataError as error:
            assert "\n" not in str(error)  # noqa: PT017
