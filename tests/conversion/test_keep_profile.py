"""Folders keep their judge's profile: converted, exported, converted again, and measured by its own question."""

import ast
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.files import PROFILE_FILE, RECORD
from mlxpref.conversion import convert as conversion
from mlxpref.conversion.compare_recipes import compare_recipes
from mlxpref.conversion.convert import convert
from mlxpref.conversion.export import export_adapter
from mlxpref.conversion.fidelity import answers_of, built_in_comparisons, questions_of
from mlxpref.conversion.functions import convert as convert_by_name
from mlxpref.conversion.quantize import Recipe
from mlxpref.engine.profile import PROMPT_SLOT, Profile, built_in_profiles, profile_named, read_profile
from mlxpref.engine.vlm import load_vlm
from mlxpref.errors import ConfigError
from mlxpref.judge.judge import Judge
from mlxpref.judge.loading import load_judge
from mlxpref.ranking.log_odds import probability
from tests.conftest import GOLDEN, tiny_model, write_adapter

SOURCE = GOLDEN / "qwen2_5_vl"
COMPARISONS = built_in_comparisons()[:4]
OTHERS = sorted(set(built_in_profiles()) - {"mlxpref"})


def readable(name: str, folder: Path) -> Profile:
    """A built-in profile whose labels the tiny vocabulary has: a tie begins with one letter there."""
    file = folder / f"{name}.toml"
    file.write_text(built_in_profiles()[name].text().replace('"Both"\n', '"B"\n'))
    return profile_named(str(file))


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_keeps_its_profile_and_is_measured_by_it(name: str, tmp_path: Path) -> None:
    profile = readable(name, tmp_path)
    result = convert(
        SOURCE, tmp_path / "out", Recipe(None), dtype="float32", comparisons=COMPARISONS, profile=profile,
    )  # fmt: skip
    assert result["profile"] == profile.name
    assert read_profile(tmp_path / "out" / PROFILE_FILE).version() == profile.version()
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["profile"] == {"name": profile.name, "version": profile.version()}
    assert PROFILE_FILE in record["sha256"]
    assert str(tmp_path) not in (tmp_path / "out" / PROFILE_FILE).read_text()
    assert (result["fidelity"]["comparisons"], result["fidelity"]["agreement"]) == (4, 1)
    assert result["fidelity"]["kl_answer"] == result["fidelity"]["token_logprob_difference"] == 0
    assert load_judge(str(tmp_path / "out")).profile.name == profile.name
    again = convert(tmp_path / "out", tmp_path / "again", Recipe(8, 32))
    assert again["profile"] == profile.name
    assert load_judge(str(tmp_path / "again")).profile.version() == profile.version()


@pytest.mark.parametrize("name", ["mlxpref", *OTHERS])
def test_preferences_are_those_of_the_judge_at_once(name: str, tmp_path: Path) -> None:
    vlm = load_vlm(SOURCE, 512 * 512, profile=readable(name, tmp_path))
    answers = answers_of(vlm, COMPARISONS)
    judge = Judge(vlm)
    questions = questions_of(vlm.profile, COMPARISONS)
    verdicts = [each.verdicts[0] for each in judge.judgements(questions, think=False)]
    if vlm.profile.is_point:
        assert len(questions) == 4  # two pairs in both orders show four images
        # The judge's own score is the mean over its aspects, the measurement's is that of the first one.
        levels = np.array(vlm.profile.levels, float)
        shares = np.exp(answers.label_logprobs) / np.exp(answers.label_logprobs).sum(axis=1, keepdims=True)
        score = dict(zip([id(each.images[0]) for each in questions], shares @ levels, strict=True))
        expected = [float(probability(score[id(c.first)] - score[id(c.second)])) for c in COMPARISONS]
        one = readable(name, tmp_path).text().replace('aspects = ["Faithfulness", "Quality", ', "aspects = [")
        (tmp_path / "one.toml").write_text(one.replace('"Text in the image"]', '"Faithfulness"]'))
        single = Judge(load_vlm(SOURCE, 512 * 512, profile=read_profile(tmp_path / "one.toml")))
        scores = [each.verdicts[0].score for each in single.judgements(questions, think=False)]
        assert list(score.values()) == pytest.approx(scores, abs=1e-4)
    else:
        expected = [v.p_label_first / (v.p_label_first + v.p_label_second) for v in verdicts]
    assert answers.p_first == pytest.approx(expected, abs=1e-4)


def test_the_profile_is_that_of_the_source(tmp_path: Path) -> None:
    """By its id, or what it was made of; our own stays out of the folder unless it is given."""
    for name, expected in {
        "CodeGoat24/UnifiedReward-Think-qwen3vl-8b": "unifiedreward-think",
        "CodeGoat24/UnifiedReward-Flex-qwen3vl-8b@v2": "unifiedreward-flex",
        "Qwen/Qwen3-VL-8B-Instruct": "mlxpref",
    }.items():
        output = tmp_path / expected
        assert convert(SOURCE, output, name=name)["profile"] == expected
        assert (output / PROFILE_FILE).exists() == (expected != "mlxpref")
    ours = tmp_path / "ours"
    convert(SOURCE, ours, name="CodeGoat24/UnifiedReward-Think-x", profile=profile_named("mlxpref"))
    assert load_judge(str(ours)).profile.name == "mlxpref"  # though its source has another one
    convert(ours, tmp_path / "ours again", Recipe(4), requantize=True)
    assert load_judge(str(tmp_path / "ours again")).profile.name == "mlxpref"


def test_a_profile_is_no_part_of_the_model(tmp_path: Path) -> None:
    names = ("mlxpref", "unifiedreward-think")
    for name in names:
        convert_by_name(SOURCE, tmp_path / name, 8, fidelity=False, profile=name)
    identities = [Checkpoint.open(tmp_path / name).identity.own for name in names]
    assert identities[0] == identities[1]
    judges = [load_judge(str(tmp_path / name), settings={"think": False}) for name in names]
    assert judges[0].fingerprint.now() == judges[1].fingerprint.now()
    assert judges[0].conditions().profile != judges[1].conditions().profile


def test_wrong_profiles_are_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "lazy_model", None)
    words = built_in_profiles()["plain"].text().replace('first = "1"', 'first = "one-hundred"')
    (tmp_path / "words.toml").write_text(words)
    for problem, profile in {
        "'one-hundred' is no single token of this judge's tokenizer": tmp_path / "words.toml",
        "unknown profile 'nonsense': known are mlxpref, plain, ": "nonsense",
        r"nothing\.toml: no such file; give a TOML file, or one of mlxpref, plain, ": tmp_path / "nothing.toml",
    }.items():
        with pytest.raises(ConfigError, match=problem):
            convert_by_name(SOURCE, tmp_path / "out", profile=profile)
    with pytest.raises(ConfigError, match="'one-hundred' is no single token"):
        compare_recipes(SOURCE, [Recipe()], COMPARISONS, read_profile(tmp_path / "words.toml"))
    assert [each.name for each in tmp_path.iterdir()] == ["words.toml"]


def test_recipes_are_compared_by_the_profile(tmp_path: Path) -> None:
    rows = {
        name: compare_recipes(SOURCE, [Recipe(4, 32)], COMPARISONS, profile, dtype="float32")
        for name, profile in (("own", None), ("think", profile_named("unifiedreward-think")))
    }
    assert rows["own"][0]["kl_answer"] != rows["think"][0]["kl_answer"]
    result = convert(
        SOURCE, tmp_path / "out", Recipe(4, 32), dtype="float32", comparisons=COMPARISONS,
        profile=profile_named("unifiedreward-think"),
    )  # fmt: skip
    assert rows["think"][0]["kl_answer"] == result["fidelity"]["kl_answer"]


@pytest.mark.parametrize("name", OTHERS)
def test_exports_carry_the_adapters_profile(name: str, tmp_path: Path) -> None:
    profile = readable(name, tmp_path)
    adapter = write_adapter(tmp_path / "adapter", tiny_model("qwen2_5_vl"))
    shutil.copy(tmp_path / f"{name}.toml", adapter / PROFILE_FILE)
    (adapter / PROFILE_FILE).write_text(profile.text())
    for to in ("peft", "fused", "hf"):
        result = export_adapter(adapter, tmp_path / to, to, SOURCE, str(SOURCE))
        assert result["profile"] == profile.name
        assert (tmp_path / to / PROFILE_FILE).read_text() == profile.text()
        card = (tmp_path / to / "README.md").read_text()
        assert f"(the profile {profile.name})" in card
        code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        assert len(code) == (2 if to == "fused" else 3)
        for part in code:
            ast.parse(part)
        messages = json.dumps(profile.messages()).replace(json.dumps(PROMPT_SLOT)[1:-1], "PROMPT")
        assert json.loads(code[1].removeprefix("messages = ")) == json.loads(messages)
        for text in (*profile.closings(at_once=True), *(profile.closings() if profile.thinks else ()), profile.lead):
            assert f"`{text!r}`" in card
        assert ("<think>" in card) == (profile.think_begin == "<think>")
        assert ("Both orders" in card) == (not profile.is_point)
        assert ("A tie begins with" in card) == bool(profile.tie_opening)
    assert load_judge(str(SOURCE), tmp_path / "peft").profile.name == profile.name
    assert load_judge(str(tmp_path / "fused")).profile.name == profile.name
