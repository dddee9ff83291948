"""The judge as a reward for other training: functions, groups of one prompt, and preference pairs."""

from typing import TYPE_CHECKING, Any

from mlxpref.reward.functions import GroupReward, ImageRewardModel, ddpo, flow_grpo, trl
from mlxpref.reward.group import ImageReward, RewardSettings, reward_images
from mlxpref.reward.pair_files import PairFiles, write_pairs

if TYPE_CHECKING:
    from mlxpref.reward.flow_factory import FlowFactoryReward as FlowFactoryReward

# Not FlowFactoryReward: `import *` would import Flow-Factory.
__all__ = [
    "GroupReward", "ImageReward", "ImageRewardModel", "PairFiles", "RewardSettings", "ddpo",
    "flow_grpo", "reward_images", "trl", "write_pairs",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "FlowFactoryReward":  # importing it imports Flow-Factory
        from mlxpref.reward.flow_factory import FlowFactoryReward

        return FlowFactoryReward
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
