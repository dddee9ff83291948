"""The prefix cache: equal beginnings of comparisons run once.

All comparisons of a prompt begin with the same instruction and prompt; those of one first image also share that image.
The cache keeps what the layers remember of each such prefix, and only the rest of a comparison runs behind them.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlxpref.checkpoints import bounds
from mlxpref.engine.branched_cache import BranchedCache, row_branch_ids
from mlxpref.engine.decoder import cache_of, mixer_of, run_block
from mlxpref.engine.layers import Prefix
from mlxpref.engine.vlm import VLM, ComparisonInput, TokenSegment
from mlxpref.lru import LRU


class PrefixCache:
    """Prefixes of comparisons; drops the least recently used first. The model must not change during its life."""

    def __init__(self, vlm: VLM, memory: int = bounds.PREFIX_BYTES) -> None:
        self._vlm = vlm
        self._prefixes: LRU[Hashable, Prefix] = LRU(memory, _nbytes)  # of one row each

    def prefill(self, comparisons: Sequence[ComparisonInput]) -> tuple[BranchedCache, mx.array]:
        """Run B comparisons; returns what the layers remember, and the logits (B, V) after each row's last token."""
        decoder, parts = self._vlm.decoder, [comparison.parts for comparison in comparisons]
        instructions = [(part[0].ids.tobytes(),) for part in parts]
        # Features stand for their image: the key keeps them alive, so that their id stays unique.
        firsts = [(part[0].ids.tobytes(), part[1].ids.tobytes(), part[1].images) for part in parts]
        by_key = self._cached(instructions, [part[0] for part in parts])
        by_key |= self._cached(firsts, [part[1] for part in parts], [by_key[key] for key in instructions])
        prefixes = [_stack(decoder, [by_key[key] for key in keys]) for keys in (instructions, firsts)]
        states, new = self._run([part[2] for part in parts], prefixes)
        prefixes.append(new)
        branch_ids = np.concatenate([prefix.branch_ids[prefix.rows] for prefix in prefixes], axis=1)  # (B, S)
        layers = [
            mixer_of(layer).join([prefix.expanded(prefix.layers[number]) for prefix in prefixes])
            for number, layer in enumerate(decoder.layers)
        ]
        return cache_of(decoder, branch_ids, layers), self._vlm.head(states)

    def _cached(
        self, keys: Sequence[Hashable], segments: Sequence[TokenSegment], before: Sequence[Prefix] = ()
    ) -> dict[Hashable, Prefix]:
        """The prefixes of B segments by key, from the cache; the missing ones run together.

        `before` are the prefixes before the B segments, if any.
        """
        by_key = {key: prefix for key in dict.fromkeys(keys) if (prefix := self._prefixes.get(key))}
        missing = [row for row, key in enumerate(keys) if key not in by_key and key not in keys[:row]]
        if not missing:
            return by_key
        prefixes = [_stack(self._vlm.decoder, [before[row] for row in missing])] if before else []
        _, new = self._run([segments[row] for row in missing], prefixes)
        for place, row in enumerate(missing):
            length, pairs = len(segments[row]), zip(self._vlm.decoder.layers, new.layers, strict=True)
            layers = [mixer_of(layer).one_row(memory, place, length) for layer, memory in pairs]
            by_key[keys[row]] = Prefix(layers, row_branch_ids([length], length), np.zeros(1, np.int64))
        mx.eval([array for row in missing for pair in by_key[keys[row]].layers for array in pair])
        for row in missing:
            self._prefixes.put(keys[row], by_key[keys[row]])
        return by_key

    def _run(self, segments: Sequence[TokenSegment], before: Sequence[Prefix]) -> tuple[mx.array, Prefix]:
        """Run B segments behind prefixes: the states (B, D) at their ends, and a prefix of them."""
        block = self._vlm.block(segments)
        last = np.array([len(segment) - 1 for segment in segments])
        states, layers = run_block(
            self._vlm.decoder, block, before, recompute=False, last_positions=last, eval_each_piece=True
        )
        return states, Prefix(layers, block.branch_ids, np.arange(len(segments)))


def _nbytes(prefix: Prefix) -> int:
    return sum(int(array.nbytes) for pair in prefix.layers for array in pair)


def _stack(decoder: Any, cached: Sequence[Prefix]) -> Prefix:
    """The prefixes of B rows as one prefix of P rows: each once, padded on the right to the longest."""
    distinct = list(dict.fromkeys(cached))
    rows = {prefix: row for row, prefix in enumerate(distinct)}
    lengths = [prefix.branch_ids.shape[1] for prefix in distinct]
    layers = [
        mixer_of(layer).stack_rows([prefix.layers[number] for prefix in distinct])
        for number, layer in enumerate(decoder.layers)
    ]
    return Prefix(layers, row_branch_ids(lengths, max(lengths)), np.array([rows[prefix] for prefix in cached]))
