"""The store of several processes: process 0 has it, and all know what is in it."""

from collections.abc import Mapping, Sequence

from mlxpref.distributed import ProcessGroup
from mlxpref.judge.store import Store
from mlxpref.verdict import Verdict, verdicts_from_json, verdicts_to_json

__all__ = ["BroadcastStore"]


class BroadcastStore:
    """A store as `store.Store`, which only process 0 opens: all ask it for the same things, and it keeps for all.

    So a store does not depend on how many processes there were, and no two machines have half of it each.
    """

    def __init__(self, store: Store | None, machines: ProcessGroup) -> None:
        self._store, self._machines = store, machines

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, tuple[Verdict, ...]]:
        """The verdicts under those of the keys that are there; every process asks for the same, in the same order."""
        found = self._store.get_many(keys) if self._store else {}
        told = self._machines.agreed([verdicts_to_json(found[key]) if key in found else None for key in keys])
        # By place, not by name: a picture that one machine has in other bits must not lead them apart.
        return {key: verdicts_from_json(known) for key, known in zip(keys, told, strict=True) if known is not None}

    def put_many(self, items: Mapping[bytes, Sequence[Verdict]]) -> None:
        """Keep verdicts by key, once for all processes."""
        if self._store:
            self._store.put_many(items)
