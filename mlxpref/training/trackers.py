"""Sends the steps of a run to TensorBoard or Weights & Biases too, through their own packages, where installed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from mlxpref.errors import ConfigError
from mlxpref.log import logger
from mlxpref.text import one_line

Line = Mapping[str, Any]
Send = Callable[[int, Mapping[str, float]], None]
"""Takes a step and its numbers by name."""


def check_trackers(names: str) -> list[str]:
    """The trackers in `--report-to`; ConfigError for an unknown one, and for one whose package is not installed."""
    trackers = [name.strip() for name in names.split(",") if name.strip() not in ("", "none")]
    for name in trackers:
        if name not in _TRACKERS:
            raise ConfigError(f"report_to {name!r}: known are {', '.join(_TRACKERS)}, none; several with commas")
        try:
            import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"report_to {name}: the package {name} is not installed here ({error}); `pip install {name}`"
            ) from error
    return list(dict.fromkeys(trackers))


@contextmanager
def tracking(names: str, folder: Path, record: Mapping[str, Any]) -> Iterator[Callable[[Line], None]]:
    """A function that sends a line of log.jsonl to all trackers; one that fails is left out, and training goes on."""
    with ExitStack() as stack:
        senders: dict[str, Send] = {}

        def attempt(name: str, action: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return action(*arguments)
            except Exception as error:
                senders.pop(name, None)
                logger.warning(f"{name}: {one_line(error)}: nothing more is sent there; log.jsonl has all lines")

        for name in check_trackers(names):
            if opened := attempt(name, _TRACKERS[name], folder, record):
                senders[name], close = opened
                stack.callback(attempt, name, close)

        def send(line: Line) -> None:
            for name, sender in list(senders.items()):
                attempt(name, sender, line["step"], dict(_numbers(line)))

        yield send


def _numbers(line: Line, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a line; nested ones as `held_out/accuracy`."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name not in ("step", "steps"):
            yield prefix + name, float(value)


def _tensorboard(folder: Path, record: Mapping[str, Any]) -> tuple[Send, Callable[[], None]]:
    from tensorboard.summary import Writer

    writer = Writer(str(folder / "tensorboard"))

    def send(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send, writer.close


def _wandb(folder: Path, record: Mapping[str, Any]) -> tuple[Send, Callable[[], None]]:
    import wandb

    run = wandb.init(
        project="mlxpref",
        name=folder.absolute().name,
        id=record["id"],
        resume="allow",
        dir=str(folder),
        config=dict(record["settings"]),
        settings=wandb.Settings(console="off"),  # stdout is for results
    )
    return lambda step, numbers: run.log(dict(numbers), step=step), run.finish


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}
"""By the name of the package: opens a run there, and returns functions that send a step and that end it."""
