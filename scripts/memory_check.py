"""The memory plan beside what MLX measures: the models, runs and peaks behind `scripts.memory_table --check`."""

import gc
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxpref._blas import preload

preload()  # before MLX is first imported

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_vlm.utils import load_processor  # noqa: E402
from PIL import Image  # noqa: E402

from mlxpref.checkpoints.checkpoint import Checkpoint  # noqa: E402
from mlxpref.checkpoints.memory import MemoryPlan, ModelSize, judging_plan, training_plan  # noqa: E402
from mlxpref.config import JudgeSettings, TrainSettings  # noqa: E402
from mlxpref.demo import JUDGE  # noqa: E402
from mlxpref.engine.vlm import VLM  # noqa: E402
from mlxpref.judge.judge import Judge  # noqa: E402
from mlxpref.preferences import Preference  # noqa: E402
from mlxpref.training.trainer import Trainer  # noqa: E402
from scripts.bench_models import DEMO_SIZE, build_hybrid, hybrid_config  # noqa: E402
from scripts.demo_checkpoint import build_model  # noqa: E402

__all__ = ["LARGE_RUNS", "MODELS", "REWARD", "RUNS", "Measured", "Model", "Run", "measure", "random_judge"]

_TEXT = "a red circle"
_CONTEXT = 1 << 20
_TOKENS = 64
REWARD = """
import zlib
def reward(texts, **_):
    return [zlib.crc32(text.encode()) / 2**32 for text in texts]
"""
"""A file of a reward that differs from completion to completion, whatever random weights write."""


@dataclass(frozen=True)
class Model:
    """Changes to the demo judge's config, and how the language model is quantized (0 bits: not).

    A `hybrid` one has sizes of its own, and recurrent layers.
    """

    name: str
    text: dict[str, Any]
    vision: dict[str, Any]
    bits: int = 0
    hybrid: bool = False

    def config(self) -> dict[str, Any]:
        """The config of the whole model."""
        if self.hybrid:
            config = hybrid_config({"text": self.text, "vision": self.vision})
            config["text_config"]["max_position_embeddings"] = _CONTEXT
            return config
        config = json.loads((JUDGE / "config.json").read_text(encoding="utf-8"))
        config |= self.text | {"max_position_embeddings": _CONTEXT}
        half = config["hidden_size"] // config["num_attention_heads"] // 2
        time, height = half // 4, (half - half // 4) // 2
        config["rope_scaling"] = {"type": "mrope", "mrope_section": [time, height, half - time - height]}
        config["vision_config"] |= self.vision | {"out_hidden_size": config["hidden_size"]}
        return config  # type: ignore[no-any-return]


_MIDDLE_TEXT = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16,
    "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32768,
}  # fmt: skip
_MIDDLE_VISION = {"depth": 12, "hidden_size": 768, "intermediate_size": 2048, "num_heads": 12}
_HYBRID_TEXT = {
    "hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 128, "linear_num_key_heads": 8, "linear_num_value_heads": 16,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64,
}  # fmt: skip
_HYBRID_VISION = {"depth": 3, "hidden_size": 256, "intermediate_size": 768, "num_heads": 4}
MODELS = (
    Model("demo's size", {}, {}),
    Model("300 M", _MIDDLE_TEXT, _MIDDLE_VISION),
    Model("300 M, 4 bit", _MIDDLE_TEXT, _MIDDLE_VISION, bits=4),
    Model("recurrent, demo's size", DEMO_SIZE["text"], DEMO_SIZE["vision"], hybrid=True),
    Model("recurrent, 60 M", _HYBRID_TEXT, _HYBRID_VISION, hybrid=True),
)


@dataclass(frozen=True)
class Run:
    """Settings of a training step, or of judging `images` images."""

    pixels: int
    settings: TrainSettings | JudgeSettings
    images: int = 0

    @property
    def name(self) -> str:
        """What it does, in short."""
        s = self.settings
        if isinstance(s, JudgeSettings):
            return f"rank {self.images}, {'think' if s.think else 'read'}"
        return (
            f"train {s.comparisons} x {s.group}"
            + (", recompute" if s.recompute else "")
            + (f", micro-batch {s.micro_batch}" if s.micro_batch < s.comparisons * s.group else "")
            + (", KL" if s.kl else "")
            + (f", {s.max_tokens} tokens" if s.max_tokens > _TOKENS else "")
        )


def _train(pixels: int, **changes: Any) -> Run:
    return Run(pixels, replace(TrainSettings(comparisons=2, max_tokens=_TOKENS, max_pixels=pixels**2), **changes))


def _judge(pixels: int, images: int, think: bool) -> Run:
    return Run(pixels, JudgeSettings(think=think, max_tokens=64, max_pixels=pixels**2), images)


RUNS = (
    _train(308),
    _train(308, recompute=False, micro_batch=8),
    _train(308, micro_batch=4),
    _train(644, comparisons=1),
    _train(84, comparisons=8, micro_batch=64, kl=0.1),
    _train(84, comparisons=1, max_tokens=512),  # in pieces
    _judge(308, 6, think=True),
    _judge(308, 8, think=False),
    _judge(84, 12, think=True),
)


LARGE_RUNS = (*RUNS[:3], _judge(308, 6, think=False))
"""What larger models are measured with: each run takes them a minute or two here."""


@dataclass(frozen=True)
class Measured:
    """One run: what was planned, and the peak in bytes that MLX measured."""

    plan: MemoryPlan
    peak: int

    @property
    def error(self) -> float:
        """By what share the plan's peak is above the measured one."""
        return self.plan.peak / self.peak - 1

    @property
    def error_without_weights(self) -> float:
        """The same for what a run takes beside the weights."""
        return (self.plan.peak - self.plan.weights) / (self.peak - self.plan.weights) - 1


def measure(model: Model, runs: Iterator[Run] | tuple[Run, ...]) -> Iterator[tuple[Run, Measured]]:
    """Run a model of random weights and measure; a new model each time, as training puts an adapter on it."""
    for run in runs:
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        vlm = random_judge(model)
        checkpoint = ModelSize.from_config(model.config(), _weight_bytes(vlm), 4, run.settings.max_pixels)
        if isinstance(run.settings, TrainSettings):
            plan, peak = _measure_training(vlm, checkpoint, run.pixels, run.settings)
        else:
            plan, peak = _measure_judging(vlm, checkpoint, run.pixels, run.settings, run.images)
        del vlm
        yield run, Measured(plan, peak - before)


def _weight_bytes(vlm: VLM) -> int:
    arrays: dict[str, mx.array] = dict(tree_flatten(vlm.model.parameters()))
    return sum(int(array.nbytes) for array in arrays.values())


def random_judge(model: Model, dtype: mx.Dtype = mx.float32) -> VLM:
    """A model of random weights that never ends its completions, and writes no tag that would end them."""
    mx.random.seed(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "judge"
        built = build_hybrid(model.config(), folder) if model.hybrid else build_model(model.config())
        processor = load_processor(folder if model.hybrid else JUDGE, trust_remote_code=False)
    built.set_dtype(dtype)
    if model.bits:
        nn.quantize(built.language_model, bits=model.bits)
    built.eval()
    mx.eval(built.parameters())
    processor.image_processor.max_pixels = 1 << 30
    vlm = VLM(built, processor, Checkpoint.open(JUDGE), 1 << 30)
    vlm.eos_ids = frozenset()
    for tag in ("</think>", "</answer>"):
        for token in vlm.tokenizer.encode_template_text(tag):
            vlm.tokenizer.vocabulary[token] = ""
    return vlm


def _pictures(count: int, pixels: int) -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (pixels, pixels, 3), np.uint8)) for _ in range(count)]


def _text_tokens(vlm: VLM, pixels: int) -> int:
    first, second = _pictures(2, 28)
    prompt = vlm.input(first, second, _TEXT, "choice", think=True)
    return len(prompt) - sum(image.tokens for image in prompt.images)


def _measure_training(vlm: VLM, checkpoint: ModelSize, pixels: int, settings: TrainSettings) -> tuple[MemoryPlan, int]:
    text = _text_tokens(vlm, pixels)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "reward.py"
        file.write_text(REWARD, encoding="utf-8")
        settings = replace(settings, reward=f"{file}:reward", steps=1)
        images = _pictures(2 * settings.comparisons, pixels)
        preferences = [Preference(_TEXT, a, b, 1.0) for a, b in zip(images[::2], images[1::2], strict=True)]
        trainer = Trainer(vlm, preferences, settings)
        peak = max(report.peak_bytes for report in trainer.steps())
    return training_plan(checkpoint, settings, len(preferences), text=text), peak


def _measure_judging(
    vlm: VLM, checkpoint: ModelSize, pixels: int, settings: JudgeSettings, images: int
) -> tuple[MemoryPlan, int]:
    text = _text_tokens(vlm, pixels)
    mx.reset_peak_memory()
    Judge(vlm, settings).score(_pictures(images, pixels), _TEXT)  # all pairs in full batches; a ranking's are smaller
    return judging_plan(checkpoint, settings, images, text), int(mx.get_peak_memory())
