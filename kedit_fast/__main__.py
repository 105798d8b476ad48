"""`python -m kedit_fast`: what to paste into a bug report."""

from kedit_fast.cli.environment import print_environment

print_environment()
