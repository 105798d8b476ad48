"""Tile shapes by op, shape class and architecture.

None of these rows has been tuned on a GPU yet: they are the shapes that compile without spills for sm_80 and sm_90,
odd sizes and strides included (benchmarks/results/kernel_resources.json), and keep the matrix unit's operands in shared
memory. Newer devices run the rows of sm_90. KEDIT_FAST_AUTOTUNE=1 times CANDIDATES at the first call of every shape
class and size and uses the fastest; another tile may round a sum of many terms in another way, so bits can differ
between processes then.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """The tile of a kernel's program and how it is compiled."""

    m: int
    """Rows of the tile of results."""
    n: int
    """Columns of the tile of results."""
    k: int
    """Depth of one step of the product."""
    warps: int
    """Warps per program, of 32 threads each."""
    stages: int
    """Steps whose operands are loaded ahead."""
    group: int = 8
    """Rows of tiles that share their operands through the second-level cache."""


SYMMETRIC, RANK_K, LOGITS, GRADIENT = "symmetric_rank_k_update_", "rank_k_update_", "logits", "gradient"
STEP, ROW_PRODUCTS = "masked_step", "row_products"
TAIL = "tail_attention"
NEAREST, OVERLAP, DIGITS, MERGE = "nearest_key", "best_overlap", "magnitude_bound", "ties_merge_"
NORM, GATED = "rms_norm", "gated"
CHUNK = "logits of a chunk"

# Shape classes. symmetric: "native" (16-bit rows as they are), "native64" (the same with an fp64 acc, whose tile takes
# twice the registers), "split" (fp32 rows or weights, written as bf16 terms); "narrow" and "split_narrow" are the same
# where strides or a size forbid loads of 16 bytes.
# rank_k: "fma" (small k), "dot". "grouped_" before a class: the same for a stack of matrices, where most are small.
# logits (forward and backward of the head ops) and gradient (d logits times head): "native" (16-bit states), "split"
# (fp32), each "narrow" where loads are; "pair" computes two distributions at once.
# masked_step (masked_descent_ and masked_adam_): "rows" (a gradient), "dot" (its factors). row_products
# (activation_distance): "native" (16-bit operands of one dtype), "split"; "routed_" before them for routed_linear.
# nearest_key: m queries and n keys, k columns at a time. best_overlap: m rows of the book, n words. magnitude_bound and
# ties_merge_: n entries. rms_norm and gated, and their gradients: n columns of a row at a time.
# logits of a chunk: n of a row's, read twice.
# tail_attention: m queries of one row and group, n keys; "native" (16-bit numbers), "split" (fp32), "wide" for heads of
# more than 64 numbers and "widest" of more than 128; "backward_" before them for gradients.
TABLE: dict[tuple[str, str], dict[str, Config]] = {
    (SYMMETRIC, "native"): {
        "sm_80": Config(128, 128, 32, 8, 4),
        "sm_90": Config(128, 128, 64, 8, 4),
    },
    (SYMMETRIC, "native64"): {
        "sm_80": Config(64, 64, 32, 4, 4),
        "sm_90": Config(128, 128, 64, 8, 4),
    },
    (SYMMETRIC, "narrow"): {"sm_80": Config(64, 64, 32, 4, 4)},
    (SYMMETRIC, "split"): {
        "sm_80": Config(64, 64, 16, 8, 3),
        "sm_90": Config(64, 64, 32, 4, 3),
    },
    (SYMMETRIC, "split_narrow"): {
        "sm_80": Config(64, 64, 16, 4, 3),
        "sm_90": Config(64, 64, 32, 4, 3),
    },
    (SYMMETRIC, "grouped_native"): {"sm_80": Config(64, 64, 32, 4, 4)},
    (SYMMETRIC, "grouped_split"): {"sm_80": Config(64, 64, 16, 4, 3)},
    (RANK_K, "fma"): {"sm_80": Config(32, 256, 1, 4, 2)},
    (RANK_K, "dot"): {"sm_80": Config(32, 64, 32, 4, 2)},
    (RANK_K, "grouped_fma"): {"sm_80": Config(16, 128, 1, 4, 2)},
    (STEP, "rows"): {"sm_80": Config(16, 128, 1, 4, 2)},
    (STEP, "dot"): {"sm_80": Config(32, 64, 32, 8, 2)},
    (ROW_PRODUCTS, "native"): {"sm_80": Config(32, 64, 32, 4, 3)},
    (ROW_PRODUCTS, "split"): {"sm_80": Config(16, 64, 32, 4, 2)},
    (ROW_PRODUCTS, "routed_native"): {"sm_80": Config(16, 64, 32, 4, 2)},
    (ROW_PRODUCTS, "routed_split"): {"sm_80": Config(16, 32, 16, 4, 2)},
    (LOGITS, "native"): {
        "sm_80": Config(64, 128, 32, 8, 4),
        "sm_90": Config(64, 128, 64, 8, 4),
    },
    (LOGITS, "native_narrow"): {"sm_80": Config(64, 64, 32, 4, 3)},
    (LOGITS, "split"): {"sm_80": Config(64, 64, 32, 8, 2)},
    (LOGITS, "split_narrow"): {"sm_80": Config(32, 64, 32, 8, 2)},
    (LOGITS, "pair_native"): {
        "sm_80": Config(64, 64, 32, 4, 4),
        "sm_90": Config(64, 128, 64, 8, 3),
    },
    (LOGITS, "pair_native_narrow"): {"sm_80": Config(32, 64, 32, 4, 3)},
    (LOGITS, "pair_split"): {"sm_80": Config(32, 64, 32, 8, 2)},
    (LOGITS, "pair_split_narrow"): {"sm_80": Config(16, 64, 32, 4, 2)},
    (NEAREST, "rows"): {"sm_80": Config(4, 16, 64, 4, 2)},
    (OVERLAP, "words"): {"sm_80": Config(16, 128, 1, 4, 2)},
    (DIGITS, "entries"): {"sm_80": Config(1, 1024, 1, 4, 2)},
    (MERGE, "entries"): {"sm_80": Config(1, 512, 1, 4, 2)},
    (NORM, "rows"): {"sm_80": Config(1, 1024, 1, 4, 2)},
    (NORM, "backward"): {"sm_80": Config(1, 1024, 1, 4, 2)},
    (GATED, "entries"): {"sm_80": Config(1, 1024, 1, 4, 2)},
    (GATED, "backward"): {"sm_80": Config(1, 1024, 1, 4, 2)},
    (CHUNK, "rows"): {"sm_80": Config(1, 256, 1, 8, 2)},
    (TAIL, "native"): {"sm_80": Config(16, 16, 1, 8, 2)},
    (TAIL, "native_wide"): {"sm_80": Config(16, 32, 1, 8, 2)},
    (TAIL, "native_widest"): {"sm_80": Config(16, 32, 1, 8, 1)},
    (TAIL, "split"): {"sm_80": Config(16, 32, 1, 4, 2)},
    (TAIL, "backward_native"): {"sm_80": Config(16, 16, 1, 8, 2)},
    (TAIL, "backward_native_wide"): {"sm_80": Config(16, 16, 1, 4, 2)},
    (TAIL, "backward_native_widest"): {"sm_80": Config(16, 16, 1, 8, 2)},
    (TAIL, "backward_split"): {"sm_80": Config(16, 16, 1, 4, 1)},
    (GRADIENT, "native"): {"sm_80": Config(64, 64, 32, 4, 3)},
    (GRADIENT, "split"): {"sm_80": Config(64, 64, 32, 4, 2)},
    (GRADIENT, "split_narrow"): {
        "sm_80": Config(32, 64, 32, 4, 2),
        "sm_90": Config(64, 64, 32, 4, 2),
    },
}

# The interpreter's: small, so that odd shapes meet several tiles in every direction.
INTERPRETED = {
    SYMMETRIC: Config(32, 32, 32, 4, 1, group=2),
    RANK_K: Config(32, 64, 32, 4, 1),
    STEP: Config(32, 64, 32, 4, 1),
    ROW_PRODUCTS: Config(16, 32, 32, 4, 1),
    LOGITS: Config(16, 32, 32, 4, 1),
    GRADIENT: Config(16, 32, 32, 4, 1),
    NEAREST: Config(16, 64, 128, 4, 1),
    OVERLAP: Config(64, 64, 1, 4, 1),
    DIGITS: Config(1, 1024, 1, 4, 1),
    MERGE: Config(1, 1024, 1, 4, 1),
    NORM: Config(1, 64, 1, 4, 1),
    GATED: Config(1, 64, 1, 4, 1),
    CHUNK: Config(1, 64, 1, 4, 1),
    TAIL: Config(16, 16, 1, 4, 1),
}

CANDIDATES: dict[str, tuple[Config, ...]] = {
    SYMMETRIC: tuple(
        Config(side, side, k, warps, stages, group)
        for side, k, warps, stages in (
            (64, 32, 4, 3), (64, 64, 4, 3), (128, 32, 4, 3), (128, 32, 4, 4), (128, 32, 8, 3), (128, 32, 8, 4),
            (128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 3), (128, 64, 8, 4),
        )
        for group in (4, 8, 16)
    ),
    RANK_K: tuple(
        Config(m, n, k, warps, stages)
        for m, n, k, warps, stages in (
            (8, 256, 1, 4, 2), (16, 128, 1, 4, 2), (16, 256, 1, 4, 2), (32, 128, 1, 4, 2), (32, 256, 1, 8, 2),
            (64, 128, 1, 8, 2), (64, 64, 32, 4, 2), (64, 128, 32, 8, 2), (128, 64, 32, 8, 2), (64, 64, 16, 4, 3),
        )
    ),
    STEP: tuple(
        Config(m, n, k, warps, stages)
        for m, n, k, warps, stages in (
            (8, 128, 1, 4, 2), (8, 256, 1, 4, 2), (16, 256, 1, 8, 2), (32, 64, 32, 8, 2), (64, 64, 32, 4, 2),
            (64, 64, 32, 8, 2), (64, 128, 32, 8, 2),
        )
    ),
    ROW_PRODUCTS: tuple(
        Config(m, n, k, warps, stages)
        for m, n, k, warps, stages in (
            (16, 64, 64, 4, 4), (16, 128, 64, 4, 4), (32, 64, 64, 4, 4), (32, 128, 64, 4, 3), (64, 64, 32, 4, 3),
            (64, 128, 32, 8, 3),
        )
    ),
    LOGITS: tuple(
        Config(m, n, k, warps, stages)
        for m, n, k, warps, stages in (
            (16, 128, 64, 4, 4), (16, 256, 64, 4, 3), (32, 128, 64, 4, 4), (64, 64, 64, 4, 4), (64, 128, 32, 4, 4),
            (64, 128, 64, 4, 3), (64, 128, 64, 8, 4), (64, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 32, 8, 4),
        )
    ),
    NEAREST: tuple(
        Config(m, n, k, warps, 2)
        for m, n, k, warps in ((2, 16, 128, 4), (4, 16, 64, 4), (4, 32, 32, 4), (8, 16, 32, 4), (8, 32, 32, 8))
    ),
    OVERLAP: tuple(Config(m, n, 1, 4, 2) for m, n in ((8, 128), (16, 64), (16, 128), (32, 64), (32, 128))),
    DIGITS: tuple(Config(1, n, 1, warps, 2) for n, warps in ((512, 4), (1024, 4), (2048, 4), (2048, 8), (4096, 8))),
    CHUNK: tuple(Config(1, n, 1, warps, 2) for n, warps in ((256, 4), (1024, 16), (2048, 8), (4096, 8))),
    MERGE: tuple(Config(1, n, 1, warps, 2) for n, warps in ((256, 2), (512, 4), (1024, 4), (1024, 8), (2048, 8))),
    NORM: tuple(Config(1, n, 1, warps, 2) for n, warps in ((512, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8))),
    GATED: tuple(Config(1, n, 1, warps, 2) for n, warps in ((512, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8))),
    TAIL: tuple(
        Config(m, n, 1, warps, 2)
        for m, n, warps in ((16, 16, 2), (16, 16, 4), (16, 16, 8), (16, 32, 4), (16, 32, 8), (32, 32, 4), (64, 32, 4))
    ),
    GRADIENT: tuple(
        Config(m, n, k, warps, stages)
        for m, n, k, warps, stages in (
            (16, 128, 64, 4, 3), (32, 64, 32, 4, 3), (64, 64, 32, 4, 2), (64, 64, 64, 4, 3), (64, 128, 32, 8, 3),
            (128, 64, 32, 8, 3),
        )
    ),
}  # fmt: skip


def lookup(op: str, shape_class: str, architecture: str) -> Config:
    """The row of the newest listed architecture that is not newer than this one."""
    rows = TABLE[op, shape_class]
    number = int(architecture.removeprefix("sm_"))
    known = [int(name.removeprefix("sm_")) for name in rows]
    return rows[f"sm_{max((n for n in known if n <= number), default=min(known))}"]


def candidates(op: str, shape_class: str) -> tuple[Config, ...]:
    """What autotuning tries for a shape class."""
    if op in (RANK_K, STEP):
        by_terms = shape_class in ("fma", "grouped_fma", "rows")
        return tuple(config for config in CANDIDATES[op] if (config.k == 1) == by_terms)
    return CANDIDATES[op]
