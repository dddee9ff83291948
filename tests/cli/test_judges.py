"""Image features on disk, as a person meets them: a command encodes no image that one before it encoded."""

import json
from pathlib import Path
from typing import Any

import pytest

import mlxpref
from mlxpref.engine.vision import VisionEncoder
from tests.cli.test_commands import QUICK, TINY, run
from tests.conftest import picture, write_adapter

IMAGES = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "pictures"
    place.mkdir()
    for i in range(IMAGES):
        picture(i).save(place / f"{i}.png")
    return place


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "kept.sqlite"


def ranked(folder: Path, *arguments: str | Path) -> dict[str, Any]:
    done = run("rank", folder, "--prompt", "a red circle", "--no-think", "--json", *QUICK, *arguments)
    assert done.exit_code == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result | {"stderr": done.stderr}


def test_a_second_ranking_encodes_nothing(folder: Path, store: Path, tmp_path: Path) -> None:
    first = ranked(folder, "--store", store)
    assert (first["vision_runs"], first["recalled"]) == (IMAGES, 0)
    more = ranked(folder, "--store", store, "--pairs", "all")
    assert more["vision_runs"] == 0
    assert 0 < more["recalled"] < 2 * len(more["pairs"])
    adapter = write_adapter(tmp_path / "adapter", mlxpref.load(TINY).vlm)
    adapted = ranked(folder, "--store", store, "--adapter", adapter)
    assert (adapted["vision_runs"], adapted["recalled"]) == (0, 0)
    assert adapted["images"] != first["images"]
    picture(IMAGES).save(folder / "new.png")
    assert ranked(folder, "--store", store)["vision_runs"] == 1


def test_recalled_features_give_the_same_bits(folder: Path, store: Path) -> None:
    first = ranked(folder, "--store", store)
    for file in store.parent.glob("kept.sqlite*"):
        if file.is_file():
            file.unlink()  # the comparisons are judged again, from features on disk
    again = ranked(folder, "--store", store)
    assert (again["vision_runs"], again["recalled"]) == (0, 0)
    assert again["images"] == first["images"]
    assert again["pairs"] == first["pairs"]


def test_other_pixels_are_encoded(folder: Path, store: Path) -> None:
    first = ranked(folder, "--store", store)
    smaller = ranked(folder, "--store", store, "--max-pixels", "3136")
    assert (first["vision_runs"], smaller["vision_runs"]) == (IMAGES, IMAGES)
    picture(99).save(folder / "3.png")
    assert ranked(folder, "--store", store)["vision_runs"] == 1


def test_a_damaged_file_is_one_line_and_one_image(folder: Path, store: Path) -> None:
    first = ranked(folder, "--store", store)
    files = sorted(store.with_name("kept.sqlite.features").iterdir(), key=lambda file: file.stat().st_size)
    assert len(files) == 2 * IMAGES  # the pixels' names, which are small, and the features
    for file in (files[0], *files[-2:]):
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    store.unlink()
    again = ranked(folder, "--store", store)
    assert again["vision_runs"] == 2
    assert again["stderr"].count("damaged; what it holds is computed again") == 1
    for ours, expected in zip(again["images"], first["images"], strict=True):
        assert ours["path"] == expected["path"]
        assert ours["strength"] == pytest.approx(expected["strength"], abs=1e-3)


def test_nothing_is_kept_without_a_store(folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = store.parent / "cache"
    monkeypatch.setenv("MLXPREF_CACHE", str(cache))
    assert ranked(folder, "--no-store")["vision_runs"] == IMAGES
    assert not cache.exists()
    monkeypatch.setenv("MLXPREF_FEATURES_GB", "0")
    ranked(folder)
    assert (cache / "comparisons.sqlite").exists()
    assert not (cache / "comparisons.sqlite.features").exists()
    monkeypatch.setenv("MLXPREF_FEATURES_GB", "much")
    done = run("rank", folder, "--prompt", "a red circle", *QUICK)
    assert done.exit_code == 1
    assert "MLXPREF_FEATURES_GB is 'much': give a number" in done.stderr
    monkeypatch.setenv("MLXPREF_FEATURES_GB", "0.0003")  # four files
    assert "full" in ranked(folder, "--store", store)["stderr"]
    assert len(list(store.with_name("kept.sqlite.features").iterdir())) == 4


def test_a_refused_command_leaves_nothing(folder: Path, store: Path) -> None:
    store.write_text("somebody's notes")
    done = run("rank", folder, "--prompt", "a red circle", "--store", store, *QUICK)
    assert done.exit_code == 1
    assert "not a store" in done.stderr
    assert sorted(store.parent.iterdir()) == sorted([folder, store])


def test_eval_recalls_features(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = ("--data", "demo", "--model", "demo", "--split", "test", "--limit", "6", "--store", store)
    assert run("eval", *demo, "--no-think").exit_code == 0
    monkeypatch.setattr(VisionEncoder, "encode", None)
    done = run("eval", *demo, "--no-think", "--strategy", "select")  # other comparisons
    assert done.exit_code == 0, done.stderr
