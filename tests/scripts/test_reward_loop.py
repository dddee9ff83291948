"""The loop of a generator and a judge: what is computed exactly, a tiny run over HTTP, tables and figure."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mlxpref.demo.briefs import count_met
from mlxpref.demo.preferences import demo_pairs
from scripts import reward_loop
from scripts.reward_loop import REWARDS, draw, main, plans, tables_of
from scripts.reward_loop_generator import TASKS, Generator, Task, all_right, true_order, true_preference
from scripts.reward_loop_runs import AGREEMENT, Plan, Sizes, run, voted

FOLDER = Path(reward_loop.__file__).parent


def places_of(generator: Generator, task: Task, count: int, rng: np.random.Generator) -> np.ndarray:
    return true_order(task.brief, [task.look(each) for each in generator.draw(count, rng).tolist()])


def test_wanted_pictures_meet_the_whole_brief() -> None:
    for task in TASKS:
        assert task.look((0, 0, 0, 0, 0)) == task.wanted
        by_quality = [task.look((0, 0, 0, 0, quality)) for quality in range(3)]
        assert true_order(task.brief, by_quality).tolist() == [11, 10, 9]
        assert count_met(task.brief, task.look((1, 2, 3, 4, 0))) < len(task.brief)


def test_true_preference_is_that_of_many_pictures() -> None:
    generator, rng = Generator(), np.random.default_rng(0)
    assert true_preference(generator) == pytest.approx(0.5)
    for logits, value in zip(generator.logits, (1.0, 2.0, 0.5, 1.5, 1.0), strict=True):
        logits[0] = value
    own, first = (np.stack([places_of(each, task, 4000, rng) for task in TASKS]) for each in (generator, Generator()))
    assert true_preference(generator) == pytest.approx(np.mean((own > first) + (own == first) / 2), abs=0.01)
    assert all_right(generator) == pytest.approx(np.mean(own == 11), abs=0.01)


def test_generator_learns_what_is_rewarded() -> None:
    generator, rng = Generator(), np.random.default_rng(0)
    for number in range(36):
        task = TASKS[number % len(TASKS)]
        choices = generator.draw(100, rng)
        rewards = true_order(task.brief, [task.look(each) for each in choices.tolist()])
        generator.learn(choices, (rewards - rewards.mean()) / (rewards.std() or 1))
    assert true_preference(generator) > 0.99
    assert all_right(generator) > 0.9


def test_votes_follow_what_differs() -> None:
    preferences, pairs = voted(300, seed=0), demo_pairs("train", 300, seed=0)
    right = [p.p_people if pair.better == "a" else 1 - p.p_people for p, pair in zip(preferences, pairs, strict=True)]
    leads = np.array([abs(count_met(pair.brief, pair.a) - count_met(pair.brief, pair.b)) for pair in pairs])
    for lead, agree in enumerate(AGREEMENT):
        assert np.mean(np.array(right)[np.minimum(leads, 2) == lead]) == pytest.approx(agree, abs=0.04)
    assert [p.prompt for p in preferences] == [pair.prompt for pair in pairs]


def test_a_run_is_measured(tmp_path: Path) -> None:
    made = run(Plan(3.0, 0), Sizes(group=4, groups=1, steps=2, taught=1, test=4, taus=1))
    learned = {each["reward"]: each for each in made["learned"]}
    assert tuple(learned) == REWARDS
    assert all(len(each["curve"]) == 3 and each["curve"][0] == 0.5 for each in learned.values())
    assert [each["comparisons"] for each in learned.values()] == [24, 12, 12, 12, 0], "both orders; one order"
    assert all(each["seconds"] > 0 for name, each in learned.items() if name != "true order")
    assert "| 3 | biased scores |" in tables_of([made])
    draw([made], tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 600


def test_file_and_page_have_every_run() -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    if not (FOLDER / "reward_loop.json").exists():
        assert "Not measured with the present demo judge yet: `python -m scripts.reward_loop" in page
        return
    runs = json.loads((FOLDER / "reward_loop.json").read_text(encoding="utf-8"))["runs"]
    assert sorted((each["seed"], each["bias"]) for each in runs) == [(plan["seed"], plan["bias"]) for plan in plans()]
    printed = CliRunner().invoke(main, ["--table"], catch_exceptions=False).stdout
    assert all(table.strip() in page for table in printed.split("\n\n"))
    assert (FOLDER / "reward_loop.png").stat().st_size < 100_000
