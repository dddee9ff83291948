"""`python -m mlxpref`: the command line."""

from mlxpref.cli import main

main()
