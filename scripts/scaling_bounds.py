"""What work must take by counting, and what this machine reaches at it in the same run: for `scripts.scaling`.

A bound is multiply-adds over the rate of bare products of the same shapes, with the model's own weights one after the
other, so that weights come from memory as they do in the model. Two costs stand beside it that no count of
multiply-adds has: exponentials, and operations by number, at the price of one that does next to nothing.
"""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from mlxpref._blas import preload

preload()  # before MLX is first imported

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mlxpref.checkpoints import bounds  # noqa: E402
from mlxpref.engine.lora import adapter_weights, linear_layers  # noqa: E402
from scripts.bench_common import evaluation_seconds  # noqa: E402
from scripts.bench_models import decoder_operations, vision_operations  # noqa: E402

__all__ = ["Counts", "Machine", "Operations", "Work", "counted", "least_seconds"]

Shape = tuple[str, int, int]
"""A kind of product, its rows, and the columns that its queries see."""
_CHAIN = 1000
"""Operations of the chain that measures one."""
_NUMBERS = 1 << 19
"""Numbers whose exponentials are measured, as many as some scores of a layer."""
_COPIED = 1 << 24
"""Numbers whose copy is measured: more than a cache holds."""


@dataclass(frozen=True)
class Work:
    """Multiply-adds by kind, and exponentials.

    `linear` are the frozen layers, `adapter` the products of an adapter, `head` the vocabulary's, whose products have
    `rows` rows; `attention` those of queries with keys and of what comes out with values, `columns` of them.
    """

    rows: int
    columns: int
    linear: float
    adapter: float
    head: float
    attention: float
    exponentials: float

    def passes(self, forward: int, backward: int) -> "Work":
        """The work of so many passes.

        Backwards frozen layers have the gradient of their inputs alone, and attention takes its softmax as it was.
        """
        once, twice = forward + backward, forward + 2 * backward
        return replace(
            self,
            linear=self.linear * once,
            adapter=self.adapter * twice,
            head=self.head * once,
            attention=self.attention * twice,
            exponentials=self.exponentials * forward,
        )

    @property
    def multiply_adds(self) -> float:
        """Those of all kinds."""
        return self.linear + self.adapter + self.head + self.attention


class Counts:
    """The work of blocks of tokens, from the shapes of a model whose layers all attend."""

    def __init__(self, model: Any) -> None:
        self.model, arguments = model, model.language_model.args
        layers = model.language_model.model.layers
        self.depth, self.heads = len(layers), int(arguments.num_attention_heads)
        self.inner, self.vocabulary = int(arguments.intermediate_size), int(arguments.vocab_size)
        self.hidden = int(arguments.hidden_size)
        self.weights = sum(int(layer.weight.size) for layer in linear_layers(model).values())
        self.adapter = sum(int(weight.size) for weight in adapter_weights(model).values())
        last = f"layers.{self.depth - 1}."
        self.skipped = sum(
            int(layer.weight.size)
            for name, layer in linear_layers(model).items()
            if last in name and "k_proj" not in name and "v_proj" not in name
        )
        """Weights of the last layer, which only the last token of a prompt meets."""

    def vision(self, images: int, pixels: int) -> Work:
        """Square pictures in a tower of which some blocks see all patches, the others those of a window."""
        config = self.model.config.vision_config
        patches = (pixels // config.patch_size) ** 2
        window = min(patches, (config.window_size // config.patch_size) ** 2)
        full = len(config.fullatt_block_indexes)
        seen = full * patches + (config.depth - full) * window
        exponentials = images * patches * (config.num_heads * seen + config.depth * config.intermediate_size)
        linear = images * vision_operations(self.model, pixels)
        return Work(bounds.TARGET_TOKENS, 1, linear, 0, 0, 0, exponentials)

    def prompts(self, count: int, length: int) -> Work:
        """Prompts once; the head at their ends."""
        size = bounds.piece_columns(count)
        seen = sum((min(start + size, length) - start) * min(start + size, length) for start in range(0, length, size))
        work = self.tokens(count, length, 0, min(size, length) * count, seen / length, heads=count)
        return replace(work, linear=work.linear - count * (length - 1) * self.skipped)

    def tokens(self, rows: int, count: int, before: int, product_rows: int, seen: float, heads: int) -> Work:
        """`count` tokens in each of `rows` rows, behind `before` others; the head at `heads` of them.

        `seen` are the columns whose scores are computed for a token, with those that a mask hides.
        """
        all_tokens = rows * count
        return Work(
            rows=product_rows,
            columns=before + count,
            linear=all_tokens * self.weights,
            adapter=all_tokens * self.adapter,
            head=heads * self.vocabulary * self.hidden,
            attention=rows * decoder_operations(self.model, count, before) - all_tokens * self.weights,
            exponentials=all_tokens * self.depth * (self.heads * seen + self.inner) + heads * self.vocabulary,
        )


class Machine:
    """What this machine reaches: multiply-adds a second of products by shape, and what else takes time.

    Everything is measured anew whenever it is asked to `look` at work, and the best counts: what ran beside one
    measurement did not run beside all.
    """

    def __init__(self, model: Any) -> None:
        arguments = model.language_model.args
        self._layers = [layer.weight for layer in linear_layers(model).values()]
        self._adapter = list(adapter_weights(model).values())
        self._head = [model.language_model.model.embed_tokens.weight]
        self._heads = int(arguments.num_attention_heads), int(arguments.num_key_value_heads)
        self._width = int(arguments.hidden_size) // self._heads[0]
        self.rates: dict[Shape, float] = {}
        self.operation_s = self.exponential_s = math.inf
        self.copied_a_second = 0.0

    def look(self, works: Iterable[Work]) -> None:
        """Measure what work needs."""
        for kind, rows, columns in {shape for work in works for _, shape in _parts(work)}:
            measure = self._attention if kind == "attention" else self._products
            rate = measure(kind, rows, columns)
            self.rates[kind, rows, columns] = max(rate, self.rates.get((kind, rows, columns), 0.0))
        self.operation_s = min(self.operation_s, least_seconds(_chain) / _CHAIN)
        numbers, more = mx.random.normal((_NUMBERS,)), mx.zeros(_COPIED)
        mx.eval(numbers, more)
        self.exponential_s = min(self.exponential_s, least_seconds(lambda: [mx.exp(numbers)]) / _NUMBERS)
        copied = 2 * int(more.nbytes) / least_seconds(lambda: [more + 1])
        self.copied_a_second = max(self.copied_a_second, copied)

    def costs(self, seconds: float, operations: int, works: Sequence[Work]) -> dict[str, float]:
        """Seconds beside those of products, exponentials and operations, by the best that was looked at."""
        bound = sum(count / self.rates[shape] for work in works for count, shape in _parts(work))
        return {
            "seconds": round(seconds, 4),
            "bound_s": round(bound, 4),
            "exponentials_s": round(sum(work.exponentials for work in works) * self.exponential_s, 4),
            "operations_s": round(operations * self.operation_s, 4),
            "multiply_adds": sum(work.multiply_adds for work in works),
            "operations": operations,
        }

    def to_json(self) -> dict[str, Any]:
        """What was reached, in a second or seconds each."""
        return {
            "multiply_adds_a_second": {
                " ".join(map(str, key)): round(rate) for key, rate in sorted(self.rates.items())
            },
            "operation_s": self.operation_s,
            "exponential_s": self.exponential_s,
            "copied_a_second": round(self.copied_a_second),
        }

    def _products(self, kind: str, rows: int, _: int) -> float:
        """Of all weights of a kind, (outputs, inputs) each, or (inputs, outputs) of an adapter."""
        weights = {"linear": self._layers, "adapter": self._adapter, "head": self._head}[kind]
        right = weights if kind == "adapter" else [weight.T for weight in weights]
        states = {width: mx.random.normal((rows, width)) for width in {weight.shape[0] for weight in right}}
        mx.eval(states)
        seconds = least_seconds(lambda: [states[weight.shape[0]] @ weight for weight in right])
        return float(rows * sum(int(weight.size) for weight in weights) / seconds)

    def _attention(self, _: str, rows: int, columns: int) -> float:
        """Of queries with keys, and of what comes out with values."""
        queries, keys = self._heads
        together = queries // keys * rows
        left, right = mx.random.normal((keys, together, self._width)), mx.random.normal((keys, self._width, columns))
        mixed, values = mx.random.normal((keys, together, columns)), mx.random.normal((keys, columns, self._width))
        mx.eval(left, right, mixed, values)
        seconds = least_seconds(lambda: [left @ right, mixed @ values])
        return 2 * queries * rows * columns * self._width / seconds


def _chain() -> list[mx.array]:
    """Many operations on one number, one behind the other."""
    number = mx.array(0.0)
    for _ in range(_CHAIN):
        number = number + 1
    return [number]


def _parts(work: Work) -> list[tuple[float, Shape]]:
    """The multiply-adds of work by the shapes of their products."""
    rows, columns = _rounded(work.rows), _rounded(work.columns)
    parts: list[tuple[float, Shape]] = [
        (work.linear, ("linear", rows, 0)),
        (work.adapter, ("adapter", rows, 0)),
        (work.head, ("head", rows, 0)),
        (work.attention, ("attention", rows, columns)),
    ]
    return [part for part in parts if part[0]]


def _rounded(count: int) -> int:
    """A count as a power of two, so that few shapes are measured."""
    return 1 << max(0, count.bit_length() - 1)


def least_seconds(compute: Callable[[], Sequence[mx.array]], repeats: int = 5) -> float:
    """The least of the seconds that arrays take, after a warm-up: what the machine reaches if nothing disturbs it."""
    return min(evaluation_seconds(compute, repeats))


@dataclass
class Operations:
    """How many operations MLX was asked to evaluate."""

    count: int = 0


@contextmanager
def counted() -> Iterator[Operations]:
    """Count the operations of graphs before they are evaluated; those that only reading a value starts are missing."""
    found = Operations()
    at_once, later = mx.eval, mx.async_eval

    def counting(evaluate: Any) -> Any:
        def run(*trees: Any) -> None:
            graph = io.StringIO()
            arrays = [array for _, array in list[Any](tree_flatten(trees)) if isinstance(array, mx.array)]
            mx.export_to_dot(graph, *arrays)
            found.count += graph.getvalue().count("shape=rectangle")
            evaluate(*trees)

        return run

    mx.eval, mx.async_eval = counting(at_once), counting(later)
    try:
        yield found
    finally:
        mx.eval, mx.async_eval = at_once, later
