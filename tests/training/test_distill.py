"""What a judge prefers with thinking, as a file that `train` and `eval` read."""

import json
import os
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mlxpref
from mlxpref.data.images import load_image
from mlxpref.data.left_out import LeftOut
from mlxpref.data.load import Preferences, load_preferences
from mlxpref.demo.preferences import demo_preferences
from mlxpref.engine.vision import VisionEncoder
from mlxpref.judge import rank, verdict_source
from mlxpref.judge.judge import Judge
from mlxpref.judge.verdict_source import Judgement
from mlxpref.preferences import Comparison, Pair, Preference
from mlxpref.training.distill import distill_preferences
from mlxpref.verdict import Verdict
from tests.conftest import picture

PROMPT = "a red circle, a blue square, a green cross"
"""One that the demo judge has an answer to, whatever it is shown."""


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def saved(folder: Path, count: int, seed: int = 0) -> list[Preference]:
    """Demo preferences with files, of which the last name is no text."""
    preferences = []
    for number, each in enumerate(demo_preferences("train", count, seed)):
        names = folder / f"{number} a.png", folder / os.fsdecode(b"%d \xff.png" % number)
        for name, image in zip(names, (each.a, each.b), strict=True):
            load_image(image).save(name)
        preferences.append(replace(each, a=names[0], b=names[1]))
    return preferences


def unreadable(monkeypatch: pytest.MonkeyPatch, is_unreadable: Callable[[int, Comparison], bool]) -> None:
    """Let thinking about some comparisons, by number, have no answer."""
    judge_comparisons = Judge.judgements

    def judgements(judge: Judge, comparisons: Iterator[Comparison], *args: Any, **named: Any) -> Iterator[Judgement]:
        kept = list(comparisons)
        thinks = args[2] if len(args) > 2 else named.get("think")
        for number, each in enumerate(judge_comparisons(judge, kept, *args, **named)):
            silent = thinks and is_unreadable(number, kept[number])
            yield Judgement((Verdict("<think>I"),)) if silent else each

    monkeypatch.setattr(Judge, "judgements", judgements)


@pytest.fixture
def demo(demo_judge: Callable[..., Judge]) -> Judge:
    return demo_judge(max_tokens=80)


def test_the_file_says_what_the_judge_says_with_thinking(demo: Judge, tmp_path: Path) -> None:
    given = demo_preferences("train", 12)
    result = mlxpref.distill(demo, given, tmp_path / "soft.jsonl", held_out=0.4)
    path = tmp_path / "soft.jsonl"
    verdicts = list(demo.pairs([Pair(p.a, p.b, p.prompt) for p in given], think=True))
    rows = rows_of(path)
    assert [row["p_a"] for row in rows] == pytest.approx([verdict.p_a for verdict in verdicts], abs=1e-5)
    assert [row["people"] for row in rows] == [p.p_people for p in given]
    read = {split: load_preferences(str(path), split) for split in ("train", "test")}
    assert (len(read["train"]), len(read["test"])) == (result.train, result.test)
    assert result.train + result.test == len(given)
    assert result.test
    assert not {p.prompt for p in read["train"]} & {p.prompt for p in read["test"]}
    by_share = {p.p_people: p for part in read.values() for p in part}
    for before, row in zip(given, rows, strict=True):
        after = by_share[row["p_a"]]
        assert after.prompt == before.prompt
        for one, other in ((before.a, after.a), (before.b, after.b)):
            assert load_image(one).tobytes() == load_image(other).tobytes()
    people = [p for p, row in zip(given, rows, strict=True) if row["split"] == "test"]
    for found, expected in (
        (result.thinking, mlxpref.evaluate(demo, people)),
        (result.reading, mlxpref.evaluate(demo, people, think=False)),
        (result.agreement, mlxpref.evaluate(demo, path, think=False, split="test")),
    ):
        assert found is not None
        assert vars(found.metrics) == pytest.approx(vars(expected.metrics), rel=1e-4)  # batches round differently


def test_the_judge_learns_it(demo: Judge, tmp_path: Path) -> None:
    path = tmp_path / "soft.jsonl"
    mlxpref.distill(demo, demo_preferences("train", 6), path, held_out=0)
    assert not any("split" in row for row in rows_of(path))
    settings = {
        "think": False, "reward": "brier", "steps": 30, "comparisons": 6, "warmup_steps": 1, "learning_rate": 5e-3,
    }  # fmt: skip
    for _ in mlxpref.train(path, "demo", tmp_path / "run", **settings):  # type: ignore[arg-type]
        pass
    learned = mlxpref.load(adapter=tmp_path / "run")
    assert not learned.settings.think
    before, after = (mlxpref.evaluate(judge, path, think=False).metrics.brier for judge in (demo, learned))
    assert after < 0.5 * before


def test_images_have_names_from_where_the_file_is(demo: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "elsewhere").mkdir()
    given = saved(tmp_path / "pictures", 2)
    with zipfile.ZipFile(tmp_path / "pictures" / "all.zip", "w") as archive:
        for name in ("one.png", "two.png"):
            picture(len(archive.namelist()), (84, 84)).save(tmp_path / name)
            archive.write(tmp_path / name, f"deep/{name}")
    content = {(tmp_path / name).read_bytes() for name in ("one.png", "two.png")}
    row = {"prompt": PROMPT, "a": "one.png", "b": "two.png", "p_a": 1}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    monkeypatch.chdir(tmp_path / "elsewhere")
    mlxpref.distill(demo, given, "../soft.jsonl", held_out=0)
    mlxpref.distill(demo, tmp_path / "pairs.jsonl", "zip.jsonl", data_dir=tmp_path / "pictures")
    monkeypatch.chdir("/")
    for before, after in zip(given, load_preferences(str(tmp_path / "soft.jsonl"), "train"), strict=True):
        assert isinstance(after.a, Path)
        assert before.a.samefile(after.a)  # type: ignore[union-attr]
        assert isinstance(after.b, Path)
        assert after.b.parent == tmp_path / "soft-images", "its name cannot be written"
        assert after.b.read_bytes() == before.b.read_bytes()  # type: ignore[union-attr]
    monkeypatch.setenv("MLXPREF_CACHE", str(tmp_path / "pictures"))  # as if they were unpacked there
    mlxpref.distill(demo, given, tmp_path / "cached.jsonl", held_out=0)
    for image in (image for p in load_preferences(str(tmp_path / "cached.jsonl"), "train") for image in (p.a, p.b)):
        assert isinstance(image, Path)
        assert image.parent == tmp_path / "cached-images"
    (packed,) = load_preferences(str(tmp_path / "elsewhere" / "zip.jsonl"), "train")
    assert {image.read_bytes() for image in (packed.a, packed.b) if isinstance(image, Path)} == content


def test_pairs_of_images_are_those_of_a_ranking(demo: Judge, tmp_path: Path) -> None:
    images = [picture(seed) for seed in range(10)]
    result = mlxpref.distill(demo, images, tmp_path / "soft.jsonl", prompt=PROMPT, pairs=14)
    ranking = demo.rank(images, PROMPT, "all", pairs=14, orders="both")
    assert (result.train, result.test, result.thinking, result.reading) == (14, 0, None, None)
    assert [row["p_a"] for row in rows_of(result.path)] == pytest.approx(
        [pair.verdict.p_a for pair in ranking.pairs], abs=1e-5
    )
    read = load_preferences(str(result.path), "train")
    for preference, pair in zip(read, ranking.pairs, strict=True):
        assert load_image(preference.a).tobytes() == images[pair.a].tobytes()


def test_what_cannot_be_read_is_left_out_by_name(
    demo: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = saved(tmp_path, 4)
    unreadable(monkeypatch, lambda number, comparison: number in (1, 4, 5))  # an order of the first, both of the third
    result = mlxpref.distill(demo, given, tmp_path / "soft.jsonl", held_out=0)
    assert [row["a"] for row in rows_of(result.path)] == ["1 a.png", "3 a.png"]
    assert [name.partition(" beside ")[0] for name in result.unreadable] == [str(given[0].a), str(given[2].a)]
    assert "2 of 4 pairs had no readable answer in both orders" in caplog.text
    unreadable(monkeypatch, lambda number, comparison: True)
    with pytest.raises(mlxpref.DataError, match="no pair has a readable answer"):
        mlxpref.distill(demo, given, tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


def test_an_image_that_goes_costs_its_pairs(demo: Judge, tmp_path: Path) -> None:
    given = saved(tmp_path, 3)
    assert isinstance(given[1].a, Path)
    given[1].a.write_bytes(b"no picture")
    left_out = LeftOut("mine", given)
    result = distill_preferences(demo, "mine", Preferences(given), tmp_path / "soft.jsonl", 0.0, left_out)
    assert [row["a"] for row in rows_of(result.path)] == ["0 a.png", "2 a.png"]
    assert (left_out.pairs, result.unreadable) == (1, ())


def test_an_interrupt_keeps_finished_pairs(demo: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, path = saved(tmp_path, 6), tmp_path / "soft.jsonl"

    def interrupted(number: int, comparison: Comparison) -> bool:
        if number == 6:  # the first order of the fourth pair
            raise KeyboardInterrupt
        return False

    mlxpref.distill(demo, given, path, held_out=0.4)
    whole = path.read_text()
    path.unlink()
    with monkeypatch.context() as patched:
        unreadable(patched, interrupted)
        with pytest.raises(KeyboardInterrupt):
            mlxpref.distill(demo, given, path, held_out=0.4)
    assert path.read_text().splitlines() == whole.splitlines()[:3]
    mlxpref.distill(demo, given, path, held_out=0.4)
    assert path.read_text() == whole
    unreadable(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):  # a second run, with fewer pairs until then
        mlxpref.distill(demo, given, path, held_out=0.4)
    assert path.read_text() == whole


def test_an_interrupt_before_an_answer_writes_nothing(
    demo: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupted(number: int, comparison: Comparison) -> bool:
        raise KeyboardInterrupt

    unreadable(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        mlxpref.distill(demo, demo_preferences("train", 2), tmp_path / "soft.jsonl")
    assert f"{tmp_path / 'soft.jsonl'} is not written" in caplog.text
    assert "stays" not in caplog.text
    assert not any(tmp_path.iterdir())


def test_pairs_of_an_earlier_distillation_are_not_lost(demo: Judge, tmp_path: Path) -> None:
    path, given = tmp_path / "soft.jsonl", demo_preferences("train", 4)
    mlxpref.distill(demo, given[:3], path)
    mlxpref.distill(demo, given, path)  # more pairs lose none
    everything = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    other = replace(demo, name="another")
    for judge, data, reason in (
        (demo, given[:3], "4 pairs of an earlier .* would lose 1; give another output"),
        (demo, demo_preferences("train", 4, seed=1), "would lose 4;"),
        (demo, [*given[:3], replace(given[3], prompt=PROMPT)], "would lose 1;"),
        (demo, [*given[:3], replace(given[3], b=given[0].a)], "would lose 1;"),
        (other, given, "judged by demo, not another, .*; give another output"),
    ):
        with pytest.raises(mlxpref.ConfigError, match=reason) as error:
            mlxpref.distill(judge, data, path)
        assert str(error.value).startswith(f"{path}: ")
    assert everything == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    mlxpref.distill(demo, given, path)
    assert path.read_bytes() == everything[path]


def test_images_lose_no_pairs_of_an_earlier_distillation(demo: Judge, tmp_path: Path) -> None:
    path, images = tmp_path / "soft.jsonl", [picture(seed) for seed in range(5)]
    mlxpref.distill(demo, images[:4], path, prompt=PROMPT, pairs=3)
    for number in (3, 6):  # the same, and more
        assert mlxpref.distill(demo, images[:4], path, prompt=PROMPT, pairs=number).train == number
    for others, pairs in ((images[:4], 5), (images[1:], None)):
        with pytest.raises(mlxpref.ConfigError, match="6 pairs of an earlier"):
            mlxpref.distill(demo, others, path, prompt=PROMPT, pairs=pairs)
    assert len(rows_of(path)) == 6


@pytest.mark.parametrize(("named", "seed"), [({}, 90), ({"prompt": PROMPT, "pairs": 8}, 100)])
def test_seconds_are_those_of_answers(
    demo: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: dict[str, Any], seed: int
) -> None:
    clock = [0.0]

    def taking(seconds: float, call: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*args: Any, **named: Any) -> Any:
            clock[0] += seconds
            return call(*args, **named)

        return slow

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(VisionEncoder, "encode", taking(1e6, VisionEncoder.encode))
    monkeypatch.setattr(rank, "fit_strengths", taking(1e3, rank.fit_strengths))
    monkeypatch.setattr(verdict_source, "roll_out", taking(1.0, verdict_source.roll_out))
    images: list[Any] = [picture(seed + number) for number in range(6)]
    data: Any = images if named else [Preference(f"{PROMPT} {n}", images[n], images[n + 1], 1.0) for n in (0, 2, 4)]
    result = mlxpref.distill(
        replace(demo, settings=replace(demo.settings, rows=2)), data, tmp_path / "a.jsonl", **named
    )
    assert clock[0] > 1e6
    assert clock[0] % 1e6 > 1e3 or not named
    assert result.seconds_per_pair == pytest.approx(1.0)  # both orders of a pair at once
    assert result.reading_seconds_per_pair == pytest.approx(1.0)


def test_refusals_come_before_the_work(demo: Judge, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"prompt": "a hat", "a": "1.png", "b": "2.png", "p_a": 1}\n')
    given = demo_preferences("train", 2)
    for judge, output, reason in (
        (demo, mine, "no earlier result"),
        (demo, tmp_path / "soft.csv", "ends in it"),
        (demo, tmp_path / "gone" / "soft.jsonl", "does not exist"),
        (replace(demo, settings=replace(demo.settings, think=False)), tmp_path / "soft.jsonl", "answers at once"),
        (replace(demo, settings=replace(demo.settings, criterion="sharp")), tmp_path / "soft.jsonl", "leave it out"),
    ):
        with pytest.raises(mlxpref.ConfigError, match=reason):
            mlxpref.distill(judge, given, output)
    images, soft = [picture(1), picture(2)], tmp_path / "soft.jsonl"
    for named in ({"limit": 5}, {"split": "train"}, {"data_dir": tmp_path}):
        with pytest.raises(mlxpref.ConfigError, match="split, limit and data_dir are for preferences"):
            mlxpref.distill(demo, images, soft, prompt=PROMPT, **named)  # type: ignore[arg-type]
    with pytest.raises(mlxpref.ConfigError, match="pairs is for images"):
        mlxpref.distill(demo, given, soft, pairs=3)
    with pytest.raises(mlxpref.ConfigError, match="think=False: what a judge says"):
        mlxpref.distill("demo", given, soft, think=False)
    with pytest.raises(mlxpref.ConfigError, match="share from 0"):
        mlxpref.distill(demo, given, tmp_path / "soft.jsonl", held_out=20)
    assert mine.read_text().count("\n") == 1
    assert list(tmp_path.iterdir()) == [mine]


def test_a_single_prompt_is_not_held_out(demo: Judge, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = [replace(each, prompt=PROMPT, group="") for each in demo_preferences("train", 3)]
    result = mlxpref.distill(demo, given, tmp_path / "soft.jsonl")
    assert (result.train, result.test) == (3, 0)
    assert "none are held out" in caplog.text
    assert load_preferences(str(result.path), "train").split == "all rows"
