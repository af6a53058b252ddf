"""Run the command line: `python -m jobledger`."""

from jobledger.cli.main import main

main()
