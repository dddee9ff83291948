"""What a second process gives: `python -m scripts.bench_machines`, a training of the demo judge by one and by two.

Each process has one BLAS thread, so two of them on two cores are as two machines, but for what they share: caches,
memory, and whoever else is at work. So a third case tells what the cores give at best: the same training twice at the
same time, each by one process alone. `share of ideal` is what a step takes if nothing is lost, over what it took.

What Macs would give was not measured: it is computed from the bytes that a step sends. The gradient is sent as it is
here, so its bytes are those of a 7B judge's adapter; everything else grows with the tokens that are written. A link is
taken to carry half of what it is sold for. What is left out: that shares of a step end at different times.
"""

import json
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import click

from mlxpref.cli.output import note
from scripts.bench_common import report
from scripts.memory_table import in_bits
from scripts.several import start, wait

ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
SETTINGS: dict[str, Any] = {"comparisons": 8, "group": 8, "max_tokens": 48, "learning_rate": 5e-4, "limit": 96}
LINKS = {"10 GbE": 10e9, "Thunderbolt 4": 40e9, "Thunderbolt 5": 80e9}
"""Bits a second that a link is sold for."""
CARRIED = 0.5
RANK, ROLLOUTS, TOKENS = 16, 64, 256
"""A step of a real judge by the defaults."""
STEP_SECONDS = (30, 120)
"""What a step may take one Mac: not known, so two guesses."""
COLUMNS = ("seconds", "rollout_seconds", "update_seconds", "wait_seconds", "sent_bytes", "tokens")

Line = dict[str, Any]
"""A line of log.jsonl."""


def train(processes: int, steps: int, folder: Path) -> list[Any]:
    """Begin a training by so many processes."""
    folder.mkdir(parents=True)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    command = [sys.executable, "-c", "from mlxpref.cli import main; main()", "train", "--data=demo", "--model=demo"]
    return start(processes, [*command, *options, f"--steps={steps}", f"--output={folder}/run"], folder, ONE_THREAD)


def log_of(begun: list[Any], folder: Path) -> list[Line]:
    """Wait for a training, and read its log but for the first step."""
    codes = wait(begun, 3600)
    if any(codes):
        raise click.ClickException(f"exit codes {codes}: {(folder / 'err.0').read_text()}")
    return [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()][1:]


def a_round(steps: int) -> dict[str, list[Line]]:
    """The steps of every case, once."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        one = log_of(train(1, steps, folder / "one"), folder / "one")
        twins = [(train(1, steps, folder / name), folder / name) for name in ("first", "second")]
        apart, _ = [log_of(*twin) for twin in twins]
        two = log_of(train(2, steps, folder / "two"), folder / "two")
    return {"one process": one, "two, each alone": apart, "two together": two}


def measured(rounds: list[dict[str, list[Line]]]) -> list[dict[str, Any]]:
    """Means over the steps, each as it was in the round where it took the least time: the others were disturbed."""
    cases: list[dict[str, Any]] = []
    for name in rounds[0]:
        steps = [min(tries, key=lambda line: line["seconds"]) for tries in zip(*(r[name] for r in rounds), strict=True)]
        case: dict[str, Any] = {"case": name} | {key: mean(line[key] for line in steps) for key in COLUMNS}
        ideal = (cases[0] if cases else case)["seconds"] / (2 if name == "two together" else 1)
        cases.append(case | {"share_of_ideal": ideal / case["seconds"]})
    return cases


def gradient_bytes() -> int:
    """What each of two processes sends of the demo judge's gradient: once its size."""
    import mlxpref
    from mlxpref.engine.lora import adapter_weights, attach_lora, lora_targets

    model = mlxpref.load("demo").vlm.model
    attach_lora(model, lora_targets(model), RANK, 2.0)
    return 4 * sum(weight.size for weight in adapter_weights(model).values())


def on_paper(rest: float) -> list[dict[str, Any]]:
    """What Macs would give at 7B, by link and number; `rest` are the bytes a token that are no gradient."""
    gradient = in_bits("Qwen2.5-VL-7B", None).adapter(RANK)
    rows = []
    for link, bits in LINKS.items():
        for macs in (2, 3, 4):
            # A ring: each sends its part of the sum on, twice; and what the others say passes through as well.
            sent = 2 * gradient * (macs - 1) / macs + rest * ROLLOUTS * TOKENS * (macs - 1) / macs
            exchange = sent * 8 / (bits * CARRIED)
            shares = [step / macs / (step / macs + exchange) for step in STEP_SECONDS]
            rows.append({"link": link, "macs": macs, "sent_bytes": sent, "exchange_s": exchange, "shares": shares})
    return rows


@click.command()
@click.option("--steps", default=9, show_default=True, help="Steps of a training; the first one is not counted.")
@click.option("--repeats", default=5, show_default=True, help="Rounds.")
@click.option("--quick", is_flag=True, help="One round of three steps, to see that it runs.")
def main(steps: int, repeats: int, quick: bool) -> None:
    """Measure trainings by one process and by two, and compute what Macs would give."""
    steps, repeats = (3, 1) if quick else (steps, repeats)
    rounds = []
    for number in range(1, repeats + 1):
        note(f"round {number} of {repeats}")
        rounds.append(a_round(steps))
    cases = measured(rounds)
    seconds = ("seconds", "rollout_seconds", "update_seconds", "wait_seconds")
    rows = [
        [
            case["case"],
            *(f"{case[key]:.2f} s" for key in seconds),
            f"{case['sent_bytes'] / 1e6:.2f} MB",
            f"{case['share_of_ideal']:.0%}",
        ]
        for case in cases
    ]
    gradient, together = gradient_bytes(), cases[-1]
    # Of two processes each tells the other about half of the tokens.
    rest = 2 * (together["sent_bytes"] - gradient) / together["tokens"]
    paper = on_paper(rest)
    remarks = [f"each of two sends {gradient / 1e6:.2f} MB of gradient, and {rest:.0f} bytes for a token that it wrote"]
    for row in paper:
        shares = (f"{s:.1%} of ideal at {t} s a step of one" for s, t in zip(row["shares"], STEP_SECONDS, strict=True))
        sent = f"{row['sent_bytes'] / 1e6:.0f} MB in {row['exchange_s']:.2f} s a step"
        remarks.append(f"7B, {row['macs']} Macs, {row['link']}: {sent}; {', '.join(shares)}")
    columns = ["case", ">step", ">rollouts", ">update", ">in exchanges", ">sent a step", ">share of ideal"]
    settings = SETTINGS | {"steps": steps, "repeats": repeats, "link_carries": CARRIED}
    report("machines", settings, [*cases, *paper], (columns, rows), remarks)


if __name__ == "__main__":
    main()
