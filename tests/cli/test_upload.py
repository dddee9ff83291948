"""`--upload-repo` sends a finished folder only where the user agrees to its size, its target and who can see it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from tests.cli.test_commands import TINY, run
from tests.conftest import tiny_model, write_adapter


class Hub:
    """A stand-in for HfApi: what it was asked, and what it was sent."""

    def __init__(self, private: bool | None = None) -> None:
        self.private, self.sent, self.refuses, self.is_far = private, list[Any](), False, False

    def __call__(self) -> "Hub":
        return self

    def _error(self, kind: type[Any], status: int) -> Exception:
        error: Exception = kind("no", response=SimpleNamespace(status_code=status, headers={}, request=None, text=""))
        return error

    def model_info(self, hub_id: str, **_: Any) -> Any:
        if self.is_far:
            raise ConnectionError("no network")
        if self.private is None:
            raise self._error(RepositoryNotFoundError, 404)
        return SimpleNamespace(private=self.private)

    def create_repo(self, hub_id: str, **options: Any) -> str:
        if self.refuses:
            raise self._error(HfHubHTTPError, 403)
        self.sent.append((hub_id, options))
        return f"https://hub/{hub_id}"

    def upload_folder(self, **options: Any) -> None:
        folder = Path(options["folder_path"])
        self.sent.append((options, sorted(file.name for file in folder.iterdir())))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr("mlxpref.hub.HfApi", hub)
    return hub


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: self.name == "<stdin>", raising=False)


def convert(output: Path, *options: str, input: str | None = None) -> Result:
    return run("convert", TINY, output, "--no-fidelity", "--upload-repo", "me/judge", *options, input=input)


@pytest.mark.parametrize(
    ("private", "kind"),
    [(None, "a new, private repository"), (True, "a private repository, whose weights it replaces"),
     (False, "a public repository, whose weights it replaces")],
)  # fmt: skip
def test_the_question(private: bool | None, kind: str, hub: Hub, terminal: None, tmp_path: Path) -> None:
    hub.private = private
    result = convert(tmp_path / "out", input="n\n")
    assert (result.exit_code, hub.sent) == (0, [])
    assert f"/me/judge, {kind}?" in result.stderr
    assert "files, " in result.stderr
    assert "not uploaded" in result.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_yes_on_the_terminal(hub: Hub, terminal: None, tmp_path: Path) -> None:
    assert convert(tmp_path / "out", input="y\n").exit_code == 0
    (repo, created), (options, files) = hub.sent
    assert (repo, created["private"], created["exist_ok"]) == ("me/judge", True, True)
    assert files == sorted(file.name for file in (tmp_path / "out").iterdir())
    assert "*.safetensors" in options["delete_patterns"]  # shards of an earlier model must not stay beside these


def test_yes_as_an_option(hub: Hub, tmp_path: Path) -> None:
    result = convert(tmp_path / "out", "--yes", "--json")
    assert json.loads(result.stdout)["uploaded"] == "https://hub/me/judge"
    assert len(hub.sent) == 2
    assert "uploading" in result.stderr


def test_nobody_to_agree(hub: Hub, tmp_path: Path) -> None:
    """Known before the work: nothing is converted, nothing is sent."""
    result = convert(tmp_path / "out")
    assert result.exit_code == 1
    assert "add --yes" in result.stderr
    assert (list(tmp_path.iterdir()), hub.sent) == ([], [])


def test_an_adapter_in_pefts_format(hub: Hub, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", tiny_model("qwen2_5_vl"))
    options = ("--to", "peft", "--model", TINY, "--upload-repo", "me/lora", "--yes")
    assert run("export", tmp_path / "adapter", tmp_path / "out", *options).exit_code == 0
    assert hub.sent[1][1] == ["README.md", "adapter_config.json", "adapter_model.safetensors", "mlxpref.json"]


def test_a_hub_that_is_not_reached(hub: Hub, tmp_path: Path) -> None:
    """Known before the work, too."""
    hub.is_far = True
    result = convert(tmp_path / "out", "--yes")
    assert result.exit_code == 1
    assert "was not reached" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_refuses(hub: Hub, tmp_path: Path) -> None:
    hub.refuses = True
    result = convert(tmp_path / "out", "--yes")
    assert result.exit_code == 1
    assert "answered 403; log in anew" in result.stderr.splitlines()[-1]
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["judge", "me/judge@v2", "a/b/c", "", "../judge"])
def test_no_repository(name: str, hub: Hub, tmp_path: Path) -> None:
    result = run("convert", TINY, tmp_path / "out", "--upload-repo", name, "--yes")
    assert result.exit_code == 2
    assert "is no repository; give one like owner/name" in result.stderr
    assert not hub.sent
    assert run("convert", TINY, "--compare", "8", "--upload-repo", "me/judge", "--yes").exit_code == 2
