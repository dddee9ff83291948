"""A file of one's own preferences, as tests of reading it need it."""

import json
from pathlib import Path

GOOD = {"prompt": "a red cube", "a": "1.png", "b": "2.png", "p_a": 0.7}


def write_rows(folder: Path, *rows: object) -> Path:
    """A file of these rows; text goes in as it is."""
    path = folder / "preferences.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), "utf-8")
    return path
