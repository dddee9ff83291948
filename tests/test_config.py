"""Settings: one field each, checked by name, type and limit, and offered as options with the same default."""

from dataclasses import fields
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from mlxpref.cli.options import settings_options
from mlxpref.config import JudgeSettings, TrainSettings, settings_from
from mlxpref.errors import ConfigError


def test_settings_are_checked() -> None:
    assert settings_from(JudgeSettings, {}) == JudgeSettings()
    assert settings_from(JudgeSettings, {"think": False, "samples": 4}) == JudgeSettings(think=False, samples=4)
    for values, problem in (
        ({"sample": 1}, "unknown setting 'sample'; known are think, samples"),
        ({"samples": 0}, "setting samples: 0 is below 1"),
        ({"samples": "2"}, "setting samples: '2' is not int"),
        ({"samples": True}, "setting samples: True is not int"),
        ({"think": 1}, "setting think: 1 is not bool"),
        ({"max_pixels": 10}, "setting max_pixels: 10 is below 784"),
    ):
        with pytest.raises(ConfigError, match=problem):
            settings_from(JudgeSettings, values)


def test_removed_settings() -> None:
    fixed = {"schedule": "cosine", "curriculum": False, "divide_by_deviation": True}
    assert settings_from(TrainSettings, fixed | {"steps": 3}) == TrainSettings(steps=3)
    for name, value in {"schedule": "linear", "curriculum": True, "divide_by_deviation": False}.items():
        with pytest.raises(
            ConfigError, match=f"run.json: setting {name} was removed: it is always {fixed[name]!r} now"
        ):
            settings_from(TrainSettings, fixed | {name: value}, "run.json")


def test_contradicting_settings() -> None:
    assert settings_from(TrainSettings, {"length_budget": 255}).length_budget == 255
    with pytest.raises(ConfigError, match=r"run.toml: setting length_budget: 256 is not below max_tokens, 256"):
        settings_from(TrainSettings, {"length_budget": 256}, "run.toml")
    assert settings_from(TrainSettings, {"patience": 2, "held_out": 0.1}).patience == 2
    with pytest.raises(ConfigError, match="setting patience: nothing is measured without held_out"):
        settings_from(TrainSettings, {"patience": 2})


def test_every_setting_of_training_is_an_option() -> None:
    @click.command()
    @settings_options(TrainSettings)
    def command(settings: dict[str, Any]) -> None:
        click.echo(repr(settings))

    inputs = {
        "--updates-per-rollout": 3, "--length-budget": 64, "--resample": 2, "--held-out": 0.1, "--held-out-limit": 50,
        "--evaluate-every": 5, "--patience": 2,
    }  # fmt: skip
    arguments = [str(word) for pair in inputs.items() for word in pair] + ["--mask-truncated"]
    result = eval(CliRunner().invoke(command, arguments).output)
    expected = {name[2:].replace("-", "_"): value for name, value in inputs.items()}
    assert result == expected | {"mask_truncated": True}
    assert CliRunner().invoke(command, ["--loss-type", "steep"]).exit_code == 2


def test_options_have_help_and_default() -> None:
    @click.command()
    @settings_options(JudgeSettings)
    def command(settings: dict[str, Any]) -> None:
        click.echo(repr(settings))

    output = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    for field in fields(JudgeSettings):
        assert f"--{field.name.replace('_', '-')}" in output
        assert field.metadata["help"] in output
    assert "[default: 262144, or the adapter's; never more than the judge's own]" in output
    assert "[default: yes, or as the adapter was trained]" in output
    assert CliRunner().invoke(command, []).output == "{}\n"
    assert eval(CliRunner().invoke(command, ["--no-think", "--samples", "2"]).output) == {"think": False, "samples": 2}
    for wrong in (["--samples", "0"], ["--samples", "many"]):
        assert CliRunner().invoke(command, wrong).exit_code == 2


def test_an_option_may_be_left_out() -> None:
    @click.command()
    @settings_options(JudgeSettings, only=("seed",))
    def command(settings: dict[str, Any]) -> None:
        click.echo(repr(settings))

    assert CliRunner().invoke(command, ["--seed", "3"]).output == "{'seed': 3}\n"
    assert CliRunner().invoke(command, ["--samples", "3"]).exit_code == 2


def test_numbers_of_numpy() -> None:
    settings = settings_from(JudgeSettings, {"samples": np.int64(2), "max_tokens": np.uint8(9)})
    assert (settings.samples, type(settings.samples), settings.max_tokens) == (2, int, 9)
    assert settings_from(TrainSettings, {"data": "demo", "learning_rate": np.float32(0.5)}).learning_rate == 0.5
    with pytest.raises(ConfigError, match="samples"):
        settings_from(JudgeSettings, {"samples": np.float32(2.5)})
