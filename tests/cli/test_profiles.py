"""`--profile` as a person meets it: in every command, in folders that keep it, and in what is printed of answers."""

import csv
import json
from pathlib import Path

import click
import pytest

import mlxpref
from mlxpref.checkpoints.files import PROFILE_FILE
from mlxpref.cli import main
from mlxpref.engine.profile import built_in_profiles
from mlxpref.errors import ConfigError
from tests.cli.test_commands import draw, refusal_of, report, run

PAIR = built_in_profiles()["unifiedreward-pair"].text()
ASK = ("--prompt", "a shape", "--model", "demo")


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return draw(tmp_path / "pictures" / "a.png"), draw(tmp_path / "pictures" / "b.png", 1)


@pytest.fixture
def tie(tmp_path: Path) -> Path:
    """A profile with ties that the demo's vocabulary has: they begin with the word red."""
    (tmp_path / "tie.toml").write_text(PAIR.replace('"Both"\n', '"red"\n').replace('"unifiedreward-pair"', '"tie"'))
    return tmp_path / "tie.toml"


@pytest.mark.parametrize("command", ["compare", "rank", "eval", "calibrate", "distill", "train", "convert"])
def test_every_command_takes_a_profile_and_says_what_is_asked_without(command: str) -> None:
    shown = run(command, "--help").stdout
    assert "--profile" in shown
    words = " ".join(shown.partition("--profile")[2].split())
    assert words.removeprefix("TEXT ").startswith("How the judge is asked: a built-in profile by name, or a TOML file")
    assert "own, by its folder or id]" in words
    assert next(p for p in main.get_command(click.Context(main), command).params if p.name == "profile")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "arguments",
    [
        "rank . --prompt x --model Owner/none",
        "compare a.png b.png --prompt x --model Owner/none",
        "eval --data nowhere.jsonl --model Owner/none",
        "calibrate --data nowhere.jsonl --model Owner/none",
        "distill --data nowhere.jsonl --model Owner/none --output out.jsonl",
        "train --data nowhere.jsonl --model Owner/none --output run",
        "convert Owner/none out",
    ],
)
def test_an_unknown_profile_is_named_before_any_work(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known = "known are mlxpref, plain, rationalrewards, "
    assert f"unknown profile 'nonsense': {known}" in refusal_of(*arguments.split(), "--profile", "nonsense")
    (tmp_path / "typo.toml").write_text(PAIR.replace("lead =", "leed ="))
    refusal = refusal_of(*arguments.split(), "--profile", "typo.toml")
    assert "typo.toml: lead is missing; unknown key 'leed'; known are kind, " in refusal
    assert "is empty; give a built-in profile by name" in run(*arguments.split(), "--profile", "").stderr
    assert [path.name for path in tmp_path.iterdir()] == ["typo.toml"]


@pytest.mark.parametrize("command", ["compare a.png b.png", "rank .", "eval --data demo", "calibrate --data demo"])
def test_a_criterion_of_ones_own_goes_with_our_profile(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png", 1)
    for model in ("Owner/none", "demo"):
        options = ("--model", model, "--profile", "plain", "--criterion", "sharp")
        assert "has no place for it" in refusal_of(*command.split(), *options)


def test_what_a_profile_does_not_have(two: tuple[Path, Path], tie: Path, tmp_path: Path) -> None:
    assert "the profile tie answers at once" in refusal_of("compare", *two, *ASK, "--profile", tie, "--think")
    distilled = refusal_of("distill", "--data", "demo", "--limit", "2", "--model", "demo", "--profile", tie,
                           "--output", tmp_path / "out.jsonl")  # fmt: skip
    assert "answers at once" in distilled
    score = ("eval", "--data", "demo", "--limit", "2", "--model", "demo", "--strategy", "score")
    assert "no question for two scores" in refusal_of(*score, "--profile", "plain")
    train = ("train", "--data", "demo", "--model", "demo", "--output", tmp_path / "run", "--profile")
    assert "no question for two scores" in refusal_of(*train, "plain", "--reward", "score", "--no-think")
    assert "one image at a time" in refusal_of(*train, "rationalrewards")


def test_a_converted_folder_is_asked_by_its_profile(two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("convert", "demo", out, "--bits", "8", "--profile", "unifiedreward-think")
    assert done.exit_code == 0, done.output
    assert f"use it with --model {out}, which is asked by the profile unifiedreward-think" in done.stdout
    assert (out / PROFILE_FILE).is_file()
    ask = ("compare", *two, "--prompt", "a shape", "--no-think", "--model")
    kept = report(*ask, out)
    assert kept["profile"] == "unifiedreward-think"
    assert report(*ask, out, "--profile", "mlxpref")["profile"] == "mlxpref"
    assert report(*ask, "demo")["profile"] == "mlxpref"
    assert kept["p_a"] == pytest.approx(report(*ask, "demo", "--profile", "unifiedreward-think")["p_a"], abs=0.05)
    ranking = report("rank", two[0].parent, "--prompt", "a shape", "--no-think", "--model", out)
    assert ranking["profile"] == "unifiedreward-think"
    bits = run("convert", "demo", "--compare", "8", "--profile", "unifiedreward-think")
    assert (bits.exit_code, bits.stdout.splitlines()[1].split()[0]) == (0, "8")


def test_scores_of_single_images(two: tuple[Path, Path], tmp_path: Path) -> None:
    ask = (*ASK, "--profile", "rationalrewards", "--no-think")
    pair = report("compare", *two, *ask)
    a, b = pair["scores"]
    assert 1 <= min(a, b) < max(a, b) <= 4
    assert (pair["p_a"] > 0.999) == (a > b)
    assert pair["p_a"] > 0.999 or pair["p_a"] < 0.001
    assert any("without a fitted temperature" in warning for warning in pair["warnings"])
    shown = run("compare", *two, *ask)
    best, other = (two, two[::-1])[a < b]
    assert shown.stdout.splitlines()[0] == f"{best} is preferred to {other} by its score"
    assert f"  {best.name}: score {max(a, b):.2f}" in shown.stdout.splitlines()
    assert "%" not in shown.stdout.partition("note: ")[0]
    assert "without a fitted temperature" in shown.stderr
    page, table = tmp_path / "page.html", tmp_path / "table.csv"
    for number, name in enumerate(("c.png", "d.png"), 2):  # a single pair would say little of strengths
        draw(two[0].parent / name, number)
    result = run("rank", two[0].parent, *ask, "--html", page, "--csv", table)
    assert "each image scored by itself" in result.stdout
    assert "4 scores without thinking" in result.stderr
    assert "Strengths are on the scale of the levels of its scores" in page.read_text()
    assert "no place was favoured" in page.read_text()
    with table.open() as file:
        rows = list(csv.DictReader(file))
    strength = {Path(row["image"]).name: float(row["strength"]) for row in rows}
    assert strength["a.png"] - strength["b.png"] == pytest.approx(a - b, rel=0.05)
    assert "strengths are on the scale of its levels" in rows[0]["warnings"]
    calibrate = ("calibrate", "--data", "demo", "--limit", "12", "--model", "demo", *ask[4:], "--output")
    assert run(*calibrate, tmp_path / "fit.json").exit_code == 0
    fitted = (*ask, "--calibration", tmp_path / "fit.json")
    assert f"by its score, {100 * max(p := report('compare', *two, *fitted)['p_a'], 1 - p):.1f} %" in (
        run("compare", *two, *fitted).stdout
    )


def test_a_tie_has_its_share(two: tuple[Path, Path], tie: Path) -> None:
    pair = report("compare", *two, *ASK, "--profile", tie)
    assert 0 < pair["p_tie"] < 1
    assert (
        f"a tie: {100 * pair['p_tie']:.1f} %, counted half for each"
        in run("compare", *two, *ASK, "--profile", tie).stdout
    )
    assert "p_tie" not in report("compare", *two, *ASK, "--no-think")
    ranking = report("rank", two[0].parent, *ASK, "--profile", tie)
    assert ranking["pairs"][0]["p_tie"] == pytest.approx(pair["p_tie"], abs=1e-6)


def test_swapped_images_have_each_others_scores(two: tuple[Path, Path], tie: Path) -> None:
    judge = mlxpref.load("demo", profile="rationalrewards", think=False)
    verdict, other = judge.compare(*two, "a shape"), judge.compare(*two[::-1], "a shape")
    assert verdict.scores is not None
    assert verdict.swapped().scores == verdict.scores[::-1]
    assert other.scores == pytest.approx(verdict.scores[::-1], abs=1e-5)
    assert verdict.p_tie is None
    with_tie = mlxpref.load("demo", profile=tie).compare(*two, "a shape")
    assert with_tie.scores is None
    assert with_tie.swapped().p_tie == pytest.approx(with_tie.p_tie)


def test_profiles_in_python(tie: Path) -> None:
    judge = mlxpref.load("demo", profile=tie)
    assert judge.profile.name == "tie"
    with pytest.raises(ConfigError, match="profile and max_pixels are chosen when a judge is loaded"):
        mlxpref.evaluate(judge, "demo", limit=2, profile="plain")
    with pytest.raises(ConfigError, match="unknown profile 'nonsense'"):
        mlxpref.load("demo", profile="nonsense")


def test_json_of_distill_names_the_profile(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    result = run("distill", "--data", "demo", "--limit", "2", "--model", "demo", "--output", out, "--json")
    assert json.loads(result.stdout)["profile"] == "mlxpref"
