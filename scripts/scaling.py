"""Cost against work, as curves: `python -m scripts.scaling [--only grpo|rank|convert] [--small]`.

A step of GRPO against its group, prompt, completion and comparisons, a ranking against its images, a conversion
against its size; each beside the bound by counts (`scripts/scaling_bounds.py`), at the rates that this machine reaches
in the same run, and beside mlx-vlm where that can run. `--json` and `--plot` name the files that it writes, by default
`scaling.json` and `scaling.png` beside this one; `--small` needs others. `--table` prints the tables from the file and
draws it anew.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxpref._blas import preload

preload()  # before MLX is first imported

import click  # noqa: E402

from mlxpref.cli.output import print_text  # noqa: E402
from mlxpref.files import write_file  # noqa: E402
from mlxpref.report.curves import COLOURS  # noqa: E402
from mlxpref.report.drawing import drawing  # noqa: E402
from scripts.bench_common import environment  # noqa: E402
from scripts.kept_runs import markdown  # noqa: E402
from scripts.scaling_grpo import LARGE, PHASES, SMALL, grpo_points  # noqa: E402
from scripts.scaling_others import convert_points, rank_points  # noqa: E402

PARTS = ("grpo", "rank", "convert")
Found = Mapping[str, Any]
_JSON, _PLOT = (Path(__file__).with_name(f"scaling.{kind}") for kind in ("json", "png"))
_LEAST = 1e-3
"""Seconds outside the model below which nothing is drawn."""
_OURS, _BOUND, _NAMED, _PEER = "measured", "bound", "bound, exponentials, operations", "mlx-vlm"
_PLANNED, _ROLLOUT = "planned", "peak of the rollout"
_STYLES: dict[str, Any] = {
    _OURS: {"color": COLOURS[0], "marker": "o"},
    _BOUND: {"color": COLOURS[1]},
    _NAMED: {"color": COLOURS[1], "linestyle": ":"},
    _PEER: {"color": COLOURS[2], "marker": "s", "linestyle": "--"},
    _PLANNED: {"color": COLOURS[3]},
    _ROLLOUT: {"color": COLOURS[4], "marker": "."},
}
_AXES = {"group": "completions of a prompt", "prompt": "tokens of a prompt", "tokens": "tokens of a completion",
         "comparisons": "comparisons of a step"}  # fmt: skip


def measure(part: str, small: bool) -> Any:
    """One part of the page."""
    sizes = SMALL if small else LARGE
    if part == "grpo":
        return grpo_points(sizes)
    if part == "rank":
        images, simulated = ((4, 8), (16, 32)) if small else ((16, 32, 64, 128), (16, 60, 250, 500, 2000))
        return rank_points(sizes.model, 3 if small else 6, images, simulated)
    return convert_points(*(((0.05,), ("4",)) if small else ((0.1, 0.5, 2.0), ("none", "4"))))


def grpo_table(points: Sequence[Found]) -> str:
    """A line for each point: seconds over the bound by phase, what has a name of the step, and peaks."""
    columns = ("group", "prompt", "completion", "comparisons", "micro-batch", "step", "over its bound", *PHASES,
               "exponentials", "operations", "no name", "peak", "planned", "mlx-vlm", "its peak")  # fmt: skip
    rows = []
    for point in points:
        step, peer = point["step"], point.get("peer")
        shares = [step[name] / step["seconds"] for name in ("bound_s", "exponentials_s", "operations_s")]
        batch = f"{point['micro_batch']}" + ("" if point["recompute"] else ", kept")
        rows.append(
            [
                *(f"{point[key]}" for key in ("group", "prompt", "tokens", "comparisons")),
                batch,
                f"{step['seconds']:.2f} s",
                f"{step['seconds'] / step['bound_s']:.2f}",
                *(f"{_over(point['phases'][name]):.2f}" for name in PHASES),
                *(f"{share:.0%}" for share in (*shares[1:], 1 - sum(shares))),
                *(f"{point[key] / 1e6:.0f} MB" for key in ("update_peak", "planned_peak")),
                *((f"{peer['step_s']:.1f} s", f"{peer['update_peak'] / 1e6:.0f} MB") if peer else ("", "")),
            ]
        )
    return markdown(columns, rows)


def _over(part: Found) -> float:
    """How many times its bound something takes."""
    return float(part["seconds"] / part["bound_s"])


def rank_tables(found: Found) -> str:
    """Rankings with a judge, and what is outside a judge."""
    columns = ("images", "comparisons", "vision runs", "seconds", "a comparison", "over the bound", "exponentials",
               "operations", "peak", "mlx-vlm")  # fmt: skip
    rows = [
        [
            *(f"{point[key]}" for key in ("images", "comparisons", "vision_runs")),
            f"{point['seconds']:.2f}",
            f"{1000 * point['seconds'] / point['comparisons']:.1f} ms",
            f"{_over(point):.2f}",
            *(f"{point[key] / point['seconds']:.0%}" for key in ("exponentials_s", "operations_s")),
            f"{point['peak'] / 1e6:.0f} MB",
            f"{point['peer_s']:.1f} s",
        ]
        for point in found["points"]
    ]
    outside = [
        [f"{row['images']:,}", f"{row['seconds']:.2f}", f"{row['fit_s']:.2f}", f"{row['round_s']:.2f}",
         f"{row['bound_s']:.3f}" if row["bound_s"] else "", f"{row['mb']:.0f} MB"]
        for row in found["simulated"]
    ]  # fmt: skip
    names = ("images", "outside the model, s", "of it the last fit", "the last round", "bound, s", "memory")
    return markdown(columns, rows) + "\n\n" + markdown(names, outside)


def convert_table(rows: Sequence[Found]) -> str:
    """Conversions by size and recipe."""
    columns = ("size", "recipe", "seconds", "over the bound", "computing", "mlx-vlm", "peak", "its peak")
    lines = [
        [
            f"{row['bytes'] / 1e9:.2f} GB",
            row["recipe"],
            f"{row['seconds']:.1f}",
            f"{_over(row):.2f}",
            f"{row['computing_s'] / row['seconds']:.0%}",
            f"{row['peer_s']:.1f}",
            *(f"{row[key] / 1e6:.0f} MB" for key in ("peak", "peer_peak")),
        ]
        for row in rows
    ]
    return markdown(columns, lines)


def draw(found: Found, path: Path) -> None:
    """Draw what was measured: seconds and bytes against the four axes of a step, then rankings and conversions."""
    with drawing(path, (11, 8)) as figure:
        panels = figure.subplots(3, 4)
        if "grpo" in found:
            for column, axis in enumerate(_AXES):
                _draw_axis(panels[0, column], panels[1, column], found["grpo"]["points"], axis)
        if "rank" in found:
            _draw_ranking(panels[2, 0], panels[2, 1], found["rank"])
        if "convert" in found:
            _draw_conversion(panels[2, 2], panels[2, 3], found["convert"])
        lines: dict[str, Any] = {}
        for panel in panels.flat:
            panel.grid(alpha=0.3)
            lines |= {str(line.get_label()): line for line in panel.get_lines()}
        figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=6)


def _draw_axis(seconds: Any, peaks: Any, points: Sequence[Found], axis: str) -> None:
    """The points of one axis of a step: seconds above, bytes below."""
    own = sorted(
        (point for point in points if ("side" if axis == "prompt" else axis) in point["axes"].split()),
        key=lambda point: point[axis],
    )
    steps = [(point[axis], point["step"]) for point in own]
    curve(seconds, _OURS, [(x, step["seconds"]) for x, step in steps])
    curve(seconds, _BOUND, [(x, step["bound_s"]) for x, step in steps])
    named = [(x, step["bound_s"] + step["exponentials_s"] + step["operations_s"]) for x, step in steps]
    curve(seconds, _NAMED, named)
    peers = [(point[axis], point["peer"]) for point in own if "peer" in point]
    curve(seconds, _PEER, [(x, peer["step_s"]) for x, peer in peers])
    curve(peaks, _OURS, [(point[axis], point["update_peak"] / 1e6) for point in own])
    curve(peaks, _ROLLOUT, [(point[axis], point["rollout_peak"] / 1e6) for point in own])
    curve(peaks, _PLANNED, [(point[axis], point["planned_peak"] / 1e6) for point in own])
    curve(peaks, _PEER, [(x, peer["update_peak"] / 1e6) for x, peer in peers])
    label(seconds, _AXES[axis], "GRPO step, s")
    label(peaks, _AXES[axis], "peak of the update, MB")


def _draw_ranking(seconds: Any, outside: Any, found: Found) -> None:
    """Rankings with a judge, and what is outside it."""
    points = found["points"]
    curve(seconds, _OURS, [(point["images"], point["seconds"]) for point in points])
    curve(seconds, _BOUND, [(point["images"], point["bound_s"]) for point in points])
    named = [(point["images"], point["bound_s"] + point["exponentials_s"] + point["operations_s"]) for point in points]
    curve(seconds, _NAMED, named)
    curve(seconds, _PEER, [(point["images"], point["peer_s"]) for point in points])
    label(seconds, "images of a ranking", "ranking, s")
    rows = found["simulated"]
    curve(outside, _OURS, [(row["images"], row["seconds"]) for row in rows])
    curve(outside, _BOUND, [(row["images"], row["bound_s"]) for row in rows if row["bound_s"]])
    label(outside, "images of a ranking", "outside the model, s")
    outside.set_ylim(bottom=_LEAST)


def _draw_conversion(seconds: Any, peaks: Any, rows: Sequence[Found]) -> None:
    """Conversions by size: the last recipe."""
    own = [row for row in rows if row["recipe"] == rows[-1]["recipe"]]
    sizes = [round(row["bytes"] / 1e9, 2) for row in own]
    for panel, ours, peer in ((seconds, "seconds", "peer_s"), (peaks, "peak", "peer_peak")):
        unit = 1.0 if panel is seconds else 1e6
        curve(panel, _OURS, [(x, row[ours] / unit) for x, row in zip(sizes, own, strict=True)])
        curve(panel, _PEER, [(x, row[peer] / unit) for x, row in zip(sizes, own, strict=True)])
    curve(seconds, _BOUND, [(x, row["bound_s"]) for x, row in zip(sizes, own, strict=True)])
    label(seconds, "GB of a checkpoint", f"convert to {own[-1]['recipe']} bit, s")
    label(peaks, "GB of a checkpoint", "its peak, MB")


def curve(panel: Any, name: str, points: Sequence[tuple[float, float]]) -> None:
    """One curve by its name, on logarithmic axes."""
    if points:
        panel.loglog(*zip(*points, strict=True), label=name, linewidth=1.4, markersize=4, **_STYLES[name])


def label(panel: Any, across: str, up: str) -> None:
    """The names of a panel's axes; numbers below it only where something was measured."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    panel.set_xlabel(across)
    panel.set_ylabel(up)
    panel.set_xticks(sorted({x for line in panel.get_lines() for x in line.get_xdata()}))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
    panel.yaxis.set_minor_formatter(NullFormatter())
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def tables(found: Found) -> str:
    """All tables, in Markdown."""
    parts: dict[str, Callable[[Any], str]] = {
        "grpo": lambda part: grpo_table(part["points"]),
        "rank": rank_tables,
        "convert": convert_table,
    }
    return "\n\n".join(table(found[name]) for name, table in parts.items() if name in found)


@click.command(help=__doc__)
@click.option(
    "--only", multiple=True, type=click.Choice(PARTS), help="Measure these parts, and keep the file's others."
)
@click.option("--json", "file", type=click.Path(path_type=Path), default=_JSON, help="The numbers.")
@click.option("--plot", type=click.Path(path_type=Path), default=_PLOT, help="The curves.")
@click.option("--table", is_flag=True, help="Measure nothing.")
@click.option("--small", is_flag=True, help="Small sizes: a test that everything works.")
def main(only: Sequence[str], file: Path, plot: Path, table: bool, small: bool) -> None:
    if small and (file == _JSON or plot == _PLOT):
        raise click.UsageError("--small would replace the numbers or curves of a real run; give --json and --plot")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() and (only or table) else {}
    for part in [] if table else only or PARTS:
        found[part] = measure(part, small)
        found |= environment()
        write_file(file, json.dumps(found, indent=1))
    draw(found, plot)
    for line in tables(found).splitlines():
        print_text(line)


if __name__ == "__main__":
    main()
