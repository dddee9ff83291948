"""The judge as a reward of Flow-Factory, whose YAML names it by its path, `mlxpref.reward.FlowFactoryReward`.

Only this file imports Flow-Factory, and only its trainer needs this file.
"""

from collections.abc import Sequence
from typing import Any

from flow_factory.rewards import GroupwiseRewardModel, RewardModelOutput  # type: ignore[import-not-found]

from mlxpref.data.inputs import ImageInput
from mlxpref.reward.functions import GroupReward, info_of


class FlowFactoryReward(GroupwiseRewardModel):  # type: ignore[misc]  # its trainer leaves out what is not of this class
    """A reward of groups, which Flow-Factory makes from an entry of `rewards` and calls once a group.

    `config` is the entry. Its own keys, `config.extra_kwargs`, are the arguments of `GroupReward`: `judge`, `value`,
    `comparisons_per_image`, `adapter`, and the judge's settings, such as `think`.
    """

    required_fields = ("prompt", "image")

    def __init__(self, config: Any, accelerator: Any) -> None:
        super().__init__(config, accelerator)
        self._rewards_of = GroupReward(**config.extra_kwargs)

    def __call__(self, prompt: Sequence[str], image: Sequence[ImageInput]) -> Any:
        """The rewards of a group's images with a prompt for each, and lists of what else there is of them.

        Errors: see `GroupReward`. All further parameters would cost the trainer an exchange among its processes.
        """
        rewards = self._rewards_of(image, prompt)
        return RewardModelOutput(rewards=[each.reward for each in rewards], extra_info=info_of(rewards))
