"""`python -m kedit_fast`: what to paste into a bug report; with arguments, the command kedit-fast."""

import sys

from kedit_fast.cli.environment import print_environment
from kedit_fast.cli.main import main

if sys.argv[1:]:
    main()
else:
    print_environment()
