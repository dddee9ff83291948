"""From clicks to a trained judge: a scripted rater answers on the page of `mlxpref label`, the demo judge learns it.

The rater looks at the demo's pictures and prefers what meets more of the brief, then what looks better; some clicks go
wrong. The page is a real one in a headless Chromium, labelling, training and evaluation are the commands that a user
types. The first answers of the same labelling are learned by themselves, too, to see how many are wanted. The judge
thinks: answering at once it would guess, before and after.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import click
import numpy as np
from playwright.sync_api import Page

from mlxpref.cli.output import note, print_json, print_text
from mlxpref.data.label_file import TEST, active_records, record_of
from mlxpref.demo.briefs import Brief, Requirement, draw_brief, prompt_text
from mlxpref.demo.pictures import PictureSpec, render
from mlxpref.demo.preferences import value_of
from scripts.bench_common import looks_for
from scripts.kept_runs import markdown, spread

__all__ = ["Labelled", "Rater", "brief_of", "labelling", "learn", "rate", "rule_of", "write_folder"]

MLXPREF = [sys.executable, "-c", "from mlxpref.cli import main; main()"]
CONFIG = Path(__file__).parent.parent / "mlxpref" / "demo" / "training.toml"
MOST_TOKENS = 80
"""More than the judge writes about a pair."""
KEYS = {"first": "ArrowLeft", "second": "ArrowRight", "tie": "ArrowDown"}
Rule = Callable[[str, str, str], str]
"""From a prompt and the names of both pictures, as they stand, to `first`, `second` or `tie`."""


class Rater(NamedTuple):
    """Somebody who clicks by a rule, and wrongly with some probability."""

    rule: Rule
    errors: float
    random: random.Random

    def choice(self, prompt: str, first: str, second: str) -> str:
        """What this rater presses."""
        right = self.rule(prompt, first, second)
        wrong = {"first": "second", "second": "first"}.get(right, right)
        return wrong if self.random.random() < self.errors else right


def write_folder(folder: Path, prompts: int, images: int, seed: int) -> None:
    """Write the demo's pictures, so many for each of so many prompts, with the prompt in a text file beside each.

    A picture is named after what it shows, so that the rater sees it; the judge is shown pixels only.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(prompts):
        brief = draw_brief(rng)
        for place, look in enumerate(looks_for(brief, images, rng)):
            name = f"{number:02}-{place:02}-{'-'.join(look)}"
            render(look, rng).save(folder / f"{name}.png")
            (folder / f"{name}.txt").write_text(prompt_text(brief), encoding="utf-8")


def rule_of(prompt: str, first: str, second: str) -> str:
    """What the demo's people prefer."""
    values = [value_of(brief_of(prompt), PictureSpec(*Path(name).stem.split("-")[2:])) for name in (first, second)]
    return "tie" if values[0] == values[1] else "first" if values[0] > values[1] else "second"


def brief_of(prompt: str) -> Brief:
    """The brief that a prompt tells."""
    parts = [part.split() for part in prompt.split(", ")]
    return tuple(
        Requirement(words[1], words[-1]) if "like" in words else Requirement(words[2], words[1]) for words in parts
    )


class Labelled(NamedTuple):
    """A running `mlxpref label`: where its page is, its process, and what it said until then."""

    address: str
    process: "subprocess.Popen[str]"
    said: str


@contextmanager
def labelling(folder: Path, output: Path, *options: str) -> Iterator[Labelled]:
    """`mlxpref label` while it runs; it is ended at last."""
    command = [*MLXPREF, "label", str(folder), "--output", str(output), "--no-browser", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if "http://" in line:
                    yield Labelled(line[line.index("http://") :].strip(), process, "".join(lines))
                    break
            else:
                raise RuntimeError("".join(lines))
        finally:
            process.terminate()
            process.wait(30)


def rate(page: Page, rater: Rater, answers: int) -> int:
    """Answer so many questions of an open page by keyboard, or as many as there are; how many it were."""
    asking = page.locator("#asking")
    names, prompts = page.evaluate("[names, prompts]")
    for done in range(answers):
        page.wait_for_selector('#asking[aria-busy="false"]', state="attached")
        number, question, task = page.evaluate("[state.number, state.question, state.task]")
        if question is None:
            return done
        page.keyboard.press(KEYS[rater.choice(prompts[task], *(names[image] for image in question))])
        asking.and_(page.locator(f'[data-number="{number + 1}"][aria-busy="false"]')).wait_for(state="attached")
    return answers


def _run(*arguments: str) -> Any:
    done = subprocess.run([*MLXPREF, *arguments, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"mlxpref {' '.join(arguments)}: {done.stderr}")
    return json.loads(done.stdout)


def measure(data: str, think: str, adapter: Path | None = None) -> Any:
    """What `mlxpref eval` prints of the demo judge, with an adapter or without; None where nothing is held out."""
    judged = ("--model", "demo", "--max-tokens", str(MOST_TOKENS), "--no-store", think)
    if data != "demo":
        lines = map(json.loads, Path(data).read_text(encoding="utf-8").splitlines())
        decided = [record for record in active_records(map(record_of, lines)) if record.p_people not in (None, 0.5)]
        if not any(record.split == TEST for record in decided):
            return None
    return _run("eval", "--data", data, *judged, *(("--adapter", str(adapter)) if adapter else ()))


def learn(file: Path, folder: Path, think: str, *options: str) -> dict[str, Any]:
    """Train the demo judge with a file of answers, and measure it before and after: with what the file holds out, and
    on pictures of others."""
    started = time.perf_counter()
    given = ("--data", str(file), "--limit", "0", "--output", str(folder))
    _run("train", "--config", str(CONFIG), *given, think, *options)
    seconds = time.perf_counter() - started
    return {
        "before": measure(str(file), think),
        "after": measure(str(file), think, folder),
        "others": measure("demo", think, folder),
        "seconds": seconds,
    }


def _first_lines(file: Path, count: int) -> Path:
    part = file.with_name(f"{count}.jsonl")
    part.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:count]), encoding="utf-8")
    return part


def _shown(found: dict[str, Any], name: str) -> str:
    one = found[name]
    if one is None:
        return ""
    return f"{one['accuracy']:.3f} ({one['accuracy_low']:.3f} to {one['accuracy_high']:.3f}) of {one['pairs']}"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    middle, low, high = spread(values)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


@click.command()
@click.option("--answers", multiple=True, type=int, default=(12, 25, 50, 100, 200), show_default=True)
@click.option("--seeds", type=int, default=3, show_default=True)
@click.option("--errors", type=float, default=0.05, show_default=True, help="Share of the clicks that go wrong.")
@click.option("--think/--no-think", default=True, show_default=True, help="Train and measure with reasoning.")
@click.option("--json", "as_json", is_flag=True)
def main(answers: Sequence[int], seeds: int, errors: float, think: bool, as_json: bool) -> None:
    """Label, train and measure, once for each seed."""
    from tests.browser import Browser, find_browser

    executable = find_browser()
    if executable is None:
        raise click.ClickException("no Chromium or Chrome is installed; install one")
    flag = "--think" if think else "--no-think"
    rows: list[dict[str, Any]] = []
    before = measure("demo", flag)
    browser = Browser(executable)
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_folder(folder / "pictures", 12, 10, seed)
            file = folder / "preferences.jsonl"
            with labelling(folder / "pictures", file, "--prompt-from", "sidecar", "--seed", str(seed)) as (
                address,
                _,
                _,
            ):
                page = browser.new_page()
                page.goto(address)
                rater = Rater(rule_of, errors, random.Random(seed))
                started = time.perf_counter()
                done = rate(page, rater, max(answers))
                note(f"seed {seed}: {done} answers clicked in {time.perf_counter() - started:.0f} s")
                note(page.inner_text("#why"))
                page.context.close()
            for count in answers:
                options = (flag, "--steps", "30", "--seed", str(seed))
                rows.append(
                    {"answers": count, "seed": seed, **learn(_first_lines(file, count), folder / str(count), *options)}
                )
                note(f"seed {seed}, {count} answers: {_shown(rows[-1], 'others')} on pictures of others")
    browser.close()
    if as_json:
        print_json({"others before": before, "runs": rows})
        return
    columns = ("answers", "held-out pairs", "before", "after", "other pictures, before", "after", "seconds")
    lines = []
    for count in answers:
        runs = [row for row in rows if row["answers"] == count]
        measured = [row for row in runs if row["after"]]
        counts = sorted(row["after"]["pairs"] for row in measured)
        pairs = f"{counts[0]} to {counts[-1]}" if counts else "none"
        shares = [_spread([row[name]["accuracy"] for row in measured]) for name in ("before", "after")]
        others = _spread([row["others"]["accuracy"] for row in runs])
        seconds = f"{mean(row['seconds'] for row in runs):.0f}"
        lines.append((str(count), pairs, *shares, f"{before['accuracy']:.3f}", others, seconds))
    for line in markdown(columns, lines).splitlines():
        print_text(line)


if __name__ == "__main__":
    main()
