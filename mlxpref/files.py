"""Writing files so that nothing is lost: beside their name first, then renamed; and one writer at a time."""

import fcntl
import os
from pathlib import Path
from typing import IO

__all__ = ["lock", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Write a text file; whoever reads the name sees the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def lock(file: IO[bytes]) -> bool:
    """Keep other processes from locking an open file until it is closed; False if one has locked it already."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True
