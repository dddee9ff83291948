"""One run of `scripts/reward_loop.py`: a judge is taught and biased, generators learn from its rewards.

A judge is sure of what it knows, by the demo's labels, or as unsure as people, by shares of votes.
"""

import base64
import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

from mlxpref._blas import preload

preload()  # before MLX is first imported

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from PIL import Image  # noqa: E402
from scipy.stats import kendalltau  # noqa: E402

from mlxpref.cli.demo import demo_settings  # noqa: E402
from mlxpref.config import JudgeSettings  # noqa: E402
from mlxpref.demo import JUDGE  # noqa: E402
from mlxpref.demo.pictures import COLOURS, QUALITIES, SHAPES, PictureSpec, render  # noqa: E402
from mlxpref.demo.preferences import TRAIN_PROMPTS, demo_preferences, prompt_text  # noqa: E402
from mlxpref.engine.lora import adapter_weights  # noqa: E402
from mlxpref.engine.vlm import VLM, load_vlm  # noqa: E402
from mlxpref.judge.judge import Judge  # noqa: E402
from mlxpref.judge.pair_verdict import PairVerdict  # noqa: E402
from mlxpref.log import track  # noqa: E402
from mlxpref.preferences import ImageLike, Pair  # noqa: E402
from mlxpref.ranking.log_odds import log_odds  # noqa: E402
from mlxpref.ranking.outcomes import all_pairs  # noqa: E402
from mlxpref.serve.server import RewardServer  # noqa: E402
from mlxpref.training.trainer import Trainer  # noqa: E402
from mlxpref.verdict import Strategy  # noqa: E402
from mlxpref.web import listen  # noqa: E402
from scripts.learning_runs import Labels, preferences_of  # noqa: E402

__all__ = ["Generator", "Plan", "Sizes", "run", "share_of_wins", "true_order", "true_preference"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Reward = Callable[[Sequence[Image.Image], str, Ints], Floats]
"""The rewards (N,) of a group's pictures for a prompt; the true order also looks at what was drawn (N, 3)."""
Margin = Callable[[PairVerdict], float]
"""How far the image shown first is ahead."""

_TAUGHT: dict[str, tuple[str, Labels]] = {"sure": ("soft", "labels"), "unsure": ("brier", "votes")}
_TEST_SEED = 6
_CHOICES = (len(COLOURS), len(SHAPES), len(QUALITIES))
_RATE = 1.5


@dataclass(frozen=True)
class Plan:
    """What a run is: the kind of its judge, its position bias in nats, and its seed."""

    judge: str
    bias: float
    seed: int


@dataclass(frozen=True)
class Sizes:
    """How much a run does: `taught` steps for each of the judge's two lessons, `taus` groups before any training."""

    group: int = 24
    groups: int = 2
    steps: int = 20
    taught: int = 30
    test: int = 400
    taus: int = 8


STANDARD = Sizes()


@dataclass
class Generator:
    """Draws colour, shape and quality by logits; choice 0 of each is what the prompt asks for, or clean."""

    logits: list[Floats] = field(default_factory=lambda: [np.zeros(count) for count in _CHOICES])

    @property
    def chances(self) -> list[Floats]:
        """The probabilities of the choices of each aspect."""
        return [np.exp(each) / np.exp(each).sum() for each in self.logits]

    def draw(self, count: int, rng: np.random.Generator) -> Ints:
        """The choices (N, 3) of so many pictures."""
        return np.stack([rng.choice(len(p), count, p=p) for p in self.chances], axis=1)

    def learn(self, choices: Ints, advantages: Floats) -> None:
        """One step of REINFORCE, by choices (N, 3) and advantages (N,)."""
        for logits, p, chosen in zip(self.logits, self.chances, choices.T, strict=True):
            logits += _RATE * advantages @ (np.eye(len(p))[chosen] - p) / len(choices)


def pictures_of(prompt: tuple[str, str], choices: Ints, rng: np.random.Generator) -> list[Image.Image]:
    """The pictures of choices (N, 3) for a prompt's colour and shape."""
    colours = list(COLOURS)
    colour, shape = colours.index(prompt[0]), SHAPES.index(prompt[1])
    looks = [
        PictureSpec(colours[(colour + c) % len(colours)], SHAPES[(shape + s) % len(SHAPES)], QUALITIES[q])
        for c, s, q in choices.tolist()
    ]
    return [render(look, rng) for look in looks]


def true_order(choices: Ints) -> Floats:
    """The places (N,) of pictures by the demo's rule, a larger number is better: the prompt first, then the quality."""
    is_right: Floats = (choices == 0) @ np.array([2.0, 2.0, 1.0])
    return is_right


def true_preference(generator: Generator) -> float:
    """The probability that its picture is preferred to one of an untrained generator, a tie being half."""
    own, first = (_places_of(each) for each in (generator, Generator()))
    return float(own @ (np.tri(len(own), k=-1) + np.eye(len(own)) / 2) @ first)


def _places_of(generator: Generator) -> Floats:
    """The probabilities (6,) of the places of `true_order`."""
    colour, shape, quality = (float(p[0]) for p in generator.chances)
    prompt = [(1 - colour) * (1 - shape), colour * (1 - shape) + (1 - colour) * shape, colour * shape]
    return np.outer(prompt, [1 - quality, quality]).ravel()


def taught_judge(kind: str, seed: int, steps: int) -> Judge:
    """The demo judge after its two lessons, without thinking."""
    weights: dict[str, mx.array] | None = None
    lessons: list[tuple[str, Labels]] = [("score", "labels"), _TAUGHT[kind]]
    for reward, labels in lessons:
        settings = demo_settings(reward=reward, think=False, steps=steps, seed=seed)
        vlm = load_vlm(JUDGE, settings.max_pixels, mx.float32)
        for _ in Trainer(vlm, preferences_of(labels, "train", settings.limit, seed), settings, start=weights).steps():
            pass
        weights = adapter_weights(vlm.model)
    return Judge(vlm, JudgeSettings(think=False, max_pixels=settings.max_pixels, rows=settings.rows), "demo")


def add_bias(vlm: VLM, nats: float) -> None:
    """Give the model a head that adds nats to the logit of the first image's label; its weights are in float32."""
    weight = vlm.decoder.embed_tokens.weight
    vlm.language_model.lm_head = head = nn.Linear(weight.shape[1], weight.shape[0])
    first = mx.array(vlm.tokenizer.label_ids[0])
    head.weight, head.bias = weight, mx.zeros(weight.shape[0]).at[first].add(nats)
    vlm.language_model.args.tie_word_embeddings = False


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

    def served(images: Sequence[Image.Image], prompt: str, _: Ints) -> Floats:
        body = {"prompt": [prompt] * len(images), "image": [base64.b64encode(_png(each)).decode() for each in images]}
        with opener.open(Request(f"{server.address}/compute", json.dumps(body).encode())) as response:
            answer = json.load(response)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return np.array(answer["rewards"])

    def queued(strategy: Strategy, margin: Margin) -> Reward:
        def ask(images: Sequence[Image.Image], prompt: str, _: Ints) -> Floats:
            job = server.queue.put(lambda judge: share_of_wins(judge, images, prompt, strategy, margin))
            return np.array(job.answer.result())

        return ask

    rewards: dict[str, Reward] = {
        "served": served,
        "hard wins": queued("soft", label_margin),
        "written scores": queued("score", score_margin(judge, 0)),
        "biased scores": queued("score", score_margin(judge, points)),
        "true order": lambda images, prompt, choices: true_order(choices),
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
        generator.learn(np.concatenate([each[0] for each in groups]), np.concatenate([each[1] for each in groups]))
        curve.append(round(true_preference(generator), 4))
    return {
        "curve": curve,
        "right": round(float(np.prod([p[0] for p in generator.chances])), 4),
        "comparisons": counts.comparisons - comparisons,
        "seconds": round(counts.seconds - seconds, 2),
    }


def _group(reward: Reward, generator: Generator, rng: np.random.Generator, count: int) -> tuple[Ints, Floats]:
    """The choices (N, 3) of a group for a random prompt, and its rewards (N,) with mean 0 and deviation 1."""
    prompt = TRAIN_PROMPTS[int(rng.integers(len(TRAIN_PROMPTS)))]
    choices = generator.draw(count, rng)
    rewards = reward(pictures_of(prompt, choices, rng), prompt_text(*prompt), choices)
    return choices, (rewards - rewards.mean()) / (rewards.std() or 1.0)


def agreement(reward: Reward, seed: int, sizes: Sizes) -> float:
    """Kendall's tau-b of rewards with the true order, the mean over groups of an untrained generator."""
    rng, taus = np.random.default_rng([2, seed]), []
    for _ in range(sizes.taus):
        choices, advantages = _group(reward, Generator(), rng, sizes.group)
        taus.append(kendalltau(np.round(advantages, 6), true_order(choices)).statistic)
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
    judge = taught_judge(plan.judge, plan.seed, sizes.taught)
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
