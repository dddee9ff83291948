"""Recipes side by side: smaller is less true, the source is asked once, and nothing is kept."""

import tempfile
from pathlib import Path
from typing import Any

import pytest

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.cli.tables import print_recipes
from mlxpref.conversion import compare_recipes as recipe_comparison
from mlxpref.conversion import fidelity as fidelity_module
from mlxpref.conversion.compare_recipes import compare_recipes
from mlxpref.conversion.convert import convert
from mlxpref.conversion.fidelity import Fidelity, answers_of, built_in_comparisons, fidelity_of
from mlxpref.conversion.quantize import Recipe
from mlxpref.engine.vlm import load_vlm
from mlxpref.errors import ConfigError, ModelError
from tests.conftest import GOLDEN

SOURCE = GOLDEN / "qwen2_5_vl"
COMPARISONS = built_in_comparisons()[:8]
COMMON: dict[str, Any] = {"dtype": "float32", "comparisons": COMPARISONS}


def recipes(*names: str) -> list[Recipe]:
    return [Recipe.named(name, 32) for name in names]


@pytest.fixture(autouse=True)
def own_temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Temporary folders go to a place that can be looked at."""
    place = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl_moe", "qwen3_5"])
def test_fewer_bits_are_less_exact(family: str, own_temporary: Path) -> None:
    rows = compare_recipes(GOLDEN / family, recipes("none", "8", "4", "2"), **COMMON)
    assert [row["recipe"] for row in rows] == ["none", "8", "4", "2"]
    assert [row["quantized_layers"] > 0 for row in rows] == [False, True, True, True]
    for key in ("bytes", "bits_per_weight"):
        values = [row[key] for row in rows]
        assert values == sorted(values, reverse=True), key
        assert len(set(values)) == 4, key
    kls = [row["kl_answer"] for row in rows]
    assert kls[0] == 0
    assert kls == sorted(kls)
    assert 0 < 10 * kls[1] < kls[3]
    assert rows[0]["agreement"] == 1
    assert list(own_temporary.iterdir()) == []


def test_rows_are_those_of_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(source: Checkpoint, *arguments: Any, **named: Any) -> Any:
        loaded.append(source.folder)
        return load_vlm(source, *arguments, **named)

    monkeypatch.setattr(fidelity_module, "load_vlm", load)
    rows = compare_recipes(SOURCE, recipes("8", "mixed_4_8"), name="owner/name", **COMMON)
    assert loaded == [SOURCE]
    reference = answers_of(load_vlm(SOURCE, 512 * 512), COMPARISONS)
    for row in rows:
        folder = tmp_path / row["recipe"]
        convert(SOURCE, folder, Recipe.named(row["recipe"], 32), dtype="float32", name="owner/name")
        answers = answers_of(load_vlm(folder, 512 * 512), COMPARISONS, reference.completions)
        again = fidelity_of(reference, answers)
        assert {key: row[key] for key in again.to_json()} == again.to_json()
    assert rows[0]["bytes"] > rows[1]["bytes"]


def test_wrong_recipes_and_sources(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="given twice: 8, 8"):
        compare_recipes(SOURCE, recipes("8", "8"), **COMMON)
    with pytest.raises(ModelError, match="nowhere: no such model folder"):
        compare_recipes(tmp_path / "nowhere", recipes("8"), **COMMON)


def test_an_interruption_leaves_nothing(own_temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: Path, output: Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        convert(source, output, *arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe_comparison, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare_recipes(SOURCE, recipes("8"), **COMMON)
    assert list(own_temporary.iterdir()) == []


def test_source_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fidelity_module, "device_working_set", lambda: 10**6)
    rows = compare_recipes(SOURCE, recipes("8", "4"), **COMMON)
    assert [row["kl_answer"] for row in rows] == [None, None]
    assert all("does not fit in memory" in row["fidelity_skipped"] for row in rows)
    print_recipes(rows)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "n/a" in lines[1]
    assert lines[3].startswith("not compared with the source: the source does not fit in memory")


def test_the_table_has_a_line_for_each_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    fidelity = Fidelity(8, 1.5e-4, 0.01, 0.975, 0.0125, 0.1, 0.2, 0.04, 100)
    sizes = {"bytes": 3_250_000, "bits_per_weight": 4.517, "quantized_layers": 21, "fidelity_skipped": None}
    print_recipes([{"recipe": "4", **sizes, **fidelity.to_json()}, {"recipe": "8", **sizes, **fidelity.to_json()}])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].split() == ["4", "3.2", "MB", "4.52", "21", "97.5", "%", "0.00015", "0.01", "0.013", "0.04"]
