"""Models and goldens that several test files share; each is loaded once a session."""

import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlxpref  # isort: skip  opens the fast BLAS before anything imports MLX

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

from mlxpref.checkpoints.files import ADAPTER_CONFIG
from mlxpref.engine.adapters import ADAPTER_WEIGHTS
from mlxpref.engine.branched_cache import BranchedCache
from mlxpref.engine.decoder import run_block
from mlxpref.engine.lora import adapter_weights, attach_lora, linear_layers, linear_shape, lora_targets
from mlxpref.engine.positions import text_positions
from mlxpref.engine.profile import Form, own_profile
from mlxpref.engine.reading import Reader
from mlxpref.engine.vlm import VLM, ComparisonInput, load_vlm
from mlxpref.judge.judge import Judge
from mlxpref.verdict import Verdict
from tests.browser import Browser, find_browser

# The same examples in every run, however busy the machine is; `--hypothesis-profile default` draws others.
_UNCHECKED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("mlxpref", deadline=None, derandomize=True, suppress_health_check=_UNCHECKED)
settings.load_profile("mlxpref")

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")


@pytest.fixture(autouse=True, scope="session")
def cache_of_fixtures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nor does a fixture of several tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXPREF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test keeps comparisons where the user does."""
    monkeypatch.setenv("MLXPREF_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One headless browser for all tests of pages."""
    executable = find_browser()
    if executable is None:
        pytest.skip("no Chromium or Chrome is installed, so no page is looked at")
    headless = Browser(executable)
    yield headless
    headless.close()


@cache
def tiny_model(name: str) -> VLM:
    """The tiny random checkpoint of a family, in float32."""
    return load_vlm(GOLDEN / name, 512 * 512, mx.float32)


def read_verdict(
    text: str, first: float = 0.0, second: float = 0.0, form: Form = "choice", think: bool = True, **others: Any
) -> Verdict:
    """The verdict on a completion of our own profile."""
    reader = Reader(own_profile())
    return Verdict(
        text, first, second, reasoning=reader.reasoning(text), written=reader.written(text, form),
        well_formed=reader.is_well_formed(text, form, think), answer_start=reader.start(text), **others,
    )  # fmt: skip


def picture(seed: int, size: tuple[int, int] = (84, 84)) -> Image.Image:
    """A picture of random pixels, (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def start_together(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Let processes that wait for a line begin, once each has said that it is ready."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


def hidden_states(vlm: VLM, comparisons: Sequence[ComparisonInput]) -> mx.array:
    """The hidden states (B, L, D) of comparisons as right-padded rows."""
    return run_block(vlm.decoder, vlm.block(comparisons), recompute=False)[0]


def append_block(vlm: VLM, cache: BranchedCache, ids: np.ndarray, start: np.ndarray) -> mx.array:
    """Logits (B, N, V) of a block of tokens (B, N) that every row goes on with, from its next position (B,)."""
    branch_ids = np.zeros(ids.shape, np.int32)
    if not cache.branches.size:
        cache.begin_branches(branch_ids[:, :1])
    cache.reserve(branch_ids)
    return vlm.head(vlm.extend(cache, mx.array(ids), mx.array(text_positions(start, ids.shape[1])[0])))


def write_adapter(folder: Path, vlm: VLM, layers: Sequence[str] | None = None, rank: int = 4) -> Path:
    """A random adapter for all layers that training adapts, or for those named, in mlx-vlm's format."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(layers) if layers is not None else lora_targets(vlm.model)
    rng = np.random.default_rng(0)
    weights = {}
    for name in names:
        outputs, inputs = linear_shape(linear_layers(vlm.model)[name])
        weights[f"{name}.lora_a"] = mx.array(0.2 * rng.standard_normal((inputs, rank)), mx.float32)
        weights[f"{name}.lora_b"] = mx.array(0.2 * rng.standard_normal((rank, outputs)), mx.float32)
    mx.save_safetensors(str(folder / ADAPTER_WEIGHTS), weights)
    parameters = {"rank": rank, "scale": 2.0, "dropout": 0.0, "keys": names}
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    return folder


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each supported family in turn."""
    return str(request.param)


@pytest.fixture
def tiny_vlm(family: str) -> VLM:
    """The tiny random checkpoint of each family in turn."""
    return tiny_model(family)


@pytest.fixture
def trained(family: str) -> VLM:
    """A model with an adapter that is not fresh; loaded anew, as it is changed."""
    vlm = load_vlm(GOLDEN / family, 512 * 512, mx.float32)
    attach_lora(vlm.model, lora_targets(vlm.model), rank=4, scale=2.0)
    mx.random.seed(1)
    weights = {n: 0.05 * mx.random.normal(w.shape) for n, w in adapter_weights(vlm.model).items()}
    vlm.model.load_weights(list(weights.items()), strict=False)
    return vlm


@pytest.fixture
def golden(family: str) -> dict[str, Any]:
    """What transformers computed for the tiny checkpoint of a family; see scripts/make_golden.py."""
    with np.load(GOLDEN / family / "golden.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def demo_judge() -> Callable[..., Judge]:
    """The demo judge with settings of one's own; the model is loaded once."""
    vlm = mlxpref.load("demo").vlm

    def make(**settings: Any) -> Judge:
        from mlxpref.config import JudgeSettings

        return Judge(vlm, JudgeSettings(**settings), "demo")

    return make
