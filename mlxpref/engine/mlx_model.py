"""mlx-vlm's model of a checkpoint, with lazy weights in any spelling of their names."""

import re
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxpref.checkpoints.checkpoint import Checkpoint
from mlxpref.checkpoints.checks import check_model
from mlxpref.checkpoints.families import Family
from mlxpref.engine.weights import to_mlx
from mlxpref.errors import MlxprefError, ModelError
from mlxpref.text import one_line

_UNKNOWN = re.compile(r"Received (\d+) parameters not in model:\s*([\w.]*\w)")
_MISSING = re.compile(r"Missing (\d+) parameters:\s*([\w.]*\w)")


def lazy_model(checkpoint: Checkpoint) -> nn.Module:
    """mlx-vlm's model of a checkpoint, whose weights are read when they are needed.

    mlx-vlm's own `load_model` knows one spelling of a family's tensors; here each goes to its place in
    `checkpoint.places`. ModelError for a tensor without a place in the model, and for a missing one: mlx-vlm compares
    all names and shapes, and `check_model` finds parts that it leaves out.
    """
    try:
        model = _load(checkpoint)
    except MlxprefError:
        raise
    except Exception as error:  # mlx-vlm raises anything from KeyError to RuntimeError for a damaged folder
        reason = one_line(error)
        if match := _UNKNOWN.search(str(error)):
            reason = f"no place for {match[1]} of its tensors, such as {match[2]}; give the original checkpoint"
        elif match := _MISSING.search(str(error)):
            reason = f"{match[1]} of the model's tensors missing, such as {match[2]}; download the checkpoint again"
        raise ModelError(f"{checkpoint.folder}: cannot be loaded: {reason}") from error
    check_model(checkpoint.folder, model)
    return model


def _load(checkpoint: Checkpoint) -> nn.Module:
    from mlx_vlm import utils

    with checkpoint.readable() as folder:
        config = utils.load_config(folder)
        package, _ = utils.get_model_and_args(config)
        settings = package.ModelConfig.from_dict(config)
        settings = utils.update_module_configs(settings, package, config, ["text", "vision"])
        settings = utils.apply_generation_config_defaults(settings, config)
        weights: dict[str, mx.array] = {}
        for file in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
            arrays: Any = mx.load(str(file))
            weights |= {place: arrays[name] for name, place in checkpoint.places.items() if name in arrays}
        weights = package.VisionModel(settings.vision_config).sanitize(weights)
        weights = to_mlx(weights, checkpoint.family, checkpoint.family.language(checkpoint.config))
        model: nn.Module = utils.load_model_weights(package.Model(settings), config, weights, folder, lazy=True)
        _correct_activations(model, checkpoint.family)
        return model


def _correct_activations(model: Any, family: Family) -> None:
    """Give the vision tower the activations of transformers' model, and its mergers theirs.

    In mlx-vlm 0.7.10 those of Qwen3-VL's mixture of experts are in each other's place: features are off by 8e-4.
    """
    tower = getattr(model, "vision_tower", None)
    for block in getattr(tower, "blocks", ()):
        if family.vision_activation == "gelu_pytorch_tanh" and "act_fn" in block.mlp:
            block.mlp.act_fn = nn.GELU(approx="tanh")
    for merger in [getattr(tower, "merger", None), *getattr(tower, "deepstack_merger_list", ())]:
        if merger is not None and "act_fn" in merger:
            merger.act_fn = nn.GELU()
