"""convert/models.toml: every field is there, and it agrees with the recommended judges."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from mlxpref.checkpoints.families import FAMILIES
from mlxpref.checkpoints.recommended import recommended_judges
from mlxpref.conversion.quantize import Recipe
from mlxpref.engine.find_profile import find_profile
from mlxpref.engine.profile import built_in_profiles

FILE = Path(__file__).parents[1] / "convert" / "models.toml"
LIST = tomllib.loads(FILE.read_text(encoding="utf-8"))
MODELS: list[dict[str, Any]] = LIST["model"]
SIZES = ("source_gb", "conversion_gb", "converted_gb")
PROFILES = set(built_in_profiles())
FIELDS = {"source", "family", "licence", "any_use", *SIZES, "recipe", "profile", "checked"}
each = pytest.mark.parametrize("model", MODELS, ids=lambda model: model["source"])


@each
def test_each_model_has_every_field(model: dict[str, Any]) -> None:
    assert set(model) >= FIELDS
    assert set(model) <= FIELDS | {"converted", "revision", "form", "shape"}
    assert model["source"].count("/") == 1
    assert model["family"] in FAMILIES
    assert model["profile"] in {*PROFILES, "own", "not verified"}
    assert ("form" in model) == (model["profile"] == "own")
    assert model["checked"]
    assert all(isinstance(model[name], float) for name in SIZES)


@each
def test_licences(model: dict[str, Any]) -> None:
    assert model["any_use"] == (model["licence"] in ("apache-2.0", "mit"))
    if "revision" in model:
        assert "revision" in model["checked"], "say where the revision was checked"


@each
def test_sizes_fit_each_other(model: dict[str, Any]) -> None:
    sizes = [model[name] for name in SIZES]
    assert all(sizes) or not any(sizes), "a size that is not known is 0, and then no other is known either"
    assert any(sizes) == ("shape" in model)
    if any(sizes):
        assert LIST["shape"][model["shape"]]["model_type"] == model["family"]
        assert min(model["converted_gb"], 5) + 0.3 < model["conversion_gb"] < model["source_gb"]


@each
def test_recipes_can_be_asked_for(model: dict[str, Any]) -> None:
    assert Recipe.named(model["recipe"]).name == model["recipe"]


def test_recommended_judges_are_asked_by_their_profiles() -> None:
    for judge in recommended_judges():
        assert find_profile("", (), (judge.id, "")).name == judge.profile, judge.id
    for model in MODELS:
        if model["profile"] in built_in_profiles():
            assert find_profile("", (), (model["source"], "")).name == model["profile"], model["source"]


def test_recommended_judges_are_in_the_list() -> None:
    known = {model.get("converted", model["source"]): model for model in MODELS}
    assert len({model["source"] for model in MODELS}) == len(MODELS) == len(known)
    for judge in recommended_judges():
        model = known[judge.id]
        assert (model["licence"], model["any_use"]) == (judge.licence, judge.any_use)
        if judge.is_converted:
            assert (model["source"], model["profile"]) == (judge.id, judge.profile)
            assert Recipe.named(model["recipe"]) == Recipe(), "its first use converts so"
            assert (model["source_gb"], model["converted_gb"]) == (judge.download_gb, judge.converted_gb)
        else:
            assert model["converted_gb"] == judge.download_gb
    assert {model["converted"] for model in MODELS if "converted" in model} <= {j.id for j in recommended_judges()}
