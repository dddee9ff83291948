"""The seam to mlx-vlm against transformers' numbers and mlx-vlm's own generation, and what a row may depend on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlxpref.engine.image_features import Features
from mlxpref.engine.positions import image_positions
from mlxpref.engine.vlm import VLM, ComparisonInput, load_vlm
from mlxpref.errors import ModelError
from tests.conftest import GOLDEN, append_block, hidden_states, picture
from tests.tolerance import PROBABILITY


def input_of(vlm: VLM, ids: np.ndarray, images: tuple[Features, Features]) -> ComparisonInput:
    """A comparison of ids that were made elsewhere."""
    blocks: list[int | tuple[int, int]] = []
    waiting: Iterator[Features] = iter(images)
    place = 0
    while place < len(ids):
        if ids[place] == vlm.image_token_id:
            image = next(waiting)
            blocks.append(image.grid)
            place += image.tokens
        else:
            text = next((i for i in range(place, len(ids)) if ids[i] == vlm.image_token_id), len(ids)) - place
            blocks.append(text)
            place += text
    positions, following = image_positions(blocks)
    return ComparisonInput(ids.astype(np.int32), positions, images, following)


def golden_input(vlm: VLM, golden: dict[str, Any]) -> ComparisonInput:
    first, second = vlm.features.get_all([Image.fromarray(golden["image0"]), Image.fromarray(golden["image1"])])
    return input_of(vlm, golden["input_ids"], (first, second))


def text_logits(vlm: VLM, logits: mx.array) -> np.ndarray:
    """Logits without the tokens that can never be chosen."""
    keep = np.setdiff1d(np.arange(logits.shape[-1]), vlm.suppressed_ids)
    return np.array(logits)[..., keep]


def test_logits_equal_transformers(tiny_vlm: VLM, golden: dict[str, Any]) -> None:
    comparison = golden_input(tiny_vlm, golden)
    assert np.array_equal(comparison.positions, golden["position_ids"])
    assert comparison.next_position - len(comparison) == golden["rope_delta"]
    features = np.concatenate([np.array(image.merged) for image in comparison.images])
    assert np.abs(features - golden["vision"]).max() < 1e-3
    hidden = hidden_states(tiny_vlm, [comparison])
    difference = text_logits(tiny_vlm, tiny_vlm.head(hidden)[0]) - text_logits(tiny_vlm, mx.array(golden["logits"]))
    assert np.abs(difference).max() < 1e-3


def test_the_processor_sees_the_same_pixels(tiny_vlm: VLM, golden: dict[str, Any]) -> None:
    inputs = tiny_vlm.features.processor([Image.fromarray(golden["image0"]), Image.fromarray(golden["image1"])])
    assert np.abs(np.array(inputs["pixel_values"]) - golden["pixel_values"]).max() < 1e-5


def test_decoding_equals_transformers_and_mlx_vlm(tiny_vlm: VLM, golden: dict[str, Any], tmp_path: Path) -> None:
    from mlx_vlm import load, stream_generate

    comparison = golden_input(tiny_vlm, golden)
    cache, logits = tiny_vlm.prefill([comparison])
    ours = []
    for step in range(len(golden["greedy_ids"])):
        ours.append(int(mx.argmax(logits[0]).item()))
        logits = append_block(
            tiny_vlm, cache, np.array([[ours[-1]]], np.int32), np.array([comparison.next_position + step])
        )[:, 0]
    assert ours == golden["greedy_ids"].tolist()
    model, processor = load(str(tiny_vlm.checkpoint.folder))
    model.update(_in_float32(model))
    files = []
    for name in ("image0", "image1"):
        Image.fromarray(golden[name]).save(tmp_path / f"{name}.png")
        files.append(str(tmp_path / f"{name}.png"))
    answers = stream_generate(model, processor, str(golden["text"]), files, max_tokens=len(ours), temperature=0.0)
    assert [answer.token for answer in answers][: len(ours)] == ours


def _in_float32(model: Any) -> Any:
    from mlx.utils import tree_map

    return tree_map(lambda x: x.astype(mx.float32) if x.dtype == mx.bfloat16 else x, model.parameters())


def comparisons(vlm: VLM) -> list[ComparisonInput]:
    """Comparisons of pictures of several sizes, so of several lengths."""
    sizes = [(84, 84), (140, 84), (56, 112), (168, 168)]
    pictures = [picture(i, size) for i, size in enumerate(sizes)]
    return [
        vlm.input(first, second, "a hat" if i % 2 else "a small boat at night", "choice", i % 3 > 0)
        for i, (first, second) in enumerate((a, b) for a in pictures for b in pictures if a is not b)
    ]


def test_padding_and_batch_change_nothing(tiny_vlm: VLM) -> None:
    inputs = comparisons(tiny_vlm)
    assert len({len(comparison) for comparison in inputs}) > 3
    alone = [mx.softmax(tiny_vlm.prefill([comparison])[1], axis=-1) for comparison in inputs]
    together = mx.softmax(tiny_vlm.prefill(inputs)[1], axis=-1)
    shuffled = mx.softmax(tiny_vlm.prefill(inputs[::-1])[1], axis=-1)[::-1]
    for i in range(len(inputs)):
        assert np.abs(np.array(alone[i][0] - together[i])).max() < PROBABILITY
        assert np.abs(np.array(alone[i][0] - shuffled[i])).max() < PROBABILITY


def test_decoding_after_padding_changes_nothing(tiny_vlm: VLM) -> None:
    inputs = comparisons(tiny_vlm)[:6]
    tokens = np.random.default_rng(0).integers(5, 200, (len(inputs), 4)).astype(np.int32)
    cache, _ = tiny_vlm.prefill(inputs)
    starts = np.array([comparison.next_position for comparison in inputs])
    steps = [append_block(tiny_vlm, cache, tokens[:, t : t + 1], starts + t)[:, 0] for t in range(2)]
    block = append_block(tiny_vlm, cache, tokens[:, 2:], starts + 2)
    together = mx.stack([*steps, block[:, 0], block[:, 1]], axis=1)
    for i, comparison in enumerate(inputs):
        single, _ = tiny_vlm.prefill([comparison])
        alone = append_block(tiny_vlm, single, tokens[i : i + 1], starts[i : i + 1])
        difference = mx.softmax(together[i], axis=-1) - mx.softmax(alone[0], axis=-1)
        assert np.abs(np.array(difference)).max() < PROBABILITY


def logprob(vlm: VLM, comparison: ComparisonInput, completion: tuple[int, ...] = (65, 66, 67)) -> float:
    """The log-probability of a completion."""
    cache, logits = vlm.prefill([comparison])
    following = append_block(vlm, cache, np.array([completion], np.int32), np.array([comparison.next_position]))
    rows = mx.concatenate([logits[:, None], following[:, :-1]], axis=1)[0]
    logprobs = rows[mx.arange(len(completion)), mx.array(completion)] - mx.logsumexp(rows, axis=-1)
    return float(logprobs.sum().item())


def test_completion_depends_on_images_and_prompt(tiny_vlm: VLM) -> None:
    first, second, other = picture(1), picture(2), picture(3)
    base = logprob(tiny_vlm, tiny_vlm.input(first, second, "a hat", "choice", True))
    changed = {
        "prompt": tiny_vlm.input(first, second, "a cat", "choice", True),
        "first image": tiny_vlm.input(other, second, "a hat", "choice", True),
        "second image": tiny_vlm.input(first, other, "a hat", "choice", True),
        "places": tiny_vlm.input(second, first, "a hat", "choice", True),
        "form": tiny_vlm.input(first, second, "a hat", "scores", True),
    }
    for what, comparison in changed.items():
        assert abs(logprob(tiny_vlm, comparison) - base) > 1e-3, what


def test_calls_do_not_influence_each_other(tiny_vlm: VLM) -> None:
    comparison = tiny_vlm.input(picture(1), picture(2), "a hat", "choice", True)
    before = logprob(tiny_vlm, comparison)
    longer = tiny_vlm.input(picture(3, (168, 168)), picture(4, (56, 168)), "something much longer", "scores", True)
    logprob(tiny_vlm, longer)
    # What mlx-vlm itself leaves behind on the model: positions and rope deltas of another comparison.
    sizes = mx.array([[1, *(2 * side for side in image.grid)] for image in longer.images])
    tiny_vlm.language_model._position_ids, tiny_vlm.language_model._rope_deltas = (
        tiny_vlm.language_model.get_rope_index(mx.array(longer.ids[None]), sizes)
    )
    assert logprob(tiny_vlm, comparison) == before


def test_suppressed_tokens_cannot_be_chosen(tiny_vlm: VLM) -> None:
    _, logits = tiny_vlm.prefill([tiny_vlm.input(picture(1), picture(2), "a hat", "choice", True)])
    assert tiny_vlm.image_token_id in tiny_vlm.suppressed_ids
    assert max(tiny_vlm.suppressed_ids) == logits.shape[-1] - 1 > len(tiny_vlm.tokenizer.vocabulary)
    assert np.isneginf(np.array(logits)[0, tiny_vlm.suppressed_ids]).all()
    assert np.isfinite(text_logits(tiny_vlm, logits)).all()


def test_chat_template_of_the_checkpoint(tiny_vlm: VLM) -> None:
    text = tiny_vlm.tokenizer.hf_tokenizer.decode(
        tiny_vlm.input(picture(1), picture(2), "a hat", "choice", True).ids.tolist()
    )
    assert text.count("<|image_pad|>") == 18
    assert (
        text.index("Prompt: a hat\n")
        < text.index("Image 1: <|vision_start|>")
        < text.index("Image 2: <|vision_start|>")
    )
    assert text.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not readable as JSON"),
        (lambda f: _set(f, "config.json", model_type="llava"), "Qwen2-VL, Qwen2.5-VL, Qwen3-VL"),
        (lambda f: _set(f, "config.json", model_type=None), "Qwen2-VL, Qwen2.5-VL, Qwen3-VL"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "no preprocessor_config.json"),
        (lambda f: [w.unlink() for w in f.glob("*.safetensors")], "no .safetensors"),
        (lambda f: [w.write_bytes(w.read_bytes()[:-999]) for w in f.glob("*.safetensors")], "safetensors"),
        (lambda f: _set(f, "config.json", intermediate_size=32), "cannot be loaded"),
        (lambda f: _set(f, "config.json", hidden_size=32), "mrope_section"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    ],
)
def test_a_damaged_checkpoint_is_refused(change: Any, words: str, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(GOLDEN / "qwen2_5_vl", tmp_path / "model"))
    change(folder)
    with pytest.raises(ModelError) as caught:
        load_vlm(folder, 512 * 512)
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def _set(folder: Path, name: str, **values: Any) -> None:
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | values))
