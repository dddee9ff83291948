"""The judge behind the arguments of other training code: any form of images, and errors instead of made-up numbers."""

import io
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from threading import current_thread, main_thread
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlxpref
from mlxpref.errors import ConfigError, DataError
from mlxpref.judge.judge import Judge
from mlxpref.reward import ImageRewardModel, ddpo, flow_grpo, trl
from mlxpref.reward.group import INFO, reward_images
from tests.reward.test_group import CIRCLE, CIRCLES, CROSS, CROSSES

PIXELS = np.stack([np.asarray(image) for image in CIRCLES])  # (N, H, W, 3)
FLOATS = PIXELS.astype(np.float32) / 255
PROMPTS = [CIRCLE] * 3


@pytest.fixture
def judge(demo_judge: Callable[..., Judge]) -> Judge:
    """A judge who is sure of most of its answers; at once it would find all even."""
    return demo_judge(max_tokens=80)


@pytest.fixture
def expected(judge: Judge) -> Any:
    """The scores of the three circles, whatever they come in; the judge sees the same pixels."""
    return pytest.approx([each.reward for each in reward_images(judge, CIRCLES, PROMPTS)], abs=1e-6)  # type: ignore[union-attr]


def content(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


BATCHES: dict[str, Callable[[], Any]] = {
    "uint8, channels last": lambda: PIXELS,
    "uint8, channels first": lambda: PIXELS.transpose(0, 3, 1, 2),
    "floats, channels first": lambda: FLOATS.transpose(0, 3, 1, 2),
    "floats, channels last": lambda: FLOATS,
    "doubles": lambda: FLOATS.astype(np.float64).transpose(0, 3, 1, 2),
    "MLX, uint8": lambda: mx.array(PIXELS),
    "MLX, floats, channels first": lambda: mx.array(FLOATS).transpose(0, 3, 1, 2),
    "PIL": lambda: CIRCLES,
    "tuple": lambda: tuple(CIRCLES),
    "generator": lambda: (image for image in CIRCLES),
    "bytes": lambda: [content(image) for image in CIRCLES],
    "list of arrays, channels first": lambda: list(FLOATS.transpose(0, 3, 1, 2)),
    "mixed": lambda: [CIRCLES[0], mx.array(FLOATS[1]).transpose(2, 0, 1), content(CIRCLES[2])],
}


@pytest.mark.parametrize("form", BATCHES)
def test_every_form_of_images_gives_the_same_scores(judge: Judge, expected: Any, form: str) -> None:
    scores, _ = flow_grpo(judge)(BATCHES[form](), PROMPTS, None)
    assert scores == expected
    assert np.argmax(scores) == 0


def test_files_and_arrays_of_their_names(judge: Judge, expected: Any, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file, image in zip(files, CIRCLES, strict=True):
        image.save(file)
    assert flow_grpo(judge)(files, PROMPTS)[0] == expected
    assert flow_grpo(judge)(np.array([str(file) for file in files]), PROMPTS)[0] == expected


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_halves_of_mlx(judge: Judge, dtype: mx.Dtype) -> None:
    halves = mx.array(FLOATS).transpose(0, 3, 1, 2).astype(dtype)
    same = np.array(halves.astype(mx.float32))
    assert flow_grpo(judge)(halves, PROMPTS)[0] == pytest.approx(flow_grpo(judge)(same, PROMPTS)[0], abs=1e-6)


@pytest.mark.reference
@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed: `pip install --group reference`")
def test_tensors_of_torch(judge: Judge, expected: Any) -> None:
    import torch

    first = torch.tensor(FLOATS).permute(0, 3, 1, 2)
    for batch in (first, torch.tensor(PIXELS), first.requires_grad_(), list(first), first.double()):
        assert flow_grpo(judge)(batch, PROMPTS, [{}] * 3)[0] == expected  # type: ignore[arg-type]
    for dtype in (torch.bfloat16, torch.float16):
        halves = first.detach().to(dtype)
        scores = flow_grpo(judge)(halves.float().numpy(), PROMPTS)[0]
        assert flow_grpo(judge)(halves, PROMPTS)[0] == pytest.approx(scores, abs=1e-6)


def test_thin_images_are_taken_as_trainers_have_them(judge: Judge) -> None:
    thin = np.random.default_rng(0).integers(0, 256, (3, 3, 60, 4), np.uint8)  # as (N, 3, 60, 4) or as (N, 60, 4, 3)
    last = flow_grpo(judge)([Image.fromarray(each, "RGBA") for each in thin], PROMPTS)[0]
    first = flow_grpo(judge)([Image.fromarray(each.transpose(1, 2, 0), "RGB") for each in thin], PROMPTS)[0]
    assert last != pytest.approx(first, abs=1e-3)
    assert flow_grpo(judge)(thin, PROMPTS)[0] == pytest.approx(last, abs=1e-6)
    assert flow_grpo(judge)(thin / np.float32(255), PROMPTS)[0] == pytest.approx(first, abs=1e-6)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (2 * FLOATS - 1, r"image 0.*from -\S+ to \S+: floats go from 0 to 1.*give \(x \+ 1\) / 2"),
        (PIXELS.astype(np.float32), r"image 0.*give x\.astype\('uint8'\)"),
        (FLOATS * np.nan, "image 0.*not all are numbers"),
        (np.zeros((3, 2, 8, 8), np.float32), "image 0, image 1, image 2: an array of shape"),
        ([CIRCLES[0], "missing.png", b"no picture"], r"image 1: missing\.png: no such file.*; image 2: "),
        ([CIRCLES[0], None, CIRCLES[1]], "image 1: None is no image"),
    ],
)
def test_an_image_that_cannot_be_used_is_named_by_its_number(judge: Judge, batch: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        flow_grpo(judge)(batch, PROMPTS)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("batch", "prompts", "message"),
    [
        (PIXELS[0], PROMPTS, r"shape \(84, 84, 3\); give \(N, height"),
        (PIXELS[None], PROMPTS, "of videos give one frame each"),
        (CIRCLES[0], PROMPTS, "is no batch"),
        ("pictures", PROMPTS, "is no batch"),
        (PIXELS, PROMPTS[:2], "3 images and 2 prompts"),
        (PIXELS, "abc", "'abc' is no list"),
        (PIXELS, None, "None is no list"),
        (PIXELS, [CIRCLE, CIRCLE, 3], "number 2 is int 3; give texts"),
    ],
)
def test_what_is_no_batch(judge: Judge, batch: Any, prompts: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        flow_grpo(judge)(batch, prompts)


def test_an_image_alone_with_its_prompt_is_an_error(judge: Judge) -> None:
    with pytest.raises(DataError, match=f"^image 2: it is the only readable image of the prompt “{CROSS}”.*one call$"):
        flow_grpo(judge)([*CIRCLES[:2], CROSSES[0]], [CIRCLE, CIRCLE, CROSS])


def test_scores_and_info_are_lists_in_the_order_of_the_images(judge: Judge) -> None:
    images, prompts = [CROSSES[0], CIRCLES[1], CIRCLES[0], CROSSES[1]], (CROSS, CIRCLE, CIRCLE, CROSS)
    scores, info = ddpo(judge)(images, prompts, ({},) * 4)
    assert tuple(info) == INFO
    assert all(type(values) is list and len(values) == 4 for values in info.values())
    assert all(type(score) is float for score in scores)
    assert info["rank"] == [1, 2, 1, 2]
    assert scores == info["strength"] == pytest.approx([scores[0], scores[1], -scores[1], -scores[0]])
    wins, _ = ddpo(judge, value="wins")(images, prompts, ({},) * 4)
    assert wins == pytest.approx(info["wins"], abs=1e-6)


def test_the_budget_reaches_the_ranking(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, rank = [], Judge.rank

    def counted(*arguments: Any, **named: Any) -> Any:
        pairs.append(named["pairs"])
        return rank(*arguments, **named)

    monkeypatch.setattr(Judge, "rank", counted)
    flow_grpo(judge)(CIRCLES + CROSSES, [CIRCLE] * 6)
    flow_grpo(judge, comparisons_per_image=1)(CIRCLES + CROSSES, [CIRCLE] * 6)
    assert pairs == [12, 5]  # at least as many as connect six images


def test_a_judge_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXPREF_MODEL", "demo")
    assert len(flow_grpo()(CIRCLES, PROMPTS)[0]) == 3
    with pytest.raises(ConfigError, match="is no name of a model; the order is"):
        flow_grpo(SimpleNamespace(type="cuda"))  # type: ignore[arg-type]  # a device, as the trainer's own rewards take


def test_threads_of_a_trainer_take_turns(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, busy, rank = set(), [0, 0], Judge.rank

    def watched(*arguments: Any, **named: Any) -> Any:
        threads.add(current_thread())
        busy[:] = busy[0] + 1, max(busy[1], busy[0] + 1)
        try:
            return rank(*arguments, **named)
        finally:
            busy[0] -= 1

    monkeypatch.setattr(Judge, "rank", watched)
    reward = flow_grpo(judge)
    batches = [[image.rotate(90 * turn) for image in CIRCLES] for turn in range(4)]
    with ThreadPoolExecutor(4) as executor:
        scores = list(executor.map(lambda batch: reward(batch, PROMPTS)[0], batches))
        with pytest.raises(DataError, match="image 0"):
            executor.submit(reward, PIXELS[:1], [CIRCLE]).result()
    assert len(threads) == 1, "MLX keeps what it compiles for each thread"
    assert threads.pop() is not main_thread()
    assert busy == [0, 1]
    for batch, score in zip(batches, scores, strict=True):
        assert score == pytest.approx(reward(batch, PROMPTS)[0], abs=1e-4)


ENDING = """
import numpy as np, sys
from concurrent.futures import ThreadPoolExecutor
import mlxpref
reward = mlxpref.reward.flow_grpo(mlxpref.load("demo", think=False))
images = np.random.default_rng(0).integers(0, 256, (3, 84, 84, 3), np.uint8)
print(len(ThreadPoolExecutor(2).submit(reward, images, ["a hat"] * 3, [{}] * 3).result()[0]))
"""


def test_a_program_whose_threads_asked_ends_well() -> None:
    for _ in range(3):  # MLX's threads and Python end in any order
        run = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, check=False)
        assert (run.returncode, run.stdout) == (0, "3\n"), run.stderr


def test_an_image_reward_model(judge: Judge, expected: Any) -> None:
    model = ImageRewardModel(judge)
    ranks, rewards = model.inference_rank(CIRCLE, CIRCLES)
    assert rewards == expected == model.score(CIRCLE, CIRCLES)
    assert sorted(ranks) == [1, 2, 3]
    assert ranks == [1 + sum(other > each for other in rewards) for each in rewards]
    with pytest.raises(DataError, match="only readable image"):
        model.score(CIRCLE, CIRCLES[0])
    assert sorted(model.inference_rank(CIRCLE, [CIRCLES[0]] * 3)[0]) == [1, 2, 3], (
        "a place for each, as of the original"
    )


def message(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def test_trl_calls_with_images_or_messages(judge: Judge, expected: Any) -> None:
    reward = trl(judge)
    columns = {"image": [None] * 3, "completion_ids": [[1]] * 3, "trainer_state": None}
    assert reward(prompts=PROMPTS, completions=CIRCLES, **columns) == expected
    assert reward(prompts=PROMPTS, completions=PIXELS, **columns) == expected
    assert reward.__name__ == "mlxpref", "under which TRL logs it"
    shown = {"type": "image", "image": CROSSES[0]}
    prompts = [
        [message("system", "Draw."), message("user", shown, CIRCLE)],
        [{"role": "user", "content": "a hat"}, message("assistant", "Done."), {"role": "user", "content": CIRCLE}],
        CIRCLE,
    ]
    completions = [[message("assistant", "Here.", {"type": "image", "image": image})] for image in CIRCLES]
    assert reward(prompts=prompts, completions=completions, **columns) == expected


@pytest.mark.parametrize(
    ("completion", "words"),
    [
        ("a text", "image 1: its completion is text"),
        ([{"role": "assistant", "content": "a text"}], "image 1: its completion has 0 image parts"),
        ([message("assistant", *[{"type": "image", "image": CIRCLES[0]}] * 2)], "completion has 2 image parts"),
        ([message("assistant", {"type": "image"})], "image 1: None is no image"),
        (["a text"], "'a text' is no message"),
    ],
)  # fmt: skip
def test_trl_completions_without_an_image(judge: Judge, completion: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        trl(judge)(prompts=PROMPTS, completions=[CIRCLES[0], completion, CIRCLES[1]])


@pytest.fixture
def flow_factory(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The part of Flow-Factory that a reward meets, by what it does: a base class and a result."""

    class GroupwiseRewardModel:
        def __init__(self, config: Any, accelerator: Any) -> None:
            self.config, self.accelerator, self.device = config, accelerator, config.device

    def output(rewards: Sequence[float], extra_info: dict[str, Any]) -> SimpleNamespace:
        return SimpleNamespace(rewards=rewards, extra_info=extra_info)

    module = ModuleType("flow_factory.rewards")
    vars(module).update(GroupwiseRewardModel=GroupwiseRewardModel, RewardModelOutput=output)
    monkeypatch.setitem(sys.modules, "flow_factory", ModuleType("flow_factory"))
    monkeypatch.setitem(sys.modules, "flow_factory.rewards", module)
    monkeypatch.delitem(sys.modules, "mlxpref.reward.flow_factory", raising=False)
    return module


def test_flow_factory_makes_and_calls_it(flow_factory: ModuleType, judge: Judge, expected: Any) -> None:
    chosen = mlxpref.reward.FlowFactoryReward
    assert issubclass(chosen, flow_factory.GroupwiseRewardModel)
    own = {"judge": "demo", "max_tokens": 80, "comparisons_per_image": 8}
    model = chosen(config=SimpleNamespace(extra_kwargs=own, device="cpu"), accelerator=None)
    assert chosen.required_fields == ("prompt", "image")
    output = model(prompt=PROMPTS, image=CIRCLES)
    assert output.rewards == expected
    assert tuple(output.extra_info) == INFO
    assert model.device == "cpu"
    with pytest.raises(ConfigError, match="give 'strength' or 'wins'"):
        chosen(config=SimpleNamespace(extra_kwargs={"judge": "demo", "value": "elo"}, device="cpu"), accelerator=None)


def test_importing_imports_no_other_trainer() -> None:
    program = "import mlxpref, sys; mlxpref.reward.flow_grpo; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "flow_factory"} & set(run.stdout.split())
    assert "mlxpref.reward.functions" in run.stdout.split()


def test_all_names_can_be_imported_at_once() -> None:
    """Without Flow-Factory, whose object is for those who have it."""
    names: dict[str, Any] = {}
    exec("from mlxpref.reward import *", names)
    assert names["flow_grpo"] is flow_grpo
