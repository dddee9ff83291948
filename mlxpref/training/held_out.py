"""Held-out preferences: measure a judge in training on preferences that no step shows, and remember the best."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from mlxpref.config import TrainSettings
from mlxpref.data.left_out import LeftOut
from mlxpref.distributed import SINGLE_PROCESS, ProcessGroup
from mlxpref.engine.lora import adapter_weights
from mlxpref.engine.vlm import VLM
from mlxpref.errors import DataError, ImageError
from mlxpref.judge.evaluation import Evaluation, EvaluationSpec, evaluate
from mlxpref.judge.judge import Judge
from mlxpref.log import logger
from mlxpref.preferences import Preference
from mlxpref.training.rewards import RewardMix
from mlxpref.training.sampler import random_subset


class HeldOut:
    """Measures with the code of `eval`: both orders, greedy, with thinking if training has it, without ties.

    With `settings.patience` it remembers the adapter with the best accuracy, the earliest of equal ones, and
    `should_stop` turns True after as many measurements in a row without a better one.
    """

    def __init__(
        self,
        vlm: VLM,
        preferences: Sequence[Preference],
        settings: TrainSettings,
        mix: RewardMix,
        processes: ProcessGroup = SINGLE_PROCESS,
        left_out: LeftOut | None = None,
    ) -> None:
        without_ties = [p for p in preferences if not p.is_tie]
        if settings.held_out and not without_ties:
            raise DataError(
                f"all {len(preferences)} held-out preferences are ties, which measure nothing; give a larger --held-out"
            )
        self.preferences = random_subset(without_ties, settings.held_out_limit, settings.seed, "measured")
        self.best: dict[str, mx.array] = {}
        """The best adapter's weights so far; empty before the first measurement, or without patience."""
        self.best_step = 0
        self._vlm, self._settings, self._strategy, self._processes = vlm, settings, mix.strategy, processes
        self._left_out = left_out or LeftOut(settings.data, preferences)
        self._accuracy, self._measurements_since_best = -1.0, 0

    @property
    def should_stop(self) -> bool:
        """Whether training should end."""
        return 0 < self._settings.patience <= self._measurements_since_best

    def measure(self, step: int, steps: int) -> Evaluation | None:
        """Judge the held-out preferences and remember the best adapter.

        None where that is not due after a step, or where no image can be read any more. Step 0 is before training, for
        comparison: no adapter to remember.
        """
        settings = self._settings
        if not self.preferences or (step % settings.evaluate_every and step < steps):
            return None
        judge = Judge(self._vlm, settings.judging, processes=self._processes)
        spec = EvaluationSpec(settings.data, "held-out", self._strategy)
        try:
            evaluation = evaluate(judge, self.preferences, spec, self._left_out)
        except ImageError as error:
            logger.warning(f"step {step}: held-out preferences: {error}")
            return None
        # The number that ends training must be equal in all processes.
        accuracy = float(self._processes.broadcast(evaluation.metrics.accuracy))
        if step == 0:
            return evaluation
        self._measurements_since_best += 1
        if accuracy > self._accuracy:
            self._accuracy, self._measurements_since_best, self.best_step = accuracy, 0, step
            self.best = adapter_weights(self._vlm.model) if settings.patience else {}
        return evaluation

    @property
    def state(self) -> tuple[dict[str, mx.array], dict[str, Any]]:
        """The state for later measurements: the best adapter, and numbers."""
        numbers = {"accuracy": self._accuracy, "stale": self._measurements_since_best, "best_step": self.best_step}
        return dict(self.best), numbers

    def restore(self, best: Mapping[str, mx.array], numbers: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.best = dict(best)
        self._accuracy, self._measurements_since_best = float(numbers["accuracy"]), int(numbers["stale"])
        self.best_step = int(numbers.get("best_step", 0))  # earlier versions lack it

    def restart_patience(self) -> None:
        """Wait for a better measurement from here on."""
        self._measurements_since_best = 0
