"""The command that looks whether everything is as it must be: doctor."""

from typing import TYPE_CHECKING

import click

from mlxpref.cli.options import json_option

if TYPE_CHECKING:
    from mlxpref.cli.doctor_checkup import CheckResult

__all__ = ["doctor"]


@click.command(short_help="What would fail here, and what to do about it.")
@json_option
def doctor(as_json: bool) -> None:
    """Look at this machine, its packages, MLX, judges, the hub and caches; exit 1 where a command would fail.

    A `note` is slow or missing, and can be done without. Nothing is downloaded and nothing is changed; the hub is asked
    for its head once, unless HF_HUB_OFFLINE is set.
    """
    from dataclasses import asdict

    from mlxpref.cli.doctor_run import examine
    from mlxpref.cli.output import print_json

    found = examine()
    failing = [finding for finding in found if finding.state == "fails"]
    if as_json:
        print_json({"ok": not failing, "findings": [asdict(finding) for finding in found]})
    else:
        _print(found)
    if failing:
        raise SystemExit(1)


def _print(found: "list[CheckResult]") -> None:
    """A line for each finding, and then what to do."""
    from mlxpref.cli.output import print_table, print_text

    print_table(("", "checked", "found"), [(finding.state, finding.name, finding.found) for finding in found])
    print_text("")
    failing = sum(finding.state == "fails" for finding in found)
    for finding in sorted(found, key=lambda finding: finding.state != "fails"):
        if finding.remedy:
            print_text(f"{finding.state}: {finding.name}: {finding.remedy}")
    print_text(f"{failing} of {len(found)} checks failed" if failing else "nothing would fail")
