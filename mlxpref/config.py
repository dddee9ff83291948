"""Settings: one frozen dataclass field each, from which option, help and record come."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from mlxpref.errors import ConfigError

__all__ = ["JudgeSettings", "setting", "settings_from"]

S = TypeVar("S")


def setting(default: Any, text: str, **limits: Any) -> Any:
    """A field with its default, the help text of its option, and the option's limits (`minimum`)."""
    return field(default=default, metadata={"help": text, **limits})


@dataclass(frozen=True)
class JudgeSettings:
    """How a judge looks, thinks and answers."""

    think: bool = setting(True, "Write reasons before answering; without, the answer is read at once.")
    samples: int = setting(1, "Completions an order: one is greedy, several are sampled.", minimum=1)
    max_tokens: int = setting(256, "Tokens of reasoning; then it is closed and read.", minimum=1)
    max_pixels: int = setting(512 * 512, "Pixels that an image is shrunk to, aspect ratio kept.", minimum=784)
    seed: int = setting(0, "Seed of every random number.", minimum=0)
    rows: int = setting(32, "Completions written together; fewer take less memory.", minimum=1)


def settings_from(kind: type[S], values: Mapping[str, Any]) -> S:
    """Settings of a kind from names and values, checked: unknown names, wrong types and limits are a ConfigError."""
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}; known are {', '.join(known)}")
        wanted = type(known[name].default)
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise ConfigError(f"setting {name}: {value!r} is not {wanted.__name__}")
        minimum = known[name].metadata.get("minimum")
        if minimum is not None and value < minimum:
            raise ConfigError(f"setting {name}: {value!r} is below {minimum}")
    return kind(**values)
