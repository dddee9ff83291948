"""The file of a labelling: every click is one line, and no line is ever changed or taken out.

A line is a row of preferences (`prompt`, `a`, `b`, `p_a`) with more keys: which `answer` it was, which image was shown
first, its number. A skip and an undo are lines, too, whose `p_a` is null. `datasets.jsonl` reads such a file as it
stands: without what was undone or skipped, answers about the same pair together.
"""

import errno
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

from mlxpref.errors import ConfigError, DataError
from mlxpref.files import lock
from mlxpref.log import logger
from mlxpref.text import first_ten

__all__ = [
    "LABEL_KEYS",
    "TEST",
    "TRAIN",
    "Answer",
    "LabelFile",
    "LabelRecord",
    "active_records",
    "pair_of",
    "record_of",
]

TRAIN, TEST = "train", "test"
"""The splits of records: what is learned from, and what measures."""
Answer = Literal["a", "b", "tie", "skip", "undo"]
_P_A: Mapping[str, float] = {"a": 1.0, "b": 0.0, "tie": 0.5}
LABEL_KEYS = frozenset({"number", "answer", "shown_first"})
"""The keys by which a row of preferences is known for a line of a labelling."""
_BEGIN = b'{"number": '
"""What every line begins with, so that half of one is known for what it is."""


@dataclass(frozen=True, slots=True)
class LabelRecord:
    """One line: a pair as it was shown, and what was said of it.

    `number` counts the lines, `a` and `b` are the images' paths as they are written, relative to the file's folder,
    `shown_first` says which of them stood first. `seconds` are from seeing the pair to the click, `time` is UTC.
    `undoes` is the number of the line that an undo takes back; its other fields are that line's.
    """

    number: int
    prompt: str
    a: str
    b: str
    answer: Answer
    shown_first: Literal["a", "b"]
    split: str
    seconds: float | None = None
    time: str = ""
    undoes: int | None = None

    @property
    def p_people(self) -> float | None:
        """The preference for a that was stated; None for a skip and an undo."""
        return _P_A.get(self.answer)

    def line(self) -> bytes:
        """The record as it is written, with its line feed."""
        row = {
            "number": self.number,
            "prompt": self.prompt,
            "a": self.a,
            "b": self.b,
            "p_a": self.p_people,
            "answer": self.answer,
            "shown_first": self.shown_first,
            "split": self.split,
            "seconds": self.seconds,
            "time": self.time,
        }
        undoes = {} if self.undoes is None else {"undoes": self.undoes}
        return json.dumps(row | undoes, ensure_ascii=False).encode() + b"\n"


def record_of(row: Mapping[str, Any]) -> LabelRecord:
    """The record that a row of a file is; DataError for what no labelling wrote."""
    try:
        record = LabelRecord(**{name: value for name, value in row.items() if name != "p_a"})
    except TypeError as error:
        raise DataError("not a line that `mlxpref label` wrote") from error
    texts = (record.prompt, record.a, record.b, record.split, record.time)
    numbers = [record.number, *([record.undoes] if record.answer == "undo" else [])]
    if (
        not all(isinstance(text, str) for text in texts)
        or not all(isinstance(number, int) and number > 0 for number in numbers)
        or record.answer not in get_args(Answer)
        or record.shown_first not in ("a", "b")
        or not record.a < record.b
        or not isinstance(record.seconds, int | float | None)
        or row.get("p_a") != record.p_people
    ):
        raise DataError("not a line that `mlxpref label` wrote")
    return record


def active_records(records: Iterable[LabelRecord]) -> list[LabelRecord]:
    """The answers and skips that were not taken back, in their order.

    An undo is about the nearest line of that number before it, so that files may be put one behind the other.
    """
    kept: dict[int, LabelRecord] = {}
    latest: dict[int, int] = {}
    for place, record in enumerate(records):
        if record.undoes is None:
            kept[place] = record
            latest[record.number] = place
        else:
            kept.pop(latest.get(record.undoes, -1), None)
    return list(kept.values())


def pair_of(record: LabelRecord) -> tuple[str, str, str]:
    """What records about the same pair share: prompt, a and b."""
    return record.prompt, record.a, record.b


class LabelFile:
    """A file of records that is appended to; no other process can open it meanwhile.

    What `append` was given is on the disk when it returns. A line that was cut off by the end of a process is taken
    out when the file is opened, with a warning. DataError for a file that holds anything else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror}); give another --output") from error
        try:
            if not lock(self._file):
                raise ConfigError(f"{path}: another `mlxpref label` writes there; use its page, or end it")
            self.records = self._read()
            self._torn: int | None = None
            """Where an answer begins that was not kept, and could not be taken out either."""
        except BaseException:
            self._file.close()
            raise

    def append(self, record: LabelRecord) -> None:
        """Add a record; DataError, with the file as it was, where it cannot be written."""
        size = os.fstat(self._file.fileno()).st_size if self._torn is None else self._torn
        try:
            if not self.path.exists() or not os.path.samestat(self.path.stat(), os.fstat(self._file.fileno())):
                raise DataError(
                    f"{self.path}: the file was moved or removed, this answer is not kept; put it back, or end "
                    "and start `mlxpref label` again"
                )
            line = record.line()
            if self._torn is not None:
                os.ftruncate(self._file.fileno(), size)
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            self._torn = size
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), size)
                self._torn = None
            raise DataError(
                f"{self.path}: this answer cannot be kept ({error.strerror}); correct that and answer again"
            ) from error
        self._torn = None
        self.records.append(record)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> list[LabelRecord]:
        content = self.path.read_bytes()
        whole, _, tail = content.rpartition(b"\n")
        records, bad = [], []
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            try:
                records += [_parsed(line)] if line.strip() else []
            except DataError as error:
                bad.append(f"line {number}: {error}")
        if tail and not _is_cut_off(tail):
            bad.append("the end: no line of `mlxpref label`")
        if bad:
            raise DataError(f"{self.path}: holds other lines; give another --output:\n  {first_ten(bad)}")
        if tail:
            records += self._mended(tail, len(content) - len(tail))
        return records

    def _mended(self, tail: bytes, size: int) -> list[LabelRecord]:
        """What follows the last line feed: a record that only lacks its own, or the half of one, which is cut off."""
        try:
            record = _parsed(tail)
        except DataError:
            os.ftruncate(self._file.fileno(), size)
            logger.warning(
                f"{self.path}: the last line was cut off when it was written; it is removed, all others are there"
            )
            return []
        self._file.write(b"\n")
        return [record]


def _parsed(line: bytes) -> LabelRecord:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError("not valid JSON") from error
    if not isinstance(row, dict) or not row.keys() >= LABEL_KEYS:
        raise DataError("not a line that `mlxpref label` wrote")
    return record_of(row)


def _is_cut_off(tail: bytes) -> bool:
    """Whether this may be the beginning of a line of ours, or what a file system leaves in its place."""
    with suppress(ValueError, RecursionError):
        found = json.loads(tail)  # a whole line: one of ours, but for its line feed, or somebody else's
        return isinstance(found, dict) and found.keys() >= LABEL_KEYS
    return tail.startswith(_BEGIN) or _BEGIN.startswith(tail) or not tail.strip(b"\0")
