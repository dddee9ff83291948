"""Damaged and hostile checkpoints and adapters, made by chance, through the full path of `convert` and `load_adapter`.

    python scripts/fuzz_conversion.py --cases 10000 --seed 1 --workers 1

Each case either works or raises one MlxprefError of one line that names the folder; it leaves nothing beside its
output, its source unchanged, and the process alive within its memory. Counts by outcome are printed as JSON; a
violation makes the exit status 1. Cases run in processes of their own, so that one that dies is seen.
"""

import argparse
import contextlib
import gc
import io
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import mlxpref  # noqa: F401  # isort: skip  opens the fast BLAS before anything imports MLX

from mlxpref.errors import MlxprefError
from scripts.damage import ADAPTER_DAMAGE, CHECKPOINT_DAMAGE, Damage

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")
RECIPES = ("none", "4", "8", "mixed_4_8", "mxfp4")
SERVED = 500
"""Cases of one process: each load of a model by mlx-vlm keeps a quarter of a megabyte (measured without ours, too)."""
MEMORY = 600 << 20
"""How far the peak of resident memory may rise over that of three sound conversions, in bytes."""
_KIND = re.compile(r": ([A-Z]\w*(?:Error|Exception))\b")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--part", type=int, nargs=2, metavar=("FIRST", "STEP"), help="run these cases here")
    options = parser.parse_args()
    if options.part:
        run_part(options.cases, options.seed, *options.part)
        return 0
    with ThreadPoolExecutor(options.workers) as pool:
        parts = pool.map(partial(watch, options.cases, options.seed, options.workers), range(options.workers))
        found = [row for part in parts for row in part]
    counts = Counter(row["outcome"] for row in found)
    violations = [row for row in found if row["violation"]]
    print(
        json.dumps(
            {
                "cases": len(found),
                "seed": options.seed,
                "outcomes": dict(counts.most_common()),
                "peak_mb": max((row["peak_mb"] for row in found), default=0),
                "violations": len(violations),
                "first_violations": violations[:40],
            },
            indent=2,
        )
    )
    return 1 if violations or len(found) != options.cases else 0


def watch(cases: int, seed: int, workers: int, first: int) -> list[dict[str, Any]]:
    """The outcomes of a worker's cases; a process that dies is a violation of the case that it was at."""
    found: list[dict[str, Any]] = []
    while first < cases:
        command = [sys.executable, str(Path(__file__)), "--cases", str(cases), "--seed", str(seed)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            [*command, "--part", str(first), str(workers)], stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stdout
            for line in process.stdout:
                found.append(json.loads(line))
                first = found[-1]["case"] + workers
                if found[-1]["violation"]:
                    print(line.strip(), file=sys.stderr, flush=True)
        if process.returncode:
            died = {"case": first, "outcome": "died", "violation": f"exit status {process.returncode}", "peak_mb": 0}
            print(died, file=sys.stderr, flush=True)
            found.append(died)
            first += workers
    return found


def run_part(cases: int, seed: int, first: int, step: int) -> None:
    """Run every `step`th case from `first` and print a line of JSON for each."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    lines = sys.stdout
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        for family in FAMILIES:
            convert_case(Path(place) / family, Random(0), family, [])
        allowed = peak() + MEMORY
        for case in range(first, cases, step)[:SERVED]:
            folder = Path(place) / str(case)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                outcome, violation = run_case(folder, Random(f"{seed} {case}"))
            gc.collect()  # models hold themselves
            shutil.rmtree(folder)
            if peak() > allowed:
                violation = violation or f"memory rose to {peak() >> 20} MB"
                allowed = peak()
            row = {"case": case, "outcome": outcome, "violation": violation, "peak_mb": peak() >> 20}
            print(json.dumps(row), file=lines, flush=True)


def peak() -> int:
    """The most resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run_case(place: Path, rng: Random) -> tuple[str, str | None]:
    """One case of the full path in a new folder: its outcome, and what is wrong with it."""
    family = rng.choice(FAMILIES)
    if rng.random() < 0.25:
        return adapter_case(place, rng, family)
    return convert_case(place, rng, family, rng.choices(CHECKPOINT_DAMAGE, k=rng.choice((1, 1, 1, 2))))


def convert_case(place: Path, rng: Random, family: str, damages: list[Damage]) -> tuple[str, str | None]:
    """Convert a damaged copy of a tiny checkpoint."""
    from mlxpref.conversion.convert import convert
    from mlxpref.conversion.quantize import Recipe

    source, output = place / "source", place / "output"
    copy_checkpoint(family, source)
    for damage in damages:
        damage(source, rng)
    before = contents(source)
    recipe = Recipe.named(rng.choice(RECIPES), 32)
    requantize = rng.random() < 0.5
    outcome, violation = attempt("convert", lambda: convert(source, output, recipe, requantize=requantize), place)
    left = {file.name for file in place.iterdir()} - {"source"}
    if left != ({"output"} if outcome == "convert: made" else set()):
        violation = violation or f"left behind: {sorted(left)}"
    if contents(source) != before:
        violation = violation or "the source was changed"
    names = "+".join(damage.__name__ for damage in damages)
    return outcome, f"{family} {names}: {violation}" if violation else None


def adapter_case(place: Path, rng: Random, family: str) -> tuple[str, str | None]:
    """Put a damaged adapter on a tiny model, which one that is refused leaves as it was."""
    from mlxpref.engine.adapters import load_adapter
    from scripts.damage import write_adapter, write_peft

    model = _model(family)
    peft = rng.random() < 0.5
    folder = place / "adapter"
    (write_peft if peft else write_adapter)(folder, _layers(family))
    damage = rng.choice(ADAPTER_DAMAGE)
    damage(folder, rng)
    before, names = contents(folder), parameters(model)
    kind = "PEFT adapter" if peft else "adapter"
    outcome, violation = attempt(kind, lambda: load_adapter(model, folder), place)
    if outcome.endswith("made"):
        _MODELS.pop(family)
    elif parameters(model) != names:
        violation = violation or "a refused adapter changed the model"
    if contents(folder) != before:
        violation = violation or "the adapter's folder was changed"
    return outcome, f"{family} {damage.__name__}: {violation}" if violation else None


def parameters(model: Any) -> list[str]:
    """The names of a model's parameters."""
    from mlx.utils import tree_flatten

    return list(dict(tree_flatten(model.parameters())))


def attempt(kind: str, work: Callable[[], Any], place: Path) -> tuple[str, str | None]:
    """Run one case; returns its outcome, and what is wrong with an error that it raised."""
    try:
        work()
    except MlxprefError as error:
        text = str(error)
        known = _KIND.search(text.replace(str(place), ""))
        outcome = f"{kind}: refused{f', naming {known[1]}' if known else ''}"
        if len(text.splitlines()) != 1 or len(text) > 2000 or not text.isprintable():
            return outcome, f"not one clear line: {text[:500]!r}"
        if str(place) not in text:
            return outcome, f"names no folder: {text[:500]!r}"
        return outcome, None
    except BaseException as error:
        return f"{kind}: {type(error).__name__}", f"{type(error).__name__}: {error!s:.500}"
    return f"{kind}: made", None


def copy_checkpoint(family: str, folder: Path) -> None:
    """A tiny checkpoint as links: damage replaces files, it never writes into them."""
    folder.mkdir(parents=True)
    for file in (GOLDEN / family).iterdir():
        if file.suffix != ".npz":
            (folder / file.name).symlink_to(file)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file of a folder."""
    return {str(file.relative_to(folder)): _bytes(file) for file in _files(folder)}


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if not file.is_dir())


def _bytes(file: Path) -> bytes | None:
    with contextlib.suppress(OSError):
        return file.read_bytes()
    return None


_MODELS: dict[str, Any] = {}


def _model(family: str) -> Any:
    from mlxpref.engine.vlm import load_vlm

    if family not in _MODELS:
        _MODELS[family] = load_vlm(GOLDEN / family, 512 * 512).model
    return _MODELS[family]


def _layers(family: str) -> dict[str, tuple[int, int]]:
    from mlxpref.engine.lora import linear_layers

    return {name: tuple(layer.weight.shape) for name, layer in linear_layers(_model(family)).items()}


if __name__ == "__main__":
    sys.exit(main())
