"""The judge as a reward for other training: functions, groups of one prompt, and preference pairs."""

from mlxpref.reward.flow_factory import FlowFactoryReward
from mlxpref.reward.functions import ImageRewardModel, ddpo, flow_grpo, trl
from mlxpref.reward.group import ImageReward, RewardSettings, reward_images

__all__ = [
    "FlowFactoryReward", "ImageReward", "ImageRewardModel", "RewardSettings", "ddpo", "flow_grpo", "reward_images", "trl",
]  # fmt: skip
