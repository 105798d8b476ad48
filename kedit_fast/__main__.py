"""`python -m kedit_fast`: what to paste into a bug report."""

from kedit_fast.cli.main import print_environment

print_environment()
