"""Several processes of `mlx.launch` that share one piece of work, on one machine or on many.

All processes run the same program on the same data. Each does its shard, and the exchanges here give every process the
whole result. Every process must make every exchange, in the same order. With one process, exchanges return their
arguments. No other module uses `mx.distributed`.

If a process fails or is killed, `mlx.launch` ends the others.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from numpy.typing import NDArray

from mlxpref.errors import MlxprefError

_RANK_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")
"""Environment variables of mlx.launch, the second through mpirun."""


class ProcessGroup:
    """This process among `size` processes. The one with `rank` 0 is the main process: it writes files and prints.

    `sent_bytes` counts this process's bytes to the next one in the ring, `wait_seconds` the seconds of its exchanges,
    including the wait for others.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.sent_bytes = 0
        self.wait_seconds = 0.0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def shard(self, count: int) -> range:
        """This process's indices of `count` items: consecutive, and equally many up to one."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def all_sum(self, tree: Any) -> Any:
        """The sum of a tree of arrays over all processes, added in float32; MlxprefError if a process has ended.

        The trees have the same shapes everywhere. All arrays travel in one exchange.
        """
        if self.size == 1:
            return tree
        names, arrays = zip(*tree_flatten(tree), strict=True)
        flat = mx.concatenate([array.reshape(-1).astype(mx.float32) for array in arrays])  # (numbers of all arrays,)
        total = self._sum(flat)
        parts = mx.split(total, _ends([array.size for array in arrays]))
        entries = zip(names, arrays, parts, strict=True)
        return tree_unflatten([(name, part.reshape(array.shape).astype(array.dtype)) for name, array, part in entries])

    def all_sum_numbers(self, *numbers: float) -> list[float]:
        """The sum of each number over all processes; every process gets the same bits."""
        if self.size == 1:
            return list(numbers)
        return [math.fsum(column) for column in zip(*self.all_gather(numbers), strict=True)]

    def all_gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank: any JSON value, with exact floats."""
        if self.size == 1:
            return [value]
        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        lengths = self._gather_rows(np.array([len(text)], np.uint32))[:, 0].tolist()
        rows = self._gather_rows(np.pad(text, (0, max(lengths) - len(text))))
        return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]

    def broadcast(self, value: Any) -> Any:
        """The main process's value, in every process."""
        return self.all_gather(value if self.is_main else None)[0]

    def broadcast_arrays(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The main process's exact arrays, in every process; the others' arguments are ignored."""
        if self.size == 1:
            return dict(arrays)
        descriptions = [
            [name, array.shape, str(array.dtype).rpartition(".")[2], array.nbytes] for name, array in arrays.items()
        ]
        descriptions = self.broadcast(descriptions)
        sizes = [nbytes for *_, nbytes in descriptions]
        flat = mx.zeros(sum(sizes), mx.uint8)  # the others add zeros to the main process's bytes
        if self.is_main:
            flat = mx.concatenate([mx.view(array.reshape(-1), mx.uint8) for array in arrays.values()])
        total = self._sum(flat)
        entries = zip(descriptions, mx.split(total, _ends(sizes)), strict=True)
        return {name: mx.view(part, getattr(mx, kind)).reshape(shape) for (name, shape, kind, _), part in entries}

    def check_same(self, values: Mapping[str, str]) -> None:
        """MlxprefError if a process has another value than the main process; the names are for the message."""
        main, *others = self.all_gather(dict(values))
        for rank, other in enumerate(others, start=1):
            for name in values:
                if other[name] != main[name]:
                    raise MlxprefError(
                        f"{name}: process {rank} of {self.size} has {other[name]}, process 0 has {main[name]}; "
                        "give all processes the same"
                    )

    def _sum(self, flat: mx.array) -> mx.array:
        """The sum of one array over all processes; a ring sends all but one part of it twice."""
        sent_bytes = 2 * flat.nbytes * (self.size - 1) // self.size
        return self._exchange(mx.distributed.all_sum, flat, sent_bytes)

    def _gather_rows(self, row: NDArray[Any]) -> NDArray[Any]:
        """The rows of all processes, which have one length: (length,) -> (processes, length)."""
        flat = mx.array(row[None])
        return np.array(self._exchange(mx.distributed.all_gather, flat, flat.nbytes * (self.size - 1)))

    def _exchange(self, exchange: Callable[[mx.array], mx.array], array: mx.array, sent_bytes: int) -> mx.array:
        """The evaluated result of an exchange of `array`; MlxprefError if a process has ended."""
        mx.eval(array)  # so that the time below is only of the exchange
        self.sent_bytes += sent_bytes
        start = time.perf_counter()
        try:
            result = exchange(array)
            mx.eval(result)
        except RuntimeError as error:
            raise MlxprefError(
                f"another of the {self.size} processes has ended; its own error says why ({error}); start again, "
                "a training with --resume"
            ) from error
        finally:
            self.wait_seconds += time.perf_counter() - start
        return result


SINGLE_PROCESS = ProcessGroup()
"""The only process."""


def process_group() -> ProcessGroup:
    """Connect the processes that `mlx.launch` started with this one; MlxprefError if that fails.

    Without a launcher this is SINGLE_PROCESS.
    """
    if not any(name in os.environ for name in _RANK_VARIABLES):
        return SINGLE_PROCESS
    hosts = os.environ.get("MLX_HOSTFILE")
    if hosts and not Path(hosts).read_text(encoding="utf-8").strip():  # `mlx.launch -n 1` writes an empty file
        return SINGLE_PROCESS
    try:
        group = mx.distributed.init(strict=True)
    except (RuntimeError, ValueError) as error:
        raise MlxprefError(f"the processes of mlx.launch cannot connect: {error}; look at its hostfile") from error
    return ProcessGroup(group.rank(), group.size())


def _ends(sizes: Sequence[int]) -> list[int]:
    """The ends of parts of these sizes in their concatenation, without the last one."""
    return [int(end) for end in np.cumsum(sizes)[:-1]]
