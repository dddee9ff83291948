"""Which profile a judge has, and what makes one profile another."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from mlxpref.checkpoints.files import PROFILE_FILE
from mlxpref.engine.find_profile import find_profile
from mlxpref.engine.profile import Profile, own_profile, read_profile
from tests.engine.test_profile import PAIR, POINT, with_key, write


def test_a_judges_profile_is_found(tmp_path: Path) -> None:
    """The given one, else that in its adapter's folder, in its model's, the one for its names, and our own."""
    names = ("CodeGoat24/UnifiedReward-Think-qwen3vl-8b", "")
    adapter, model = tmp_path / "adapter", tmp_path / "model"
    for folder in (adapter, model):
        write(folder, f'name = "in the {folder.name}"{PAIR}', PROFILE_FILE)
    empty = tmp_path / "empty"
    empty.mkdir()

    def found(given: str, folders: tuple[Path | None, ...], names: tuple[str, ...] = names) -> str:
        return find_profile(given, folders, names).name

    assert found("plain", (adapter, model)) == "plain"
    assert found(str(write(tmp_path, PAIR)), (adapter, model)) == "own"
    assert found("", (adapter, model)) == "in the adapter"
    assert found("", (empty, model)) == "in the model"
    assert found("", (None, model)) == "in the model"
    assert found("", (None, empty)) == "unifiedreward-think"
    assert found("", (None, empty), ("some/model", "")) == "mlxpref"


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        ("CodeGoat24/UnifiedReward-Think-qwen3vl-8b", "unifiedreward-think"),
        ("CodeGoat24/UnifiedReward-Think-qwen3vl-8b@main", "unifiedreward-think"),
        ("CodeGoat24/UnifiedReward-Think-qwen35-9b@" + 40 * "a", "unifiedreward-think"),
        ("CodeGoat24/UnifiedReward-Think-qwen3vl-8b@refs/pr/3", "unifiedreward-think"),
        ("CodeGoat24/UnifiedReward-Flex-qwen3vl-8b", "unifiedreward-flex"),
        ("CodeGoat24/UnifiedReward-2.0-qwen3vl-8b", "unifiedreward-pair"),
        ("TIGER-Lab/RationalRewards-8B-T2I", "rationalrewards"),
        ("/home/me/models/unifiedreward-think-qwen3vl-8b-4bit/", "unifiedreward-think"),
        ("models/UnifiedReward-Flex-qwen3vl-8b-mlx", "unifiedreward-flex"),
        ("mlx-community/RationalRewards-8B-T2I-4bit", "rationalrewards"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "mlxpref"),
        ("/home/UnifiedReward-Think-me/models/qwen", "mlxpref"),
        ("me/my-UnifiedReward-Think-8b", "mlxpref"),
        ("demo", "mlxpref"),
        ("", "mlxpref"),
    ],
)
def test_a_judge_is_known_by_its_name_and_by_what_it_was_converted_from(name: str, profile: str) -> None:
    assert find_profile("", (), (name,)).name == profile
    assert find_profile("", (None,), ("models/mine", name)).name == profile


# versions

CHANGES: Mapping[str, Any] = {
    "system": "You judge.",
    "question": "{image}{image}<{prompt}>",
    "chat_template": {"enable_thinking": False},
    "counts": "last",
    "first": ("A", "a"),
    "second": ("C",),
    "tie": ("T",),
    "end": ".",
    "closing": "So. Answer: ",
    "at_once": "Answer:  ",
    "think_end": "</t>",
    "lead": "Reply: ",
    "scores_question": "{image}{image}{prompt}?",
    "thinks": False,
}
SAME: Mapping[str, Any] = {
    "name": "n", "note": "n", "models": ("m",), "max_tokens": 7, "path": Path("p.toml"), "source": "#",
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGES)
def test_another_way_of_asking_or_reading_is_another_version(tmp_path: Path, field: str) -> None:
    profile = read_profile(write(tmp_path, PAIR))
    changes = {field: CHANGES[field]} | ({"closing": "", "at_once": ""} if field in ("lead", "think_end") else {})
    assert replace(profile, **changes).version() != profile.version()


def test_versions_of_what_goes_together(tmp_path: Path) -> None:
    pair = read_profile(write(tmp_path, PAIR + "thinks = false"))
    point = read_profile(write(tmp_path, POINT))
    asked = replace(pair, question="{criterion}\n{prompt}\n{image}{image}", criterion="sharp")
    tagged = replace(pair, thinks=True, think_end="</t>", closing="", at_once="")
    sharp, soft = asked, replace(asked, criterion="soft")
    versions = [
        each.version()
        for each in (
            pair, replace(pair, tie_opening=("Both",)), replace(pair, tie_opening=("Tie",)), point,
            replace(point, levels=("1", "3")), replace(point, aspects=("light",)), sharp, soft,
            tagged, replace(tagged, think_begin="<t>", at_once=""),
            replace(pair, end="."), replace(pair, end=".", after=" is better"),
        )
    ]  # fmt: skip
    assert len(set(versions)) == len(versions)
    tested = {*CHANGES, *SAME, "kind", "tie_opening", "levels", "aspects", "criterion", "think_begin", "after"}
    assert tested == {field.name for field in fields(Profile)}


def test_names_and_notes_are_the_same_version(tmp_path: Path) -> None:
    profile = read_profile(write(tmp_path, PAIR))
    assert replace(profile, **SAME).version() == profile.version()
    spaced = "# words" + with_key(PAIR, 'closing = "Answer: "').replace("\n", "\n\n")
    assert read_profile(write(tmp_path, spaced, "other.toml")).version() == profile.version()


def test_a_criterion_of_ones_own_is_another_version() -> None:
    own = own_profile()
    assert own.version(" ") == own.version()
    assert len({own.version(), own.version("sharp"), own.version("soft")}) == 3
    assert own.version("sharp") == own.version(" sharp\n")
