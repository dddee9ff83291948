"""Training and evaluation on small data sets in the public layouts, from their archives to the page of the run."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlxpref.cli import main
from tests.data_layouts import LAYOUTS, make_layout

JUDGE = ("--model", "demo", "--no-think")
TRAIN = ("--steps", "1", "--comparisons", "2", "--group", "2", "--rows", "4")


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_eval_judges_every_layout(name: str, tmp_path: Path) -> None:
    folder = make_layout(name, tmp_path, prompts=2)
    data = name.removesuffix("-list")
    done = run("eval", "--data", data, "--data-dir", folder, "--protocol", "pairs", "--json", *JUDGE)
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    counts = {"imagereward": (10, 2), "hpdv2": (12, 0), "hpdv3": (6, 0), "mmrb2": (4, 0), "genai_bench": (6, 2)}
    assert (report["pairs"], report["ties_dropped"]) == counts.get(data, (3, 0))
    assert 0 <= report["accuracy"] <= 1


@pytest.mark.parametrize("name", ["imagereward", "hpdv2", "pickapic", "hpdv3"])
def test_training_learns_from_every_layout(name: str, tmp_path: Path) -> None:
    folder = make_layout(name, tmp_path / "data", prompts=2)
    output = tmp_path / "run"
    done = run(
        "train", "--data", name, "--data-dir", folder, "--limit", "4", *JUDGE, *TRAIN, "--output", output, "--json"
    )
    assert done.exit_code == 0, done.stderr
    assert (output / "adapters.safetensors").is_file()
    assert json.loads((output / "run.json").read_text())["settings"]["data_dir"] == str(folder)


def test_run_page_shows_archived_pictures(tmp_path: Path) -> None:
    folder = make_layout("imagereward", tmp_path / "data", prompts=2)
    output = tmp_path / "run"
    thinking = ("--model", "demo", "--max-tokens", "8", *TRAIN, "--output", output)
    done = run("train", "--data", "imagereward", "--data-dir", folder, "--limit", "4", *thinking)
    assert done.exit_code == 0, done.stderr
    rollout = json.loads((output / "rollouts.jsonl").read_text().splitlines()[0])
    assert ".zip/train_" in rollout["first"]
    assert (output / "report.html").read_text().count("data:image/webp") >= 2
    resumed = run("train", "--resume", "--output", output)
    assert "this run is complete" in resumed.stderr


def test_the_folder_is_only_for_public_data(tmp_path: Path) -> None:
    done = run("eval", "--data", "demo", "--data-dir", tmp_path, *JUDGE)
    assert done.exit_code == 1
    assert "--data demo needs none" in done.stderr
    done = run("train", "--data", "hpdv2", "--data-dir", tmp_path / "gone", *JUDGE, "--output", tmp_path / "run")
    assert done.exit_code == 1
    assert "no such folder" in done.stderr
    assert not (tmp_path / "run").exists()
