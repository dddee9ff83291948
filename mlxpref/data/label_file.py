"""The file of a labelling: one line a click; lines are never changed or removed.

A line is a row of preferences (`prompt`, `a`, `b`, `p_a`) with more keys: the `answer`, the image that was shown first,
its number. Skips and undos are lines, too, with `p_a` null.
"""

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from mlxpref.data.find_images import locate
from mlxpref.errors import ConfigError, DataError
from mlxpref.files import lock
from mlxpref.log import logger
from mlxpref.text import few, first_ten

TRAIN, TEST = "train", "test"
"""The splits of records: to learn from, and to measure with."""
Answer = Literal["a", "b", "tie", "skip", "undo"]
_P_PEOPLE: Mapping[str, float] = {"a": 1.0, "b": 0.0, "tie": 0.5}
_LABEL_KEYS = frozenset({"number", "answer", "shown_first"})
"""The keys that identify a line of a labelling."""
_BEGIN = b'{"number": '
"""The beginning of every line, to recognise half a line."""
_NOT_OURS = "not a line that `mlxpref label` wrote"


@dataclass(frozen=True, slots=True)
class LabelRecord:
    """One line: a pair as it was shown, and the answer.

    `number` counts the lines, `a` and `b` are the images' paths, relative to the file's folder, `shown_first` is the
    one that was first. `seconds` are from the pair's display to the click, `time` is UTC. `undoes` is the number of the
    line that an undo takes back; its other fields are that line's.
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
        """The answer's preference for a; None for a skip and an undo."""
        return _P_PEOPLE.get(self.answer)

    @property
    def pair(self) -> tuple[str, str, str]:
        """The key of a pair: prompt, a and b."""
        return self.prompt, self.a, self.b

    def line(self) -> bytes:
        """The record as a line, with its line feed."""
        row = {}
        for name, value in asdict(self).items():
            if name == "answer":
                row["p_a"] = self.p_people
            if name != "undoes" or value is not None:
                row[name] = value
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def record_of(row: Mapping[str, Any]) -> LabelRecord:
    """The record in a row of a file; DataError for rows that no labelling wrote."""
    try:
        record = LabelRecord(**{name: value for name, value in row.items() if name != "p_a"})
    except TypeError as error:
        raise DataError(_NOT_OURS) from error
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
        raise DataError(_NOT_OURS)
    return record


def active_records(records: Iterable[LabelRecord]) -> list[LabelRecord]:
    """The answers and skips without undone ones, in their order.

    An undo refers to the nearest earlier line of that number, so that files may be concatenated.
    """
    active: dict[int, LabelRecord] = {}
    latest: dict[int, int] = {}
    for place, record in enumerate(records):
        if record.undoes is None:
            active[place] = record
            latest[record.number] = place
        else:
            active.pop(latest.get(record.undoes, -1), None)
    return list(active.values())


def merge_answers(
    rows: Iterable[tuple[int, dict[str, Any] | DataError]], path: Path, notes: set[str]
) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """The numbered rows of a file of preferences, with one row for all answers of a labelling about the same pair.

    It has their mean, and one vote, as one person gave them. Undone and skipped answers are no rows. Users may delete
    pictures after choosing: one of the `notes` counts pairs without one, which are left out.
    """
    entries: list[tuple[int, dict[str, Any] | DataError]] = []
    records: list[LabelRecord] = []
    lines: dict[int, int] = {}
    for number, row in rows:
        if isinstance(row, DataError) or not row.keys() >= _LABEL_KEYS:
            if records or entries:
                entries.append((number, row))
            else:  # a row at a time, as there may be a million
                yield number, row
            continue
        try:
            records.append(record_of(row))
            lines[id(records[-1])] = number
        except DataError as error:
            entries.append((number, error))
    answers: dict[tuple[str, ...], list[LabelRecord]] = {}
    for record in active_records(records):
        if record.p_people is not None:
            answers.setdefault((*record.pair, record.split), []).append(record)
    without_picture = []
    for (prompt, a, b, split), opinions in answers.items():
        if missing := [name for name in (a, b) if locate(name, path.parent) is None]:
            without_picture.append(missing[0])
            continue
        p_people = sum(record.p_people or 0.0 for record in opinions) / len(opinions)
        entries.append((lines[id(opinions[0])], {"prompt": prompt, "a": a, "b": b, "p_a": p_people, "split": split}))
    if without_picture:
        count = f"{len(without_picture)} of {len(answers)} pairs"
        notes.add(f"{path}: {count} are left out, as a picture is gone, such as {without_picture[0]}")
    yield from sorted(entries, key=lambda row: row[0])


class LabelFile:
    """A locked file of records, to append to.

    When `append` returns, the record is on the disk. Opening the file removes a last line that a process left
    unfinished, with a warning. DataError for a file with anything else.
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
            self._size = os.fstat(self._file.fileno()).st_size
            """The bytes of the records; a failed write may leave more."""
        except BaseException:
            self._file.close()
            raise

    def append(self, record: LabelRecord) -> None:
        """Add a record; DataError, with the file unchanged, if it cannot be written."""
        descriptor, line = self._file.fileno(), record.line()
        try:
            if not self.path.exists() or not os.path.samestat(self.path.stat(), os.fstat(descriptor)):
                raise DataError(
                    f"{self.path}: the file was moved or removed, this answer is not kept; put it back, or end "
                    "and start `mlxpref label` again"
                )
            os.ftruncate(descriptor, self._size)
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(descriptor, self._size)
            raise DataError(
                f"{self.path}: this answer cannot be kept ({error.strerror}); correct that and answer again"
            ) from error
        self._size += len(line)
        self.records.append(record)

    def close(self) -> None:
        """Close and unlock the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self) -> list[LabelRecord]:
        content = self.path.read_bytes()
        whole, _, tail = content.rpartition(b"\n")
        records, places = [], dict[str, list[str]]()
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            try:
                records += [_parsed(line)] if line.strip() else []
            except DataError as error:
                places.setdefault(str(error), []).append(f"line {number}")
        if tail and not _is_cut_off(tail):
            places.setdefault(_NOT_OURS, []).append("the end")
        if places:
            errors = [f"{few(lines, 3)}: {error}" for error, lines in places.items()]
            raise DataError(f"{self.path}: holds other lines; give another --output:\n  {first_ten(errors)}")
        if tail:  # a record without its line feed, or half a record
            try:
                records.append(_parsed(tail))
                self._file.write(b"\n")
            except DataError:
                os.ftruncate(self._file.fileno(), len(content) - len(tail))
                logger.warning(
                    f"{self.path}: the last line was cut off when it was written; it is removed, all others are there"
                )
        return records


def _parsed(line: bytes) -> LabelRecord:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError("not valid JSON") from error
    if not isinstance(row, dict) or not row.keys() >= _LABEL_KEYS:
        raise DataError(_NOT_OURS)
    return record_of(row)


def _is_cut_off(tail: bytes) -> bool:
    """Whether this may be the beginning of our line, or a file system's rest of one."""
    with suppress(ValueError, RecursionError):
        row = json.loads(tail)  # a whole line without its line feed, ours or not
        return isinstance(row, dict) and row.keys() >= _LABEL_KEYS
    return tail.startswith(_BEGIN) or _BEGIN.startswith(tail) or not tail.strip(b"\0")
