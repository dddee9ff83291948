"""Profiles for tests: our own with some changes, in a file."""

import json
import re
from pathlib import Path
from typing import Any

from mlxpref.engine.profile import own_profile

WITHOUT_THINKING = {"thinks": False, "think_begin": None, "think_end": None, "closing": None, "at_once": None}


def own_with(file: Path, **changes: Any) -> Path:
    """Write our own profile with other values of some keys; None leaves a key out."""
    text = own_profile().text()
    for key, value in changes.items():
        text = re.sub(rf"^{key} = .*\n", "", text, flags=re.MULTILINE)
        text += "" if value is None else f"{key} = {json.dumps(value)}\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text.replace('name = "mlxpref"', f"name = {json.dumps(file.stem)}"))
    return file
