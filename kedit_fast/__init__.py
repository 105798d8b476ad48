"""Closed-form knowledge editing of language models: fast kernels, exact solves, small reversible updates.

The ops and the backends are loaded here; everything that needs transformers is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from kedit_fast import ops
from kedit_fast._version import __version__
from kedit_fast.backends import backends, explain, use_backend
from kedit_fast.kernels import native as _native  # noqa: F401  registers what it can run
from kedit_fast.kernels import triton as _triton  # noqa: F401
from kedit_fast.ops import (
    distribution_kl,
    gated_silu,
    mirror_,
    rank_k_update_,
    rank_one_update_,
    rms_norm,
    spd_solve,
    symmetric_rank_k_update_,
    target_log_probs,
)

if TYPE_CHECKING:
    from kedit_fast.editing.editor import Editor
    from kedit_fast.evaluation.metrics import evaluate
    from kedit_fast.patches.patch import Patch
    from kedit_fast.requests.reading import load_requests
    from kedit_fast.requests.request import EditRequest
    from kedit_fast.solver.key_memory import KeyMemory
    from kedit_fast.solver.least_squares import solve_update
    from kedit_fast.solver.low_rank import LowRankUpdate
    from kedit_fast.solver.preconditioner import Covariance, Identity, NullSpace
    from kedit_fast.solver.value_descent import optimize_values
    from kedit_fast.statistics.collect import collect_statistics
    from kedit_fast.statistics.corpus import Corpus
    from kedit_fast.statistics.moments import second_moment
    from kedit_fast.statistics.resumable import collect_into
    from kedit_fast.statistics.store import load_statistics, save_statistics

_LAZY = {
    "Corpus": "kedit_fast.statistics.corpus",
    "Covariance": "kedit_fast.solver.preconditioner",
    "EditRequest": "kedit_fast.requests.request",
    "Editor": "kedit_fast.editing.editor",
    "Identity": "kedit_fast.solver.preconditioner",
    "KeyMemory": "kedit_fast.solver.key_memory",
    "LowRankUpdate": "kedit_fast.solver.low_rank",
    "NullSpace": "kedit_fast.solver.preconditioner",
    "Patch": "kedit_fast.patches.patch",
    "collect_into": "kedit_fast.statistics.resumable",
    "collect_statistics": "kedit_fast.statistics.collect",
    "evaluate": "kedit_fast.evaluation.metrics",
    "load_requests": "kedit_fast.requests.reading",
    "load_statistics": "kedit_fast.statistics.store",
    "optimize_values": "kedit_fast.solver.value_descent",
    "save_statistics": "kedit_fast.statistics.store",
    "second_moment": "kedit_fast.statistics.moments",
    "solve_update": "kedit_fast.solver.least_squares",
}

__all__ = [
    "Corpus",
    "Covariance",
    "EditRequest",
    "Editor",
    "Identity",
    "KeyMemory",
    "LowRankUpdate",
    "NullSpace",
    "Patch",
    "__version__",
    "backends",
    "collect_into",
    "collect_statistics",
    "distribution_kl",
    "evaluate",
    "explain",
    "gated_silu",
    "load_requests",
    "load_statistics",
    "mirror_",
    "ops",
    "optimize_values",
    "rank_k_update_",
    "rank_one_update_",
    "rms_norm",
    "save_statistics",
    "second_moment",
    "solve_update",
    "spd_solve",
    "symmetric_rank_k_update_",
    "target_log_probs",
    "use_backend",
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'kedit_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
