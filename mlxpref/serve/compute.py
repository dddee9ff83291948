"""`POST /compute`, Flow-Factory's remote reward: lists of prompts and images in, one number an image out.

The images of one prompt in a call are one group. A reward that cannot be given makes the whole answer an error: the
client turns the list into numbers as it stands. The error comes in the protocol's own form, with status 200: of any
other status the client shows no text, and asks again.
"""

from collections.abc import Mapping
from typing import Any

from mlxpref.errors import DataError
from mlxpref.judge.judge import Judge
from mlxpref.reward.arrays import usable
from mlxpref.reward.group import RewardSettings, reward_images
from mlxpref.serve.body import decode_all, get_content, get_list, get_text
from mlxpref.serve.device_queue import Work

_OTHER_MEDIA = ("video", "videos", "condition_images", "condition_videos")


def read_compute(body: Mapping[str, Any], settings: RewardSettings) -> Work:
    """The work for `{"prompt": [text], "image": [base64]}`, also as `prompts` and `images`: `{"rewards": [number]}`."""
    if media := [name for name in _OTHER_MEDIA if body.get(name)]:
        raise DataError(f'this judge sees images alone: leave out "{media[0]}"')
    prompts = [get_text(text, f"prompt {number}") for number, text in enumerate(get_list(body, "prompt", "prompts"))]
    values = get_list(body, "image", "images")
    if len(prompts) != len(values):
        raise DataError(f'"prompt" has {len(prompts)} entries and "image" {len(values)}: give one prompt an image')
    contents = [get_content(value, f"image {number}") for number, value in enumerate(values)]

    def work(judge: Judge) -> dict[str, Any]:
        rewards = reward_images(judge, decode_all(contents, judge.vlm.features.max_pixels), prompts, settings)
        try:
            return {"rewards": [each.reward for each in usable(rewards)]}
        except DataError as error:
            return {"error": f"no rewards, as not all images have one: {error}"}

    return work
