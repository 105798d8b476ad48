"""Micro-benchmarks of the ops. What is installed is measured: the source tree, which may not be built, comes last."""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [*(entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT), str(_ROOT)]
