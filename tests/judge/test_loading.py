"""A judge takes its settings from the training of its adapter, and says where others are asked for."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import mlxpref
from mlxpref.checkpoints.files import ADAPTER_CONFIG
from mlxpref.config import JudgeSettings
from mlxpref.engine.adapters import trained_settings
from mlxpref.errors import ConfigError
from tests.cli.test_commands import TINY, report, run
from tests.conftest import picture, tiny_model, write_adapter

TRAINED: dict[str, Any] = {"think": False, "max_pixels": 128 * 128, "max_tokens": 9, "read_weight": 0.0}


def adapter_of(folder: Path, **trained: Any) -> Path:
    """An adapter of the tiny model that was trained like this."""
    adapter = write_adapter(folder / "adapter", tiny_model("qwen2_5_vl"))
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config | {"trained": TRAINED | trained}))
    return adapter


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    caplog.clear()
    return [line.partition(": ")[2] for line in lines if "fingerprint" not in line]


def test_training_writes_what_loading_takes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = {"limit": 6, "steps": 1, "comparisons": 2, "group": 2, "max_tokens": 7, "max_pixels": 120 * 120}
    for name, changes, weight in (
        ("think", {}, 1.0), ("alone", {"read_weight": 0.0}, 0.0), ("score", {"reward": "score"}, 0.0),
        ("hard", {"reward": "hard"}, 1.0), ("at once", {"think": False}, 0.0),
    ):  # fmt: skip
        list(mlxpref.train("demo", TINY, tmp_path / name, **small | changes))
        think = name != "at once"
        expected = {"think": think, "max_tokens": 7, "max_pixels": 120 * 120, "read_weight": weight}
        assert trained_settings(tmp_path / name) == expected
        caplog.clear()
        judge = mlxpref.load(TINY, adapter=tmp_path / name)
        assert judge.settings == JudgeSettings(think=think, max_tokens=7, max_pixels=120 * 120)
        assert judge.vlm.features.max_pixels == 120 * 120
        assert judge.think_about == ("none" if not think else "top" if weight else "all")
        assert not warnings_of(caplog)


def test_a_copy_of_the_demo_judge_guesses_at_once_as_well(tmp_path: Path) -> None:
    mlxpref.convert("demo", tmp_path / "copy", fidelity=False)
    assert mlxpref.load(tmp_path / "copy").think_about == mlxpref.load("demo").think_about == "all"


def test_given_settings_go_first_and_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter = adapter_of(tmp_path)
    judge = mlxpref.load(TINY, adapter, think=True, max_pixels=256 * 256, max_tokens=9, samples=2)
    assert judge.settings == JudgeSettings(think=True, max_pixels=256 * 256, max_tokens=9, samples=2)
    assert warnings_of(caplog) == [
        "trained without thinking only, asked with thinking: it answers less well so",
        "trained with --max-pixels 16384, asked with 65536",
    ]
    mlxpref.load(TINY, adapter, think=False)
    assert not warnings_of(caplog)
    assert mlxpref.load(TINY, adapter, criterion="the sharper eyes").settings.criterion == "the sharper eyes"
    assert [line.partition(":")[0] for line in warnings_of(caplog)] == ["trained without --criterion"]


@pytest.mark.parametrize(("weight", "about"), [(1.0, "top"), (0.0, "all")])
def test_reading_that_was_trained_too_may_be_asked_for(
    weight: float, about: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = adapter_of(tmp_path, think=True, read_weight=weight)
    assert mlxpref.load(TINY, adapter).think_about == about
    caplog.clear()
    assert mlxpref.load(TINY, adapter, think=False).think_about == "none"
    expected = ["trained with thinking only, asked without thinking: it answers less well so"]
    assert warnings_of(caplog) == ([] if weight else expected)


def test_an_adapter_that_does_not_say_it(tmp_path: Path) -> None:
    judge = mlxpref.load(TINY, write_adapter(tmp_path, tiny_model("qwen2_5_vl")))
    assert judge.settings == JudgeSettings()
    assert judge.think_about == "top"


def test_exports_say_it_too(tmp_path: Path) -> None:
    list(mlxpref.train("demo", TINY, tmp_path / "run", limit=4, steps=1, comparisons=2, think=False, max_tokens=7))
    for to in ("peft", "fused", "hf"):
        mlxpref.export(tmp_path / "run", tmp_path / to, to=to)
        judge = mlxpref.load(TINY, tmp_path / to) if to == "peft" else mlxpref.load(tmp_path / to)
        assert judge.settings == JudgeSettings(think=False, max_tokens=7), to
    mlxpref.convert(tmp_path / "hf", tmp_path / "again", bits=None)
    assert mlxpref.load(tmp_path / "again").settings == JudgeSettings(think=False, max_tokens=7)


def test_an_adapter_that_says_nonsense(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adapter, trained with: setting max_tokens: 'many' is not int"):
        mlxpref.load(TINY, adapter_of(tmp_path, max_tokens="many"))


def test_every_command_follows_the_adapter(tmp_path: Path) -> None:
    adapter = ("--model", TINY, "--adapter", adapter_of(tmp_path))
    (tmp_path / "pictures").mkdir()
    paths = [tmp_path / "pictures" / f"{i:02}.png" for i in range(12)]
    for i, path in enumerate(paths):
        picture(i).save(path)
    prompt = ("--prompt", "a red circle")
    compared = report("compare", *paths[:2], *prompt, *adapter)
    assert {sample["tokens"] for sample in compared["samples"]} == {0}
    ranked = report("rank", tmp_path / "pictures", *prompt, *adapter, "--no-store")
    assert ranked["tokens"] == 0
    data = ("--data", "demo", "--limit", "3", "--no-store")
    assert report("eval", *data, *adapter)["tokens"] == 0
    assert mlxpref.evaluate(TINY, "demo", limit=3, adapter=tmp_path / "adapter").tokens == 0
    enough = ("--data", "demo", "--limit", "12", "--no-store")
    fits = report("calibrate", *enough, *adapter, "--output", tmp_path / "fit.json")["calibrations"]
    assert len(fits) == 1
    assert fits[0]["conditions"]["think"] is False
    against = run("eval", *data, *adapter, "--think", "--json")
    assert json.loads(against.stdout)["tokens"] > 0
    assert "trained without thinking only, asked with thinking" in against.stderr
