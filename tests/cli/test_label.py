"""`mlxpref label` as a person starts it: what is refused at once, what is left out, and what a second start finds."""

import json
import os
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlxpref.cli import main
from mlxpref.config import LabelSettings
from mlxpref.data.label_file import LabelFile
from mlxpref.data.load import load_preferences
from mlxpref.data.prompts import PromptGroup
from mlxpref.label.prompt_task import prompt_tasks
from mlxpref.label.server import LabelServer
from mlxpref.label.session import LabelSession
from tests.cli.test_commands import UNDECODED, run
from tests.label_pages import pictures

PROMPT = ("--prompt", "a hat")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pictures(tmp_path / "pictures", 4)
    return tmp_path / "pictures"


@pytest.fixture
def ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page ends as soon as it is served."""
    serve = LabelServer.run

    def end(server: LabelServer) -> bool:
        server.end()
        return serve(server)

    monkeypatch.setattr(LabelServer, "run", end)


def notes(folder: Path, output: Path, *options: str) -> str:
    """What the command says on stderr; its page ends at once."""
    arguments = ("label", folder, "--no-browser", "--output", output, *options)
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stderr


@pytest.mark.parametrize(
    "arguments", [(), (*PROMPT, "--prompt-from", "sidecar"), (*PROMPT, "--pairs", "0"), (*PROMPT, "--port", "70000")]
)
def test_wrong_usage(folder: Path, arguments: tuple[str, ...]) -> None:
    assert run("label", folder, *arguments).exit_code == 2


def test_impossible_labelling_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "diary.jsonl").write_text("dear diary\n")
    pictures(tmp_path / "one", 1)
    (tmp_path / "empty").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, expected in (
            ((tmp_path / "nowhere",), "no such folder; give the one that holds the images"),
            ((folder / "0000.png",), "no such folder"),
            ((tmp_path / "one",), "two images are needed"),
            ((tmp_path / "empty",), "holds no images"),
            ((folder, "--output", tmp_path / "nowhere" / "p.jsonl"), "give another file"),
            ((folder, "--output", tmp_path), "give another file"),
            ((folder, "--output", tmp_path / "diary.jsonl"), "holds other lines; give another --output"),
            ((folder, "--output", tmp_path / "p.csv"), "give a name that ends in it"),
            ((folder, "--output", tmp_path / "p.jsonl", "--port", port), "cannot be taken"),
        ):
            done = run("label", *arguments, *PROMPT, "--no-browser")
            assert done.exit_code == 1, arguments
            assert expected in done.stderr
    assert (tmp_path / "diary.jsonl").read_text() == "dear diary\n"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.usefixtures("ends_at_once")
def test_only_pictures_of_the_folder(folder: Path, tmp_path: Path) -> None:
    secret = pictures(tmp_path / "secret", 1)[0]
    (folder / "link.png").symlink_to(secret)
    (folder / "inside.png").symlink_to(folder / "0001.png")
    (folder / UNDECODED).write_bytes((folder / "0002.png").read_bytes())
    (folder / "broken.png").write_bytes(b"\x89PNG")
    result = notes(folder, tmp_path / "p.jsonl", *PROMPT)
    assert "link.png: is a link that leads out of the folder" in result
    assert "has a name that is not UTF-8 text" in result
    assert "broken.png: is damaged" in result
    assert "\n4 images, 6 pairs planned of 6\n" in result, "a link within the folder is the file that it leads to"


@pytest.mark.usefixtures("ends_at_once")
def test_each_prompt_is_a_group(folder: Path, tmp_path: Path) -> None:
    for number, image in enumerate(sorted(folder.iterdir())):
        image.with_suffix(".txt").write_text(f"prompt {number // 2}")
    assert "4 images of 2 prompts, 2 pairs planned of 2" in notes(
        folder, tmp_path / "p.jsonl", "--prompt-from", "sidecar"
    )


@pytest.mark.usefixtures("ends_at_once")
def test_a_second_start_continues(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "p.jsonl"
    record = {
        "number": 1, "prompt": "a hat", "a": "pictures/0000.png", "b": "pictures/0001.png", "p_a": 1.0, "answer": "a",
        "shown_first": "a", "split": "train", "seconds": 1.0, "time": "",
    }  # fmt: skip
    elsewhere = record | {"number": 2, "prompt": "a shoe"}
    output.write_text("".join(json.dumps(each) + "\n" for each in (record, elsewhere)))
    assert "p.jsonl: 2 lines are there, 1 of them stand and are about these images" in notes(folder, output, *PROMPT)
    os.truncate(output, output.stat().st_size - 40)
    assert "the last line was cut off when it was written; it is removed" in notes(folder, output, *PROMPT)
    assert output.read_text() == json.dumps(record) + "\n"


def test_output_behind_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    output = tmp_path / "link" / "p.jsonl"
    with LabelFile(output) as file:
        groups = [PromptGroup("a hat", tuple(sorted(folder.iterdir())))]
        labelling = LabelSession(file, prompt_tasks(groups, output.parent, None, 0.0, ()), LabelSettings())
        assert labelling.answer(labelling.state()["number"], "first", None)
    assert len(load_preferences(str(output), "train")) >= 1
