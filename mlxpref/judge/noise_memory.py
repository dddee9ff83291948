"""What a judge's earlier rankings showed of its noise, kept in the store with the judge's digest."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from mlxpref.judge.mode_fit import fit_of_mode
from mlxpref.judge.ranking_result import Ranking
from mlxpref.judge.verdict_source import JudgingSession
from mlxpref.preferences import ImageLike
from mlxpref.ranking.noise import Noise, without_prior

if TYPE_CHECKING:
    from mlxpref.judge.judge import Judge

_LEAST, _MOST = 3.0, 8.0
"""Degrees of freedom: fewer are not worth knowing; more would claim that all sets of images are alike."""


class NoiseMemory:
    """The noise of a judge in the rankings before this one, of these images for this prompt.

    A ranking keeps what it knew when it first began, so that the same command chooses the same pairs again, whatever
    was ranked in between. Without a store it knows and keeps nothing.
    """

    def __init__(self, judge: "Judge", images: Sequence[ImageLike], prompt: str, session: JudgingSession) -> None:
        self._judge, self._session = judge, session
        self._ranking = b""
        if judge.store is not None:
            contents = sorted(content or "" for content in judge.vlm.features.contents(images, session.seen))
            self._ranking = hashlib.sha256(json.dumps([prompt, contents]).encode()).digest()

    def recall(self, think: bool) -> Noise | None:
        """What is known of the judge with thinking or without; None where it is too little."""
        store = self._judge.store
        if store is None:
            return None
        key = self._key(think)
        rankings = store.get_noises(key)
        if self._ranking in rankings:
            known = rankings[self._ranking]["known"]
            return Noise(**known) if known else None
        known = _pooled([row["measured"] for row in rankings.values() if row["measured"]])
        store.put_noise(key, self._ranking, {"known": asdict(known) if known else None, "measured": None})
        return known

    def keep(self, ranking: Ranking) -> None:
        """Keep what each way of judging shows by itself, without what was known before this ranking.

        Beside the other way it would look as noisy as the two are unlike.
        """
        store = self._judge.store
        if store is None:
            return
        is_alone = len(ranking.modes) == 1 and not any(ranking.known)
        for think in ranking.modes:
            fit = ranking.strengths.fit if is_alone else fit_of_mode(ranking, think)
            key, noise = self._key(think), without_prior(fit.reference.noise)
            row = store.get_noises(key).get(self._ranking, {"known": None, "measured": None})
            before = Noise(**row["measured"]).bias_freedom if row["measured"] else 0.0
            # Pairs in one order show only the sum of both variances; of two rankings the richer one is kept.
            if noise.bias_freedom >= max(_LEAST, before):
                store.put_noise(key, self._ranking, row | {"measured": asdict(noise)})

    def _key(self, think: bool) -> bytes:
        """The judge's key in the store, which also names what is kept: rows of another version are not read."""
        form = " ".join(field.name for field in fields(Noise))
        return hashlib.sha256(self._judge.noise_key(think, self._session) + form.encode()).digest()


def _pooled(measured: Sequence[dict[str, Any]]) -> Noise | None:
    """One noise for all: means of the log variances by their degrees of freedom, which add up to `_MOST` at most."""
    noises = [noise for row in measured if not (noise := Noise(**row)).votes]
    freedom, bias_freedom = (sum(n.freedom for n in noises), sum(n.bias_freedom for n in noises))
    if min(freedom, bias_freedom) < _LEAST:
        return None
    pair = sum(n.freedom * math.log(n.pair) for n in noises) / freedom
    bias = sum(n.bias_freedom * math.log(n.bias) for n in noises) / bias_freedom
    return Noise(math.exp(pair), math.exp(bias), min(freedom, _MOST), min(bias_freedom, _MOST))
