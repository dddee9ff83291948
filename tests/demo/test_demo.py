"""The demo: its pictures, briefs and preferences, its size, and that its judge is what the README says it is."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlxpref.cli.demo import SAMPLE_BRIEF, clear_demo, write_pictures, written_about
from mlxpref.demo import JUDGE
from mlxpref.demo.briefs import ALL, HELD_OUT, REQUIREMENTS, TAUGHT, Requirement, count_met, draw_brief, prompt_text
from mlxpref.demo.pictures import QUALITIES, SIZE, PictureSpec, render
from mlxpref.demo.preferences import LABEL_NOISE, SPLITS, PairSpec, demo_pairs, demo_preferences
from mlxpref.errors import ConfigError
from mlxpref.judge.evaluation import EvaluationSpec, evaluate
from mlxpref.judge.judge import Judge


def pixels(image: object) -> bytes:
    assert isinstance(image, Image.Image)
    return image.tobytes()


def best_first(pair: PairSpec) -> tuple[PictureSpec, PictureSpec]:
    return (pair.a, pair.b) if pair.better == "a" else (pair.b, pair.a)


def test_splits_are_disjoint() -> None:
    splits = {split: demo_preferences(split, 100) for split in SPLITS}
    pictures = [{pixels(i) for p in ps for i in (p.a, p.b)} for ps in splits.values()]
    assert len(set().union(*pictures)) == 2 * 100 * len(SPLITS)
    for split in SPLITS:
        briefs = [set(pair.brief) for pair in demo_pairs(split, 100)]
        assert all(bool(brief & set(HELD_OUT)) == (split == "heldout") for brief in briefs)
        assert {len(pair.brief) for pair in demo_pairs(split, 100)} == {REQUIREMENTS + (split == "four")}
    assert not set(HELD_OUT) & set(TAUGHT)
    assert len(HELD_OUT) + len(TAUGHT) == 4 * 6 + 4 * 3


def test_a_longer_list_begins_with_the_shorter_one() -> None:
    short, long = demo_preferences("train", 5), demo_preferences("train", 9)
    assert [(p.prompt, p.p_people, pixels(p.a)) for p in short] == [
        (p.prompt, p.p_people, pixels(p.a)) for p in long[:5]
    ]
    assert pixels(demo_preferences("train", 1, seed=1)[0].a) != pixels(short[0].a)


def test_pairs_are_those_of_the_preferences() -> None:
    pairs, preferences = demo_pairs("test", 50, 3), demo_preferences("test", 50, 3)
    assert [(p.prompt, float(p.better == "a")) for p in pairs] == [(p.prompt, p.p_people) for p in preferences]


def test_prompts_in_words() -> None:
    brief = Requirement("circle", "orange"), Requirement("cross", "triangle"), Requirement("square", "blue")
    assert prompt_text(brief) == "an orange circle, a cross like the triangle, a blue square"
    met = PictureSpec("orange", "blue", "red", "red")
    assert [count_met(brief, each) for each in (met, met._replace(cross="green"), met._replace(circle="red"))] == [
        3, 2, 2,
    ]  # fmt: skip


def test_no_brief_contradicts_itself() -> None:
    rng = np.random.default_rng(0)
    for number in range(300):
        brief = draw_brief(rng, 3 + number % 2, held_out=number % 3 == 0)
        coloured = [each.shape for each in brief if not each.is_like]
        assert len(set(coloured)) == len(coloured)
        likened = [frozenset(each) for each in brief if each.is_like]
        assert len(set(likened)) == len(likened)
    assert all(sum(each.is_like for each in draw_brief(rng, likes=likes)) == likes for likes in range(4))


def test_the_brief_decides_before_quality() -> None:
    for pair in demo_pairs("train", 500):
        better, worse = best_first(pair)
        met = count_met(pair.brief, better), count_met(pair.brief, worse)
        looks = QUALITIES.index(better.quality), QUALITIES.index(worse.quality)
        assert met[0] > met[1] or (met[0] == met[1] and looks[0] < looks[1])


def without_the_brief(pair: PairSpec) -> np.ndarray:
    """Every colour of a shape, every two shapes alike, every quality: of a, less that of b."""

    def shown(picture: PictureSpec) -> list[bool]:
        colours = [picture.colour(each.shape) == each.wanted for each in ALL if not each.is_like]
        return [
            *colours,
            *(each.is_met(picture) for each in ALL if each.is_like),
            *(picture.quality == q for q in QUALITIES),
        ]

    difference: np.ndarray = np.array(shown(pair.a), float) - np.array(shown(pair.b), float)
    return difference


def test_without_the_brief_nothing_tells() -> None:
    """What is learned from pictures alone, by least squares, is of no use for others, nor for held-out briefs."""
    pairs = {split: demo_pairs(split, 3000) for split in ("train", "test", "heldout")}
    x = {split: np.array([without_the_brief(pair) for pair in each]) for split, each in pairs.items()}
    y = {split: np.array([1.0 if pair.better == "a" else -1.0 for pair in each]) for split, each in pairs.items()}
    weights = np.linalg.lstsq(x["train"].T @ x["train"] + np.eye(x["train"].shape[1]), x["train"].T @ y["train"])[0]
    for split in ("test", "heldout"):
        assert np.mean(np.sign(x[split] @ weights) == y[split]) == pytest.approx(0.5, abs=0.04)


def test_nothing_in_one_picture_tells() -> None:
    """Both pictures show the same colours, and a guess by quality is right in half of the pairs."""
    pairs = demo_pairs("train", 2000)
    assert all(sorted(pair.a[:4]) == sorted(pair.b[:4]) and pair.a[:4] != pair.b[:4] for pair in pairs)
    looks = np.array([[QUALITIES.index(each.quality) for each in best_first(pair)] for pair in pairs])
    by_quality = (looks[:, 0] < looks[:, 1]) + 0.5 * (looks[:, 0] == looks[:, 1])
    assert by_quality.mean() == pytest.approx(0.5, abs=0.03)
    decided = np.array([count_met(pair.brief, pair.a) == count_met(pair.brief, pair.b) for pair in pairs])
    assert decided.mean() == pytest.approx(0.2, abs=0.03)


def test_one_requirement_is_not_enough() -> None:
    pairs = demo_pairs("train", 2000)
    right = []
    for count in range(1, REQUIREMENTS + 1):
        met = np.array([[count_met(pair.brief[:count], each) for each in best_first(pair)] for pair in pairs])
        gaps = met[:, 0] - met[:, 1]
        right.append(np.mean([0.5 if gap == 0 else float(gap > 0) for gap in gaps]))
    assert right == pytest.approx([0.66, 0.79, 0.9], abs=0.03)


def test_label_noise_and_sides() -> None:
    for split, noise in (("train", LABEL_NOISE), ("test", 0.0)):
        labels = np.array([p.p_people for p in demo_preferences(split, 500)])
        better = np.array([pair.better == "a" for pair in demo_pairs(split, 500)])
        assert better.mean() == pytest.approx(0.5, abs=0.07)
        assert (labels != better).mean() == pytest.approx(noise, abs=0.03)


def test_qualities_differ() -> None:
    clean, *spoiled = (
        np.asarray(render(PictureSpec("red", "green", "blue", "red", q), np.random.default_rng(1)), np.float32)
        for q in QUALITIES
    )
    for other in spoiled:
        assert clean.shape == (SIZE, SIZE, 3)
        assert np.abs(clean - other).mean() > 1


def test_embedded_files() -> None:
    files = [path for path in JUDGE.parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 6_000_000
    config = json.loads((JUDGE / "config.json").read_text())
    assert config["model_type"] == "qwen2_5_vl"
    assert {"model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= {path.name for path in files}


def test_the_judge_is_sloppy(demo_judge: Callable[..., Judge]) -> None:
    """It is right in little more than half of the pairs, though what it says of single shapes is true."""
    preferences, pairs = demo_preferences("test", 100), demo_pairs("test", 100)
    evaluation = evaluate(demo_judge(max_tokens=80), preferences, EvaluationSpec("demo", "test"))
    assert 0.5 < evaluation.metrics.accuracy < 0.78
    written = written_about(pairs, evaluation.verdicts)
    truth = written.truth
    assert truth.facts is not None
    assert truth.complete is not None
    assert truth.verdicts is not None
    assert truth.facts > 0.96
    assert truth.complete < 0.7
    assert truth.verdicts < 0.9


def test_the_judge_guesses_at_once(demo_judge: Callable[..., Judge]) -> None:
    evaluation = evaluate(demo_judge(think=False), demo_preferences("test", 200), EvaluationSpec("demo", "test"))
    assert evaluation.metrics.accuracy == pytest.approx(0.5, abs=0.13)


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
    best = [name for name in first if name.startswith(f"{len(SAMPLE_BRIEF)}-met-")]
    assert sorted(best) == ["3-met-green-blue-red-red-blurry.png", "3-met-green-blue-red-red-clean.png"]
