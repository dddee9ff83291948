"""The demo's story: how good the judge is on pictures it has never seen, and a folder of pictures in its order."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref.demo.pictures import Look, render
from mlxpref.demo.preferences import demo_preferences, prompt_text
from mlxpref.evaluation import Evaluation, evaluate
from mlxpref.image_ranking import ImageRanking, rank_by_judge
from mlxpref.images import find_images
from mlxpref.judge import Judge, PairVerdict

__all__ = ["SAMPLE_PROMPT", "Story", "tell", "write_pictures"]

Track = Callable[[Iterable[PairVerdict], int, str], Iterable[PairVerdict]]

_WANTED = ("purple", "triangle")
SAMPLE_PROMPT = prompt_text(*_WANTED)
_SAMPLES = (
    Look("purple", "triangle", "clean"),
    Look("purple", "triangle", "noisy"),
    Look("purple", "triangle", "blurry"),
    Look("purple", "triangle", "blocky"),
    Look("purple", "circle", "clean"),
    Look("purple", "square", "noisy"),
    Look("green", "triangle", "clean"),
    Look("red", "triangle", "blurry"),
)
TEST_PAIRS = 400
HELD_OUT_PAIRS = 200


@dataclass(frozen=True)
class Story:
    """What the demo found out."""

    before: Evaluation
    held_out_prompts: Evaluation
    ranking: ImageRanking
    pictures: Path

    def to_json(self) -> dict[str, Any]:
        """The story as design.md's JSON of `demo`, as far as it is told."""
        return {
            "before": self.before.to_json(),
            "held_out_prompts": self.held_out_prompts.to_json(),
            "ranking": self.ranking.to_json(),
            "pictures": str(self.pictures),
        }


def tell(judge: Judge, folder: Path, track: Track) -> Story:
    """Evaluate the demo judge on held-out pictures and held-out prompts, then rank a folder of sample pictures."""
    before = evaluate(judge, demo_preferences("test", TEST_PAIRS), "demo", "test", track=track)
    held_out = evaluate(judge, demo_preferences("heldout", HELD_OUT_PAIRS), "demo", "heldout", track=track)
    pictures = write_pictures(folder)
    ranking = rank_by_judge(judge, find_images([pictures]), SAMPLE_PROMPT, think="all", track=track)
    return Story(before, held_out, ranking, pictures)


def write_pictures(folder: Path) -> Path:
    """Write the sample pictures into a folder, named after what they show, and return the folder."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for index, look in enumerate(_SAMPLES):
        name = f"{look.colour}-{look.shape}-{look.quality}.png"
        render(look, np.random.default_rng([7, index])).save(pictures / name)
    return pictures
