"""Several processes that do one work, on one machine or many: who this one is, and what they tell each other.

Nothing else knows `mx.distributed`. All processes run the same program on the same data; each does its share, and what
they exchange makes every one of them know the whole. With one process nothing is sent, and what would come back is what
was given. Every exchange has to be made by all processes, in the same order.
"""

import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from numpy.typing import NDArray

from mlxpref.errors import MlxprefError
from mlxpref.heartbeat import Ending, Heartbeat, meet

__all__ = ["SINGLE_PROCESS", "ProcessGroup", "join"]

_PATIENCE = 5.0
"""Seconds to wait for word of why an exchange failed."""


class ProcessGroup:
    """This process among `size` of them; `rank` 0 writes files and speaks.

    `sent_bytes` counts what this process sends to the next one in the ring, `waited` the seconds that exchanges took,
    waiting for others included.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.sent_bytes = 0
        self.waited = 0.0
        self.heartbeat: Heartbeat | None = None
        self._exchanges = 0

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The numbers of the things, of so many, that are this process's to do: shares in a row, alike to one thing."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def summed(self, tree: Any) -> Any:
        """The sum of all processes' trees of arrays, which have the same shapes; in one exchange, in float32."""
        if self.size == 1:
            return tree
        names, arrays = zip(*tree_flatten(tree), strict=True)
        flat = mx.concatenate([array.reshape(-1).astype(mx.float32) for array in arrays])
        mx.eval(flat)  # an exchange that waits for nothing but the others
        self.sent_bytes += 2 * flat.nbytes * (self.size - 1) // self.size
        total = self._exchanged(lambda: mx.distributed.all_sum(flat))
        ends = np.cumsum([array.size for array in arrays])[:-1].tolist()
        parts = zip(names, arrays, mx.split(total, ends), strict=True)
        return tree_unflatten([(name, part.reshape(array.shape).astype(array.dtype)) for name, array, part in parts])

    def gathered(self, value: Any) -> list[Any]:
        """What each process gives, by rank; anything that JSON holds, numbers to the last bit."""
        if self.size == 1:
            return [value]
        told = np.frombuffer(json.dumps(value).encode(), np.uint8)
        lengths = self._gathered(np.array([len(told)], np.uint32))[:, 0].tolist()
        rows = self._gathered(np.pad(told, (0, max(lengths) - len(told))))
        return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]

    def totals(self, *values: float) -> list[float]:
        """The sums of numbers over all processes, the same in all of them."""
        return [math.fsum(each) if self.size > 1 else each[0] for each in zip(*self.gathered(values), strict=True)]

    def agreed(self, value: Any) -> Any:
        """What process 0 gives, for all."""
        return self.gathered(value if self.leads else None)[0]

    def agreed_arrays(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The arrays that process 0 gives, for all, to the last bit."""
        if self.size == 1:
            return dict(arrays)
        told = [(name, array.shape, array.dtype.size, array.size) for name, array in arrays.items()]
        kinds = [str(array.dtype).rpartition(".")[2] for array in arrays.values()]
        told, kinds = self.agreed([told, kinds])
        sizes = [width * count for _, _, width, count in told]
        flat = mx.zeros(sum(sizes), mx.uint8)
        if self.leads:
            flat = mx.concatenate([mx.view(array.reshape(-1), mx.uint8) for array in arrays.values()])
        mx.eval(flat)
        self.sent_bytes += 2 * flat.nbytes * (self.size - 1) // self.size
        parts = mx.split(self._exchanged(lambda: mx.distributed.all_sum(flat)), np.cumsum(sizes)[:-1].tolist())
        named = zip(told, kinds, parts, strict=True)
        return {name: mx.view(part, getattr(mx, kind)).reshape(shape) for (name, shape, _, _), kind, part in named}

    def check_same(self, values: Mapping[str, str]) -> None:
        """MlxprefError where a process has another value than process 0; the name of a value says what it is."""
        first, *others = self.gathered(dict(values))
        for rank, other in enumerate(others, start=1):
            for what in values:
                if other[what] != first[what]:
                    raise MlxprefError(
                        f"{what}: process {rank} of {self.size} has {other[what]}, process 0 {first[what]}; "
                        "let them have the same"
                    )

    def leave(self, ending: Ending, why: str = "") -> None:
        """Tell the others how the work ended here."""
        if self.heartbeat:
            self.heartbeat.leave(ending, why)
            self.heartbeat = None

    def ending(self) -> None:
        """The work ends here by itself, and no word from others is to interrupt how it does."""
        if self.heartbeat:
            self.heartbeat.ending()

    def _gathered(self, row: NDArray[Any]) -> NDArray[Any]:
        """The rows of all processes, by rank; they have one length."""
        sent = mx.array(row[None])
        mx.eval(sent)
        self.sent_bytes += sent.nbytes * (self.size - 1)
        return np.array(self._exchanged(lambda: mx.distributed.all_gather(sent)))

    def _exchanged(self, begin: Callable[[], mx.array]) -> mx.array:
        """What an exchange gives, once it is there."""
        started = time.perf_counter()
        self._exchanges += 1
        if self.heartbeat:
            self.heartbeat.exchange = self._exchanges
        try:
            result = begin()
            mx.eval(result)
        except RuntimeError as error:
            if self.heartbeat:
                self.heartbeat.wait_for_word(_PATIENCE)
            raise MlxprefError(f"process {self.rank} of {self.size} has lost the others ({error})") from error
        finally:
            if self.heartbeat:
                self.heartbeat.exchange = None
            self.waited += time.perf_counter() - started
        return result


SINGLE_PROCESS = ProcessGroup()
"""The only process."""


def join() -> ProcessGroup:
    """Meet the other processes of a launcher."""
    try:
        group = mx.distributed.init(strict=True)
    except (RuntimeError, ValueError) as error:
        raise MlxprefError(f"the processes of mlx.launch cannot meet: {error}; look at its hostfile") from error
    machines = ProcessGroup(group.rank(), group.size())
    if machines.size > 1:
        machines.heartbeat = meet(machines.rank, machines.size, _address(), machines.agreed)
    return machines


def _address() -> str:
    """Where the others reach process 0, as the launcher said it."""
    if hosts := os.environ.get("MLX_HOSTFILE"):
        first = json.loads(Path(hosts).read_text(encoding="utf-8"))[0]
        return str(first[0] if isinstance(first, list) else first).rpartition(":")[0].strip("[]")
    if coordinator := os.environ.get("MLX_JACCL_COORDINATOR"):
        return coordinator.rpartition(":")[0].strip("[]")
    return os.environ.get("NCCL_HOST_IP") or socket.gethostname()
