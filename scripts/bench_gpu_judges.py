"""The judges of `scripts.bench_gpu`: real and small sizes, random weights, the language model in 4 bit."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from mlxpref._blas import preload

preload()  # before MLX is first imported

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

from mlxpref.checkpoints.checkpoint import Checkpoint  # noqa: E402
from mlxpref.demo import JUDGE  # noqa: E402
from mlxpref.engine.vlm import VLM  # noqa: E402
from scripts.bench_models import DEMO_SIZE, FAMILIES, LARGEST, build_hybrid, hybrid_config, make_endless  # noqa: E402
from scripts.memory_check import Model, random_judge  # noqa: E402

REAL = Model(
    "Qwen2.5-VL-7B, 4 bit",
    {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    },
    {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    bits=4,
)  # fmt: skip
SMALL = Model("the demo's size, 4 bit", {}, {}, bits=4)
QWEN3_5_4B: dict[str, dict[str, int]] = {
    "text": {
        "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "vocab_size": 248320,
    },
    "vision": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16},
}  # fmt: skip
"""Its config was not seen: the language model's sizes are as others list them, those of recurrent layers transformers'
defaults; the tied head and the vision tower, that of Qwen3-VL-4B, are assumed, and make 4.54 billion weights as listed.
"""


def judge_of(family: str, quick: bool) -> tuple[str, VLM]:
    """A judge of real size, or a small one: its name, and itself."""
    if family == FAMILIES[0]:
        model = SMALL if quick else REAL
        return model.name, random_judge(model, mx.bfloat16)
    if quick:
        four = {"num_hidden_layers": 4}  # layers of both kinds are enough, and quantized products are slow on a CPU
        return "a small Qwen3.5, 4 bit", random_hybrid(DEMO_SIZE | {"text": DEMO_SIZE["text"] | four}, mx.bfloat16)
    return "Qwen3.5-4B, 4 bit", random_hybrid(QWEN3_5_4B, mx.bfloat16)


def random_hybrid(sizes: Mapping[str, Mapping[str, int]], dtype: mx.Dtype) -> VLM:
    """A Qwen3.5 of these sizes with random weights, its language model in 4 bit; its completions never end."""
    from mlx_vlm.utils import load_processor

    with TemporaryDirectory() as place:
        folder = Path(place) / "judge"
        model = build_hybrid(hybrid_config(sizes), folder)
        processor = load_processor(folder, trust_remote_code=False)
    model.set_dtype(dtype)
    nn.quantize(model.language_model, bits=4)
    model.eval()
    mx.eval(model.parameters())
    vlm = VLM(model, processor, Checkpoint.open(JUDGE), LARGEST)
    make_endless(vlm)
    return vlm
