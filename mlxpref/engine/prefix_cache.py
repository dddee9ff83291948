"""The prefix tree: what comparisons begin with alike runs once.

Instruction and prompt are the same for all comparisons of a prompt; with the first image they are the same for all its
opponents. Each beginning keeps its keys and values, and only what is new of a comparison runs behind them.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxpref.checkpoints import bounds
from mlxpref.engine.decoder import KeysValues, Prefix, expand_rows, run_block
from mlxpref.engine.kv_cache import BranchedKVCache, owners_of
from mlxpref.engine.vlm import VLM, ComparisonInput, TokenSegment

__all__ = ["PrefixCache"]


@dataclass(frozen=True, eq=False)
class _CachedPrefix:
    """Keys and values of one beginning, (1, heads, columns, width) each, by layer."""

    layers: tuple[KeysValues, ...]

    @property
    def columns(self) -> int:
        return int(self.layers[0][0].shape[2])

    @property
    def nbytes(self) -> int:
        return sum(int(part.nbytes) for pair in self.layers for part in pair)


class PrefixCache:
    """Beginnings of comparisons, least recently used out first; the model must not change during its life.

    `tokens` counts the prompt tokens that ran.
    """

    def __init__(self, vlm: VLM, memory: int = bounds.PREFIX_BYTES) -> None:
        self._vlm, self._memory = vlm, memory
        self._kept: OrderedDict[Hashable, _CachedPrefix] = OrderedDict()
        self._bytes = 0
        self.tokens = 0

    def prefill(self, prompts: Sequence[ComparisonInput]) -> tuple[BranchedKVCache, mx.array]:
        """Run B prompts: their keys and values (made when they are asked for), and the logits (B, V) after each."""
        parts = [prompt.parts for prompt in prompts]
        openings = [(part[0].ids.tobytes(),) for part in parts]
        # Features stand for their image: the key keeps them, so that none other can take their place in memory.
        firsts = [(part[0].ids.tobytes(), part[1].ids.tobytes(), part[1].images) for part in parts]
        found: dict[Hashable, _CachedPrefix] = {}
        self._begin(openings, [part[0] for part in parts], None, found)
        self._begin(firsts, [part[1] for part in parts], openings, found)
        return self._run([part[2] for part in parts], [_stem(openings, found), _stem(firsts, found)])

    def _begin(
        self,
        keys: Sequence[Hashable],
        segments: Sequence[TokenSegment],
        behind: Sequence[Hashable] | None,
        found: dict[Hashable, _CachedPrefix],
    ) -> None:
        """Find the beginnings that are kept, and run the others together, behind their own beginnings."""
        for key in keys:
            if key in self._kept:
                self._kept.move_to_end(key)
                found[key] = self._kept[key]
        missing = [row for row, key in enumerate(keys) if key not in found and key not in keys[:row]]
        if not missing:
            return
        stems = [_stem([behind[row] for row in missing], found)] if behind else []
        _, ran = self._layers([segments[row] for row in missing], stems)
        for place, row in enumerate(missing):
            one, length = slice(place, place + 1), len(segments[row])
            # Copies: a slice would keep the whole batch in memory after its neighbours are forgotten.
            found[keys[row]] = _CachedPrefix(
                tuple((mx.contiguous(k[one, :, :length]), mx.contiguous(v[one, :, :length])) for k, v in ran.layers)
            )
        mx.eval([part for row in missing for pair in found[keys[row]].layers for part in pair])
        for row in missing:
            self._keep(keys[row], found[keys[row]])

    def _keep(self, key: Hashable, beginning: _CachedPrefix) -> None:
        self._kept[key] = beginning
        self._bytes += beginning.nbytes
        while self._bytes > self._memory and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.nbytes

    def _layers(self, segments: Sequence[TokenSegment], stems: Sequence[Prefix]) -> tuple[mx.array, Prefix]:
        """Run segments behind their stems through the layers: the states (B, D) at their ends, keys and values."""
        self.tokens += sum(map(len, segments))
        block = self._vlm.block(segments)
        ends = np.array([len(segment) - 1 for segment in segments])
        states, kept = run_block(self._vlm.language.model, block, stems, recompute=False, ends=ends, in_turn=True)
        return states, Prefix(kept, block.owners, np.arange(len(segments)))

    def _run(self, segments: Sequence[TokenSegment], stems: Sequence[Prefix]) -> tuple[BranchedKVCache, mx.array]:
        states, new = self._layers(segments, stems)
        parts = [*stems, new]
        owners = np.concatenate([part.owners[part.rows] for part in parts], axis=1)
        layers = [
            (
                mx.concatenate([expand_rows(part.layers[number][0], part.rows) for part in parts], axis=2),
                mx.concatenate([expand_rows(part.layers[number][1], part.rows) for part in parts], axis=2),
            )
            for number in range(len(new.layers))
        ]
        return BranchedKVCache.of(owners, layers), self._vlm.head(states)


def _stem(keys: Sequence[Hashable], found: dict[Hashable, _CachedPrefix]) -> Prefix:
    """The beginnings of B rows as one stem: each once, padded on the right to the longest."""
    distinct = list(dict.fromkeys(keys))
    place = {key: row for row, key in enumerate(distinct)}
    beginnings = [found[key] for key in distinct]
    columns = [beginning.columns for beginning in beginnings]
    layers = [
        (
            mx.concatenate([_widened(beginning.layers[number][0], max(columns)) for beginning in beginnings]),
            mx.concatenate([_widened(beginning.layers[number][1], max(columns)) for beginning in beginnings]),
        )
        for number in range(len(beginnings[0].layers))
    ]
    return Prefix(layers, owners_of(columns, max(columns)), np.array([place[key] for key in keys]))


def _widened(part: mx.array, columns: int) -> mx.array:
    missing = columns - part.shape[2]
    return mx.pad(part, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing else part
