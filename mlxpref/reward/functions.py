"""The judge as the reward that training code calls: a function or an object with the arguments that it knows.

All of them rank the images of a prompt within one call, see `group.py`; they differ in arguments and results only.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import cache
from os import PathLike
from queue import SimpleQueue
from threading import Lock, Thread, current_thread, main_thread
from typing import Any, Protocol, TypeVar

import numpy as np

from mlxpref.data.inputs import ImageInput, ImagesInput, check_model
from mlxpref.errors import ConfigError, DataError
from mlxpref.judge.functions import judge_from
from mlxpref.judge.judge import Judge
from mlxpref.judge.loading import calibrated
from mlxpref.reward.arrays import images_of, usable
from mlxpref.reward.group import (
    COMPARISONS_PER_IMAGE,
    INFO,
    ImageReward,
    RewardSettings,
    Value,
    reward_images,
)

T = TypeVar("T")

JudgeInput = Judge | str | PathLike[str] | None
"""A judge, or a name as for `mlxpref.load`; None is $MLXPREF_MODEL or the recommended judge."""
Info = dict[str, list[Any]]
"""What there is of each image besides its reward: `group.INFO`, by name."""
_TURN = Lock()


class BatchReward(Protocol):
    """A reward of a batch: images and their prompts become scores and what else there is of the images."""

    def __call__(
        self, images: ImagesInput, prompts: Sequence[str], metadata: object = None
    ) -> tuple[list[float], Info]: ...


class GroupReward:
    """The rewards of the images of one call, ranked by prompts; the base of all interfaces.

    `value` is "strength", in nats without the mean of the image's group, or "wins", the share of wins, whose mean is
    0.5. A group of N images takes about `comparisons_per_image` times N comparisons, at most all. ConfigError for
    others. `options` are settings of the judge, such as `think`, and of one by name its `adapter`, too.
    """

    def __init__(
        self,
        judge: JudgeInput = None,
        value: Value = "strength",
        comparisons_per_image: float = COMPARISONS_PER_IMAGE,
        **options: Any,
    ) -> None:
        self.settings = RewardSettings(value, comparisons_per_image)
        self.judge = _load(judge, **options)

    def __call__(self, images: ImagesInput, prompts: Sequence[str]) -> list[ImageReward]:
        """The rewards of images in their order, by a prompt for each; the calls of several threads take turns.

        DataError, one line, names the images that have none: those that cannot be read, the only ones of a prompt, and
        those about which the judge gave no readable answer.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise ConfigError(f"prompts: {prompts!r:.40} is no list; give one with a prompt for each image")
        for number, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise ConfigError(f"prompts: number {number} is {type(prompt).__name__} {prompt!r:.40}; give texts")

        def rank() -> list[ImageReward]:
            given = images_of(images, self.judge.vlm.features.images)
            return usable(reward_images(self.judge, given, list(prompts), self.settings))

        return _in_turn(rank)


def flow_grpo(
    judge: JudgeInput = None,
    *,
    value: Value = "strength",
    comparisons_per_image: float = COMPARISONS_PER_IMAGE,
    **options: Any,
) -> BatchReward:
    """A reward for flow_grpo, ddpo-pytorch, DiffusionNFT and TRL's DDPOTrainer: `fn(images, prompts, metadata)`.

    It returns the scores as a list of floats and a dict of lists: `strength` and `wins`, `low` and `high` of the
    strength's 95 % interval, `rank`, `p_best` and `reason`. Images: see `arrays.images_of`; `metadata` is not used.
    All images of a prompt must be in one call. Arguments and errors: see `GroupReward`.
    """
    reward = GroupReward(judge, value, comparisons_per_image, **options)

    def preference(images: ImagesInput, prompts: Sequence[str], metadata: object = None) -> tuple[list[float], Info]:
        rewards = reward(images, prompts)
        return [each.reward for each in rewards], info_of(rewards)

    return preference


ddpo = flow_grpo
"""The same under its other name: ddpo-pytorch calls a reward in the same way."""


def trl(
    judge: JudgeInput = None,
    *,
    value: Value = "strength",
    comparisons_per_image: float = COMPARISONS_PER_IMAGE,
    **options: Any,
) -> Callable[..., list[float]]:
    """A reward for trainers with the arguments of TRL's GRPOTrainer: `fn(completions, prompts, **columns)`.

    A completion is the generated image, or a list of messages with it as their only image part; a text is a DataError.
    A prompt is a text, or messages whose last one of the user has it. Columns are not used: `image` and `images` are
    what the prompt shows. Arguments and errors: see `GroupReward`.
    """
    reward = GroupReward(judge, value, comparisons_per_image, **options)

    def mlxpref(completions: ImagesInput, prompts: Sequence[Any], **columns: object) -> list[float]:
        images = completions
        if isinstance(completions, list | tuple):
            images = usable([_try_completion(completion) for completion in completions])
        return [each.reward for each in reward(images, [_prompt_text(prompt) for prompt in prompts])]

    return mlxpref  # TRL logs it by this name


class ImageRewardModel(GroupReward):
    """A reward with the methods of ImageReward's model; arguments and errors as of `GroupReward`."""

    def score(self, prompt: str, image: ImageInput | list[ImageInput]) -> list[float]:
        """The rewards of a list of a prompt's images; DataError for one alone, which has none."""
        return self.inference_rank(prompt, image if isinstance(image, list | tuple) else [image])[1]

    def inference_rank(self, prompt: str, images: Sequence[ImageInput]) -> tuple[list[int], list[float]]:
        """The places of a prompt's images from 1, the best, and their rewards, both in the order given."""
        rewards = [each.reward for each in self(images, [prompt] * len(images))]
        places = np.argsort(np.argsort(-np.array(rewards), kind="stable"), kind="stable")  # (N,)
        return (1 + places).tolist(), rewards


def info_of(rewards: Sequence[ImageReward]) -> Info:
    """What there is of images besides their rewards, a list for each name."""
    return {name: [getattr(each, name) for each in rewards] for name in INFO}


def _load(judge: JudgeInput, adapter: str | PathLike[str] | None = None, **settings: Any) -> Judge:
    """A judge, by name with its own calibration, if any; with other settings, if there are some."""
    if not isinstance(judge, Judge):
        check_model(judge, "(judge), which is a judge or its name")
    loaded = judge_from(judge, adapter, settings)  # type: ignore[arg-type]
    return loaded if isinstance(judge, Judge) else calibrated(loaded, True)


def _try_completion(completion: Any) -> ImageInput | DataError:
    """The image of a completion."""
    if isinstance(completion, str):
        return DataError("its completion is text; give the image that it makes")
    if not isinstance(completion, list):
        return completion  # type: ignore[no-any-return]
    parts = [part for message in completion for part in _parts(message) if part.get("type") == "image"]
    if len(parts) != 1:
        return DataError(f"its completion has {len(parts)} image parts; give one, the image to reward")
    image: ImageInput = parts[0].get("image")  # type: ignore[assignment]  # None is refused like all that is no image
    return image


def _prompt_text(prompt: Any) -> Any:
    """The text of a prompt; of messages that of the user's last one."""
    if not isinstance(prompt, list):
        return prompt
    said = [(message, _parts(message)) for message in prompt]
    of_user = [parts for message, parts in said if message.get("role") == "user"]
    return " ".join(part["text"] for part in (of_user[-1] if of_user else []) if part.get("type") == "text")


def _parts(message: Any) -> list[dict[str, Any]]:
    """The parts of a message's content; DataError for what is no message."""
    if not isinstance(message, Mapping):
        raise DataError(f'{message!r:.60} is no message: give {{"role": "user", "content": ...}}')
    content = message.get("content")
    return content if isinstance(content, list) else [{"type": "text", "text": content or ""}]


def _in_turn(work: Callable[[], T]) -> T:
    """What work returns; one at a time, in the main thread or in one that lives as long as the program.

    Trainers ask for rewards in threads that end with the program. MLX keeps compiled functions for each thread, and
    frees them where it ends, which aborts a Python that ends at the same time.
    """
    with _TURN:
        if current_thread() is main_thread():
            return work()
        answer = Future[T]()
        _endless_thread().put((answer, work))
        return answer.result()


@cache
def _endless_thread() -> "SimpleQueue[tuple[Future[Any], Callable[[], Any]]]":
    """The queue of a thread that does work and never ends."""
    jobs = SimpleQueue[tuple[Future[Any], Callable[[], Any]]]()

    def run() -> None:
        while True:
            answer, work = jobs.get()
            try:
                answer.set_result(work())
            except BaseException as error:
                answer.set_exception(error)

    Thread(target=run, daemon=True, name="mlxpref reward").start()
    return jobs
