"""The package from outside: what it names, types and documents, and functions with the results of the commands."""

import inspect
import io
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import mlxpref
from mlxpref.cli import main
from mlxpref.demo.preferences import demo_preferences
from mlxpref.judge.judge import Judge
from tests.conftest import write_adapter
from tests.tolerance import PROBABILITY

TIMES = {"seconds", "seconds_per_pair"}


def command(*line: object) -> Any:
    """What a command prints as JSON."""
    run = CliRunner().invoke(main, [*map(str, line), "--json"])
    assert run.exit_code == 0, run.output
    return json.loads(run.stdout)


def without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def rounded(value: Any) -> Any:
    """A value of JSON whose numbers may differ as those of another run on a busy machine do."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return pytest.approx(value, abs=PROBABILITY, rel=1e-3) if isinstance(value, float) else value


def run_python(*arguments: str) -> str:
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr + run.stdout
    return run.stdout


def test_public_names() -> None:
    names = [name for name in dir(mlxpref) if not name.startswith("_")]
    assert names == sorted(mlxpref.__all__)
    for name in names:
        value = getattr(mlxpref, name)
        if name != "ImageInput":
            assert inspect.getdoc(value), name
    with pytest.raises(AttributeError, match="nothing"):
        mlxpref.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_one_version() -> None:
    assert mlxpref.__version__ == version("mlxpref")
    assert "__version__" in dir(mlxpref)


def test_the_package_runs_as_a_module() -> None:
    assert version("mlxpref") in run_python("-m", "mlxpref", "--version")


def test_importing_loads_no_model_library() -> None:
    loaded = run_python("-c", "import mlxpref, sys; dir(mlxpref); print(*sys.modules)").split()
    assert not {"mlx", "mlx.core", "numpy", "PIL", "transformers", "importlib.metadata"} & set(loaded)


PROGRAM = """
from collections.abc import Sequence
from pathlib import Path
import mlx.core as mx
import numpy as np
from PIL import Image
import mlxpref

judge: mlxpref.Judge = mlxpref.load("demo", adapter=Path("x"), think=False)
pixels = np.zeros((8, 8, 3), np.uint8)
verdict = judge.compare("a.png", pixels, "a hat")
print(verdict.p_a + 1, verdict.verdicts[0].reasoning.upper())
for image in (mx.array(pixels), b"", Path("a.png"), Image.new("RGB", (8, 8))):
    judge.compare(image, image, "a hat")
ranking = judge.rank("folder", "a hat", pairs="all", top=1)
best: Sequence[mlxpref.RankingEntry] = ranking[:3]
path: Path | None = ranking[0].path
size: tuple[int, int] = ranking[0].image.size
names = [entry.name.upper() for entry in ranking if entry.strength > 0 and entry.reason]
scores: list[float] = judge.score((np.zeros((8, 8)) for _ in range(2)), "a hat")
preference = mlxpref.Preference("a hat", Path("a.png"), Path("b.png"), 0.5)
accuracy: float = mlxpref.evaluate(judge, [preference], think=True).metrics.accuracy
file: Path = mlxpref.calibrate("demo", "demo", "train", limit=20).path
written: dict[str, object] = mlxpref.convert("demo", "out", recipe="mixed_4_8")
mlxpref.export("runs/a", "out", "peft")
for report in mlxpref.train("demo", "demo", "runs/a", steps=3):
    print(report.reward + 1)
try:
    judge.rank([], "a hat")
except mlxpref.MlxprefError as error:
    print(error)
print(mlxpref.__version__.split("."))
"""


@pytest.mark.slow
def test_a_users_program_is_typed(tmp_path: Path) -> None:
    assert (Path(mlxpref.__file__).parent / "py.typed").is_file()
    (tmp_path / "program.py").write_text(PROGRAM)
    checked = run_python("-m", "mypy", "--strict", "--cache-dir", str(tmp_path), str(tmp_path / "program.py"))
    assert "Success" in checked


def test_evaluate_as_the_command(demo_judge: Callable[..., Judge]) -> None:
    expected = command("eval", "--model", "demo", "--data", "demo", "--limit", 12, "--no-think", "--no-store")
    names = mlxpref.evaluate("demo", "demo", limit=12, think=False).to_json()
    loaded = mlxpref.evaluate(demo_judge(), "demo", "test", 12, think=False).to_json()
    listed = mlxpref.evaluate(demo_judge(think=False), demo_preferences("test", 12)).to_json()
    for values in (names, loaded):
        assert without(values, *TIMES) == rounded({name: expected[name] for name in without(values, *TIMES)})
    assert without(listed, "data", "split", *TIMES) == rounded(without(names, "data", "split", *TIMES))
    assert (listed["data"], listed["split"]) == ("list of preferences", "all rows")


def test_evaluate_files_protocols_and_strategies(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = []
    for number, preference in enumerate(demo_preferences("test", 6)):
        for side in "ab":
            getattr(preference, side).save(tmp_path / f"{number}{side}.png")
        images = {side: f"{number}{side}.png" for side in "ab"}
        rows.append({"prompt": preference.prompt, "p_a": preference.p_people, **images})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for options, settings in (
        (["--strategy", "select", "--max-tokens", 16], {"strategy": "select", "max_tokens": 16}),
        (["--protocol", "pickapic", "--tie-threshold", 0.2, "--no-think"],
         {"protocol": "pickapic", "tie_threshold": 0.2, "think": False}),
        (["--samples", 2, "--max-tokens", 4], {"samples": 2, "max_tokens": 4}),
    ):  # fmt: skip
        expected = command("eval", "--model", "demo", "--data", path, "--no-store", *options)
        values = without(mlxpref.evaluate("demo", path, **settings).to_json(), *TIMES)
        assert values == rounded({name: expected[name] for name in values})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"data": "nothing"}, "unknown --data nothing"),
        ({"data": "missing.jsonl"}, "no such file"),
        ({"data": []}, "no preferences"),
        ({"data": None}, "None; give a name"),
        ({"data": [3]}, "not all are Preferences"),
        ({"data": [mlxpref.Preference("a hat", "a.png", "b.png", 1.0)]}, "a.png: no such file"),  # type: ignore[arg-type]
        ({"data": demo_preferences("test", 2), "split": "test"}, "split"),
        ({"strategy": "best"}, "known are soft"),
        ({"protocol": "mine"}, "known are pairs"),
        ({"limit": 0}, "at least 1"),
        ({"thinking": True}, "unknown setting 'thinking'"),
        ({"max_pixels": 1000}, "mlxpref.load"),
        ({"adapter": "runs/a"}, "mlxpref.load"),
    ],
)
def test_evaluate_refuses_in_one_line(demo_judge: Callable[..., Judge], wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(mlxpref.MlxprefError, match=message) as error:
        mlxpref.evaluate(**({"judge": demo_judge(), "data": "demo"} | wrong))
    assert len(str(error.value).splitlines()) == 1


def test_dicts_are_rows_of_a_file(tmp_path: Path, demo_judge: Callable[..., Judge]) -> None:
    preferences = demo_preferences("test", 6)
    rows: list[dict[str, Any]] = []
    for number, preference in enumerate(preferences):
        preference.a.save(tmp_path / f"{number}.png")  # type: ignore[union-attr]
        images = {"a": str(tmp_path / f"{number}.png"), "b": np.asarray(preference.b)}
        rows.append({"prompt": preference.prompt, "p_a": np.float32(preference.p_people), "votes": None, **images})
    judge = demo_judge(think=False)
    expected = rounded(without(mlxpref.evaluate(judge, preferences).to_json(), *TIMES))
    assert without(mlxpref.evaluate(judge, rows).to_json(), *TIMES) == expected
    assert without(mlxpref.evaluate(judge, iter(rows)).to_json(), *TIMES) == expected
    assert mlxpref.evaluate(judge, rows, limit=2).metrics.pairs == 2
    halves = [row | {"split": "test" if number % 2 else "train"} for number, row in enumerate(rows)]
    assert mlxpref.evaluate(judge, halves).spec.split == "test"
    assert mlxpref.evaluate(judge, halves, "train").metrics.pairs == 3
    chosen = [
        {"prompt": p.prompt, "chosen": {"bytes": content(p.a), "path": None}, "rejected": content(p.b)}
        if p.p_people > 0.5
        else {"prompt": p.prompt, "chosen": content(p.b), "rejected": p.a}
        for p in preferences
    ]
    assert mlxpref.evaluate(judge, chosen).metrics.accuracy == expected["accuracy"]
    for wrong, message in (
        ([{"prompt": "x", "a": None, "b": None, "p_a": 1}], "none of 1 rows|row 0"),
        ([rows[0], rows[1] | {"b": "missing.png"}], "row 1: .*missing.png"),
        ([rows[0], rows[1] | {"b": np.zeros((3, 9, 9))}], "channels come first"),
        ([rows[0], preferences[0]], "not all are Preferences"),
        ([rows[0] | {"p_a": 3}], "p_a"),
    ):
        with pytest.raises(mlxpref.DataError, match=message):
            mlxpref.evaluate(judge, wrong)  # type: ignore[arg-type]
    with pytest.raises(mlxpref.DataError, match="no splits"):
        mlxpref.evaluate(judge, rows, "train")


def content(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_calibrate_as_the_command(tmp_path: Path) -> None:
    options = ["--data", "demo", "--limit", 12, "--no-store", "--max-tokens", 4]
    expected = command("calibrate", "--model", "demo", *options, "--output", tmp_path / "command.json")
    file = mlxpref.calibrate("demo", "demo", limit=12, max_tokens=4, output=str(tmp_path / "function.json"))
    assert file.path == tmp_path / "function.json"
    split = expected["calibrations"][0]["split"]
    written = json.loads((tmp_path / "function.json").read_text())["calibrations"]
    assert written == rounded(expected["calibrations"])
    assert written == json.loads(json.dumps([each.to_json() for each in file.calibrations]))
    judge = mlxpref.load("demo", calibration=file.path, max_tokens=4, think=False)
    again = mlxpref.calibrate(judge, "demo", split, 12, think=False, output=tmp_path / "again.json")
    assert json.loads(json.dumps(again.calibrations[0].to_json())) == rounded(written[0])


@pytest.mark.slow
def test_convert_and_export_as_the_commands(tmp_path: Path) -> None:
    expected = command("convert", "demo", tmp_path / "command", "--bits", 8, "--group-size", 32)
    written = mlxpref.convert("demo", tmp_path / "function", 8, group_size=32)
    assert without(written, "path", "seconds") == rounded(without(expected, "path", "seconds"))
    for name, options, settings in (
        ("none", ("--bits", "none"), {"bits": None}),
        ("mixed", ("--recipe", "mixed_4_8"), {"recipe": "mixed_4_8", "group_size": 64}),
    ):
        expected = command("convert", "demo", tmp_path / f"{name}-command", *options, "--no-fidelity")
        written = mlxpref.convert("demo", tmp_path / f"{name}-function", fidelity=False, **settings)
        assert without(written, "path", "seconds") == without(expected, "path", "seconds")
    adapter = write_adapter(tmp_path / "adapter", mlxpref.load("demo").vlm)
    names = ("--model", "demo", "--to", "peft")
    exported = command("export", adapter, tmp_path / "exported", *names)
    result = mlxpref.export(str(adapter), str(tmp_path / "by-function"), "peft", model="demo")
    assert without(result, "path") == without(exported, "path")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 7}, "recipe '7'"),
        ({"bits": 0}, "recipe '0'"),
        ({"recipe": "mixed_9"}, "recipe 'mixed_9'"),
        ({"dtype": "int8"}, "dtype"),
        ({"group_size": 100}, "groups of 100"),
        ({"vision_bits": 1}, "1 bits"),
        ({"source": "/no/such"}, "no such model"),
        ({"source": 3}, "no path and no name"),
    ],
)
def test_convert_refuses_in_one_line(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(mlxpref.MlxprefError, match=message):
        mlxpref.convert(**({"source": "demo", "output": tmp_path / "out"} | wrong))
    assert not (tmp_path / "out").exists()


def test_export_refuses_in_one_line(tmp_path: Path) -> None:
    for wrong in ({"to": "onnx"}, {"to": "peft", "recipe": 4}, {"to": "hf", "dtype": "int8"}):
        with pytest.raises(mlxpref.ConfigError):
            mlxpref.export(tmp_path, tmp_path / "out", **wrong, model="demo")  # type: ignore[arg-type]


def test_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert mlxpref.convert("demo", "~/judge", 8, group_size=32, fidelity=False)["path"] == str(tmp_path / "judge")
    assert mlxpref.load("~/judge").name == str(tmp_path / "judge")
    assert np.isfinite(mlxpref.evaluate("~/judge", "demo", limit=1, think=False).metrics.accuracy)
