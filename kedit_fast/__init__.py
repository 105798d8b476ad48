"""Closed-form knowledge editing of language models: fast kernels, exact solves, small reversible updates.

Backends and ops are loaded with the package; everything that needs transformers is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kedit_fast import ops as ops

if TYPE_CHECKING:  # the same names for type checkers; tests/test_public_names.py compares them with the table
    from kedit_fast._version import __version__ as __version__
    from kedit_fast.backends import backends as backends
    from kedit_fast.backends import explain as explain
    from kedit_fast.backends import use_backend as use_backend
    from kedit_fast.editing.editor import Editor as Editor
    from kedit_fast.evaluation.evaluator import evaluate as evaluate
    from kedit_fast.locating.circuits import edge_scores as edge_scores
    from kedit_fast.locating.faithfulness import faithfulness as faithfulness
    from kedit_fast.locating.linear_probes import linear_probes as linear_probes
    from kedit_fast.locating.logit_lens import logit_lens as logit_lens
    from kedit_fast.locating.prompt_pairs import prompt_pairs as prompt_pairs
    from kedit_fast.locating.pruning import greedy_edges as greedy_edges
    from kedit_fast.locating.pruning import top_edges as top_edges
    from kedit_fast.locating.tracing import average_effects as average_effects
    from kedit_fast.locating.tracing import likely_layers as likely_layers
    from kedit_fast.locating.tracing import trace as trace
    from kedit_fast.memories.attach import attach as attach
    from kedit_fast.memories.attach import attached as attached
    from kedit_fast.memories.attach import detach as detach
    from kedit_fast.memories.attach import matrix_identity as matrix_identity
    from kedit_fast.memories.memory import ActivationMemory as ActivationMemory
    from kedit_fast.memories.memory import FingerprintMemory as FingerprintMemory
    from kedit_fast.memories.memory import KeyValueMemory as KeyValueMemory
    from kedit_fast.memories.memory import SideMemory as SideMemory
    from kedit_fast.ops import activation_distance as activation_distance
    from kedit_fast.ops import best_overlap as best_overlap
    from kedit_fast.ops import distribution_kl as distribution_kl
    from kedit_fast.ops import edge_contraction as edge_contraction
    from kedit_fast.ops import gated_gelu as gated_gelu
    from kedit_fast.ops import gated_silu as gated_silu
    from kedit_fast.ops import grouped_rank_k_update_ as grouped_rank_k_update_
    from kedit_fast.ops import grouped_symmetric_rank_k_update_ as grouped_symmetric_rank_k_update_
    from kedit_fast.ops import magnitude_bound as magnitude_bound
    from kedit_fast.ops import masked_adam_ as masked_adam_
    from kedit_fast.ops import masked_descent_ as masked_descent_
    from kedit_fast.ops import mirror_ as mirror_
    from kedit_fast.ops import nearest_key as nearest_key
    from kedit_fast.ops import rank_k_update_ as rank_k_update_
    from kedit_fast.ops import rank_one_update_ as rank_one_update_
    from kedit_fast.ops import rms_norm as rms_norm
    from kedit_fast.ops import routed_linear as routed_linear
    from kedit_fast.ops import spd_solve as spd_solve
    from kedit_fast.ops import symmetric_rank_k_update_ as symmetric_rank_k_update_
    from kedit_fast.ops import tail_attention as tail_attention
    from kedit_fast.ops import target_log_probs as target_log_probs
    from kedit_fast.ops import ties_merge_ as ties_merge_
    from kedit_fast.ops import top_features as top_features
    from kedit_fast.patches.patch import Patch as Patch
    from kedit_fast.reports.lint import lint_requests as lint_requests
    from kedit_fast.requests.reading import load_requests as load_requests
    from kedit_fast.requests.request import EditRequest as EditRequest
    from kedit_fast.solver.key_memory import KeyMemory as KeyMemory
    from kedit_fast.solver.least_squares import solve_update as solve_update
    from kedit_fast.solver.low_rank import LowRankUpdate as LowRankUpdate
    from kedit_fast.solver.output_metric import OutputMetric as OutputMetric
    from kedit_fast.solver.preconditioner import Covariance as Covariance
    from kedit_fast.solver.preconditioner import Identity as Identity
    from kedit_fast.solver.preconditioner import NullSpace as NullSpace
    from kedit_fast.solver.value_descent import optimize_values as optimize_values
    from kedit_fast.statistics.collect import collect_statistics as collect_statistics
    from kedit_fast.statistics.corpus import Corpus as Corpus
    from kedit_fast.statistics.moments import cross_moment as cross_moment
    from kedit_fast.statistics.moments import second_moment as second_moment
    from kedit_fast.statistics.resumable import collect_into as collect_into
    from kedit_fast.statistics.store import load_statistics as load_statistics
    from kedit_fast.statistics.store import save_statistics as save_statistics

PUBLIC_NAMES = {
    "ActivationMemory": "kedit_fast.memories.memory",
    "Corpus": "kedit_fast.statistics.corpus",
    "Covariance": "kedit_fast.solver.preconditioner",
    "EditRequest": "kedit_fast.requests.request",
    "Editor": "kedit_fast.editing.editor",
    "FingerprintMemory": "kedit_fast.memories.memory",
    "Identity": "kedit_fast.solver.preconditioner",
    "KeyMemory": "kedit_fast.solver.key_memory",
    "KeyValueMemory": "kedit_fast.memories.memory",
    "LowRankUpdate": "kedit_fast.solver.low_rank",
    "NullSpace": "kedit_fast.solver.preconditioner",
    "OutputMetric": "kedit_fast.solver.output_metric",
    "Patch": "kedit_fast.patches.patch",
    "SideMemory": "kedit_fast.memories.memory",
    "__version__": "kedit_fast._version",
    "activation_distance": "kedit_fast.ops",
    "attach": "kedit_fast.memories.attach",
    "attached": "kedit_fast.memories.attach",
    "average_effects": "kedit_fast.locating.tracing",
    "backends": "kedit_fast.backends",
    "best_overlap": "kedit_fast.ops",
    "collect_into": "kedit_fast.statistics.resumable",
    "collect_statistics": "kedit_fast.statistics.collect",
    "cross_moment": "kedit_fast.statistics.moments",
    "detach": "kedit_fast.memories.attach",
    "distribution_kl": "kedit_fast.ops",
    "edge_contraction": "kedit_fast.ops",
    "edge_scores": "kedit_fast.locating.circuits",
    "evaluate": "kedit_fast.evaluation.evaluator",
    "explain": "kedit_fast.backends",
    "faithfulness": "kedit_fast.locating.faithfulness",
    "gated_gelu": "kedit_fast.ops",
    "gated_silu": "kedit_fast.ops",
    "greedy_edges": "kedit_fast.locating.pruning",
    "grouped_rank_k_update_": "kedit_fast.ops",
    "grouped_symmetric_rank_k_update_": "kedit_fast.ops",
    "likely_layers": "kedit_fast.locating.tracing",
    "linear_probes": "kedit_fast.locating.linear_probes",
    "lint_requests": "kedit_fast.reports.lint",
    "load_requests": "kedit_fast.requests.reading",
    "load_statistics": "kedit_fast.statistics.store",
    "logit_lens": "kedit_fast.locating.logit_lens",
    "magnitude_bound": "kedit_fast.ops",
    "masked_adam_": "kedit_fast.ops",
    "masked_descent_": "kedit_fast.ops",
    "matrix_identity": "kedit_fast.memories.attach",
    "mirror_": "kedit_fast.ops",
    "nearest_key": "kedit_fast.ops",
    "optimize_values": "kedit_fast.solver.value_descent",
    "prompt_pairs": "kedit_fast.locating.prompt_pairs",
    "rank_k_update_": "kedit_fast.ops",
    "rank_one_update_": "kedit_fast.ops",
    "rms_norm": "kedit_fast.ops",
    "routed_linear": "kedit_fast.ops",
    "save_statistics": "kedit_fast.statistics.store",
    "second_moment": "kedit_fast.statistics.moments",
    "solve_update": "kedit_fast.solver.least_squares",
    "spd_solve": "kedit_fast.ops",
    "symmetric_rank_k_update_": "kedit_fast.ops",
    "tail_attention": "kedit_fast.ops",
    "target_log_probs": "kedit_fast.ops",
    "ties_merge_": "kedit_fast.ops",
    "top_edges": "kedit_fast.locating.pruning",
    "top_features": "kedit_fast.ops",
    "trace": "kedit_fast.locating.tracing",
    "use_backend": "kedit_fast.backends",
}
"""Public name -> the module that it is loaded from. `__all__`, `dir()` and loading on first use follow from it."""
_LOADED_WITH_THE_PACKAGE = ("kedit_fast._version", "kedit_fast.backends", "kedit_fast.ops")

__all__ = sorted(["ops", *PUBLIC_NAMES])  # pyright: ignore[reportUnsupportedDunderAll] - it follows from the table


def __getattr__(name: str) -> Any:
    if name in PUBLIC_NAMES:
        return getattr(importlib.import_module(PUBLIC_NAMES[name]), name)
    raise AttributeError(f"module 'kedit_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)


# `backends` must be set here: importing the module of that name put the module in its place.
globals().update({name: __getattr__(name) for name, home in PUBLIC_NAMES.items() if home in _LOADED_WITH_THE_PACKAGE})
