"""Options of several commands. Related ones reach a command as one object."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal

import click
from click.shell_completion import CompletionItem

from mlxpref.cli.output import note
from mlxpref.config import DATA_HELP
from mlxpref.data.similar import DISTANCE, LARGEST_DISTANCE

Command = Callable[..., Any]

FILE = click.Path(path_type=Path)
"""The type of options for files and folders."""

_UNGROUPED = "Options"


_SHORT = {"--limit": "-n"} | {
    f"--{name}": f"-{name[0]}" for name in ("adapter", "data", "json", "model", "output", "prompt", "steps", "yes")
}
"""Short names, the same in every command."""


class GroupedOption(click.Option):
    """An option that the help of a `HelpCommand` lists under the name of its group; it completes names of ours."""

    def __init__(self, *arguments: Any, group: str = _UNGROUPED, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.group = group

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names of data sets, judges or profiles, and files."""
        names: list[str] = []
        if self.name == "data":
            from mlxpref.data.catalog import CATALOG

            names = ["demo", *CATALOG]
        elif self.name == "model":
            from mlxpref.checkpoints.recommended import recommended_judges

            names = ["demo", *(judge.id for judge in recommended_judges())]
        elif self.name == "profile":
            from mlxpref.engine.profile import built_in_profiles

            names = list(built_in_profiles())
        if not names:
            return super().shell_complete(ctx, incomplete)
        matching = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return [CompletionItem(incomplete, type="file"), *matching]


class HelpCommand(click.Command):
    """A command whose help lists options by group, in the order of their first ones, and `examples`, one a line."""

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.examples = examples
        for parameter in self.params:
            parameter.opts[:0] = [
                _SHORT[name] for name in parameter.opts if _SHORT.get(name, name) not in parameter.opts
            ]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each group of options, and one for the examples."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) and record[1]:  # arguments are in the first line
                groups.setdefault(getattr(parameter, "group", _UNGROUPED), []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)
        if self.examples:
            with formatter.section("Examples"):  # never wrapped, so that each can be copied
                formatter.write("".join(f"  {example}\n" for example in self.examples))


grouped_option = partial(click.option, cls=GroupedOption)
"""As `click.option`, with a `group`."""
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def option(name: str, default: Any = None, **attributes: Any) -> Any:
    """A field of a dataclass of options: `name` and `attributes` are those of `grouped_option`."""
    if default is not None:
        attributes["default"] = default
    return field(default=default, metadata={"name": name, "attributes": attributes})


def flag(name: str, text: str) -> Any:
    """A field of a dataclass of options that is False unless it is given."""
    return option(name, default=False, is_flag=True, help=text)


def option_group(kind: type, name: str, only: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """A decorator: options for the fields of a dataclass (or for `only`) reach the command as one object, `name`.

    Other fields have their defaults.
    """
    options = {
        f.name: grouped_option(f.metadata["name"], f.name, **f.metadata["attributes"])
        for f in fields(kind)
        if not only or f.name in only
    }
    return lambda command: _together(command, options, name, lambda values: kind(**values))


def settings_options(kind: type, only: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """A decorator: options for the fields of a settings dataclass (or for `only`).

    The command gets the given ones in a dict, `settings`; the others keep their defaults.
    """
    option_fields = [f for f in fields(kind) if not only or f.name in only]
    options = {f.name: _setting_option(f.name, f.default, f.metadata) for f in option_fields}

    def given(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value is not None}

    return lambda command: _together(command, options, "settings", given)


def _together(
    command: Command, options: Mapping[str, Callable[[Command], Command]], name: str, join: Callable[[Any], Any]
) -> Command:
    """A command with more options, whose joined values are one argument, `name`."""

    @wraps(command)
    def joined(**values: Any) -> Any:
        own = {option: values.pop(option) for option in options}
        return command(**values, **{name: join(own)})

    with_options: Command = joined
    for decorate in reversed(list(options.values())):
        with_options = decorate(with_options)
    return with_options


def _setting_option(name: str, default: Any, metadata: Mapping[str, Any]) -> Callable[[Command], Command]:
    """The option of a setting; None if the user does not give it."""
    flag = name.replace("_", "-")
    value = metadata.get("shown", ("yes" if default else "no") if isinstance(default, bool) else default)
    text = metadata["help"] if value == "" else f"{metadata['help']}  [default: {value}]"
    common: dict[str, Any] = {"default": None, "help": text, "group": metadata["group"] or _UNGROUPED}
    if isinstance(default, bool):
        return grouped_option(f"--{flag}/--no-{flag}", name, **common)
    if isinstance(default, str):
        if metadata.get("filled"):
            common["callback"] = _CHECKS[name]
        kind: Any = click.Choice(metadata["choices"]) if "choices" in metadata else click.STRING
        metavar = None
        if metadata.get("several"):
            common |= {"multiple": True, "callback": lambda ctx, parameter, values: ",".join(values) or None}
    else:
        metavar = "N" if isinstance(default, int) else "X"
        kind = (click.IntRange if isinstance(default, int) else click.FloatRange)(
            metadata.get("minimum"), metadata.get("maximum")
        )
    return grouped_option(f"--{flag}", name, type=kind, metavar=metavar, **common)


class OldSpellings(HelpCommand):
    """A command that still takes earlier spellings, an option and its value, and notes the new one."""

    def __init__(self, *arguments: Any, old: Mapping[tuple[str, str], tuple[str, ...]], **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self._old = old

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        new: list[str] = []
        before = ""
        for arg in args[:end]:
            option, equals, value = arg.partition("=")
            old = (option, value) if equals else (before, arg)
            if spelling := self._old.get(old):
                note(f"`{' '.join(old)}` is now spelled `{' '.join(spelling)}`")
                new[len(new) - (not equals) :] = spelling
            else:
                new.append(arg)
            before = "" if spelling else arg
        return super().parse_args(ctx, new + args[end:])


def _pairs(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | Literal["all"] | None:
    """A number of pairs, or "all"."""
    if value is None:
        return None
    if value == "all":
        return "all"
    if not value.isdecimal() or int(value) == 0:
        raise click.BadParameter(f"{value!r}: give a number from 1, or `all`")
    return int(value)


pairs_option = click.option(
    "--pairs",
    callback=_pairs,
    metavar="N|all",
    help="Pairs of a prompt's images: two comparisons each.  [default: two an image]",
)


def check_text(remedy: str, ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Raise an error for an empty text, with the remedy, or one that is no text."""
    if value is None:
        return None
    if not value.strip():
        raise click.BadParameter(f"it is empty; {remedy}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise click.BadParameter("it is not UTF-8 text; check the terminal's encoding")
    return value


check_prompt = partial(check_text, "say what the images were made for")


def check_profile(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Raise an error, before any work, for what is neither a built-in profile nor a TOML file of one."""
    if check_text("give a built-in profile by name, or a TOML file", ctx, parameter, value) is not None:
        from mlxpref.engine.profile import profile_named

        profile_named(str(value))
    return value


_CHECKS = {"criterion": partial(check_text, "say what makes an image the better one"), "profile": check_profile}
"""By the name of a setting that takes no empty text: what checks it."""
CRITERION_ALONE = "with --criterion it may be left out"


@dataclass(frozen=True)
class ImageOptions:
    """The places of images, and their prompts: one for all, or each its own."""

    prompt: str | None = option("--prompt", callback=check_prompt, help="What all images were made for.")
    prompt_from: str | None = option(
        "--prompt-from",
        metavar="sidecar|png|FILE",
        help="Each image's own prompt: a text file or metadata.jsonl next to it, its metadata, or a table (CSV, JSON, "
        "JSONL, parquet) with a column image or file_name, and one of prompt, caption or text; "
        "images are ranked among those of the same prompt.",
    )
    recursive: bool = flag("--recursive", "Search folders within folders too.")

    def check(self, criterion: bool | None = None) -> None:
        """Raise an error for two sources of prompts, and for none unless there is the user's own criterion instead.

        None is a command that takes no criterion.
        """
        if self.prompt is None and self.prompt_from is None and criterion:
            return
        if (self.prompt is None) == (self.prompt_from is None):
            alone = "" if criterion is None else "; with --criterion TEXT both may be left out"
            raise click.UsageError(f"give either --prompt TEXT or --prompt-from sidecar|png|FILE{alone}")


@dataclass(frozen=True)
class GroupOptions:
    """The groups to rank each by itself, besides those of prompts."""

    group_by: Literal["similar"] | None = option(
        "--group-by",
        type=click.Choice(["similar"]),
        help="Rank each group of near-duplicates, such as a burst, by itself; images without any are only listed.",
    )
    similar: int | None = option(
        "--similar",
        type=click.IntRange(0, LARGEST_DISTANCE),
        metavar="N",
        help=f"How far near-duplicates may be apart, 0 to {LARGEST_DISTANCE}: bits of their perceptual hashes.  "
        f"[default: {DISTANCE}]",
    )

    def __post_init__(self) -> None:
        if self.similar is not None and not self.group_by:
            raise click.UsageError("--similar is for --group-by similar")

    @property
    def distance(self) -> int:
        """The most bits by which near-duplicates differ."""
        return DISTANCE if self.similar is None else self.similar


@dataclass(frozen=True)
class DataOptions:
    """The preferences of people to judge."""

    data: str = option("--data", required=True, help=DATA_HELP)
    data_dir: Path | None = option(
        "--data-dir", type=FILE, help="Folder with the files of a public data set, or with the images of a file."
    )
    split: str | None = option(
        "--split", help="Which part of the data.  [default: test; all rows of data without splits]"
    )
    limit: int | None = option("--limit", type=click.IntRange(min=1), help="Judge only this many preferences.")


@dataclass(frozen=True)
class JudgeOptions:
    """The judge, its calibration, and its store."""

    model: str | None = option(
        "--model",
        help="Folder, Hugging Face id, or `demo`.  [default: the adapter's, else $MLXPREF_MODEL, else recommended]",
    )
    adapter: Path | None = option(
        "--adapter", type=FILE, help="Folder of a trained adapter, in the format of mlx-vlm or PEFT."
    )
    any_base: bool = flag("--any-base", "Accept an adapter that was trained on another model.")
    yes: bool = flag("--yes", "Agree to download the recommended judge, or the data.")
    calibration: Path | None = option(
        "--calibration",
        type=FILE,
        help="File of `mlxpref calibrate`.  [default: the judge's own if it was calibrated, for eval none]",
    )
    no_calibration: bool = flag("--no-calibration", "Use no calibration, not even the judge's own.")
    store: Path | None = option(
        "--store",
        type=FILE,
        help="File of finished comparisons, which are not judged again; image features are in FILE.features.  "
        "[default: in the user's cache]",
    )
    no_store: bool = flag("--no-store", "Keep and recall neither comparisons nor image features.")

    def __post_init__(self) -> None:
        if self.calibration and self.no_calibration:
            raise click.UsageError("--calibration and --no-calibration exclude each other")
        if self.store and self.no_store:
            raise click.UsageError("--store and --no-store exclude each other")
