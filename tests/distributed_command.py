"""The command line with a heartbeat that loses patience soon, so that a test need not wait for half a minute."""

from mlxpref import heartbeat
from mlxpref.cli import main

if __name__ == "__main__":
    heartbeat._SILENCE, heartbeat._GRACE = 3.0, 1.0
    main(prog_name="mlxpref")
