"""Several judges beside each other: votes of real judges by other arithmetic, and one judge in memory at a time."""

import csv
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import mlxpref
from mlxpref.data import image_cache
from mlxpref.data.images import read_image
from mlxpref.demo.preferences import demo_preferences
from mlxpref.errors import ConfigError, DataError
from mlxpref.judge.compare_judges import JudgeComparison, JudgeResult, compare_judges
from mlxpref.judge.evaluation import EvaluationSpec, evaluation_of, to_judge
from mlxpref.judge.functions import evaluate
from mlxpref.judge.judge import Judge
from mlxpref.judge.pair_verdict import JudgingCounts, PairVerdict
from mlxpref.judge.strategies import StrategyComparison, StrategyRow, StrategyVariant
from mlxpref.preferences import Preference
from mlxpref.verdict import Verdict
from tests.conftest import picture, write_adapter

P_A = {"1": 1.0, "2": 0.0, "=": 0.5}
SPEC = EvaluationSpec("votes", "test")
VARIANT = StrategyVariant("soft", True, 1)
JUDGES = ("gpt4o", "gemini-1.5-pro", "llava", "idefics2", "videollava", "cogvlm", "minicpm-V-2.5")


def votes() -> dict[str, str]:
    """Who voted what on 1,735 pairs, see fixtures/votes.md."""
    with (Path(__file__).parents[1] / "fixtures" / "votes.csv").open(encoding="utf-8", newline="") as file:
        return {row["who"]: row["votes"] for row in csv.DictReader(file)}


def people(count: int | None = None) -> list[Preference]:
    """What people voted, each pair of a prompt of its own."""
    letters = votes()["people"][:count]
    return [
        Preference(f"prompt {i}", Path(f"{i}a.png"), Path(f"{i}b.png"), P_A[letter]) for i, letter in enumerate(letters)
    ]


def verdict(letter: str) -> PairVerdict:
    """A vote as a verdict in one order: unreadable for `-`, of a pair that is left out for `x`."""
    if letter == "x":
        return PairVerdict((), ())
    p = P_A.get(letter)
    return PairVerdict((Verdict("?") if p is None else Verdict("", p, 1 - p),), ())


def voting(letters: str, all_preferences: Sequence[Preference], tokens: int = 3) -> Callable[..., JudgeResult]:
    """A judge that votes by letters, one for each of all preferences."""
    letter_of = {id(p): letter for p, letter in zip(all_preferences, letters, strict=True)}

    def measure(name: str, preferences: Sequence[Preference]) -> JudgeResult:
        kept = [p for p in preferences if letter_of[id(p)] != "x"]
        pairs = to_judge(kept, SPEC)
        evaluation = evaluation_of(kept, [verdict(letter_of[id(p)]) for p in pairs], replace(SPEC, strategy="soft"), 9)
        comparison = StrategyComparison((StrategyRow(VARIANT, evaluation),), tuple(pairs), JudgingCounts(), 9)
        return JudgeResult(name, None, comparison)

    return measure


def compared(letters: dict[str, str], preferences: Sequence[Preference], **scores: dict[str, float]) -> JudgeComparison:
    """Judges by their votes, and tools by their scores."""
    measures = {name: voting(each, preferences) for name, each in letters.items()}
    files = {Path(f"{name}.csv"): of_images for name, of_images in scores.items()}
    return compare_judges(letters, lambda name, p: measures[name](name, p), preferences, SPEC, files)


def exact_mcnemar(better: int, worse: int) -> float:
    """The two-sided p-value of the sign test on pairs that only one of two judges was right about."""
    n, k = better + worse, min(better, worse)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


@pytest.mark.parametrize("first", JUDGES)
def test_differences_of_real_judges(first: str) -> None:
    all_votes, preferences = votes(), people()
    rows = compared({name: all_votes[name] for name in (first, *(j for j in JUDGES if j != first))}, preferences)
    assert rows[0].minus_first is None
    assert rows[0].name == first
    decided = [i for i, letter in enumerate(all_votes["people"]) if letter in "12"]
    for row in rows[1:]:
        right = {name: [all_votes[name][i] == all_votes["people"][i] for i in decided] for name in (first, row.name)}
        better = sum(x and not y for x, y in zip(right[row.name], right[first], strict=True))
        worse = sum(y and not x for x, y in zip(right[row.name], right[first], strict=True))
        n, gain = len(decided), row.minus_first
        assert gain is not None
        assert gain.accuracy == pytest.approx((better - worse) / n)
        assert gain.accuracy == pytest.approx(row.evaluation.metrics.accuracy - rows[0].evaluation.metrics.accuracy)
        # Wald's interval of matched pairs, and the exact test, both by other arithmetic.
        half = 1.96 * math.sqrt(better + worse - (better - worse) ** 2 / n) / n
        assert (gain.low, gain.high) == pytest.approx((gain.accuracy - half, gain.accuracy + half), abs=0.004)
        if not 0.02 < (p_value := exact_mcnemar(better, worse)) < 0.1:
            assert (gain.low > 0 or gain.high < 0) == (p_value < 0.05)


def test_scores_stand_beside_judges() -> None:
    all_votes, preferences = votes(), people()
    letters = all_votes["gpt4o"].replace("-", "=")
    scores = {
        str(image): score
        for p, letter in zip(preferences, letters, strict=True)
        for image, score in ((p.a, 2 * P_A[letter]), (p.b, 1.0))
    }
    judge, tool = compared({"gpt4o": all_votes["gpt4o"]}, preferences, clip=scores)
    assert tool.evaluation.metrics.accuracy == judge.evaluation.metrics.accuracy
    assert (tool.name, tool.minus_first.accuracy) == ("clip.csv", 0)
    row = tool.to_json()
    assert (row["model"], row["adapter"], row["scores"]) == (None, None, "clip.csv")
    for name in ("brier", "ece", "both_orders_accuracy", "first_choice_rate", "unreadable", "tokens_per_pair", "think"):
        assert row[name] is None, name
    assert set(tool.to_json()["minus_first"]) == {"accuracy", "low", "high"}
    of_judge = judge.to_json()
    assert (of_judge["model"], of_judge["scores"], of_judge["minus_first"]) == ("gpt4o", None, None)
    # Any tool alone, and several without a judge.
    one, same = compared({}, preferences, first=scores, second=scores)
    assert (one.minus_first, same.minus_first.accuracy) == (None, 0)


def test_a_pair_that_one_leaves_out_counts_for_none() -> None:
    all_votes, preferences = votes(), people(300)
    letters = {name: list(all_votes[name][:300]) for name in ("gpt4o", "gemini-1.5-pro", "llava")}
    decided = [i for i in range(300) if all_votes["people"][i] != "="]  # the others are judged by nobody
    dropped = {"gpt4o": decided[3:5], "gemini-1.5-pro": decided[4:7], "llava": []}
    for name, places in dropped.items():
        for place in places:
            letters[name][place] = "x"
    scores = {str(image): float(7 * i % 5) for i, p in enumerate(preferences) for image in (p.a, p.b)}
    scores |= {str(p.b): 1.5 for p in preferences}
    rows = compared({name: "".join(each) for name, each in letters.items()}, preferences, clip=scores)
    kept = [i for i in range(300) if i not in decided[3:7]]
    expected = compared(
        {name: "".join(all_votes[name][i] for i in kept) for name in letters}, [preferences[i] for i in kept],
        clip=scores,
    )  # fmt: skip
    for row, other in zip(rows, expected, strict=True):
        assert row.to_json() == other.to_json()
    assert [p.prompt for p in rows.preferences] == [p.prompt for p in expected.preferences]
    with pytest.raises(DataError, match="no preference to judge"):
        compared({"one": "x", "other": "1"}, [replace(preferences[0], p_people=1.0)])


def test_equal_names_have_numbers() -> None:
    preferences = people(20)
    letters = votes()["gpt4o"][:20]
    measures = [voting(letters, preferences)] * 2
    rows = compare_judges(measures, lambda measure, p: measure("models/judge", p), preferences, SPEC)
    assert [row.name for row in rows] == ["judge (1)", "judge (2)"]


def test_a_list_of_judges(demo_judge: Callable[..., Judge], tmp_path: Path) -> None:
    preferences = demo_preferences("test", 12, 3)
    adapter = write_adapter(tmp_path / "adapter", demo_judge().vlm)
    base = demo_judge(think=False)
    adapted = mlxpref.load("demo", adapter=adapter, think=False)
    rows = evaluate([base, adapted], preferences)
    assert isinstance(rows, JudgeComparison)
    assert [row.name for row in rows] == ["demo", "demo + adapter"]
    for row, judge in zip(rows, (base, adapted), strict=True):
        alone = evaluate(judge, preferences)
        assert row.evaluation.metrics == alone.metrics
    gain = rows[1].minus_first
    assert gain.accuracy == pytest.approx(rows[1].evaluation.metrics.accuracy - rows[0].evaluation.metrics.accuracy)
    assert gain.low < gain.accuracy < gain.high
    assert len(rows) == 2
    assert rows[:1] == rows.rows[:1]


def test_one_judge_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of judges that a generator loads, and of names, which are loaded here."""
    models: list[weakref.ref[object]] = []

    def load_one(*args: object, **named: object) -> Judge:
        assert not any(model() is not None for model in models), "an earlier judge is still in memory"
        judge = load(*args, **named)
        models.append(weakref.ref(judge.vlm.model))
        return judge

    from mlxpref.judge import functions

    load = functions.load_judge
    monkeypatch.setattr(functions, "load_judge", load_one)
    preferences = demo_preferences("test", 3, 3)
    rows = evaluate(["demo", "demo"], preferences, think=False)
    assert [row.name for row in rows] == ["demo (1)", "demo (2)"]
    assert len(models) == 2
    assert len(evaluate((load_one("demo", None, {"think": False}) for _ in range(3)), preferences)) == 3
    assert len(models) == 5


def test_images_are_decoded_once_for_all_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[object] = []

    def count(image: object, *args: object, **named: object) -> object:
        decoded.append(image)
        return read_image(image, *args, **named)

    monkeypatch.setattr(image_cache, "read_image", count)
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    rows = [{"prompt": "x", "a": str(tmp_path / "0.png"), "b": str(tmp_path / f"{i}.png"), "p_a": 1} for i in (1, 2)]
    evaluate(["demo", "demo"], rows, think=False)
    assert len(decoded) == 3


@pytest.mark.parametrize(
    ("judges", "named", "problem"),
    [
        ([], {}, r"the list of judges is empty; the order is \(judge, data\)"),
        (["demo", 3], {}, r"an int is no name of a model; the order is \(judge, data\)"),
        (["demo"], {"adapter": "runs/taste"}, "load each of several with its own"),
        (["demo"], {"calibration": "calibration.json"}, "load each of several with its own"),
    ],
)
def test_wrong_lists(judges: list[str], named: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        evaluate(judges, demo_preferences("test", 2, 0), think=False, **named)
