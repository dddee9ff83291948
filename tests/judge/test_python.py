"""The judge in a program or a notebook: arguments in one order, results that are sequences and show themselves."""

import pickle
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlxpref.data.images import load_image
from mlxpref.demo.pictures import PictureSpec, render
from mlxpref.errors import ConfigError, DataError
from mlxpref.judge import judge as judge_module
from mlxpref.judge import rank as ranking_module
from mlxpref.judge.functions import calibrate, evaluate
from mlxpref.judge.judge import Judge
from mlxpref.judge.ranking_result import Ranking
from mlxpref.judge.verdict_source import judge_by_model
from mlxpref.preferences import Pair, Preference
from mlxpref.verdict import Verdict
from tests.conftest import picture
from tests.tolerance import PROBABILITY

MakeJudge = Callable[..., Judge]
PROMPT = "a red circle, a blue square, a green triangle"
HOSTILE = '<script>alert("x")</script>'


@pytest.fixture
def judge(demo_judge: MakeJudge) -> Judge:
    return demo_judge(think=False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `pictures` with three of the demo's, below the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for number, quality in enumerate(("clean", "noisy", "blurry")):
        shapes = render(PictureSpec("red", "blue", "green", "yellow", quality), np.random.default_rng(number))
        shapes.save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path / "pictures"


def test_scores_take_images_first(judge: Judge, folder: Path) -> None:
    files = sorted(folder.glob("*.png"))
    scores = pytest.approx(judge.score(files, PROMPT), abs=PROBABILITY)
    assert sum(scores.expected) == pytest.approx(1.5)
    assert judge.score("pictures", PROMPT) == scores
    assert judge.score(images="pictures", prompt=PROMPT) == scores
    assert judge.score((np.asarray(Image.open(file)) for file in files), PROMPT) == scores


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("kind", ["files", "names", "generator", "folder"])
def test_the_old_order_of_score_still_works(judge: Judge, folder: Path, kind: str, named: bool) -> None:
    files = sorted(folder.glob("*.png"))
    old = {"files": files, "names": [str(f) for f in files], "generator": (f for f in files), "folder": folder}[kind]
    with pytest.warns(DeprecationWarning, match=r"give score\(images, prompt\)"):
        scores = judge.score(PROMPT, images=old) if named else judge.score(PROMPT, old)  # type: ignore[call-arg,arg-type]
    assert scores == pytest.approx(judge.score(files, PROMPT), abs=PROBABILITY)


def test_wrong_orders_are_named(judge: Judge, folder: Path) -> None:
    images: Any = [picture(1), picture(2)]
    for ask in (
        lambda: judge.rank(PROMPT, images),
        lambda: judge.compare(PROMPT, *images),  # type: ignore[arg-type]
        lambda: judge.score(images, images),
        lambda: judge.score(PROMPT, "pictures"),
    ):
        with pytest.raises(DataError, match=r"after the images|\(images, prompt\)"):
            ask()


@pytest.mark.parametrize("prompt", ["", " \n", None])
def test_a_prompt_is_needed(judge: Judge, prompt: Any) -> None:
    images: Any = [picture(1), picture(2)]
    for ask in (
        lambda: judge.rank(images, prompt),
        lambda: judge.compare(*images, prompt),
        lambda: judge.score(images, prompt),
        lambda: next(judge.pairs([Pair(*images, prompt)])),
        lambda: evaluate(judge, [Preference(prompt, *images, 1.0)]),
    ):
        with pytest.raises(DataError, match="the prompt is"):
            ask()


def test_what_is_no_pair(judge: Judge) -> None:
    pair: Any = (picture(1), picture(2), PROMPT)
    with pytest.raises(DataError, match=r"give Pair\(a, b, prompt\)"):
        next(judge.pairs([pair]))


@pytest.mark.parametrize("data", [[], "pairs.jsonl", Path("pairs.CSV")])
def test_data_in_the_place_of_the_judge(data: Any) -> None:
    for work in (evaluate, calibrate):
        with pytest.raises(ConfigError, match=r"the order is \(judge, data\)"):
            work(data, "demo")


def test_a_score_of_every_image_or_none(judge: Judge, folder: Path) -> None:
    (folder / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1\.png"):
        judge.score("pictures", PROMPT)
    with pytest.raises(DataError, match="two are needed, not 1"):
        judge.score([picture(1)], PROMPT)


def test_unreadable_answers_are_named(judge: Judge, caplog: pytest.LogCaptureFixture) -> None:
    def unreadable(*args: Any) -> Any:
        for batch in judge_by_model(*args):
            yield [replace(each, verdicts=(Verdict("?"),)) for each in batch]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge_module, "judge_by_model", unreadable)
        assert judge.score([picture(1), picture(2)], PROMPT) == [0.5, 0.5]
    assert "2 of 2 answers could not be read" in caplog.text


def test_a_ranked_folder_names_what_it_left_out(judge: Judge, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "1.png").write_bytes(b"no picture")
    ranking = judge.rank("pictures", PROMPT)
    assert [each.path.name for each in ranking.skipped] == ["1.png"]
    assert "1.png" in caplog.text
    assert len(ranking) == 2


def test_an_image_beside_itself_is_even(judge: Judge) -> None:
    pixels = np.asarray(picture(1))
    assert judge.compare(pixels, pixels, PROMPT).p_a == pytest.approx(0.5, abs=1e-3)


def test_pairs_take_every_form(judge: Judge, folder: Path) -> None:
    pixels: Any = np.asarray(Image.open(folder / "0.png"))
    content: Any = (folder / "1.png").read_bytes()
    before = judge.vlm.features.runs
    pairs = [Pair(pixels, content, PROMPT), Pair(content, pixels, PROMPT), Pair(pixels, content, "a blue circle")]
    p_a = [verdict.p_a for verdict in judge.pairs(pairs)]
    assert p_a[0] == pytest.approx(judge.compare(folder / "0.png", "pictures/1.png", PROMPT).p_a, abs=1e-5)
    assert judge.vlm.features.runs - before <= 2


def test_a_judge_without_thinking_ranks_without(demo_judge: MakeJudge) -> None:
    images = [picture(i) for i in range(3)]

    def thinks(ranking: Ranking) -> bool:
        return any(verdict.tokens for pair in ranking.pairs for verdict in pair.verdict.verdicts)

    assert not thinks(demo_judge(think=False).rank(images, PROMPT))
    assert thinks(demo_judge(think=True, max_tokens=4).rank(images, PROMPT))
    assert thinks(demo_judge(think=False, max_tokens=4).rank(images, PROMPT, think_about="all"))
    assert not thinks(demo_judge(think=True).rank(images, PROMPT, think_about="none"))


def test_ctrl_c_is_raised_with_the_ranking_so_far(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    work = ranking_module.track

    def interrupted(*args: Any) -> Any:
        for number, verdict in enumerate(work(*args)):
            if number == 3:
                raise KeyboardInterrupt
            yield verdict

    monkeypatch.setattr(ranking_module, "track", interrupted)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        judge.rank([picture(i) for i in range(5)], PROMPT)
    assert type(interrupt.value) is KeyboardInterrupt, "only that ends a program as Ctrl-C does, so that shells stop"
    partial: Ranking = vars(interrupt.value)["ranking"]
    assert (partial.ending, partial.model, len(partial)) == ("interrupted", "demo", 5)
    assert "interrupted" in repr(partial)


def test_a_ranking_is_a_sequence_best_first(judge: Judge, folder: Path) -> None:
    images = [picture(1), folder / "0.png", folder / "1.png", np.asarray(picture(2))]
    ranking = judge.rank(images, PROMPT)
    entries = list(ranking)
    assert len(ranking) == len(entries) == 4
    assert [entry.rank for entry in entries] == [1, 2, 3, 4]
    assert [entry.index for entry in entries] == [image.index for image in ranking.strengths.images]
    assert ranking[0] == entries[0]
    assert list(ranking[:2]) == entries[:2]
    assert ranking[-1].strength == min(entry.strength for entry in ranking)
    by_index = {entry.index: entry for entry in ranking}
    assert by_index[0].image is images[0]
    assert by_index[0].path is None
    assert by_index[1].path == folder / "0.png"
    assert by_index[1].image == load_image(folder / "0.png")
    assert [by_index[i].name for i in range(4)] == ["image 0", str(images[1]), str(images[2]), "image 3"]
    assert [entry.to_json() for entry in ranking] == ranking.to_json()["images"]


def test_rankings_are_values_of_a_program(judge: Judge) -> None:
    images = [picture(i) for i in range(3)]
    ranking = judge.rank(images, PROMPT)
    assert ranking != judge.rank(images, PROMPT)  # and no error from comparing arrays
    assert ranking in {ranking: 1}
    assert ranking[1] in ranking
    assert ranking.index(ranking[2]) == 2
    assert [entry.name for entry in pickle.loads(pickle.dumps(ranking))] == [entry.name for entry in ranking]
    with pytest.raises(IndexError):
        ranking[3]


def test_images_given_twice_have_names_of_their_own(judge: Judge, folder: Path) -> None:
    file = folder / "0.png"
    same = picture(1)
    ranking = judge.rank([file, file, folder / "1.png", same, same], PROMPT, pairs="all")
    names = {entry.index: entry.name for entry in ranking}
    assert names[0] == f"{file} (image 0)"
    assert names[2] == str(folder / "1.png")
    assert len(set(names.values())) == 5


def test_entries_have_the_reasons(demo_judge: MakeJudge, folder: Path) -> None:
    ranking = demo_judge().rank("pictures", PROMPT)
    assert ranking[0].reason


def long_results(demo_judge: MakeJudge, folder: Path) -> dict[str, Any]:
    """One of each result, with long names and texts."""
    prompt = "a red circle, " * 200
    deep = folder / ("long-" * 20) / ("name-" * 20)
    deep.mkdir(parents=True)
    files = [deep / f"{number}{'x' * 200}.png" for number in range(12)]
    for number, file in enumerate(files):
        picture(number).save(file)
    judge = replace(demo_judge(max_tokens=8), name="owner/" + "name-" * 50, adapter=deep)
    ranking = judge.rank(files, prompt, think_about="all", pairs=12)
    verdict = judge.compare(files[0], files[1], prompt)
    preference = Preference(prompt, files[0], files[1], 0.75, 4)
    return {
        "Judge": judge, "Ranking": ranking, "RankingEntry": ranking[0], "PairVerdict": verdict,
        "Verdict": verdict.verdicts[0], "Preference": preference,
    }  # fmt: skip


def test_reprs_are_short_and_say_the_result(demo_judge: MakeJudge, folder: Path) -> None:
    results = long_results(demo_judge, folder)
    for name, value in results.items():
        assert repr(value).startswith(f"{name}("), repr(value)
        assert len(repr(value)) < 200, repr(value)
        assert "\n" not in repr(value)
    assert f"{results['PairVerdict'].p_a:.4f}" in repr(results["PairVerdict"])
    assert f"{results['Ranking'][0].strength:+.2f}" in repr(results["Ranking"])
    assert "0.75" in repr(results["Preference"])


def test_html_of_a_ranking(judge: Judge, folder: Path) -> None:
    ranking = judge.rank(["pictures", picture(1)], HOSTILE)
    page = ranking._repr_html_()
    assert page.count("<img") == 4
    assert HOSTILE not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"color|background", page), "the notebook's own colours stay"
    (folder / "0.png").unlink()
    (folder / "1.png").write_bytes(b"changed")
    assert ranking._repr_html_().count("<img") == 2


def test_html_of_many_images_is_small() -> None:
    from mlxpref.judge.rank import rank_pairs
    from tests.judge.test_rank import Rater

    rater = Rater(60)
    rater.images = [picture(i, (640, 480)) for i in range(60)]
    rater.place = {id(image): i for i, image in enumerate(rater.images)}
    page = rank_pairs(rater.images, "a hat" * 5000, rater, "none")._repr_html_()
    assert "and 40 more" in page
    assert len(page) < 300_000


def test_html_of_a_pair(demo_judge: MakeJudge, folder: Path) -> None:
    verdict = demo_judge(max_tokens=16).compare("pictures/0.png", picture(1), HOSTILE)
    page = verdict._repr_html_()
    assert page.count("<img") == 2
    assert HOSTILE not in page
    assert f"a: {100 * verdict.p_a:.1f} %" in page
    assert "a shown first" in page
    (folder / "0.png").unlink()
    assert verdict._repr_html_().count("<img") == 1
    assert replace(verdict, pair=None)._repr_html_().count("<img") == 0


def test_file_names_are_escaped(judge: Judge, folder: Path) -> None:
    hostile = folder / '<img src=x onerror="alert(1)">.png'
    if sys.platform != "win32":
        picture(3).save(hostile)
    page = judge.rank("pictures", PROMPT)._repr_html_()
    assert "<img src=x" not in page
