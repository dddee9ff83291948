"""A judge of real size without its weights, on this device: `python -m scripts.rehearsal [--shape 2b] [--bits 4]`.

The first thing to run on a new Mac or GPU, as nothing is downloaded. A checkpoint of a real model's shapes with random
weights is made, converted, loaded, asked, trained for a step, and ranks pictures, all by what `mlxpref` itself runs.
Its answers mean nothing. The vocabulary has the real number of words, but most are placeholders, as a whole real
tokenizer cannot be had without a download (`scripts.rehearsal_shapes`).

A line has the peak that was planned, the one that MLX measured, weights included, and on Linux that of the process's
resident memory, which holds Python and its libraries, too. What is planned above the device's working set is left out.
No completion ends by itself, so all `--tokens` are written, and a few blanks where an answer should be. Seconds and
MLX's peaks of training and ranking leave out loading.

Tokens a second and the share are of writing: of the bytes that a step must move at least (weights, keys and values,
recurrent states), at the rate at which a copy moves bytes here. When comparing, the seconds of reading the same pair
are taken off; a training's rollouts count with their pictures and prompts. On a CPU the share may be above 100 %, as
one thread copies, while all cores read weights.

On CUDA, MLX compiles its kernels when they are first used, within what is measured; it keeps them in
$MLX_PTX_CACHE_DIR. So run it twice on a new machine.
"""

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

from mlxpref._blas import preload

preload()  # before MLX is first imported

import click  # noqa: E402
import mlx.core as mx  # noqa: E402
from PIL import Image  # noqa: E402

from mlxpref.checkpoints.checkpoint import Checkpoint  # noqa: E402
from mlxpref.checkpoints.memory import model_size  # noqa: E402
from mlxpref.checkpoints.recommended import device_working_set  # noqa: E402
from mlxpref.cli.common import exit_on_sigterm  # noqa: E402
from mlxpref.cli.output import note, print_json, print_table, print_text, show_on_stderr  # noqa: E402
from mlxpref.config import JudgeSettings  # noqa: E402
from mlxpref.conversion.convert import convert  # noqa: E402
from mlxpref.conversion.quantize import Recipe  # noqa: E402
from mlxpref.data.inputs import preferences_from  # noqa: E402
from mlxpref.engine.adapters import ADAPTER_WEIGHTS  # noqa: E402
from mlxpref.engine.vlm import VLM  # noqa: E402
from mlxpref.errors import ModelError  # noqa: E402
from mlxpref.judge.judge import Judge  # noqa: E402
from mlxpref.judge.loading import load_judge  # noqa: E402
from mlxpref.preferences import Preference  # noqa: E402
from mlxpref.text import format_bytes, one_line  # noqa: E402
from mlxpref.training.run import start_run  # noqa: E402
from scripts.bench_common import TEXT, environment, pictures  # noqa: E402
from scripts.bench_decode import Case, bandwidth, step_bytes  # noqa: E402
from scripts.bench_models import make_endless  # noqa: E402
from scripts.conversion_memory import forget_peak, memory  # noqa: E402
from scripts.memory_check import REWARD  # noqa: E402
from scripts.rehearsal_plans import SHARD, Plans, Sizes, converting, making  # noqa: E402
from scripts.rehearsal_shapes import SHAPES, Shape  # noqa: E402

__all__ = ["PHASES", "Rehearsal"]

Numbers = dict[str, float]
PHASES = (
    "make checkpoint", "convert", "load", "encode 8 pictures", "compare, reading", "compare, thinking",
    "training step, thinking", "training step, reading", "rank 8 pictures, reading",
)  # fmt: skip
_PICTURES = 8


@dataclass
class Rehearsal:
    """The phases of a judge in a folder, and what was found, a line for each; `rate` are the bytes a second of a copy.

    The checkpoint is removed once it is converted, unless it `is_kept`.
    """

    shape: Shape
    recipe: Recipe
    sizes: Sizes
    folder: Path
    rate: float
    is_kept: bool = False
    lines: list[dict[str, Any]] = field(default_factory=list)
    loaded: Judge | None = None

    def __post_init__(self) -> None:
        self.source, self.converted = self.folder / "source", self.folder / "judge"

    def run(self) -> None:
        """Go through all phases."""
        make, turn, load, encode, read, compare, think, learn, rank = PHASES
        self.phase(make, lambda: making(self.shape), self._make)
        self.phase(turn, lambda: converting(self.source, self.recipe, self.sizes), self._convert)
        self.phase(load, lambda: self._plans.loading(self.recipe), self._load)
        self.phase(encode, lambda: self._plans.judging(False, _PICTURES, "vision"), self._encode)
        self.phase(read, lambda: self._plans.judging(False, 2), self._read)
        self.phase(compare, lambda: self._plans.judging(True, 2), self._compare)
        self.loaded = None
        self.phase(think, lambda: self._plans.training(True), lambda: self._train(True))
        self.phase(learn, lambda: self._plans.training(False), lambda: self._train(False))
        self.phase(rank, lambda: self._plans.judging(False, _PICTURES), self._rank)

    def phase(self, name: str, plan: Callable[[], int], work: Callable[[], Numbers]) -> None:
        """Measure work whose planned peak fits; whatever fails, the next phase may work."""
        note(name)
        line = {"phase": name} | _tried(plan, work)
        self.lines.append(line)
        note("  ".join(filter(None, [*_row(line), _missing(line)])))

    @property
    def _plans(self) -> Plans:
        return Plans(self.sizes, model_size(Checkpoint.open(self.converted)))

    @property
    def _pictures(self) -> list[Image.Image]:
        return pictures(_PICTURES, self.sizes.side, 0)

    @property
    def _judge(self) -> Judge:
        if self.loaded is None:
            raise ModelError("no judge is loaded")
        return self.loaded

    def _make(self) -> Numbers:
        self.shape.write(self.source)
        return {}

    def _convert(self) -> Numbers:
        convert(self.source, self.converted, self.recipe, shard_size=SHARD)
        if not self.is_kept:
            rmtree(self.source)
        return {}

    def _load(self) -> Numbers:
        self.loaded = self._judge_of(True)
        return {}

    def _judge_of(self, think: bool, adapter: Path | None = None) -> Judge:
        judge = load_judge(str(self.converted), adapter, self.sizes.judging(think), images=_PICTURES)
        _make_endless(judge.vlm)
        return judge

    def _encode(self) -> Numbers:
        self._judge.vlm.features.get_all(self._pictures)
        return {}

    def _read(self) -> Numbers:
        _, seconds = self._asked(False)
        return {"seconds": seconds}

    def _compare(self) -> Numbers:
        _, reading = self._asked(False)  # again, as the first time prepared what stays
        tokens, seconds = self._asked(True)
        writing = seconds - reading if seconds > reading else seconds
        return {"seconds": seconds} | self._speed(self._judge.vlm, Case(2, 2), tokens, writing)

    def _asked(self, think: bool) -> tuple[int, float]:
        """The tokens and the seconds of a pair in both orders."""
        first, second, *_ = self._pictures
        judge = replace(self._judge, settings=JudgeSettings(**self.sizes.judging(think)))
        started = time.perf_counter()
        verdict = judge.compare(first, second, TEXT)
        return sum(each.tokens for each in verdict.verdicts), time.perf_counter() - started

    def _speed(self, vlm: VLM, case: Case, tokens: int, seconds: float) -> Numbers:
        """The speed of writing so many tokens in all rows of a case."""
        first, second, *_ = self._pictures
        prompt = len(vlm.input(first, second, TEXT, "choice", think=True))
        least = step_bytes(vlm.model, case, prompt, self.sizes.tokens) * tokens / case.rows
        return {"tokens": tokens, "tokens_per_s": tokens / seconds, "share": least / seconds / self.rate}

    def _run(self, think: bool) -> Path:
        return self.folder / ("thinking" if think else "reading")

    def _train(self, think: bool) -> Numbers:
        count = self.sizes.comparisons
        shown = pictures(2 * count, self.sizes.side, 1)
        pairs = [Preference(TEXT, a, b, 1.0) for a, b in zip(shown[::2], shown[1::2], strict=True)]
        data, preferences = preferences_from(pairs, None)
        settings = replace(self.sizes.training(think), data=data, model=str(self.converted))
        if think:  # without answers all completions would be worth the same, and teach nothing
            file = self.folder / "reward.py"
            file.write_text(REWARD, encoding="utf-8")
            settings = replace(settings, reward=f"soft=1,{file}:reward=1")
        run = start_run(settings, self._run(think), preferences=preferences)
        _make_endless(run.trainer.vlm)
        (report,) = run.reports()
        found: Numbers = {"seconds": report.seconds, "peak_bytes": report.peak_bytes}
        if report.tokens:
            together = max(1, min(count, run.trainer.settings.rows // settings.group))
            case = Case(together * settings.group, together)
            found |= self._speed(run.trainer.vlm, case, report.tokens, report.rollout_seconds)
        return found

    def _rank(self) -> Numbers:
        """Rank with the adapter that learned to think, if there is one."""
        adapter = self._run(True)
        judge = self._judge_of(False, adapter if (adapter / ADAPTER_WEIGHTS).is_file() else None)
        mx.reset_peak_memory()
        started = time.perf_counter()
        ranking = judge.rank(self._pictures, TEXT)
        return {"seconds": time.perf_counter() - started, "comparisons": ranking.comparisons}


def _tried(plan: Callable[[], int], work: Callable[[], Numbers]) -> dict[str, Any]:
    """What is measured of some work, or why it is not."""
    try:
        planned = plan()
    except Exception as error:  # the phase that this one builds on is missing
        return {"left_out": one_line(error)}
    line: dict[str, Any] = {"planned_bytes": planned}
    if planned > (limit := device_working_set()):
        needs = f"needs about {format_bytes(planned)}, this device recommends at most {format_bytes(limit)}"
        return line | {"left_out": needs}
    try:
        return line | _measured(work)
    except Exception as error:
        return line | {"error": one_line(error)}


def _measured(work: Callable[[], Numbers]) -> dict[str, Any]:
    """The seconds of some work and its peaks of memory, or the numbers that it returns in their place."""
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    resident = None
    with suppress(OSError):  # only Linux counts it
        forget_peak()
    started = time.perf_counter()
    found = work()
    seconds = time.perf_counter() - started
    with suppress(OSError):
        resident = memory("VmHWM")
    return {"seconds": seconds, "peak_bytes": int(mx.get_peak_memory()), "resident_bytes": resident} | found


def _make_endless(vlm: VLM) -> None:
    """Let completions end only where they are cut, without a warning that they say nothing."""
    make_endless(vlm)
    vlm.is_unreadable = True


def _row(line: Mapping[str, Any]) -> list[str]:
    """The cells of a line; blank where nothing was found."""
    sizes = [line.get(f"{name}_bytes") for name in ("planned", "peak", "resident")]
    seconds = f"{line['seconds']:.1f}" if "seconds" in line else ""
    speed = [""] * 3
    if "share" in line:
        speed = [str(line["tokens"]), f"{line['tokens_per_s']:.1f}", f"{100 * line['share']:.1f}"]
    return [line["phase"], seconds, *(format_bytes(size) if size else "" for size in sizes), *speed]


def _missing(line: Mapping[str, Any]) -> str:
    """Why nothing was measured; empty where something was."""
    said = {"left_out": "left out", "error": "failed"}
    return "".join(f"{words}: {line[name]}" for name, words in said.items() if name in line)


def _print(rehearsal: Rehearsal) -> None:
    """Print the table, and below it what is missing there."""
    columns = ("phase", ">seconds", ">planned", ">peak", ">resident", ">tokens", ">tokens/s", ">share %")
    print_table(columns, [_row(line) for line in rehearsal.lines])
    print_text(f"share: of {rehearsal.rate / 1e9:.1f} GB/s of a copy")
    for line in rehearsal.lines:
        if missing := _missing(line):
            print_text(f"{line['phase']}: {missing}")


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="2b", show_default=True, help="Whose sizes.")
@click.option(
    "--bits", type=click.Choice(["none", "4", "8"]), help="Bits a weight.  [default: 4, on a CPU none, as it is slow]"
)
@click.option(
    "--pixels",
    default=Sizes.side,
    type=click.IntRange(28),
    show_default=True,
    help="Pixels along the sides of pictures.",
)
@click.option(
    "--tokens", default=Sizes.tokens, type=click.IntRange(1), show_default=True, help="Tokens of a completion."
)
@click.option(
    "--comparisons",
    default=Sizes.comparisons,
    type=click.IntRange(1),
    show_default=True,
    help="Comparisons of a training step.",
)
@click.option("--group", default=Sizes.group, type=click.IntRange(2), show_default=True, help="Completions of each.")
@click.option("--output", type=click.Path(path_type=Path), help="Where models and runs stay; else nothing does.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    shape: str,
    bits: str | None,
    pixels: int,
    tokens: int,
    comparisons: int,
    group: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Rehearse a judge of real size with random weights on this device."""
    bits = bits or ("none" if mx.default_device().type == mx.DeviceType.cpu else "4")
    if output and output.exists() and any(output.iterdir()):
        raise click.UsageError(f"{output}: is not empty; give another --output")
    sizes = Sizes(pixels, tokens, comparisons, group)
    with exit_on_sigterm(), TemporaryDirectory(prefix="mlxpref-rehearsal-") as place, show_on_stderr():
        folder, is_kept = output or Path(place), output is not None
        rehearsal = Rehearsal(SHAPES[shape], Recipe.named(bits), sizes, folder, bandwidth(), is_kept)
        rehearsal.run()
    if as_json:
        found = {"copy_bytes_per_s": rehearsal.rate, "phases": rehearsal.lines}
        print_json({"rehearsal": {"shape": shape, "bits": bits, **vars(sizes)}, **environment(), **found})
    else:
        _print(rehearsal)
    if any("error" in line for line in rehearsal.lines):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
