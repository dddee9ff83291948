"""Text for a person: nothing in it acts on a terminal, everything stands on one line."""

import re

__all__ = ["CONTROL", "UNDECODED", "plain"]

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# Bytes of a file name that are not UTF-8, as Python holds them; they cannot be printed.
UNDECODED = re.compile(r"[\ud800-\udfff]")


def plain(text: object) -> str:
    """Text that does nothing to a terminal but show, on one line.

    Control and direction characters are left out, line breaks are blanks, bytes that are no text stand as \\xff.
    """
    shown = CONTROL.sub(lambda match: " " if match[0].isspace() else "", str(text))
    return UNDECODED.sub(lambda match: f"\\x{ord(match[0]) & 0xFF:02x}", shown)
