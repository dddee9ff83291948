"""The files of a model folder by name, and JSON that is read as if it were hostile."""

import json
from pathlib import Path
from typing import Any

from mlxpref.errors import ModelError

__all__ = ["CONFIG", "DOWNLOAD_AGAIN", "INDEX", "PROCESSORS", "RECORD", "SIDE_FILES", "printable", "read_json_object"]

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
"""Says which tensor is in which file, where there are several."""
RECORD = "mlxpref.json"
"""Says where a converted folder comes from and what was measured of it."""
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Settings of the image processor; a model has one of the two."""
SIDE_FILES = (
    *PROCESSORS, "video_preprocessor_config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.json",
    "chat_template.jinja",
)  # fmt: skip
"""What a model reads beside its config and its weights."""
DOWNLOAD_AGAIN = "download the checkpoint again"


def read_json_object(file: Path, limit: int = 64 << 20, remedy: str = DOWNLOAD_AGAIN) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; ModelError with a remedy for anything else."""
    try:
        if not file.is_file():
            raise ValueError("no such file")
        with file.open("rb") as stream:
            content = stream.read(limit + 1)
        if len(content) > limit:
            raise ValueError(f"larger than {limit} bytes")
        value = json.loads(content.decode("utf-8"))
        if b"\\ud" in content.lower():  # half a character can be read, and then not be written
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        if not isinstance(value, dict):
            raise ValueError("no object at its top")
    except RecursionError as error:
        raise ModelError(f"{file}: not readable as JSON: nested too deeply; {remedy}") from error
    except (OSError, ValueError, MemoryError) as error:
        raise ModelError(f"{file}: not readable as JSON: {printable(error)}; {remedy}") from error
    return value


def printable(text: object) -> str:
    """Text from a file on one line of at most 300 characters, all of which can be printed."""
    line = " ".join(str(text).split())[:300]
    return "".join(character if character.isprintable() else "?" for character in line)
