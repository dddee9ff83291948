"""The demo: its pictures and preferences, its size, and that its judge is what the README says it is."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlxpref.cli.demo import clear_demo, write_pictures
from mlxpref.demo import JUDGE
from mlxpref.demo.pictures import SIZE, PictureSpec, render
from mlxpref.demo.preferences import HELD_OUT, LABEL_NOISE, TRAIN_PROMPTS, demo_preferences, draw_pair, prompt_text
from mlxpref.errors import ConfigError
from mlxpref.judge.evaluation import EvaluationSpec, evaluate
from mlxpref.judge.judge import Judge


def pixels(image: object) -> bytes:
    assert isinstance(image, Image.Image)
    return image.tobytes()


def test_splits_are_disjoint() -> None:
    splits = {split: demo_preferences(split, 200) for split in ("train", "test", "heldout")}
    pictures = {split: {pixels(i) for p in ps for i in (p.a, p.b)} for split, ps in splits.items()}
    assert all(len(images) == 400 for images in pictures.values())
    assert pictures["train"].isdisjoint(pictures["test"] | pictures["heldout"])
    held_out = {prompt_text(*names) for names in HELD_OUT}
    assert {p.prompt for p in splits["heldout"]} == held_out
    assert held_out.isdisjoint({p.prompt for p in splits["train"] + splits["test"]})
    assert len(TRAIN_PROMPTS) + len(HELD_OUT) == 24


def test_a_longer_list_begins_with_the_shorter_one() -> None:
    short, long = demo_preferences("train", 5), demo_preferences("train", 9)
    assert [(p.prompt, p.p_people, pixels(p.a)) for p in short] == [
        (p.prompt, p.p_people, pixels(p.a)) for p in long[:5]
    ]
    assert pixels(demo_preferences("train", 1, seed=1)[0].a) != pixels(short[0].a)


def test_the_prompt_decides_before_quality() -> None:
    rng = np.random.default_rng(0)
    qualities = set()
    for _ in range(500):
        scene = draw_pair(rng)
        better, worse = (scene.a, scene.b) if scene.better == "a" else (scene.b, scene.a)
        matches = [(spec.colour, spec.shape) == (scene.colour, scene.shape) for spec in (better, worse)]
        if scene.aspect == "quality":
            assert (better.colour, better.shape) == (worse.colour, worse.shape)
            assert better.quality == "clean" != worse.quality
        else:
            assert matches == [True, False]
            qualities.add((better.quality == "clean", worse.quality == "clean"))
    assert (False, True) in qualities  # quality misleads


def test_label_noise_and_sides() -> None:
    for split, noise in (("train", LABEL_NOISE), ("test", 0.0)):
        preferences = demo_preferences(split, 500)
        assert abs(np.mean([p.p_people for p in preferences]) - 0.5) < 0.07
        rng_wrong = 0
        for i, preference in enumerate(preferences):
            rng = np.random.default_rng([{"train": 1, "test": 2}[split], 0, i])
            rng_wrong += (draw_pair(rng).better == "a") != (preference.p_people == 1)
        assert abs(rng_wrong / 500 - noise) < 0.03


def test_qualities_differ() -> None:
    clean, *spoiled = (
        np.asarray(render(PictureSpec("red", "circle", q), np.random.default_rng(1)), np.float32)
        for q in ("clean", "noisy", "blurry", "blocky")
    )
    for other in spoiled:
        assert clean.shape == (SIZE, SIZE, 3)
        assert np.abs(clean - other).mean() > 1


def test_embedded_files() -> None:
    files = [path for path in JUDGE.parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 4_000_000
    config = json.loads((JUDGE / "config.json").read_text())
    assert config["model_type"] == "qwen2_5_vl"
    assert {"model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= {path.name for path in files}


def test_judge_is_biased(demo_judge: Callable[..., Judge]) -> None:
    """55 to 75 % by what its annotator taught it; what it writes of the pictures is right nearly always."""
    preferences = demo_preferences("test", 150)
    judge = demo_judge()
    report = evaluate(judge, preferences, EvaluationSpec("demo", "test")).metrics
    assert 0.52 < report.accuracy < 0.78  # 55 to 75 on 400; wider for 150
    assert abs(report.first_choice_rate - 0.5) < 0.1


def test_demo_replaces_only_a_demo(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    (tmp_path / "index.html").write_text("old")
    clear_demo(tmp_path)
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert left == ["index.html"], "the page stays until the new one replaces it"
    write_pictures(tmp_path)
    (tmp_path / "pictures" / "holiday.jpg").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds what no demo wrote, such as .*holiday.jpg"):
        clear_demo(tmp_path)
    assert len(list((tmp_path / "pictures").iterdir())) == 25


def test_sample_pictures_are_deterministic(tmp_path: Path) -> None:
    first = {path.name: path.read_bytes() for path in write_pictures(tmp_path).iterdir()}
    assert first == {path.name: path.read_bytes() for path in write_pictures(tmp_path).iterdir()}
    assert len(first) == 24
    assert sum(name.startswith("purple-triangle") for name in first) == 4
