"""The demo judge beside transformers: the same pictures and words must give the same logits at every position.

Skipped without torch. To run it with torch in an environment of its own:

    MLXPREF_REFERENCE_PYTHON=venv-torch/bin/python python -m pytest -m reference tests/test_reference.py
"""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlxpref import blas
from mlxpref.demo.pictures import Look, render
from mlxpref.template import USER_TEXT, comparison_messages

JUDGE = Path(__file__).parent.parent / "mlxpref" / "demo" / "judge"
CHOSEN_PYTHON = os.environ.get("MLXPREF_REFERENCE_PYTHON")
COMPLETION = "<think>image 1 is a red circle.</think><answer>1</answer>"
TOLERANCE = 1e-4

pytestmark = [
    pytest.mark.reference,
    pytest.mark.skipif(
        CHOSEN_PYTHON is None and importlib.util.find_spec("torch") is None,
        reason="torch is not installed: `pip install --group reference`, or set MLXPREF_REFERENCE_PYTHON",
    ),
]


def write_reference(folder: str, request: str, output: str) -> None:
    """Run by a process of its own, from this very source: importing mlx-vlm changes transformers' classes."""
    import json

    import numpy as np
    import torch
    import transformers
    from PIL import Image

    with open(request, encoding="utf-8") as file:  # noqa: PTH123
        asked = json.load(file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    images = [Image.open(path).convert("RGB") for path in asked["images"]]
    features = dict(processor(images=images, return_tensors="pt"))
    text = tokenizer.apply_chat_template(asked["messages"], tokenize=False, add_generation_prompt=True)
    first, second, rest = (text + asked["completion"]).split("<|image_pad|>")
    pads = ["<|image_pad|>" * (int(grid.prod()) // 4) for grid in features["image_grid_thw"]]
    ids = tokenizer(first + pads[0] + second + pads[1] + rest, return_tensors="pt")["input_ids"]
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    kinds = (ids == model.config.image_token_id).int()
    with torch.inference_mode():
        logits = model.eval()(input_ids=ids, mm_token_type_ids=kinds, **features).logits
    np.savez(output, input_ids=ids, logits=logits, pixel_values=features["pixel_values"])


def reference(folder: Path, images: list[Image.Image], messages: Any, tmp_path: Path) -> dict[str, np.ndarray]:
    """Input ids (1, L), pixel values and logits (1, L, V) as transformers has them, in another process."""
    paths = [str(tmp_path / f"{number}.png") for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    request, output = tmp_path / "request.json", tmp_path / "reference.npz"
    request.write_text(json.dumps({"images": paths, "messages": messages, "completion": COMPLETION}))
    program = f"import sys\n{inspect.getsource(write_reference)}\nwrite_reference(*sys.argv[1:])"
    done = subprocess.run(
        [CHOSEN_PYTHON or sys.executable, "-c", program, str(folder), str(request), str(output)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(output) as arrays:
        return dict(arrays)


def test_demo_judge_equals_transformers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first = render(Look("red", "circle", "clean"), rng)
    second = render(Look("blue", "cross", "noisy"), rng).crop((0, 0, 56, 84))
    template = json.dumps(comparison_messages("choice"), ensure_ascii=False)
    messages = json.loads(template.replace(USER_TEXT, " a red circle"))
    expected = reference(JUDGE, [first, second], messages, tmp_path)

    blas.preload()
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_vlm.utils import load, prepare_inputs

    model, processor = load(str(JUDGE))
    model.update(tree_map(lambda x: x.astype(mx.float32), model.parameters()))
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = prepare_inputs(processor, images=[first, second], prompts=text + COMPLETION)
    ids, grid = inputs["input_ids"], inputs["image_grid_thw"]
    embedded = model.get_input_embeddings(ids, inputs["pixel_values"], image_grid_thw=grid)
    logits = model.language_model(ids, inputs_embeds=embedded.inputs_embeds, position_ids=embedded.position_ids).logits

    np.testing.assert_array_equal(np.array(ids), expected["input_ids"])
    np.testing.assert_allclose(np.array(inputs["pixel_values"]), expected["pixel_values"], atol=1e-5)
    np.testing.assert_allclose(np.array(logits), expected["logits"], rtol=0, atol=TOLERANCE)
