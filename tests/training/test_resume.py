"""Saved states: what is written comes back, and wherever writing ends, a readable one is there."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxpref.errors import ConfigError
from mlxpref.training.resume import STATE_FILES, RunState, read_state, write_state
from tests.messages import messages

SIZES = {"log.jsonl": 70, "rollouts.jsonl": 300}


def state(step: int) -> RunState:
    arrays = {
        "optimizer.step": mx.array(step, mx.uint64),
        "adapter.a": mx.arange(6, dtype=mx.float32).reshape(2, 3) / 7 + step,
        "adapter.b": mx.full((2,), 0.1 * step, mx.bfloat16),
    }
    return RunState(step, arrays, {"failures": step, "held_out": {"accuracy": 0.1 + 0.2}}, SIZES)


def read(run: Path) -> tuple[RunState | None, str]:
    with messages() as warnings:
        return read_state(run), "\n".join(warnings)


def step_read(run: Path) -> int:
    state, _ = read(run)
    assert state is not None
    return state.step


def test_written_state_is_read_back(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_state(tmp_path, state(step))
    last, warnings = read(tmp_path)
    assert last is not None
    assert warnings == ""
    expected = state(3)
    assert (last.step, last.numbers, last.sizes, last.complete) == (3, expected.numbers, expected.sizes, False)
    assert set(last.arrays) == set(expected.arrays)
    for name, array in expected.arrays.items():
        assert last.arrays[name].dtype == array.dtype
        assert last.arrays[name].shape == array.shape
        assert mx.array_equal(last.arrays[name], array)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {name for name in STATE_FILES if not name.startswith("checkpoint.new/")}
    assert shutil.which("sha256sum") is None or not subprocess.call(
        ["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=tmp_path / "checkpoint"
    )


def test_read_state_survives_its_file(tmp_path: Path) -> None:
    write_state(tmp_path, state(1))
    saved_state, _ = read(tmp_path)
    write_state(tmp_path, state(2))
    shutil.rmtree(tmp_path / "checkpoint.previous")
    assert saved_state is not None
    assert all(mx.array_equal(saved_state.arrays[name], array) for name, array in state(1).arrays.items())


def test_without_a_state_the_run_starts_over(tmp_path: Path) -> None:
    assert read(tmp_path) == (None, f"{tmp_path}: no step was saved yet: the run starts over")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a bit": flip,
    "the end": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "all": lambda file: file.write_bytes(b""),
    "the file": lambda file: file.unlink(),
}


@pytest.mark.parametrize("name", ["arrays.safetensors", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_state_falls_back(damage: Callable[[Path], Any], name: str, tmp_path: Path) -> None:
    for step in (1, 2):
        write_state(tmp_path, state(step))
    damage(tmp_path / "checkpoint" / name)
    saved_state, warnings = read(tmp_path)
    assert saved_state is not None
    assert saved_state.step == 1
    assert warnings == f"{tmp_path / 'checkpoint'}: damaged; the run continues from the one before, of step 1"
    # The good one must outlive the next one, which the damaged one must not take the place of.
    write_state(tmp_path, state(3))
    assert step_read(tmp_path) == 3
    damage(tmp_path / "checkpoint" / name)
    assert step_read(tmp_path) == 1
    damage(tmp_path / "checkpoint.previous" / name)
    saved_state, warnings = read(tmp_path)
    assert saved_state is None
    assert "damaged, and there is no other: the run starts over" in warnings
    assert f"{tmp_path / 'checkpoint.previous'}" in warnings
    write_state(tmp_path, state(4))
    assert step_read(tmp_path) == 4


class Killed(BaseException):
    """The process is no more."""


class Killer:
    """Ends the process in its nth deed on the disk, which is then half done; whatever is tried later does nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last: int) -> None:
        self.left, self.dead = last, False
        for owner, name in (
            (Path, "rename"),
            (Path, "mkdir"),
            (Path, "write_text"),
            (mx, "save_safetensors"),
            (shutil, "rmtree"),
            (os, "fsync"),
        ):
            monkeypatch.setattr(owner, name, self.deadly(name, getattr(owner, name)))

    def deadly(self, name: str, deed: Callable[..., Any]) -> Callable[..., Any]:
        def done(*arguments: Any, **options: Any) -> Any:
            if not self.dead and self.left:
                self.left -= 1
                return deed(*arguments, **options)
            if not self.dead:
                self.dead = True
                half_done(name, *arguments)
            raise Killed

        return done


def half_done(name: str, path: Any = None, *rest: Any) -> None:
    if name == "rmtree" and Path(path).exists():
        next(Path(path).iterdir()).unlink()
    elif name == "write_text":
        with Path(path).open("w") as file:
            file.write(rest[0][: len(rest[0]) // 2])
    elif name == "save_safetensors":
        Path(path).write_bytes(b"half")


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_killed_writer_leaves_a_state(before: int, tmp_path: Path) -> None:
    """Of the steps up to `before`, the next one is written, and that is cut off at every place."""
    survived = False
    for deeds in range(99):
        run = tmp_path / str(deeds)
        run.mkdir()
        for step in range(1, before + 1):
            write_state(run, state(step))
        with pytest.MonkeyPatch.context() as monkeypatch:
            Killer(monkeypatch, deeds)
            try:
                write_state(run, state(before + 1))
                survived = True
            except Killed:
                pass
        saved_state, warnings = read(run)
        if before or survived:
            assert "damaged" not in warnings
            assert saved_state is not None
            assert saved_state.step in (before, before + 1)
            assert saved_state.step == before + 1 or not survived
        # The next one is written all the same, and has one before it that is no older than was promised.
        write_state(run, state(9))
        assert step_read(run) == 9
        assert not (run / "checkpoint.new").exists()
        flip(run / "checkpoint" / "state.json")
        second, _ = read(run)
        assert (second and second.step) == (saved_state and saved_state.step)
        if survived:
            break
    assert survived
    assert deeds > 8


@pytest.mark.parametrize("second", range(0, 30, 3))
def test_killed_twice_leaves_one_state(second: int, tmp_path: Path) -> None:
    """Killed between the two renames, then again wherever in the next writing."""
    write_state(tmp_path, state(1))
    write_state(tmp_path, state(2))
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.new")
    assert read(tmp_path)[1] == ""
    assert step_read(tmp_path) == 2
    with pytest.MonkeyPatch.context() as monkeypatch:
        Killer(monkeypatch, second)
        try:
            write_state(tmp_path, state(3))
        except Killed:
            assert step_read(tmp_path) in (2, 3)
        else:
            assert step_read(tmp_path) == 3


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (mx, "save_safetensors", FULL),
        (mx, "save_safetensors", RuntimeError("[write] Unable to write 9 bytes to file.")),
        (Path, "write_text", FULL),
        (Path, "mkdir", FULL),
        (os, "fsync", FULL),
    ],
)
def test_full_disk_keeps_the_state(owner: Any, name: str, error: Exception, tmp_path: Path) -> None:
    write_state(tmp_path, state(1))
    write_state(tmp_path, state(2))

    def full(*_: Any, **__: Any) -> None:
        raise error

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(owner, name, full)
        with pytest.raises(
            ConfigError, match=r"checkpoint: step 3 cannot be saved \(.*(space|Unable).*--resume"
        ) as caught:
            write_state(tmp_path, state(3))
    assert "\n" not in str(caught.value)
    assert step_read(tmp_path) == 2
    assert not (tmp_path / "checkpoint.new").exists()
    assert json.loads((tmp_path / "checkpoint.previous" / "state.json").read_text())["step"] == 1
    write_state(tmp_path, state(3))
    assert step_read(tmp_path) == 3
