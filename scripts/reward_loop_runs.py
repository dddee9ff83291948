"""One run of `scripts/reward_loop.py`: a judge is taught and biased, generators learn from its rewards."""

import base64
import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

from mlxpref._blas import preload

preload()  # before MLX is first imported

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from scipy.stats import kendalltau  # noqa: E402

from mlxpref.cli.demo import demo_settings  # noqa: E402
from mlxpref.config import JudgeSettings  # noqa: E402
from mlxpref.demo import JUDGE  # noqa: E402
from mlxpref.demo.briefs import Brief, count_met, prompt_text  # noqa: E402
from mlxpref.demo.pictures import PictureSpec, render  # noqa: E402
from mlxpref.demo.preferences import demo_pairs, demo_preferences  # noqa: E402
from mlxpref.engine.lora import adapter_weights  # noqa: E402
from mlxpref.engine.vlm import load_vlm  # noqa: E402
from mlxpref.judge.judge import Judge  # noqa: E402
from mlxpref.judge.pair_verdict import PairVerdict  # noqa: E402
from mlxpref.log import track  # noqa: E402
from mlxpref.preferences import ImageLike, Pair, Preference  # noqa: E402
from mlxpref.ranking.log_odds import log_odds  # noqa: E402
from mlxpref.ranking.outcomes import all_pairs  # noqa: E402
from mlxpref.serve.server import RewardServer  # noqa: E402
from mlxpref.training.trainer import Trainer  # noqa: E402
from mlxpref.verdict import Strategy  # noqa: E402
from mlxpref.web import listen  # noqa: E402
from scripts.learning_runs import add_bias  # noqa: E402
from scripts.reward_loop_generator import (  # noqa: E402
    TASKS,
    Floats,
    Generator,
    Ints,
    all_right,
    true_order,
    true_preference,
)

__all__ = ["Plan", "Sizes", "run", "share_of_wins", "voted"]

Reward = Callable[[Sequence[Image.Image], Brief, Sequence[PictureSpec]], Floats]
"""The rewards (N,) of a group's pictures for a brief; the true order looks at what they show."""
Margin = Callable[[PairVerdict], float]
"""How far the image shown first is ahead."""

VOTES = 10
AGREEMENT = (0.7, 0.85, 0.95)
"""The share of people who see that a picture is better: it meets as much, one requirement more, several more."""
_TEST_SEED = 6


@dataclass(frozen=True)
class Plan:
    """What a run is: its judge's position bias in nats, and its seed."""

    bias: float
    seed: int


@dataclass(frozen=True)
class Sizes:
    """How much a run does: `taught` steps for each of the judge's two lessons, `taus` groups before any training."""

    group: int = 12
    groups: int = 2
    steps: int = 30
    taught: int = 60
    test: int = 400
    taus: int = 8


STANDARD = Sizes()


def voted(count: int, seed: int) -> list[Preference]:
    """Training pairs whose labels are shares of ten votes, by people who agree the more, the more differs."""
    rng, preferences = np.random.default_rng([4, seed]), list[Preference]()
    for pair, preference in zip(demo_pairs("train", count, seed), demo_preferences("train", count, seed), strict=True):
        lead = abs(count_met(pair.brief, pair.a) - count_met(pair.brief, pair.b))
        agree = AGREEMENT[min(lead, len(AGREEMENT) - 1)]
        votes = rng.binomial(VOTES, agree if pair.better == "a" else 1 - agree)
        preferences.append(replace(preference, p_people=votes / VOTES))
    return preferences


def taught_judge(seed: int, steps: int) -> Judge:
    """The demo judge after its two lessons: to write scores, then to choose, as unsure as people are."""
    weights: dict[str, mx.array] | None = None
    for reward, data_of in ("score", partial(demo_preferences, "train")), ("brier", voted):
        settings = demo_settings(reward=reward, steps=steps, seed=seed)
        vlm = load_vlm(JUDGE, settings.max_pixels, mx.float32)
        for _ in Trainer(vlm, data_of(settings.limit, seed), settings, start=weights).steps():
            pass
        weights = adapter_weights(vlm.model)
    judging = JudgeSettings(max_tokens=settings.max_tokens, max_pixels=settings.max_pixels, rows=settings.rows)
    return Judge(vlm, judging, "demo", reads=False)


def label_margin(verdict: PairVerdict) -> float:
    """The log-odds of the first label; 0 for no answer."""
    p = verdict.p_a_shown_first
    return 0.0 if p is None else float(log_odds(p))


def score_margin(judge: Judge, points: float) -> Margin:
    """The first written score less the second, with so many points more for the first; 0 for no scores."""

    def margin(verdict: PairVerdict) -> float:
        scores = judge.vlm.tokenizer.reader.written_scores(verdict.a_shown_first[0].text)
        return 0.0 if scores is None else scores[0] + points - scores[1]

    return margin


def margins(judge: Judge, pairs: Sequence[Pair], strategy: Strategy, margin: Margin) -> Floats:
    """The margins (N,) of the first images of pairs, each shown in one order."""
    verdicts = judge.pairs(pairs, strategy, both_orders=False)
    return np.array([margin(verdict) for verdict in track(verdicts, len(pairs), "judging")])


def share_of_wins(judge: Judge, images: Sequence[ImageLike], prompt: str, strategy: Strategy, margin: Margin) -> Floats:
    """The share (N,) of wins of each image in all pairs, the lower index shown first; 0 margin is half a win."""
    judge.vlm.features.get_all(images)
    every = list(all_pairs(len(images)))
    signs = np.sign(margins(judge, [Pair(images[a], images[b], prompt) for a, b in every], strategy, margin))
    wins = np.zeros(len(images))
    for (a, b), sign in zip(every, signs.tolist(), strict=True):
        wins[a] += (1 + sign) / 2
        wins[b] += (1 - sign) / 2
    return wins / (len(images) - 1)


def rewards_of(server: RewardServer, judge: Judge, points: float) -> dict[str, Reward]:
    """The rewards by their names; any thread but the server's may ask for them."""
    opener = build_opener(ProxyHandler({}))

    def served(images: Sequence[Image.Image], brief: Brief, _: Sequence[PictureSpec]) -> Floats:
        body = {
            "prompt": [prompt_text(brief)] * len(images),
            "image": [base64.b64encode(_png(each)).decode() for each in images],
        }
        with opener.open(Request(f"{server.address}/compute", json.dumps(body).encode())) as response:
            answer = json.load(response)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return np.array(answer["rewards"])

    def queued(strategy: Strategy, margin: Margin) -> Reward:
        def ask(images: Sequence[Image.Image], brief: Brief, _: Sequence[PictureSpec]) -> Floats:
            job = server.queue.put(lambda judge: share_of_wins(judge, images, prompt_text(brief), strategy, margin))
            return np.array(job.answer.result())

        return ask

    rewards: dict[str, Reward] = {
        "served": served,
        "hard wins": queued("soft", label_margin),
        "written scores": queued("score", score_margin(judge, 0)),
        "biased scores": queued("score", score_margin(judge, points)),
        "true order": lambda images, brief, looks: true_order(brief, looks),
    }
    return {name: reward for name, reward in rewards.items() if points or name != "biased scores"}


def _png(image: Image.Image) -> bytes:
    with io.BytesIO() as file:
        image.save(file, "PNG")
        return file.getvalue()


def learned(reward: Reward, server: RewardServer, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Train a generator: how good it is before and after each step, and what the judge did for it."""
    generator, rng, counts = Generator(), np.random.default_rng([1, seed]), server.queue.counts
    comparisons, seconds = counts.comparisons, counts.seconds
    curve = [round(true_preference(generator), 4)]
    for _ in range(sizes.steps):
        groups = [_group(reward, generator, rng, sizes.group) for _ in range(sizes.groups)]
        choices, advantages, _ = zip(*groups, strict=True)
        generator.learn(np.concatenate(choices), np.concatenate(advantages))
        curve.append(round(true_preference(generator), 4))
    return {
        "curve": curve,
        "right": round(all_right(generator), 4),
        "comparisons": counts.comparisons - comparisons,
        "seconds": round(counts.seconds - seconds, 2),
    }


def _group(reward: Reward, generator: Generator, rng: np.random.Generator, count: int) -> tuple[Ints, Floats, Floats]:
    """A group for a random task: its choices (N, 5), its rewards (N,) with mean 0 and deviation 1, its places (N,)."""
    task = TASKS[int(rng.integers(len(TASKS)))]
    choices = generator.draw(count, rng)
    looks = [task.look(each) for each in choices.tolist()]
    rewards = reward([render(look, rng) for look in looks], task.brief, looks)
    return choices, (rewards - rewards.mean()) / (rewards.std() or 1.0), true_order(task.brief, looks)


def agreement(reward: Reward, seed: int, sizes: Sizes) -> float:
    """Kendall's tau-b of rewards with the true order, the mean over groups of an untrained generator."""
    rng, taus = np.random.default_rng([2, seed]), []
    for _ in range(sizes.taus):
        _, advantages, places = _group(reward, Generator(), rng, sizes.group)
        taus.append(kendalltau(np.round(advantages, 6), places).statistic)
    return round(float(np.mean(np.nan_to_num(taus))), 4)


def measured(judge: Judge, nats: float, pairs: int) -> dict[str, float]:
    """Add the bias to the judge: each instrument's accuracy with it, what it is worth in points, what it changes."""
    data = demo_preferences("test", pairs, _TEST_SEED)
    shown = [Pair(each.a, each.b, each.prompt) for each in data]
    is_a = np.array([each.p_people > 0.5 for each in data])

    def accuracy(ahead: Floats) -> float:
        return float(np.mean(np.where(ahead == 0, 0.5, (ahead > 0) == is_a)))

    before, labels = (
        margins(judge, shown, "score", score_margin(judge, 0)), margins(judge, shown, "soft", label_margin)
    )  # fmt: skip
    points = nats * float(before @ before) / float(labels @ before)
    add_bias(judge.vlm, nats)
    after = margins(judge, shown, "score", score_margin(judge, 0))
    both = np.array([float(log_odds(verdict.p_a)) for verdict in judge.pairs(shown)])
    return {
        "both orders": accuracy(both),
        "one order": accuracy(margins(judge, shown, "soft", label_margin)),
        "scores": accuracy(after + points),
        "log-odds": float(np.median(abs(both))),
        "points": points,
        "scores changed": float(np.mean(after != before)),
    }


def run(plan: Plan, sizes: Sizes = STANDARD) -> dict[str, Any]:
    """Teach and bias a judge, serve it in this thread, and let generators learn from it in another."""
    judge = taught_judge(plan.seed, sizes.taught)
    instruments = measured(judge, plan.bias, sizes.test)
    server = RewardServer(judge, listen("127.0.0.1", 0, ""))
    rewards = rewards_of(server, judge, instruments["points"])

    def ask() -> list[dict[str, Any]]:
        return [
            {
                "reward": name,
                "tau": agreement(reward, plan.seed, sizes),
                **learned(reward, server, plan.seed, sizes),
            }
            for name, reward in rewards.items()
        ]

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        asked.add_done_callback(lambda _: server.end())
        server.run()
        rounded = {name: round(value, 4) for name, value in instruments.items()}
        return {**vars(plan), "instruments": rounded, "learned": asked.result()}
