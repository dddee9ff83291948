"""`mlxpref convert` and `export` as a person meets them: what is printed, what is written, and what is refused."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxpref.conversion import verify as verification
from tests.cli.test_commands import SCRIPT, TINY, draw, refusal_of, report, run
from tests.conftest import GOLDEN, tiny_model, write_adapter
from tests.tolerance import PROBABILITY

KEYS = {
    "path", "source", "recipe", "bits", "group_size", "mode", "quantized_layers", "left", "bytes", "bits_per_weight",
    "seconds", "fidelity", "fidelity_skipped", "profile",
}  # fmt: skip
ROWS = {"recipe", "bytes", "bits_per_weight", "quantized_layers"}


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return draw(tmp_path / "pictures" / "a.png"), draw(tmp_path / "pictures" / "b.png", 1)


def compared(two: tuple[Path, Path], *arguments: str | Path) -> float:
    """What a judge says without thinking."""
    p_a: float = report("compare", *two, "--prompt", "a shape", "--no-think", *arguments)["p_a"]
    return p_a


def test_converted_model_judges(tmp_path: Path, two: tuple[Path, Path]) -> None:
    output = tmp_path / "four bit"
    result = report("convert", TINY, output)
    assert set(result) == KEYS
    assert (result["path"], result["recipe"], result["bits"], result["group_size"]) == (str(output), "4", 4, 64)
    assert result["source"] == TINY
    assert result["bytes"] == sum(file.stat().st_size for file in output.iterdir())
    assert result["fidelity"]["agreement"] >= 0.5
    assert 0 < compared(two, "--model", output) < 1
    record = json.loads((output / "mlxpref.json").read_text())
    assert record["fidelity"] == result["fidelity"]
    assert "is not empty" in refusal_of("convert", TINY, output)


def test_a_conversion_that_answers_by_chance_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxpref.conversion import convert as conversion
    from mlxpref.conversion.fidelity import Fidelity

    destroyed = Fidelity(16, 1, 1, 0, 0.5, 1, 1, 1, 1)
    monkeypatch.setattr(conversion, "compare_with_source", lambda *_: destroyed)
    result = run("convert", TINY, tmp_path / "out", "--bits", "2", "--json")
    assert json.loads(result.stdout)["fidelity"]["agreement"] == 0
    assert "the same verdict in only 0 of 16 comparisons, which chance gives, too" in result.stderr


def test_unquantized_conversion_is_identical(tmp_path: Path, two: tuple[Path, Path]) -> None:
    result = run("convert", TINY, tmp_path / "out", "--bits", "none", "--dtype", "float32")
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'out'}: not quantized, ")
    assert "the same verdict in 100.0%, KL of the answer 0 nats" in lines[1]
    assert compared(two, "--model", tmp_path / "out") == compared(two, "--model", TINY)


@pytest.mark.parametrize(
    ("options", "name", "bits"),
    [
        (["--recipe", "mixed_3_8", "--group-size", "32"], "mixed_3_8", 3),
        (["--mode", "mxfp4"], "mxfp4", 4),
        (["--bits", "8", "--vision-bits", "8", "--group-size", "32"], "8", 8),
    ],
)
def test_recipes(options: list[str], name: str, bits: int, tmp_path: Path) -> None:
    result = report("convert", TINY, tmp_path / "out", *options, "--no-fidelity", "--shard-size", "0.1MB")
    assert (result["recipe"].split("+")[0], result["bits"]) == (name, bits)
    assert result["fidelity"] is None
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    weights = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert any("vision" in key and key.endswith("scales") for key in weights) == ("--vision-bits" in options)


def test_recipes_side_by_side() -> None:
    rows = report("convert", TINY, "--compare", "none, 8", "--group-size", "32", "--dtype", "float32")
    assert [row["recipe"] for row in rows] == ["none", "8"]
    assert all(set(row) > ROWS for row in rows)
    assert rows[0]["bytes"] > rows[1]["bytes"]
    assert 0 == rows[0]["kl_answer"] < rows[1]["kl_answer"]


def test_own_preferences(tmp_path: Path, two: tuple[Path, Path]) -> None:
    rows = [{"prompt": "a shape", "a": f"pictures/{two[0].name}", "b": f"pictures/{two[1].name}", "p_a": 1}]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    result = report("convert", TINY, tmp_path / "out", "--preferences", file)
    assert result["fidelity"]["comparisons"] == 2
    assert "nowhere" in refusal_of("convert", TINY, tmp_path / "new", "--preferences", tmp_path / "nowhere.jsonl")


def test_quantized_source_on_request(tmp_path: Path) -> None:
    report("convert", TINY, tmp_path / "eight", "--bits", "8", "--no-fidelity")
    assert "--requantize" in refusal_of("convert", tmp_path / "eight", tmp_path / "four")
    result = report("convert", tmp_path / "eight", tmp_path / "four", "--requantize", "--no-fidelity")
    assert result["bits"] == 4


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", TINY],
        ["convert", TINY, "out", "--bits", "7"],
        ["convert", TINY, "out", "--bits", "4", "--recipe", "mixed_4_8"],
        ["convert", TINY, "out", "--mode", "mxfp4", "--bits", "8"],
        ["convert", TINY, "out", "--mode", "mxfp4", "--group-size", "64"],
        ["convert", TINY, "--compare", " , "],
        ["convert", TINY, "out", "--compare", "4,8"],
        ["convert", TINY, "out", "--shard-size", "big"],
        ["convert", TINY, "out", "--shard-size", "0GB"],
        ["export", "adapter", "out"],
        ["export", "adapter", "out", "--to", "gguf"],
        ["export", "adapter", "out", "--to", "peft", "--recipe", "4"],
        ["export", "adapter", "out", "--to", "fused", "--group-size", "32"],
    ],
)
def test_wrong_usage(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert list(tmp_path.iterdir()) == []


def test_unknown_recipes_are_named(tmp_path: Path) -> None:
    assert "mixed_4_9" in refusal_of("convert", TINY, tmp_path / "out", "--recipe", "mixed_4_9")
    assert "nine" in refusal_of("convert", TINY, "--compare", "4,nine")


def test_ctrl_c_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verification, "load_vlm", interrupt)
    result = run("convert", TINY, tmp_path / "out")
    assert (result.exit_code, result.stdout, result.stderr.splitlines()[-1]) == (130, "", "interrupted")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing(number: int, code: int, tmp_path: Path) -> None:
    command = [*SCRIPT, "convert", "demo", tmp_path / "out", "--bits", "8", "--shard-size", "0.2MB"]
    ignoring = signal.getsignal(signal.SIGINT)  # a suite that runs in the background ignores Ctrl-C, and so do children
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, ignoring)
    try:
        until = time.monotonic() + 300
        while not list(tmp_path.iterdir()):  # the temporary folder
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(number)
        output, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert (process.returncode, output) == (code, b"")
    assert b"Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


# Adapters


def test_exported_adapter_judges_alike(tmp_path: Path, two: tuple[Path, Path]) -> None:
    adapter = write_adapter(tmp_path / "adapter", tiny_model("qwen2_5_vl"))
    expected = compared(two, "--model", TINY, "--adapter", adapter)
    assert abs(expected - compared(two, "--model", TINY)) > 1e-3
    result = report("export", adapter, tmp_path / "peft", "--to", "peft", "--model", TINY)
    assert result["path"] == str(tmp_path / "peft")
    assert abs(compared(two, "--model", TINY, "--adapter", tmp_path / "peft") - expected) < 1e-4
    for to in ("fused", "hf"):
        run_ = run("export", adapter, tmp_path / to, "--to", to, "--model", TINY, "--dtype", "float32")
        assert run_.exit_code == 0, run_.output
        assert (tmp_path / to / "README.md").read_text().startswith("---\n")
        assert abs(compared(two, "--model", tmp_path / to) - expected) < 1e-4
    small = report("export", adapter, tmp_path / "small", "--to", "fused", "--model", TINY, "--recipe", "8")
    assert small["quantized_layers"] > 0
    assert "is not empty" in refusal_of("export", adapter, tmp_path / "hf", "--to", "hf", "--model", TINY)


def test_an_adapter_of_another_checkpoint_is_refused(tmp_path: Path, two: tuple[Path, Path]) -> None:
    """Every name and shape fits, and still it is another model's."""
    run("train", "--data", "demo", "--model", TINY, "--output", tmp_path / "run", "--limit", "8", "--no-think",
        "--steps", "1", "--rank", "2")  # fmt: skip
    other = tmp_path / "other"
    arrays = mx.load(str(GOLDEN / "qwen2_5_vl" / "model.safetensors"))
    assert isinstance(arrays, dict)
    other.mkdir()
    for file in (GOLDEN / "qwen2_5_vl").iterdir():
        if file.suffix not in (".npz", ".safetensors"):
            (other / file.name).write_bytes(file.read_bytes())
    mx.save_safetensors(str(other / "model.safetensors"), {name: x * 1.25 for name, x in arrays.items()})
    command = ("compare", *two, "--prompt", "x", "--no-think", "--model", other, "--adapter", tmp_path / "run")
    assert "--any-base" in refusal_of(*command)
    assert run(*command, "--any-base").exit_code == 0
    assert "--any-base" in refusal_of("export", tmp_path / "run", tmp_path / "out", "--to", "peft", "--model", other)
    assert run("export", tmp_path / "run", tmp_path / "out", "--to", "peft").exit_code == 0  # the base it names
    assert compared(two, "--model", TINY, "--adapter", tmp_path / "out") == pytest.approx(
        compared(two, "--model", TINY, "--adapter", tmp_path / "run"), abs=PROBABILITY
    )
