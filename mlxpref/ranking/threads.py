"""One thread for small algebra.

The BLAS of NumPy shares even a product of 136 x 136 out among threads. That gains nothing, and on a busy machine each
call waits until all of them had their turn.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController


@contextmanager
def one_thread() -> Iterator[None]:
    """Let BLAS compute in one thread inside the block, or inside a function that this decorates."""
    with _controller().limit(limits=1, user_api="blas"):
        yield


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()
