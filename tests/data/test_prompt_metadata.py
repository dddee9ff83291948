import html
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mlxpref.data import prompt_metadata
from mlxpref.data.prompt_metadata import prompt_in_image, prompt_in_infotext
from mlxpref.errors import DataError
from tests.data.test_containers import chunk, segment
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
        (b"UNICODE\0", "utf-8"),
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


def test_xmp_that_is_broken_or_a_bomb(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    for packet in (xmp(ELEMENT)[:-40], '<!DOCTYPE x [<!ENTITY a "b">]>' + xmp(ELEMENT)):
        SMALL.save(path, xmp=packet.encode())
        assert prompt_in_image(path) == "a <red> cube & é\nball"
    SMALL.save(path, xmp=xmp(ELEMENT.replace('"uc"', "uc")).encode())
    assert "not valid JSON" in problem(prompt_in_image, path)
    for packet in (xmp(), xmp()[:-40]):
        SMALL.save(path, xmp=packet.encode())
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


def test_text_bombs_are_not_unpacked(tmp_path: Path) -> None:
    path, info = tmp_path / "a.png", PngInfo()
    for name in (b"a", b"b", b"parameters"):
        info.add(b"zTXt", name + b"\0\0" + zlib.compress(bytes(6_000)))
    SMALL.save(path, pnginfo=info)
    with patch.object(prompt_metadata, "TEXT_LIMIT", 10_000):
        assert "unpacks to more than" in problem(prompt_in_image, path)
    info.add_text("prompt", "a cube")
    SMALL.save(path, pnginfo=info)
    with patch.object(prompt_metadata, "TEXT_LIMIT", 10_000):
        assert prompt_in_image(path) == "a cube"


# the same text in any container

FORMS = {
    "AUTOMATIC1111, SD.Next": INFOTEXT,
    "SwarmUI": json.dumps({"sui_image_params": {"prompt": "a cube", "negativeprompt": "ball"}}),
    "Fooocus": json.dumps({"prompt": "a cube", "negative_prompt": "ball", "version": "Fooocus v2.5.5"}),
    "InvokeAI": json.dumps({"positive_prompt": "a cube", "app_version": "5.0"}),
    "InvokeAI 2": json.dumps({"app_id": "invoke-ai/InvokeAI", "image": {"prompt": [{"prompt": "a cube [ball]"}]}}),
    "InvokeAI 1": json.dumps({"image": {"prompt": "a cube [ball]"}}),
    "NovelAI": json.dumps({"Software": "NovelAI", "Comment": json.dumps({"prompt": "a cube", "uc": "ball"})}),
    "NovelAI 1": json.dumps({"Software": "NovelAI", "Description": "a cube", "Comment": json.dumps({"uc": "ball"})}),
    "Draw Things": json.dumps({"c": "a cube", "uc": "ball", "steps": 8}),
    "ComfyUI": json.dumps({"3": {"inputs": {"text": "a cube"}}, "4": {"inputs": {"steps": 9, "positive": ["3", 0]}}}),
    "extension": "Prompt: " + json.dumps({"4": {"inputs": {"steps": 9, "positive": "a cube"}}}),
    "beside braces": json.dumps({"uc": "{red|blue}", "Comment": json.dumps({"prompt": "a cube"})}),
    "SwarmUI inside": json.dumps({"parameters": json.dumps({"sui_image_params": {"prompt": "a cube"}})}),
}


def boxed(box: str, path: Path, text: str) -> Path:
    """An image with this text in this place; other places have what is no prompt."""
    exif, options = Image.Exif(), dict[str, Any]()
    tags = {"ImageDescription": 0x010E, "Make": 0x010F, "Model": 0x0110, "XPComment": 0x9C9C, "XPTitle": 0x9C9B}
    if box in tags:
        exif[0x0131] = "Adobe Photoshop"
        exif[tags[box]] = text.encode("utf-16-le") if box.startswith("XP") else text
        options["exif"] = exif
    elif box == "UserComment":
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
        options["exif"] = exif.tobytes()
    elif box == "xmp":
        options["xmp"] = xmp(f"<dc:source>{html.escape(text)}</dc:source>").encode()
    elif box == "comment":
        options["comment"] = text.encode()
    else:
        info = PngInfo()
        info.add_text("Software", "GIMP")
        info.add_itxt("Anything", text, zip=True) if box == "iTXt" else info.add_text("Anything", text, box == "zTXt")
        options["pnginfo"] = info
    SMALL.save(path, **options)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_from_every_container(tmp_path: Path, form: str) -> None:
    exif = ("UserComment", "ImageDescription", "Make", "Model", "XPComment", "XPTitle")
    boxes = {"png": (*exif, "tEXt", "zTXt", "iTXt"), "webp": (*exif, "xmp"), "jpg": (*exif, "xmp", "comment")}
    boxes |= {"gif": ("comment",), "tif": exif[:3], "avif": (*exif, "xmp")}
    for suffix, places in boxes.items():
        for box in places:
            prompt = prompt_in_image(boxed(box, tmp_path / f"a.{suffix}", FORMS[form]))
            expected = "a red cube, 4k\non grass\n" if form.startswith("AUTO") else "a cube"
            assert prompt == expected, (suffix, box)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"a red cube, soft light [blurry, text]" -s 50 -S 12 -W 512 -C 7.5', "a red cube, soft light"),
        ("a red cube -s50 -W512 -H512", "a red cube"),
        ('"a blue-green cube - on grass" -s 50', "a blue-green cube - on grass"),
    ],
)
def test_commands_of_invokeai(tmp_path: Path, text: str, expected: str) -> None:
    assert prompt_in_image(png(tmp_path / "a.png", {"Dream": text})) == expected


def test_prompts_beside_damage(tmp_path: Path) -> None:
    text = png(tmp_path / "a.png", {"parameters": INFOTEXT}).read_bytes()
    checksum = text.index(b"IDAT") - 8
    large = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2 << 20))) + chunk(
        b"zTXt", b"workflow\0\0" + zlib.compress(bytes(range(256)) * 20_000)
    )
    jpeg = boxed("UserComment", tmp_path / "a.jpg", INFOTEXT).read_bytes()
    webp = boxed("UserComment", tmp_path / "a.webp", INFOTEXT).read_bytes()
    for number, data in enumerate(
        (
            text[:checksum] + b"abcd" + text[checksum + 4 :],
            text[:33] + large + text[33:],
            text[:-12],
            jpeg[:-2],
            jpeg[:2] + segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12rubbish") + jpeg[2:],
            webp[:-9],  # cut within the settings, behind the prompt
            webp + b"more",
        )
    ):
        path = tmp_path / str(number)
        path.write_bytes(data)
        assert prompt_in_image(path) == "a red cube, 4k\non grass\n", number


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
