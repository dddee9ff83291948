"""The formats of preference pairs: what a row of each holds, and images as JPEG."""

import io
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from mlxpref.config import JudgeSettings
from mlxpref.data.archives import ArchiveCache
from mlxpref.data.image_cache import ImageCache
from mlxpref.data.image_files import ImageFiles
from mlxpref.data.images import PIXEL_LIMIT, load_image, open_image, read_content
from mlxpref.engine.profile import PROMPT_SLOT, own_profile
from mlxpref.errors import ImageError
from mlxpref.lru import LRU
from mlxpref.preferences import ImageLike, Preference

if TYPE_CHECKING:
    import pyarrow as pa

Format = Literal["diffusion-dpo", "hpsv3", "trl", "jsonl"]
Row = dict[str, Any]
PARQUET: tuple[Format, ...] = ("diffusion-dpo", "trl")
"""The formats that hold the images themselves."""
TIES: tuple[Format, ...] = ("jsonl",)
"""The formats that can say that both images are preferred alike: Diffusion-DPO's script takes 0.5 for a win of the
first one, HPSv3's for one of `path1`."""
_QUALITY = 95
_JPEG_BYTES = 128 << 20
"""Bytes of JPEGs that are kept for the next pairs."""


class JpegImages:
    """Images as the bytes of JPEGs; the latest are kept."""

    def __init__(self) -> None:
        self._archives = ArchiveCache()
        self._kept: LRU[Path | object, bytes] = LRU(_JPEG_BYTES, len)

    def of(self, image: ImageLike) -> bytes:
        """The JPEG of an image, its own where that is one as `jpeg_of` takes it; ImageError if it cannot be read."""
        key = id(image) if isinstance(image, Image.Image) else image
        if (content := self._kept.get(key)) is None:
            if isinstance(image, Image.Image):
                content = _encoded(load_image(image))
            else:
                try:
                    content = jpeg_of(read_content(image, self._archives))
                except ImageError as error:
                    raise ImageError(str(image), error.reason) from error
            self._kept.put(key, content)
        return content


def jpeg_of(content: bytes) -> bytes:
    """An image file as a JPEG: byte for byte if it is one, else upright, on white, in best quality.

    A JPEG that EXIF turns, one with another colour space than RGB or grey, and one that only our own reader can decode
    are encoded anew. ImageError if it cannot be read.
    """
    with suppress(Exception), open_image(io.BytesIO(content)) as image:  # the other reader says what is wrong
        plain = image.format == "JPEG" and image.mode in ("RGB", "L") and image.getexif().get(0x0112, 1) == 1
        if plain and image.width * image.height <= PIXEL_LIMIT and any(content[-16:]):  # zeros decode as grey
            image.load()
            return content
    return _encoded(load_image(io.BytesIO(content)))


def _encoded(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_QUALITY, subsampling=0)
    return file.getvalue()


class FileNames:
    """The names of images for a file of rows; each is decoded once, to know that it can be."""

    def __init__(self, path: Path) -> None:
        self._cache = ImageCache(JudgeSettings().max_pixels, memory=0)
        self._files, self.folder = ImageFiles(path, self._cache), path.absolute().parent

    def of(self, image: ImageLike) -> str:
        """The path of an image from the file's folder; ImageError if it cannot be read."""
        if not isinstance(image, Image.Image):
            self._cache.size(image)
        return self._files.of(image)


def row_of(to: Format, pair: Preference, image_of: Callable[[ImageLike], Any]) -> Row:
    """A pair as a row; `image_of` gives the cell of an image."""
    a, b, p = image_of(pair.a), image_of(pair.b), float(pair.p_people)
    match to:
        case "diffusion-dpo":
            first = float(p > 0.5)
            return {"jpg_0": a, "jpg_1": b, "label_0": first, "label_1": 1 - first, "caption": pair.prompt, "p_a": p}
        case "trl":
            images = [{"bytes": each, "path": None} for each in (a, b)]
            return {"images": images, **_conversation(pair.prompt, p > 0.5), "caption": pair.prompt, "p_a": p}
        case "hpsv3":
            best, share = max(p, 1 - p), [max(p, 1 - p) * pair.votes, min(p, 1 - p) * pair.votes]
            paths = (a, b) if p > 0.5 else (b, a)
            named = {"path1": paths[0], "path2": paths[1]}
            return {"prompt": pair.prompt, "choice_dist": share, "confidence": best, **named}
        case "jsonl":
            votes = {"votes": pair.votes} if pair.votes > 1 else {}
            return {"prompt": pair.prompt, "a": a, "b": b, "p_a": p, **votes, "group": pair.group or pair.prompt}


def json_line(row: Row) -> bytes:
    """A row as one line of JSON; bytes of a file name that are no text are escaped, as Python reads them."""
    return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace")


def schema_of(to: Format) -> "pa.Schema":
    """The columns of a format in parquet; TRL's also tell the library `datasets` which are images."""
    import pyarrow as pa

    if to == "diffusion-dpo":
        numbers = [(name, pa.float64()) for name in ("label_0", "label_1")]
        images = [(name, pa.binary()) for name in ("jpg_0", "jpg_1")]
        return pa.schema([*images, *numbers, ("caption", pa.string()), ("p_a", pa.float64())])
    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part))]))
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = [("images", pa.list_(picture)), *((name, messages) for name in ("prompt", "chosen", "rejected"))]
    text, number = ({"dtype": name, "_type": "Value"} for name in ("string", "float64"))
    told: dict[str, Any] = {"images": [{"_type": "Image"}], "caption": text, "p_a": number}
    told |= {
        name: [{"role": text, "content": [{"type": text, "text": text}]}] for name in ("prompt", "chosen", "rejected")
    }
    metadata = {"huggingface": json.dumps({"info": {"features": told}})}
    return pa.schema([*columns, ("caption", pa.string()), ("p_a", pa.float64())], metadata=metadata)


def _conversation(prompt: str, first_wins: bool) -> Row:
    """The judge's own question about two images, with the right answer and the wrong one, both without reasons."""
    profile = own_profile()
    labels = (profile.first[0], profile.second[0])
    answers = [[{"role": "assistant", "content": [_text(profile.at_once + label + profile.end)]}] for label in labels]
    chosen, rejected = answers if first_wins else answers[::-1]
    question = [
        {
            "role": message["role"],
            "content": [
                _text(part["text"].replace(PROMPT_SLOT, prompt)) if "text" in part else {"type": "image", "text": None}
                for part in ([_text(message["content"])] if isinstance(message["content"], str) else message["content"])
            ],
        }
        for message in profile.messages()
    ]
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
