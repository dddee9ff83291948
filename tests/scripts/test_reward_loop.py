"""The loop of a generator and a judge: what is computed exactly, a tiny run over HTTP, tables and figure."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from scripts import reward_loop
from scripts.reward_loop import CONDITIONS, REWARDS, SEEDS, draw, main, tables_of
from scripts.reward_loop_runs import Generator, Plan, Sizes, run, true_order, true_preference

FOLDER = Path(reward_loop.__file__).parent


def test_true_preference_is_that_of_many_pictures() -> None:
    generator, rng = Generator(), np.random.default_rng(0)
    assert true_preference(generator) == pytest.approx(0.5)
    for logits, value in zip(generator.logits, (1.0, 2.0, 0.5), strict=True):
        logits[0] = value
    own, first = (true_order(each.draw(200_000, rng)) for each in (generator, Generator()))
    assert true_preference(generator) == pytest.approx(np.mean((own > first) + (own == first) / 2), abs=0.005)


def test_generator_learns_what_is_rewarded() -> None:
    generator, rng = Generator(), np.random.default_rng(0)
    for _ in range(30):
        choices = generator.draw(200, rng)
        rewards = true_order(choices)
        generator.learn(choices, (rewards - rewards.mean()) / rewards.std())
    assert true_preference(generator) > 0.97


def test_a_run_is_measured(tmp_path: Path) -> None:
    made = run(Plan("sure", 3.0, 0), Sizes(group=4, groups=1, steps=2, taught=1, test=4, taus=1))
    learned = {each["reward"]: each for each in made["learned"]}
    assert tuple(learned) == REWARDS
    assert all(len(each["curve"]) == 3 and each["curve"][0] == 0.5 for each in learned.values())
    assert [each["comparisons"] for each in learned.values()] == [24, 12, 12, 12, 0], "both orders; one order"
    assert all(each["seconds"] > 0 for name, each in learned.items() if name != "true order")
    assert "| sure | 3 | biased scores |" in tables_of([made])
    draw([made], tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 600


def test_file_and_page_have_every_run() -> None:
    runs = json.loads((FOLDER / "reward_loop.json").read_text(encoding="utf-8"))["runs"]
    assert {(each["judge"], each["bias"], each["seed"]) for each in runs} == {
        (*c, s) for c in CONDITIONS for s in SEEDS
    }
    printed = CliRunner().invoke(main, ["--table"], catch_exceptions=False).stdout
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(table.strip() in page for table in printed.split("\n\n"))
    assert (FOLDER / "reward_loop.png").stat().st_size < 100_000
