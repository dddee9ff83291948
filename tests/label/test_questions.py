"""What is asked: informative pairs, each once, some again in swapped order; and what an undo brings back."""

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mlxpref.config import LabelSettings
from mlxpref.data.label_file import TEST, LabelFile, LabelRecord, active_records
from mlxpref.data.prompts import PromptGroup
from mlxpref.label.prompt_task import Choice, PromptTask, prompt_tasks
from mlxpref.label.questions import Question, Questions
from mlxpref.label.rater import consistency, enough
from mlxpref.label.session import LabelSession
from mlxpref.ranking.intervals import share_interval
from mlxpref.ranking.strength_ranking import rank_images

Rule = Callable[[Question], Choice]


def tasks(
    *counts: int, pairs: int | None = None, held_out: float = 0.2, records: tuple[LabelRecord, ...] = ()
) -> list[PromptTask]:
    groups = [
        PromptGroup(f"prompt {i}", tuple(Path(f"/x/{i}-{j:04}.png") for j in range(n))) for i, n in enumerate(counts)
    ]
    return prompt_tasks(groups, Path("/x"), pairs, held_out, records)


def answer(questions: Questions, rule: Rule, count: int = 10**6) -> list[LabelRecord]:
    records = []
    while len(records) < count and (question := questions.current()[1]):
        records.append(questions.answer(rule(question), 1.0, ""))
        questions.take(records[-1])
        if questions.is_low():
            questions.refill()
    return records


def by_number(question: Question) -> Choice:
    """The image with the smaller number is the better one."""
    first, second = question.shown
    return "first" if first < second else "second"


def left(question: Question) -> Choice:
    return "first"


def test_the_first_pairs_connect_all_images() -> None:
    questions = Questions(tasks(20), (), LabelSettings(repeats=0.0))
    records = answer(questions, by_number, 19)
    together = {record.a: {record.a} for record in records} | {record.b: {record.b} for record in records}
    for record in records:
        joined = together[record.a] | together[record.b]
        for name in joined:
            together[name] = joined
    assert len(together[records[0].a]) == 20


def test_each_pair_is_asked_once() -> None:
    questions = Questions(tasks(9), (), LabelSettings(repeats=0.0))
    records = answer(questions, by_number)
    assert len({record.pair for record in records}) == len(records) == 36
    assert questions.current()[1] is None
    assert all(record.answer == "a" for record in records)


def test_repeats_are_swapped_and_late() -> None:
    records = answer(Questions(tasks(16), (), LabelSettings(repeats=0.2)), by_number, 120)
    places: dict[tuple[str, ...], list[int]] = {}
    for place, record in enumerate(records):
        places.setdefault(record.pair, []).append(place)
    again = [both for both in places.values() if len(both) > 1]
    assert all(len(both) == 2 for both in again)
    assert 18 <= len(again) <= 24
    for early, late in again:
        assert records[early].shown_first != records[late].shown_first
        assert late - early > 8
    assert consistency(records).agreed == consistency(records).same == len(again)


def test_rater_who_goes_by_place() -> None:
    records = answer(Questions(tasks(16), (), LabelSettings(repeats=0.2)), left, 120)
    repeated = consistency(records)
    assert repeated.agreed == 0
    assert enough(records, 0.2).needed is None
    firsts = sum(record.shown_first == "a" for record in records)
    assert 0.4 < firsts / len(records) < 0.6  # either image stands first as often


def test_a_ranking_finds_the_order() -> None:
    (task,) = tasks(16)
    answer(Questions([task], (), LabelSettings()), by_number, 40)
    order = [image.index for image in rank_images(16, task.outcomes()).images]
    inversions = sum(a > b for a, b in itertools.combinations(order, 2))
    assert 1 - 4 * inversions / (16 * 15) > 0.8


def test_reopened_file_asks_nothing_twice() -> None:
    settings = LabelSettings(repeats=0.0)
    records: list[LabelRecord] = []
    for _ in range(6):
        questions = Questions(tasks(9), records, settings)
        records += answer(questions, by_number, 6)
    assert len({record.pair for record in records}) == 36
    assert [record.number for record in records] == list(range(1, 37))


def test_undo_repeats_the_question() -> None:
    questions = Questions(tasks(9), (), LabelSettings())
    past = []
    for _ in range(12):
        past.append(questions.current()[1])
        answer(questions, by_number, 1)
    for question in reversed(past):
        undone = questions.undo("")
        assert undone is not None
        questions.take(undone)
        assert questions.current()[1] == question
    assert questions.undo("") is None
    assert questions.active == []
    records = answer(questions, by_number, 13)
    assert records[0].number == 25
    assert len({record.pair for record in records}) >= 12


def test_a_skipped_pair_does_not_come_back() -> None:
    questions = Questions(tasks(5), (), LabelSettings())
    records = answer(questions, lambda question: "skip")
    assert len({record.pair for record in records}) == len(records) == 10
    assert questions.tasks[0].outcomes() == []


def test_prompts_take_turns() -> None:
    questions = Questions(tasks(6, 6, 6), (), LabelSettings(repeats=0.0))
    records = answer(questions, by_number, 36)
    turns = [len(list(group)) for _, group in itertools.groupby(record.prompt for record in records)]
    assert set(turns) == {4}
    assert {sum(record.prompt == f"prompt {i}" for record in records) for i in range(3)} == {12}


def test_whole_prompts_are_held_out() -> None:
    few = tasks(5, 5, 5, 5, 5, 5)
    assert sorted(task.held_out for task in few) == [0, 0, 0, 0, 0, 1]
    records = answer(Questions(few, (), LabelSettings(repeats=0.0)), by_number)
    more = tasks(*[5] * 20, records=tuple(records))
    assert [task.held_out for task in more[:6]] == [task.held_out for task in few]
    assert sum(task.held_out for task in more) == 4
    for task in few:
        assert {task.split(0, 1), task.split(2, 4)} == {TEST if task.held_out else "train"}
    assert {task.held_out for task in tasks(5, 5, 5, 5, 5, held_out=0.0)} == {0}


def test_new_prompts_are_not_all_held_out() -> None:
    records: list[LabelRecord] = []
    measuring = 0
    for number in range(20):
        groups = [PromptGroup(f"prompt {number}", tuple(Path(f"/x/{number}-{j}.png") for j in range(5)))]
        (task,) = prompt_tasks(groups, Path("/x"), None, 0.2, records)
        records += answer(Questions([task], records, LabelSettings(repeats=0.0)), by_number)
        measuring += task.held_out == 1
    assert 2 <= measuring <= 4
    shares = [record.split == TEST for record in records]
    assert 0.1 < sum(shares) / len(shares) < 0.3


def test_asked_pairs_keep_their_split() -> None:
    records = answer(Questions(tasks(8, held_out=0.5), (), LabelSettings(repeats=0.0)), by_number)
    questions = Questions(tasks(8, held_out=0.0, records=tuple(records)), records, LabelSettings(repeats=0.5))
    again = answer(questions, by_number)
    assert len(again) > 20
    splits = {record.pair: record.split for record in records}
    assert set(splits.values()) == {"train", TEST}
    assert all(record.split == splits[record.pair] for record in again)


def test_of_one_prompt_single_pairs_are_held_out() -> None:
    (task,) = tasks(60)
    splits = [task.split(a, b) for a, b in itertools.combinations(range(60), 2)]
    assert 0.15 < splits.count(TEST) / len(splits) < 0.25
    assert splits == [task.split(a, b) for a, b in itertools.combinations(range(60), 2)]


def test_enough_pairs_are_planned() -> None:
    expected = enough((), 0.2).needed
    assert expected is not None
    assert tasks(24)[0].budget == expected > 48
    assert tasks(8)[0].budget == 28
    assert tasks(200)[0].budget == 400
    assert tasks(24, pairs=30)[0].budget == 30
    assert expected <= sum(task.budget for task in tasks(16, 16, 16)) < expected + 3


def test_records_of_missing_pictures() -> None:
    records = answer(Questions(tasks(6), (), LabelSettings(repeats=0.0)), by_number)
    questions = Questions(tasks(4), records, LabelSettings(repeats=0.0))
    assert len(questions.active) == 6
    assert questions.current() == (16, None)


def test_answers_from_many_threads(tmp_path: Path) -> None:
    with LabelFile(tmp_path / "p.jsonl") as file:
        session = LabelSession(file, tasks(12), LabelSettings())
        accepted: list[bool] = []

        def click() -> None:
            while sum(accepted) < 30:  # whoever is refused was too late, so somebody else was accepted
                state = session.state()
                session.ranking(0)
                if state["question"] is None:
                    assert state["asked"] == state["every"]
                else:
                    accepted.append(session.answer(state["number"], "first", None))
                if len(accepted) % 7 == 0:
                    session.undo(session.state()["number"])

        with ThreadPoolExecutor(4) as threads:
            for each in [threads.submit(click) for _ in range(4)]:
                each.result()
        numbers = [record.number for record in file.records]
        assert numbers == list(range(1, len(numbers) + 1))
        assert sum(record.undoes is None for record in file.records) == sum(accepted) >= 30
        assert active_records(file.records) == session.questions.active


def test_unsure_raters_need_more_answers() -> None:
    records = answer(Questions(tasks(20), (), LabelSettings(repeats=0.3)), by_number, 200)
    expected = []
    for wrong in (0.0, 0.05, 0.1, 0.2):
        rng = np.random.default_rng(0)
        answers = [r if rng.random() > wrong else LabelRecord(*_turned(r)) for r in records]
        expected.append(enough(answers, 0.2).needed or math.inf)
    assert expected == sorted(expected)
    assert len(set(expected)) == 4


def _turned(record: LabelRecord) -> tuple[object, ...]:
    fields = {name: getattr(record, name) for name in LabelRecord.__slots__}
    return tuple((fields | {"answer": "b" if record.answer == "a" else "a"}).values())


@pytest.mark.parametrize("reliability", [0.58, 0.62, 0.75, 0.9, 0.95, 0.98])
def test_needed_answers_suffice(reliability: float) -> None:
    """Simulated judges, as reliable as the rater: they differ from guessing and are known to ten points."""
    agree = reliability**2 + (1 - reliability) ** 2
    target = enough(_of_agreement(round(4000 * agree), 4000), 0.2)
    assert target.reliability == pytest.approx(reliability, abs=0.01)
    assert target.needed is not None
    count = math.floor(0.2 * target.needed)
    right = np.random.default_rng(1).binomial(count, reliability, 4000) / count
    assert (right - 1.96 * 0.5 / math.sqrt(count) > 0.5).mean() > 0.74
    wins = np.rint(right * count).astype(int)
    intervals = {k: share_interval(k, count) for k in set(wins.tolist())}
    low, high = np.transpose([intervals[k] for k in wins.tolist()])
    assert np.median(high - low) / 2 <= 0.1 + 1e-9
    assert ((low <= reliability) & (reliability <= high)).mean() > 0.9
    assert target.held_out_needed == count


def _of_agreement(agreed: int, repeats: int) -> list[LabelRecord]:
    records = []
    for i in range(repeats):
        pair = (f"{i}a", f"{i}b")
        second = "a" if i < agreed else "b"
        records += [
            LabelRecord(2 * i + 1, "x", *pair, "a", "a", "train"),
            LabelRecord(2 * i + 2, "x", *pair, second, "b", "train"),  # type: ignore[arg-type]
        ]
    return records
