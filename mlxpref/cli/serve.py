"""`mlxpref serve`: the judge as a reward, over HTTP."""

import logging
from dataclasses import dataclass, replace
from typing import Any, get_args

import click

from mlxpref.cli.common import exit_on_sigterm, image_cache
from mlxpref.cli.judges import open_judge
from mlxpref.cli.options import HelpCommand, JudgeOptions, option, option_group, settings_options
from mlxpref.cli.output import note
from mlxpref.config import JudgeSettings
from mlxpref.log import logger
from mlxpref.reward.group import COMPARISONS_PER_IMAGE, RewardSettings, Value
from mlxpref.serve.limits import FEATURE_BYTES
from mlxpref.serve.server import RewardServer
from mlxpref.text import counted
from mlxpref.web import LOCAL_HOSTS, listen

_GROUP = "Server"


@dataclass(frozen=True)
class ServerOptions:
    """Where the server listens, to whom, and what a reward is."""

    port: int = option(
        "--port", 8000, type=click.IntRange(0, 65535), show_default=True, group=_GROUP, help="0 is any free port."
    )
    host: str = option(
        "--host", LOCAL_HOSTS[0], show_default=True, group=_GROUP,
        help="Address to listen at; any but 127.0.0.1 and localhost needs --token.",
    )  # fmt: skip
    token: str | None = option(
        "--token", envvar="MLXPREF_TOKEN", show_envvar=True, group=_GROUP,
        help="What clients must send, as `Authorization: Bearer TOKEN` or in http://any:TOKEN@host:port.",
    )  # fmt: skip
    value: Value = option(
        "--value", "strength", type=click.Choice(get_args(Value)), show_default=True, group=_GROUP,
        help="What /compute returns: strengths without their group's mean, or shares of wins.",
    )  # fmt: skip
    comparisons_per_image: float = option(
        "--comparisons-per-image", COMPARISONS_PER_IMAGE, type=click.FloatRange(0, min_open=True), show_default=True,
        group=_GROUP, help="The work on a group; both orders of a pair are two.",
    )  # fmt: skip

    def check(self) -> None:
        """UsageError for a server that everyone may ask."""
        if self.token is not None and not self.token.strip():
            raise click.UsageError("--token is empty: give a long random text")
        if self.host not in LOCAL_HOSTS and not self.token:
            raise click.UsageError(
                f"--host {self.host} is not {' or '.join(LOCAL_HOSTS)}: give --token TEXT, or set MLXPREF_TOKEN"
            )


@click.command(
    cls=HelpCommand,
    examples=(
        "mlxpref serve --no-think",
        "mlxpref serve --adapter runs/taste --port 8001",
        "mlxpref serve --host 0.0.0.0 --token a-long-random-text",
    ),
)
@option_group(ServerOptions, "server")
@option_group(JudgeOptions, "judge", only=("model", "adapter", "any_base", "yes", "calibration", "no_calibration"))
@settings_options(JudgeSettings)
def serve(server: ServerOptions, judge: JudgeOptions, settings: dict[str, Any]) -> None:
    """Serve a judge as a reward for training image generators; Ctrl-C ends it.

    POST /compute (Flow-Factory), POST /score (UniRL), POST /v1/chat/completions (OpenAI) and POST /rank answer JSON,
    GET /health says what was done. It keeps nothing on the disk.
    """
    server.check()
    judge = replace(judge, no_store=True)  # images of a training come once
    reward = RewardSettings(server.value, server.comparisons_per_image)
    # Before the model is loaded: clients that connect now wait for it.
    socket = listen(server.host, server.port, "choose another, or 0 for any that is free")
    with socket, open_judge([], judge, settings, image_cache(settings)) as loaded:
        loaded.vlm.features.limit(FEATURE_BYTES)
        # Once, and not with a warning for each group: a calibration must hold for all ways of judging, or is left off.
        loaded = loaded.calibrated_for([False, True] if loaded.settings.think else [False])
        running = RewardServer(loaded, socket, server.token or "", reward)
        note(f"{loaded!r} listens at {running.address}; it ends with Ctrl-C")
        note(f"rewards of /compute: {reward.value}, by {reward.comparisons_per_image:g} comparisons an image")
        try:
            logger.setLevel(logging.WARNING)  # not a line on every ranking
            with exit_on_sigterm():
                running.run()
        finally:
            counts = running.queue.counts
            note(f"{counted(counts.requests, 'request')}, {counted(counts.comparisons, 'comparison')}")
