"""Public ops. Each file holds one op: its schema, its checks, its backends and its documentation."""

from kedit_fast.ops.activation_distance import activation_distance
from kedit_fast.ops.best_overlap import BestOverlap, best_overlap
from kedit_fast.ops.distribution_kl import distribution_kl
from kedit_fast.ops.edge_contraction import edge_contraction
from kedit_fast.ops.entry_bits import pack_bits, unpack_bits
from kedit_fast.ops.gated_gelu import gated_gelu
from kedit_fast.ops.gated_silu import gated_silu
from kedit_fast.ops.grouped_rank_k_update import grouped_rank_k_update_
from kedit_fast.ops.grouped_symmetric_rank_k_update import grouped_symmetric_rank_k_update_
from kedit_fast.ops.magnitude_bound import magnitude_bound
from kedit_fast.ops.masked_adam import masked_adam_
from kedit_fast.ops.masked_descent import masked_descent_
from kedit_fast.ops.nearest_key import NearestKey, nearest_key
from kedit_fast.ops.rank_k_update import rank_k_update_, rank_one_update_
from kedit_fast.ops.rms_norm import rms_norm
from kedit_fast.ops.routed_linear import routed_linear
from kedit_fast.ops.spd_solve import spd_solve
from kedit_fast.ops.symmetric_rank_k_update import mirror_, symmetric_rank_k_update_
from kedit_fast.ops.tail_attention import tail_attention
from kedit_fast.ops.target_log_probs import TargetLogProbs, target_log_probs
from kedit_fast.ops.ties_merge import ties_merge_
from kedit_fast.ops.top_features import top_features

__all__ = [
    "BestOverlap",
    "NearestKey",
    "TargetLogProbs",
    "activation_distance",
    "best_overlap",
    "distribution_kl",
    "edge_contraction",
    "gated_gelu",
    "gated_silu",
    "grouped_rank_k_update_",
    "grouped_symmetric_rank_k_update_",
    "magnitude_bound",
    "masked_adam_",
    "masked_descent_",
    "mirror_",
    "nearest_key",
    "pack_bits",
    "rank_k_update_",
    "rank_one_update_",
    "rms_norm",
    "routed_linear",
    "spd_solve",
    "symmetric_rank_k_update_",
    "tail_attention",
    "target_log_probs",
    "ties_merge_",
    "top_features",
    "unpack_bits",
]
