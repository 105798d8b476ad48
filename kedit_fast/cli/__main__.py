"""`python -m kedit_fast.cli`: the command kedit-fast."""

from kedit_fast.cli.main import main

main()
