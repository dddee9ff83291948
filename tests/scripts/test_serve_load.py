"""The load script runs: every kind of request is answered, with its own numbers."""

from click.testing import CliRunner

from scripts.serve_load import main


def test_every_request_gets_its_own_answer() -> None:
    options = ["--requests", "10", "--clients", "4", "--burst", "5"]
    run = CliRunner().invoke(main, options, catch_exceptions=False)
    assert run.exit_code == 0, run.output
    totals = [line.split()[1:5] for line in run.stdout.splitlines() if line.startswith("all ")]
    assert totals == [["10", "10", "0", "0"], ["5", "5", "0", "0"]]
    assert "/health: 15 requests" in run.stdout
