"""Whatever a checkpoint or an adapter holds: it works, or one line says what is wrong, and nothing is left behind.

scripts/fuzz_conversion.py runs the same cases by the ten thousand, in processes whose death and memory it watches.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.checks import check_folder
from mlxpref.checkpoints.safetensors import read_tensor_infos
from mlxpref.errors import ModelError
from scripts.damage import ADAPTER_DAMAGE, CHECKPOINT_DAMAGE
from scripts.fuzz_conversion import FAMILIES, adapter_case, attempt, contents, convert_case, copy_checkpoint

FUZZED = partial(settings, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
Damage = Callable[[Path, Random], object]
DAMAGES = st.lists(st.sampled_from(CHECKPOINT_DAMAGE), min_size=1, max_size=2)
RANDOM = st.integers(0, 2**32 - 1).map(Random)


@pytest.fixture(autouse=True, scope="module")
def cache_of_the_module() -> Iterator[None]:
    """One for all cases: hypothesis runs many within a test, whose own cache is made once."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as cache:
        patch.setenv("MLXPREF_CACHE", cache)
        yield


def new_place() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fuzz-")


@FUZZED(max_examples=2000)
@given(st.sampled_from(FAMILIES), DAMAGES, RANDOM)
def test_reading_heads_and_config(family: str, damages: list[Damage], rng: Random) -> None:
    with new_place() as name:
        folder = Path(name) / "model"
        copy_checkpoint(family, folder)
        for damage in damages:
            damage(folder, rng)
        outcome, violation = attempt("heads", lambda: read_tensor_infos(folder), folder)
        assert violation is None
        assert attempt("config", lambda: check_folder(Checkpoint.open(folder)), folder)[1] is None
        if outcome.endswith("made"):
            for stored in read_tensor_infos(folder).values():
                assert 8 < stored.start <= stored.end <= stored.file.stat().st_size


@pytest.mark.filterwarnings("ignore")
@FUZZED(max_examples=250)
@given(st.sampled_from(FAMILIES), DAMAGES, RANDOM)
def test_converting(family: str, damages: list[Damage], rng: Random) -> None:
    with new_place() as name:
        _, violation = convert_case(Path(name), rng, family, damages)
        assert violation is None


@pytest.mark.filterwarnings("ignore")
@FUZZED(max_examples=250)
@given(st.sampled_from(FAMILIES), RANDOM)
def test_loading_adapters(family: str, rng: Random) -> None:
    with new_place() as name:
        _, violation = adapter_case(Path(name), rng, family)
        assert violation is None


@pytest.mark.parametrize("damage", [*CHECKPOINT_DAMAGE, *ADAPTER_DAMAGE], ids=lambda damage: damage.__name__)
def test_each_damage_does_some(damage: Damage, tmp_path: Path) -> None:
    """The cases above cannot pass because the files stayed as they were; and no original is written into."""
    original = contents(Path("tests/golden/qwen2_vl").absolute())
    changed = 0
    for seed in range(8):
        copy_checkpoint("qwen2_vl", tmp_path / "model")
        before = contents(tmp_path / "model")
        damage(tmp_path / "model", Random(seed))
        changed += contents(tmp_path / "model") != before
        shutil.rmtree(tmp_path / "model")
    assert changed
    assert contents(Path("tests/golden/qwen2_vl").absolute()) == original


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
