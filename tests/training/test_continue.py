"""Runs that go on: from any folder, after a move, for more steps, or from an adapter of another run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlxpref
from mlxpref.conversion.convert import convert
from mlxpref.conversion.export import export_adapter
from mlxpref.demo.preferences import demo_preferences
from mlxpref.engine.adapters import read_adapter
from mlxpref.engine.peft import write_peft
from mlxpref.engine.vlm import load_vlm
from mlxpref.errors import ConfigError, DataError, ModelError
from mlxpref.files import LEARNED
from mlxpref.training.run_folder import held_out_change
from mlxpref.training.run_record import read_record
from tests.conftest import GOLDEN, write_adapter
from tests.messages import messages
from tests.training.test_run import QUICK, TINY, assert_same, begin, cli, log_of, resumed, timeless

OWN = "def short(texts, p_first, prompt, images, y):\n    return [-len(text) / 100 for text in texts]\n"
Project = Callable[[str], Path]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Makes a folder with preferences, a judge and a reward; its name is chosen, and it is the working folder."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        (folder / "images").mkdir(parents=True)
        rows = []
        for i, preference in enumerate(demo_preferences("train", 6)):
            for side in "ab":
                getattr(preference, side).save(folder / "images" / f"{i}{side}.png")
            names = {side: f"images/{i}{side}.png" for side in "ab"}
            rows.append({"prompt": preference.prompt, **names, "p_a": preference.p_people})
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / "own.py").write_text(OWN)
        shutil.copytree(TINY, folder / "judge")
        monkeypatch.chdir(folder)
        return folder

    return make


RELATIVE: dict[str, Any] = {
    "data": "rows.jsonl", "model": "judge", "reward": "hard=1,own.py:short=0.5", "think": True, "limit": 0, "steps": 2,
    "save_every": 1,
}  # fmt: skip


def continued(folder: Path, **given: Any) -> str:
    """Resume a run to its end, and compare it with one that nothing interrupted."""
    text = resumed(folder, **given)
    whole = folder.with_name("whole")
    assert (folder / "adapters.safetensors").read_bytes() == (whole / "adapters.safetensors").read_bytes()
    assert [timeless(line) for line in log_of(folder)] == [timeless(line) for line in log_of(whole)]
    return text


def test_resume_from_any_folder(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = project("project")
    begin(Path("whole"), **RELATIVE)
    begin(Path("run"), until=1, **RELATIVE)
    settings = read_record(folder / "run")["settings"]
    assert [settings[name] for name in ("data", "model")] == [str(folder / "rows.jsonl"), str(folder / "judge")]
    assert settings["reward"] == f"hard=1.0,{folder / 'own.py'}:short=0.5"
    assert set(log_of(folder / "run")[0]["reward_parts"]) == {"hard", "own.py:short"}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert continued(folder / "run") == ""
    begin(Path("again"), **settings)  # as with --config run.json
    assert_same(Path("again"), folder / "whole")


def test_resume_after_a_move(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that holds the run, the data, the judge and the reward is renamed."""
    folder = project("before")
    begin(folder / "whole", **RELATIVE)
    begin(folder / "run", until=1, **RELATIVE)
    monkeypatch.chdir(tmp_path)
    folder.rename(tmp_path / "after")
    assert continued(tmp_path / "after" / "run") == ""
    assert read_record(tmp_path / "after" / "run")["settings"]["model"] == str(tmp_path / "after" / "judge")


def test_resume_with_other_spellings(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through links, renamed, by relative paths: the content counts."""
    folder = project("project")
    begin(folder / "whole", **RELATIVE)
    begin(folder / "run", until=1, **RELATIVE)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path / "link" / "images")
    (folder / "own.py").rename(folder / "images" / "own.py")
    (folder / "judge").rename(folder / "renamed")
    (folder / "rows.jsonl").rename(folder / "renamed.jsonl")
    given = {"data": "../renamed.jsonl", "model": "../renamed", "reward": "hard,own.py:short=0.5"}
    assert continued(tmp_path / "link" / "run", **given) == ""


def test_run_of_an_earlier_version_resumes(project: Project) -> None:
    """In the folder that it was started in: its record has the paths as they were given, and no digests."""
    folder = project("project")
    begin(folder / "whole", **RELATIVE)
    run = begin(folder / "run", until=1, **RELATIVE)
    record = read_record(run)
    record["settings"] |= {name: RELATIVE[name] for name in ("data", "model", "reward")}
    new = ("adapter", "report_to")
    record["settings"] = {name: value for name, value in record["settings"].items() if name not in new}
    new = ("folder", "id", "reward_fingerprint", "adapter_fingerprint")
    record = {name: value for name, value in record.items() if name not in new}
    (run / "run.json").write_text(json.dumps(record))
    (run / "learned.digests").unlink()
    assert continued(run) == ""


def test_changed_contents_are_refused(project: Project) -> None:
    folder = project("project")
    run = begin(folder / "run", until=1, **RELATIVE)
    (folder / "own.py").write_text(OWN.replace("100", "10"))
    with pytest.raises(ConfigError, match=r"own.py:short=0.5 is not the same now; restore it"):
        resumed(run)
    with pytest.raises(ConfigError, match=r"cannot continue with reward soft \(it has hard"):
        resumed(run, reward="soft")
    (folder / "own.py").unlink()
    with pytest.raises(ConfigError, match=r"own.py: cannot be read"):
        resumed(run)
    (folder / "own.py").write_text(OWN)
    shutil.copy(folder / "images" / "0a.png", folder / "images" / "1b.png")
    with pytest.raises(DataError, match=r"not the same now \(1 differ"):
        resumed(run)


@pytest.mark.parametrize("complete", [True, False])
def test_a_run_is_lengthened(complete: bool, tmp_path: Path) -> None:
    """Its further steps show the comparisons, at the learning rates, of a run that was planned so long."""
    whole = begin(tmp_path / "whole", steps=6)
    folder = begin(tmp_path / "run", until=None if complete else 3, steps=4)
    done = 4 if complete else 3
    first = log_of(folder)
    text = resumed(folder, steps=6)
    assert f"6 steps instead of 4: from step {done + 1} on, the learning rate is that of a run of 6 steps" in text
    lines, expected = log_of(folder), log_of(whole)
    assert lines[:done] == first
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    rates = [[line["learning_rate"] for line in each] for each in (lines[done:], expected[done:])]
    assert rates[0] == rates[1]
    shown = [
        [
            (rollout["step"], rollout["prompt"], rollout["first"])
            for rollout in map(json.loads, (each / "rollouts.jsonl").read_text().splitlines())
        ]
        for each in (folder, whole)
    ]
    assert shown[0] == shown[1]
    record = read_record(folder)
    assert (record["settings"]["steps"], record["ended"]["step"]) == (6, 6)
    assert record["resumed"] == [{"after_step": done, "changed": {"steps": [4, 6]}}]
    assert "nothing is left to do" in resumed(folder)


def test_a_run_is_not_cut(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", until=3, limit=6)
    with pytest.raises(ConfigError, match=r"3 steps are done; give --steps from 3 on"):
        resumed(folder, steps=2)
    resumed(folder, steps=4)  # fewer than planned
    assert [line["step"] for line in log_of(folder)] == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match=r"4 steps are done, and one pass over the data takes 2; give --steps"):
        resumed(folder, steps=0)
    assert read_record(folder)["ended"]["step"] == 4


def test_lengthening_renews_patience(tmp_path: Path) -> None:
    changes = {"held_out": 0.3, "held_out_limit": 3, "evaluate_every": 1, "patience": 1, "learning_rate": 0.0}
    folder = begin(tmp_path / "run", steps=9, **changes)
    assert read_record(folder)["ended"] == {"step": 2, "early": True}  # nothing changes, so nothing gets better
    assert "nothing is left to do" in resumed(folder)
    resumed(folder, steps=10)
    assert read_record(folder)["ended"] == {"step": 3, "early": True}


# From an adapter


def weights_of(folder: Path) -> tuple[int, float, dict[str, mx.array]]:
    return read_adapter(folder, load_vlm(TINY, 512 * 512).model)


def in_peft(folder: Path, adapter: Path) -> Path:
    """An adapter in PEFT's format, in half precision, on two of its layers."""
    rank, scale, weights = weights_of(adapter)
    layers = sorted({name.rpartition(".")[0] for name in weights})[:2]
    few = {name: weight for name, weight in weights.items() if name.rpartition(".")[0] in layers}
    folder.mkdir()
    write_peft(folder, few, rank, scale, str(TINY))
    file = folder / "adapter_model.safetensors"
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    mx.save_safetensors(str(file), {name: array.astype(mx.float16) for name, array in arrays.items()}, {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["mlxpref", "peft"])
def test_training_goes_on_from_an_adapter(kind: str, tmp_path: Path) -> None:
    """Its base, rank, scale and layers are taken; at a learning rate of 0 it stays as it is."""
    if kind == "mlxpref":
        adapter = begin(tmp_path / "first", steps=2, rank=3, lora_scale=1.5)
    else:
        adapter = in_peft(tmp_path / "peft", write_adapter(tmp_path / "own", load_vlm(TINY, 512 * 512), rank=3))
    rank, scale, weights = weights_of(adapter)
    still = begin(tmp_path / "still", model="", adapter=str(adapter), learning_rate=0.0, steps=1)
    settings = read_record(still)["settings"]
    assert (settings["adapter"], settings["rank"], settings["lora_scale"]) == (str(adapter), rank, scale)
    assert settings["model"] == str(TINY)
    kept = weights_of(still)
    assert kept[:2] == (rank, scale)
    assert kept[2].keys() == weights.keys()
    assert all(kept[2][name].dtype == mx.float32 for name in weights)
    assert all(mx.array_equal(kept[2][name], weights[name].astype(mx.float32)) for name in weights)
    moving = tmp_path / "moving"
    changes = QUICK | {"adapter": adapter, "steps": 1}  # a path, without a model
    changes = {name: value for name, value in changes.items() if name not in ("model", "data")}
    assert len(list(mlxpref.train("demo", output=moving, **changes))) == 1
    assert any(not mx.array_equal(weights_of(moving)[2][name], weights[name]) for name in weights)


def test_divergence_stays_that_from_the_base(tmp_path: Path) -> None:
    """The reference is the judge without adapter: a run from an adapter is off it from its first step on."""
    first = begin(tmp_path / "first", steps=3, kl=0.1)
    assert log_of(first)[0]["kl"] == pytest.approx(0, abs=1e-6)
    second = begin(tmp_path / "second", adapter=str(first), steps=1, kl=0.1, think=True)
    assert log_of(second)[0]["kl"] > 1e-6


def test_run_from_an_adapter_resumes(tmp_path: Path) -> None:
    """Without the adapter, once a step was saved; before that it starts over, from the same adapter only."""
    adapter = begin(tmp_path / "first", steps=2)
    changes = {"adapter": str(adapter), "model": ""}
    whole = begin(tmp_path / "whole", **changes)
    early, late = begin(tmp_path / "early", until=1, **changes), begin(tmp_path / "late", until=3, **changes)
    shutil.rmtree(early / "checkpoint")
    file = adapter / "adapters.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ModelError, match=r"goes on from the adapter .*first, which is not the same now"):
        resumed(early)
    file.write_bytes(content)
    assert "the run starts over" in resumed(early)
    assert_same(early, whole)
    adapter.rename(tmp_path / "gone")
    assert resumed(late) == ""
    assert_same(late, whole)


def test_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    adapter = begin(tmp_path / "first", steps=1, rank=3)
    with pytest.raises(ConfigError, match=r"rank 5: .*first has 3, which stays; leave it out"):
        begin(tmp_path / "run", adapter=str(adapter), rank=5)
    with pytest.raises(ModelError, match=r"was trained on .*qwen2_5_vl, which this model is not"):
        begin(tmp_path / "run", adapter=str(adapter), model=str(GOLDEN / "qwen2_vl"))
    with pytest.raises(ModelError, match="no such adapter folder"):
        begin(tmp_path / "run", adapter=str(tmp_path / "nowhere"), model="")
    assert not (tmp_path / "run").exists()


# What is measured and told


HELD_OUT = {"held_out": 0.3, "held_out_limit": 3, "evaluate_every": 2}


def test_held_out_is_measured_before_training_and_told(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = QUICK | HELD_OUT
    values = [(f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items() if name != "think"]
    done = cli("train", *(part for pair in values for part in pair), "--no-think", "--output", folder)
    assert done.exit_code == 0, done.stderr
    lines = {line["step"]: line for line in log_of(folder)}
    assert sorted(lines) == list(range(7))
    before, after = (lines[step]["held_out"]["accuracy"] for step in (0, 6))
    notes = [line for line in done.stderr.splitlines() if "held-out" in line]
    assert notes[0] == f"before training: held-out {100 * before:.1f} % (3 pairs)"
    assert [note.partition(":")[0] for note in notes[1:]] == ["step 2", "step 4", "step 6"]
    last = done.stdout.splitlines()[-1]
    assert last == f"held-out {100 * before:.1f} % -> {100 * after:.1f} % (3 pairs); report: {folder / 'report.html'}"
    assert (folder / "report.html").is_file()
    repeated = json.loads(cli("train", "--resume", "--output", folder, "--json").stdout)
    assert repeated["held_out"] == held_out_change(folder)
    assert repeated["held_out"] | {"before": before, "after": after, "pairs": 3, "step": 6} == repeated["held_out"]


def test_evaluation_of_learned_preferences_is_told(project: Project) -> None:
    """Training and eval on one file without splits, then on a renamed part of it, then on others."""
    folder = project("project")
    arguments = ("--max-tokens", "4", "--no-think", "--json")
    begin(folder / "run", **RELATIVE | {"reward": "soft", "think": False})

    def evaluated(data: Path) -> tuple[int, str, str]:
        done = cli("eval", "--data", data, "--model", TINY, "--adapter", folder / "run", "--no-store", *arguments)
        assert done.exit_code == 0, done.stderr
        result = json.loads(done.stdout)
        return result["learned_from"], result["split"], done.stderr

    count, split, notes = evaluated(folder / "rows.jsonl")
    assert (count, split) == (6, "all rows")
    assert f"6 of 6 preferences are among those that {folder / 'run'} learned from" in notes
    lines = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "part.jsonl").write_text("\n".join(lines[:2]))
    assert evaluated(folder / "part.jsonl")[0] == 2
    other = json.loads(lines[0]) | {"prompt": "another"}
    (folder / "other.jsonl").write_text(json.dumps(other))
    count, _, notes = evaluated(folder / "other.jsonl")
    assert count == 0
    assert "learned from" not in notes


@pytest.mark.slow
def test_what_was_learned_from_stays_known(project: Project) -> None:
    """In every form of an adapter, in a conversion of one, and in an adapter or a model that training went on from."""
    folder = project("project")
    one, other = (folder / f"{name}.jsonl" for name in ("one", "other"))
    lines = (folder / "rows.jsonl").read_text().splitlines()
    one.write_text("\n".join(lines[:4]))
    other.write_text("\n".join(lines[4:]))
    settings = RELATIVE | {"reward": "soft", "think": False, "steps": 1}
    begin(folder / "run", **settings | {"data": str(one)})

    def evaluated(data: Path, *judge: Any) -> int | None:
        done = cli("eval", "--data", data, *judge, "--no-store", "--max-tokens", "4", "--no-think", "--json")
        assert done.exit_code == 0, done.stderr
        count: int | None = json.loads(done.stdout)["learned_from"]
        assert ("learned from" in done.stderr) == bool(count)
        return count

    assert evaluated(one, "--model", TINY) is None, "nobody knows"
    forms = ("peft", "fused", "hf")
    for to in forms:
        export_adapter(folder / "run", folder / to, to, TINY, str(TINY))
        assert LEARNED in json.loads((folder / to / "mlxpref.json").read_text())["sha256"]
    convert(folder / "hf", folder / "again", None, dtype=None)
    judges = [("--model", TINY, "--adapter", folder / "peft")]
    judges += [("--model", folder / name) for name in ("fused", "hf", "again")]
    assert [evaluated(folder / "rows.jsonl", *judge) for judge in judges] == [4] * 4
    assert evaluated(other, *judges[-1]) == 0
    for name, start in {"more": {"adapter": str(folder / "peft")}, "next": {"model": str(folder / "fused")}}.items():
        begin(folder / name, **settings | {"data": str(other)} | start)
        assert evaluated(folder / "rows.jsonl", "--model", start.get("model", TINY), "--adapter", folder / name) == 6
    many = folder / "many.jsonl"  # without a split for calibration
    rows = [json.loads(line) for line in 3 * lines[:4]]
    splits = [row | {"split": split, "p_a": i % 2} for split in ("train", "test") for i, row in enumerate(rows)]
    many.write_text("\n".join(map(json.dumps, splits)))
    with messages() as notes:
        mlxpref.evaluate(str(folder / "again"), str(one), think=False)
        fit = mlxpref.calibrate(str(folder / "fused"), str(many), think=False, output=folder / "c.json")
    assert [note.partition(" are")[0] for note in notes if "learned from" in note] == [
        "4 of 4 preferences", "12 of 12 preferences"
    ]  # fmt: skip
    done = cli("calibrate", "--data", many, "--model", folder / "hf", "--no-think", "--output", "d.json", "--json")
    assert "12 of 12 preferences are among those" in done.stderr
    assert [fit.calibrations[0].split, json.loads(done.stdout)["calibrations"][0]["split"]] == ["test", "test"]
