"""Whatever a checkpoint or an adapter holds: it works, or one line says what is wrong, and nothing is left behind.

scripts/fuzz_conversion.py runs the same cases by the ten thousand, in processes whose death and memory it watches.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.checks import check_folder
from mlxpref.errors import ModelError
from scripts.damage import ADAPTER_DAMAGE, CHECKPOINT_DAMAGE
from scripts.fuzz_conversion import FAMILIES, attempt, contents, copy_checkpoint, run_case
from tests.conftest import GOLDEN

Damage = Callable[[Path, Random], object]


@pytest.fixture
def new_place() -> Iterator[Path]:
    """A folder in a short path, since messages that name it are cut."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        yield Path(name)


@pytest.mark.parametrize("cases", [range(150), pytest.param(range(150, 2000), marks=pytest.mark.slow)])
def test_reading_heads_and_config(cases: range, new_place: Path) -> None:
    for case in cases:
        rng, folder = Random(case), new_place / str(case)
        copy_checkpoint(rng.choice(FAMILIES), folder)
        for damage in rng.choices(CHECKPOINT_DAMAGE, k=rng.choice((1, 2))):
            damage(folder, rng)
        checkpoint = Checkpoint.open(folder)
        outcome, violation = attempt("heads", lambda it=checkpoint: it.tensors, folder)
        assert violation is None, case
        assert attempt("folder", lambda it=checkpoint: check_folder(it), folder)[1] is None, case
        if outcome.endswith("made"):
            for tensor in checkpoint.tensors.values():
                assert 8 < tensor.start <= tensor.end <= tensor.file.stat().st_size


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cases", [range(60), pytest.param(range(60, 300), marks=pytest.mark.slow)])
def test_converting_and_loading_adapters(cases: range, new_place: Path) -> None:
    for case in cases:
        (new_place / str(case)).mkdir()
        _, violation = run_case(new_place / str(case), Random(case))
        assert violation is None, case


@pytest.mark.parametrize("damage", [*CHECKPOINT_DAMAGE, *ADAPTER_DAMAGE], ids=lambda damage: damage.__name__)
def test_each_damage_does_some(damage: Damage, tmp_path: Path) -> None:
    """The cases above cannot pass because the files stayed as they were; and no original is written into."""
    original = contents(GOLDEN / "qwen2_vl")
    for seed in range(8):
        folder = tmp_path / str(seed)
        copy_checkpoint("qwen2_vl", folder)
        before = contents(folder)
        damage(folder, Random(seed))
        if contents(folder) != before:
            break
    else:
        raise AssertionError(damage)
    assert contents(GOLDEN / "qwen2_vl") == original


def test_a_violation_is_seen(tmp_path: Path) -> None:
    def raised(error: BaseException) -> str | None:
        def work() -> None:
            raise error

        return attempt("work", work, tmp_path)[1]

    assert raised(ModelError(f"{tmp_path}: broken; mend it")) is None
    assert "not one clear line" in str(raised(ModelError(f"{tmp_path}: a\nb")))
    assert "names no folder" in str(raised(ModelError("broken")))
    assert "KeyError" in str(raised(KeyError("a")))
    assert "MemoryError" in str(raised(MemoryError()))
