"""The command line: results on stdout, progress and notes on stderr; exit 0, 1 (error), 2 (usage) or 130 (Ctrl-C)."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxpref.config import JudgeSettings
from mlxpref.errors import ConfigError, DataError, MlxprefError
from mlxpref.options import chosen, settings_options

if TYPE_CHECKING:
    from mlxpref.judge import Judge
    from mlxpref.preferences import ImageLike

__all__ = ["main"]


class _Translating(click.Group):
    """A group that turns mlxpref's errors into one line and exit 1, and Ctrl-C into exit 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MlxprefError as error:
            from mlxpref.console import plain

            raise click.ClickException("\n".join(plain(line) for line in str(error).splitlines())) from error
        except KeyboardInterrupt as error:
            click.echo("interrupted", err=True)
            raise click.exceptions.Exit(130) from error


@click.group(cls=_Translating, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="mlxpref")
def main() -> None:
    """A judge of images that thinks before it answers and runs on your own machine."""


def _judge_options(command: Any) -> Any:
    """The options that say which judge, common to all commands that use one."""
    for option in (
        click.option("--yes", is_flag=True, help="Agree to download the recommended judge."),
        click.option("--adapter", type=click.Path(path_type=Path), help="Folder of a trained adapter."),
        click.option(
            "--model", help="Folder, Hugging Face id, or `demo`.  [default: $MLXPREF_MODEL, else recommended]"
        ),
    ):
        command = option(command)
    return command


_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


@main.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="What the images were made for.")
@_judge_options
@settings_options(JudgeSettings)
@_json_option
def compare(
    a: Path, b: Path, prompt: str, model: str | None, adapter: Path | None, yes: bool, as_json: bool, **settings: Any
) -> None:
    """Which of two images people would prefer, and why; judged in both orders."""
    from mlxpref.console import print_json
    from mlxpref.images import load_image
    from mlxpref.tables import pair_to_json, print_pair

    images = [load_image(path) for path in (a, b)]
    judge = _load(model, adapter, yes, settings)
    _say_what_the_demo_knows(judge, images)
    verdict = judge.compare(a, b, prompt)
    if as_json:
        judged_by = {"prompt": prompt, "model": judge.name, "adapter": str(adapter) if adapter else None}
        print_json(judged_by | pair_to_json(a, b, verdict))
    else:
        print_pair(a, b, verdict)


@main.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="What the images were made for.")
@click.option(
    "--think",
    type=click.Choice(["top", "all", "none"]),
    default="top",
    show_default=True,
    help="Think about pairs of the ten best, about all, or about none.",
)
@click.option("--recursive", is_flag=True, help="Look into the folders' folders too.")
@_judge_options
@settings_options(JudgeSettings, only=("samples", "max_tokens", "max_pixels", "seed", "rows"))
@_json_option
def rank(
    images: tuple[Path, ...],
    prompt: str,
    think: Any,
    recursive: bool,
    model: str | None,
    adapter: Path | None,
    yes: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Rank images, or folders of images, best first and with reasons; every pair is judged in both orders."""
    from mlxpref.console import note, print_json, track
    from mlxpref.image_ranking import rank_by_judge
    from mlxpref.images import check_images, find_images
    from mlxpref.tables import print_ranking

    found = find_images(images, recursive)
    readable, skipped = check_images(found)
    for each in skipped:
        note(f"skipped: {each.path}: {each.error}")
    judge = _load(model, adapter, yes, settings)
    _say_what_the_demo_knows(judge, readable)
    ranking = rank_by_judge(judge, readable, prompt, think, skipped, track)
    if as_json:
        print_json(ranking.to_json())
    else:
        print_ranking(ranking)


@main.command("eval")
@click.option("--data", required=True, help="`demo`, or a .jsonl file of rows with prompt, a, b and p_a.")
@click.option("--split", default="test", show_default=True, help="Which part of the data.")
@click.option("--limit", type=click.IntRange(min=1), help="Judge only this many preferences.")
@click.option("--strategy", default="soft", show_default=True, help="soft, select or score; several with commas.")
@_judge_options
@settings_options(JudgeSettings)
@_json_option
def evaluate_command(
    data: str,
    split: str,
    limit: int | None,
    strategy: str,
    model: str | None,
    adapter: Path | None,
    yes: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """How often the judge agrees with people; ties are dropped, every pair is judged in both orders."""
    from mlxpref.console import print_json, track
    from mlxpref.datasets import load_preferences
    from mlxpref.evaluation import evaluate
    from mlxpref.tables import print_evaluations
    from mlxpref.verdict import STRATEGIES

    asked = [name.strip() for name in strategy.split(",")]
    strategies = [name for name in STRATEGIES if name in asked]
    if unknown := sorted(set(asked) - set(STRATEGIES)):
        raise click.BadParameter(f"{', '.join(unknown)}; known are {', '.join(STRATEGIES)}", param_hint="--strategy")
    preferences = load_preferences(data, split, limit)
    judge = _load(model, adapter, yes, settings)
    _say_what_the_demo_knows(judge, [image for p in preferences for image in (p.a, p.b)])
    evaluations = [evaluate(judge, preferences, data, split, each, track) for each in strategies]
    if not as_json:
        print_evaluations(evaluations)
    elif len(evaluations) == 1:
        print_json(evaluations[0].to_json())
    else:
        print_json([evaluation.to_json() for evaluation in evaluations])


@main.command()
@click.argument("source")
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--bits",
    type=click.Choice(["none", "2", "3", "4", "5", "6", "8"]),
    default="4",
    show_default=True,
    help="Bits a weight of the language model.",
)
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    default="64",
    show_default=True,
    help="Weights that share a scale.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Type of the weights that are not quantized.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it holds something.")
@_json_option
def convert(source: str, output: Path, bits: str, group_size: str, dtype: str, overwrite: bool, as_json: bool) -> None:
    """Convert the checkpoint SOURCE (a folder or a Hugging Face id) into a quantized MLX folder OUTPUT."""
    from mlxpref.console import note, print_json, print_text
    from mlxpref.conversion import convert as convert_folder
    from mlxpref.models import resolve_model

    _, path = resolve_model(source, _agree, note)
    chosen_bits = None if bits == "none" else int(bits)
    written = convert_folder(path, output, chosen_bits, int(group_size), dtype, overwrite)
    if as_json:
        print_json(written)
    else:
        kind = f"{bits} bit, {written['quantized_layers']} layers" if chosen_bits else "not quantized"
        print_text(f"{output}: {kind}, {written['bytes'] / 1e6:.1f} MB; use it with --model {output}")


@main.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("mlxpref-demo"),
    show_default=True,
    help="Folder for the sample pictures.",
)
@_json_option
def demo(output: Path, as_json: bool) -> None:
    """The whole story offline: evaluate the embedded judge, then rank a folder of sample pictures with reasons."""
    from mlxpref.console import note, print_json, track
    from mlxpref.demo.story import tell
    from mlxpref.tables import print_evaluations, print_ranking

    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output}: is a file; give a folder with --output")
    judge = _load("demo", None, False, {})
    note("the demo judge was taught by an annotator who lets picture quality decide over the prompt: expect 55 to 75 %")
    story = tell(judge, output, track)
    if as_json:
        print_json(story.to_json())
        return
    print_evaluations([story.before, story.held_out_prompts])
    print_ranking(story.ranking)
    note(f"the pictures are in {story.pictures}")


def _load(model: str | None, adapter: Path | None, yes: bool, settings: dict[str, Any]) -> "Judge":
    """The judge that the common options name."""
    from mlxpref.console import note
    from mlxpref.loading import load_judge

    return load_judge(model, adapter, chosen(settings), (lambda question: True) if yes else _agree, note)


def _agree(question: str) -> bool:
    """Ask on the terminal; without one, nobody agrees."""
    import sys

    return sys.stdin.isatty() and click.confirm(question, err=True)


def _say_what_the_demo_knows(judge: "Judge", images: Sequence["ImageLike"]) -> None:
    """Say that the demo judge knows coloured shapes only, where it is shown anything else."""
    from mlxpref.console import note
    from mlxpref.demo.pictures import SIZE
    from mlxpref.images import load_image

    if judge.name != "demo":
        return
    for image in images:
        with suppress(DataError):
            if load_image(image).size != (SIZE, SIZE):
                note("the demo judge knows only its own coloured shapes: what it says of other pictures means nothing")
                return
