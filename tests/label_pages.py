"""Serves the labelling page, in a thread or as the command, with pictures to label."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

from mlxpref.config import LabelSettings
from mlxpref.data.label_file import LabelFile
from mlxpref.data.prompts import PromptGroup
from mlxpref.label.prompt_task import prompt_tasks
from mlxpref.label.server import LabelServer
from mlxpref.label.session import LabelSession
from tests.conftest import picture
from tests.served_command import PROGRAM, served_command

__all__ = ["label_command", "pictures", "served"]


def pictures(folder: Path, count: int, size: tuple[int, int] = (60, 40)) -> list[Path]:
    """Write `count` pictures into a folder and return their paths."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        picture(i, size).save(folder / f"{i:04}.png")
    return sorted(folder.iterdir())


@contextmanager
def served(output: Path, groups: dict[str, list[Path]], settings: LabelSettings | None = None) -> Iterator[LabelServer]:
    """Run a labelling server in a thread of this process."""
    label_settings = settings or LabelSettings()
    with LabelFile(output) as file:
        prompts = [PromptGroup(prompt, tuple(images)) for prompt, images in groups.items()]
        tasks = prompt_tasks(prompts, output.parent, None, label_settings.held_out, file.records)
        server = LabelServer(LabelSession(file, tasks, label_settings))
        thread = Thread(target=server.run)
        thread.start()
        try:
            yield server
        finally:
            server.end()
            thread.join(300)
            assert not thread.is_alive()


@contextmanager
def label_command(folder: Path, output: Path, *options: str) -> Iterator[tuple[str, "subprocess.Popen[str]", str]]:
    """A running `mlxpref label`: the address of its page, its process, and what it printed until then."""
    command = [*PROGRAM, "label", str(folder), "--no-browser", "--output", str(output), *options]
    with served_command(command) as (process, lines):
        try:
            yield lines[-1][lines[-1].index("http://") :].strip(), process, "".join(lines)
        finally:
            process.terminate()
            process.wait(300)
