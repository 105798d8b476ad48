"""Bad input to an op: an error that names the argument, and nothing written. New cases join the list."""

from __future__ import annotations

import math

import pytest
import torch

from kedit_fast import (
    activation_distance,
    best_overlap,
    distribution_kl,
    edge_contraction,
    gated_gelu,
    gated_silu,
    grouped_rank_k_update_,
    grouped_symmetric_rank_k_update_,
    magnitude_bound,
    masked_adam_,
    masked_descent_,
    mirror_,
    nearest_key,
    rank_k_update_,
    rank_one_update_,
    rms_norm,
    routed_linear,
    spd_solve,
    symmetric_rank_k_update_,
    tail_attention,
    target_log_probs,
    ties_merge_,
)
from kedit_fast.errors import BackendUnavailableError, GradientError, InvalidArgumentError, KeditError, SolveError

META = torch.device("meta")
Invalid = InvalidArgumentError


def of(*shape, dtype=torch.float32, device=None):
    if dtype in (torch.int64, torch.int32, torch.bool, torch.uint8):
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.ones(shape, dtype=dtype, device=device)


def second_derivative(op):
    gate = of(3, 4).requires_grad_()
    torch.autograd.grad(op(gate, of(3, 4)).sum(), gate, create_graph=True)


def symmetric(acc=None, x=None, weights=None, mask=None, **more):
    return symmetric_rank_k_update_(
        of(4, 4) if acc is None else acc, of(3, 4) if x is None else x, weights, mask, **more
    )


def rank_k(weight=None, left=None, right=None, **more):
    tensors = (of(3, 4) if weight is None else weight, of(3, 2) if left is None else left)
    return rank_k_update_(*tensors, of(4, 2) if right is None else right, **more)


OFFSETS = torch.tensor([0, 1, 3])


def grouped_moment(acc=None, x=None, offsets=OFFSETS, weights=None, **more):
    tensors = (of(2, 4, 4) if acc is None else acc, of(3, 4) if x is None else x)
    return grouped_symmetric_rank_k_update_(*tensors, offsets, weights, **more)


def grouped_write(weight=None, left=None, right=None, columns=None, offsets=OFFSETS, **more):
    tensors = (of(2, 3, 4) if weight is None else weight, of(3, 2) if left is None else left)
    columns = torch.tensor([0, 1, 1]) if columns is None else columns
    return grouped_rank_k_update_(*tensors, of(3, 4) if right is None else right, columns, offsets, **more)


def log_probs(hidden=None, head=None, targets=None, *rest, **more):
    tensors = (of(2, 4) if hidden is None else hidden, of(9, 4) if head is None else head)
    return target_log_probs(*tensors, of(2, dtype=torch.int64) if targets is None else targets, *rest, **more)


def kl(hidden=None, other=None, head=None, *rest, **more):
    tensors = (of(2, 4) if hidden is None else hidden, of(2, 4) if other is None else other)
    return distribution_kl(*tensors, of(9, 4) if head is None else head, *rest, **more)


def descend(weight=None, lr=0.1, **more):
    gradient = {} if more.keys() & {"grad", "left", "right"} else {"grad": of(3, 4)}
    return masked_descent_(of(3, 4) if weight is None else weight, lr, **gradient, **more)


def adam(weight=None, mean=None, square=None, count=None, **more):
    weight = of(3, 4) if weight is None else weight
    mean, square = (weight.clone() if t is None else t for t in (mean, square))
    gradient = {} if more.keys() & {"grad", "left"} else {"grad": of(3, 4)}
    return masked_adam_(weight, mean, square, of() if count is None else count, 0.1, **gradient, **more)


def distance(x=None, reference=None, weights=None, starts=None, *rest, **more):
    tensors = (of(5, 4) if x is None else x, of(5, 3) if reference is None else reference)
    starts = torch.tensor([0, 2, 5]) if starts is None else starts
    return activation_distance(*tensors, of(2, 3, 4) if weights is None else weights, starts, *rest, **more)


def routed(x=None, memories=None, route=None, **more):
    beside = {} if more.keys() & {"weight", "output"} else {"weight": of(3, 4)}
    tensors = (of(5, 4) if x is None else x, beside.get("weight", more.pop("weight", None)))
    route = of(5, dtype=torch.int64) if route is None else route
    return routed_linear(*tensors, of(2, 3, 4) if memories is None else memories, route, **more)


def nearest(queries=None, keys=None, radii=None):
    tensors = (of(2, 4) if queries is None else queries, of(3, 4) if keys is None else keys)
    return nearest_key(*tensors, of(3) if radii is None else radii)


def tails(query=None, key=None, value=None, starts=(0, 2, 5), longest=3, scale=0.5, **more):
    tensors = (of(5, 4, 3) if query is None else query, of(5, 2, 3) if key is None else key)
    starts = torch.tensor(starts) if isinstance(starts, tuple) else starts
    return tail_attention(*tensors, of(5, 2, 3) if value is None else value, starts, longest, scale=scale, **more)


def prefixed(keys=None, values=None, spans=((0, 4), (1, 3)), **more):
    keys, values = (of(2, 2, 4, 3) if part is None else part for part in (keys, values))
    spans = torch.tensor(spans) if isinstance(spans, tuple) else spans
    return tails(prefix_keys=keys, prefix_values=values, spans=spans, **more)


BYTES = {"dtype": torch.uint8}


def ties(out=None, base=None, memories=None, coefficients=(0.5, 0.5), density=0.5):
    tensors = (of(3, 4) if out is None else out, of(3, 4) if base is None else base)
    return ties_merge_(*tensors, of(2, 3, 4) if memories is None else memories, coefficients, density)


SHARED = torch.zeros(2, 3, 4)


BAD = [
    ("acc not square", lambda: symmetric(acc=of(4, 5)), Invalid, r"acc must be \[d, d\]; got \[4, 5\]"),
    ("acc of integers", lambda: symmetric(acc=of(4, 4, dtype=torch.int64)), Invalid, "acc must be float32"),
    ("acc in bf16", lambda: symmetric(acc=of(4, 4, dtype=torch.bfloat16)), Invalid, "acc must be float32"),
    ("acc by columns", lambda: symmetric(acc=of(8, 4)[::2].T), Invalid, "contiguous rows"),
    ("acc expanded", lambda: symmetric(acc=of(1, 4).expand(4, 4)), Invalid, "acc overlaps itself"),
    ("acc sparse", lambda: symmetric(acc=of(4, 4).to_sparse()), Invalid, "acc must be a dense tensor"),
    ("x of another width", lambda: symmetric(x=of(3, 5)), Invalid, r"x must be \[n, 4\]"),
    ("x with three dimensions", lambda: symmetric(x=of(2, 3, 4)), Invalid, r"x must be \[n, 4\]"),
    ("x complex", lambda: symmetric(x=of(3, 4, dtype=torch.complex64)), Invalid, "x must be float32"),
    ("fp64 rows, fp32 acc", lambda: symmetric(x=of(3, 4, dtype=torch.float64)), Invalid, "must be float64"),
    ("x on another device", lambda: symmetric(x=of(3, 4, device=META)), Invalid, "x on meta"),
    ("weights too short", lambda: symmetric(weights=of(2)), Invalid, r"row_weights must be \[3\]"),
    ("weights of integers", lambda: symmetric(weights=of(3, dtype=torch.int64)), Invalid, "row_weights must"),
    ("mask of numbers", lambda: symmetric(mask=of(3)), Invalid, "mask must be bool"),
    ("mask too long", lambda: symmetric(mask=of(4, dtype=torch.bool)), Invalid, r"mask must be \[3\]"),
    ("alpha NaN", lambda: symmetric(alpha=math.nan), Invalid, "alpha must be finite; got nan"),
    ("x wants a gradient", lambda: symmetric(x=of(3, 4).requires_grad_()), GradientError, "x, which requires grad"),
    ("no such backend", lambda: symmetric(backend="gpu"), BackendUnavailableError, "unknown backend 'gpu'"),
    ("mirror of a rectangle", lambda: mirror_(of(3, 4)), Invalid, "acc must be square"),
    ("weight a vector", lambda: rank_k(weight=of(4)), Invalid, r"weight must be \[out, in\]"),
    ("weight of bytes", lambda: rank_k(weight=of(3, 4).to(torch.uint8)), Invalid, "weight must be float32"),
    ("weight expanded", lambda: rank_k(weight=of(1, 4).expand(3, 4)), Invalid, "weight overlaps itself"),
    ("left too short", lambda: rank_k(left=of(2, 2)), Invalid, r"left must be \[3, k\]"),
    ("another k", lambda: rank_k(right=of(4, 3)), Invalid, r"right must be \[4, 2\]"),
    ("right of integers", lambda: rank_k(right=of(4, 2, dtype=torch.int32)), Invalid, "right must be float32"),
    ("left on another device", lambda: rank_k(left=of(3, 2, device=META)), Invalid, "left on meta"),
    ("copy of bf16", lambda: rank_k(weight=of(3, 4).half(), copy=of(3, 4).half()), Invalid, "copy needs a"),
    ("copy in fp32", lambda: rank_k(copy=of(3, 4)), Invalid, "copy must be bfloat16"),
    ("copy of another shape", lambda: rank_k(copy=of(4, 3).half()), Invalid, r"copy must be \[3, 4\]"),
    ("copy expanded", lambda: rank_k(copy=of(1, 4).half().expand(3, 4)), Invalid, "copy overlaps itself"),
    ("alpha infinite", lambda: rank_k(alpha=math.inf), Invalid, "alpha must be finite; got inf"),
    ("weight wants a gradient", lambda: rank_k(weight=of(3, 4).requires_grad_()), GradientError, "weight, which"),
    ("one moment for groups", lambda: grouped_moment(acc=of(4, 4)), Invalid, r"acc must be \[E, d, d\]; got \[4, 4\]"),
    ("moments not square", lambda: grouped_moment(acc=of(2, 4, 5)), Invalid, r"acc must be \[E, d, d\]"),
    ("moments in bf16", lambda: grouped_moment(acc=of(2, 4, 4).bfloat16()), Invalid, "acc must be float32"),
    ("moments by columns", lambda: grouped_moment(acc=of(2, 8, 4)[:, ::2].mT), Invalid, "contiguous rows"),
    ("moments that are one", lambda: grouped_moment(acc=of(1, 4, 4).expand(2, 4, 4)), Invalid, "acc overlaps itself"),
    ("rows of another width", lambda: grouped_moment(x=of(3, 5)), Invalid, r"x must be \[n, 4\]"),
    ("fp64 rows of groups", lambda: grouped_moment(x=of(3, 4).double()), Invalid, "must be float64"),
    ("an offset too few", lambda: grouped_moment(offsets=OFFSETS[:2]), Invalid, r"offsets must be \[3\], one m"),
    ("offsets of int32", lambda: grouped_moment(offsets=OFFSETS.int()), Invalid, "offsets must be int64"),
    ("offsets that fall", lambda: grouped_moment(offsets=torch.tensor([0, 4, 3])), Invalid, r"rise from 0 to 3, the r"),
    ("rows of no group", lambda: grouped_moment(offsets=torch.tensor([0, 1, 2])), Invalid, r"got \[0, 1, 2\]"),
    ("offsets from 1", lambda: grouped_moment(offsets=torch.tensor([1, 1, 3])), Invalid, r"got \[1, 1, 3\]"),
    ("offsets elsewhere", lambda: grouped_moment(offsets=of(3, dtype=torch.int64, device=META)), Invalid, "offsets on"),
    ("weights of other rows", lambda: grouped_moment(weights=of(2)), Invalid, r"row_weights must be \[3\]"),
    ("alpha of moments NaN", lambda: grouped_moment(alpha=math.nan), Invalid, "alpha must be finite"),
    ("rows that share memory", lambda: grouped_moment(a := of(2, 4, 4), a[0, :3]), Invalid, "acc and x share memory"),
    ("grouped rows want a gradient", lambda: grouped_moment(x=of(3, 4).requires_grad_()), GradientError, "x, which"),
    ("one matrix for groups", lambda: grouped_write(of(3, 4)), Invalid, r"weight must be \[E, out, in\]"),
    ("a stack of integers", lambda: grouped_write(of(2, 3, 4).to(torch.uint8)), Invalid, "weight must be float32"),
    ("a stack that is one", lambda: grouped_write(of(1, 3, 4).expand(2, 3, 4)), Invalid, "weight overlaps itself"),
    ("left of other outputs", lambda: grouped_write(left=of(4, 2)), Invalid, r"left must be \[3, u\]"),
    ("right of other inputs", lambda: grouped_write(right=of(3, 5)), Invalid, r"right must be \[n, 4\]"),
    ("a column too few", lambda: grouped_write(columns=torch.tensor([0, 1])), Invalid, r"columns must be \[3\]"),
    ("columns as numbers", lambda: grouped_write(columns=of(3)), Invalid, "columns must be int64"),
    ("column 2 of 2", lambda: grouped_write(columns=torch.tensor([0, 1, 2])), Invalid, "0 to 1; got 0 to 2"),
    ("column -1", lambda: grouped_write(columns=torch.tensor([0, -1, 1])), Invalid, "0 to 1; got -1 to 1"),
    ("no column", lambda: grouped_write(left=of(3, 0)), Invalid, "columns must be 0 to -1"),
    ("offsets of fewer", lambda: grouped_write(offsets=OFFSETS[:2]), Invalid, r"offsets must be \[3\]"),
    ("rows of right left over", lambda: grouped_write(offsets=torch.tensor([0, 1, 2])), Invalid, "the rows of right"),
    ("a stack's copy in fp32", lambda: grouped_write(copy=of(2, 3, 4)), Invalid, "copy must be bfloat16"),
    ("a copy of one matrix", lambda: grouped_write(copy=of(3, 4).half()), Invalid, r"copy must be \[2, 3, 4\]"),
    ("a copy of half", lambda: grouped_write(of(2, 3, 4).half(), copy=of(2, 3, 4).half()), Invalid, "copy needs a"),
    ("columns elsewhere", lambda: grouped_write(columns=of(3, dtype=torch.int64, device=META)), Invalid, "columns on"),
    ("alpha of a stack infinite", lambda: grouped_write(alpha=math.inf), Invalid, "alpha must be finite"),
    ("a stack wants a gradient", lambda: grouped_write(of(2, 3, 4).requires_grad_()), GradientError, "weight, which"),
    ("matrices for vectors", lambda: rank_one_update_(of(3, 4), of(3, 1), of(4, 1)), Invalid, "be vectors"),
    ("states with three dimensions", lambda: log_probs(of(1, 2, 4)), Invalid, r"hidden must be \[rows, h\]"),
    ("states of integers", lambda: log_probs(of(2, 4, dtype=torch.int64)), Invalid, "hidden must be"),
    ("head of another width", lambda: log_probs(head=of(9, 5)), Invalid, r"head must be \[V, 4\]"),
    ("head without tokens", lambda: log_probs(head=of(0, 4)), Invalid, "with V > 0"),
    ("head of another dtype", lambda: log_probs(head=of(9, 4).double()), Invalid, "head must be float32, bfloat16, "),
    ("head on another device", lambda: log_probs(head=of(9, 4, device=META)), Invalid, "head on meta"),
    ("targets as numbers", lambda: log_probs(targets=of(2)), Invalid, "targets must be int64"),
    ("too few targets", lambda: log_probs(targets=of(1, dtype=torch.int64)), Invalid, r"targets must be \[2\]"),
    ("target 9 of 9", lambda: log_probs(targets=torch.tensor([0, 9])), Invalid, r"\[0, 9\); got 0 to 9"),
    ("target -1", lambda: log_probs(targets=torch.tensor([-1, 0])), Invalid, r"\[0, 9\); got -1 to 0"),
    ("bias of another size", lambda: log_probs(None, None, None, of(8)), Invalid, r"bias must be \[9\]"),
    ("soft-cap negative", lambda: log_probs(softcap=-1.0), Invalid, "softcap must be 0"),
    ("soft-cap NaN", lambda: kl(softcap=math.nan), Invalid, "softcap must be 0"),
    ("head wants a gradient", lambda: kl(head=of(9, 4).requires_grad_()), GradientError, "head, which requires grad"),
    ("reference of another shape", lambda: kl(other=of(3, 4)), Invalid, r"hidden_ref must be \[2, 4\]"),
    ("reference of another dtype", lambda: kl(other=of(2, 4).half()), Invalid, "hidden_ref must be float32"),
    ("gram a rectangle", lambda: spd_solve(of(3, 4), of(3, 1)), Invalid, "gram must be"),
    ("right side of another size", lambda: spd_solve(torch.eye(3), of(4, 1)), Invalid, "rhs must be"),
    ("right side of another dtype", lambda: spd_solve(torch.eye(3), of(3, 1).double()), Invalid, "rhs must be"),
    ("gram in fp16", lambda: spd_solve(torch.eye(3).half(), of(3, 1).half()), Invalid, "gram must be"),
    ("ridge NaN", lambda: spd_solve(torch.eye(3), of(3, 1), math.nan), Invalid, "ridge must be finite"),
    ("norm of a number", lambda: rms_norm(torch.tensor(1.0), of(1)), Invalid, r"x must be \[.., d\]"),
    ("norm of nothing", lambda: rms_norm(of(3, 0), of(0)), Invalid, "d not 0"),
    ("norm of integers", lambda: rms_norm(of(3, 4, dtype=torch.int64), of(4)), Invalid, "x must be float32"),
    ("norm's weight of another size", lambda: rms_norm(of(3, 4), of(3)), Invalid, r"weight must be \[4\]"),
    ("norm's weight in fp64", lambda: rms_norm(of(3, 4), of(4).double()), Invalid, "weight must be float32"),
    ("norm's eps NaN", lambda: rms_norm(of(3, 4), of(4), math.nan), Invalid, "eps must be finite"),
    ("norm's eps negative", lambda: rms_norm(of(3, 4), of(4), -1.0), Invalid, "eps must not be negative"),
    ("norm wants a gradient", lambda: rms_norm(of(3, 4), of(4).requires_grad_()), GradientError, "weight, which"),
    ("norm on another device", lambda: rms_norm(of(3, 4), of(4, device=META)), Invalid, "weight on meta"),
    ("sources of other tokens", lambda: edge_contraction(of(3, 4), of(1, 2, 2, 5), [of(4, 2, 5)], of(1, 3, 4)), Invalid,
     r"mixed must be \[L, 3, H, e\]"),
    ("too few output matrices", lambda: edge_contraction(of(3, 4), of(2, 3, 2, 5), [of(4, 2, 5)], of(2, 3, 4)), Invalid,
     "out_weights must have 2 matrices; got 1"),
    ("slopes without matrices", lambda: edge_contraction(of(3, 4), of(1, 3, 2, 5), [of(4, 2, 5)], of(1, 3, 4),
     slopes=of(1, 3, 3, 2, 5)), Invalid, "in_weights must have 3 matrices; got 0"),
    ("slopes of the logits alone", lambda: edge_contraction(of(3, 4), of(1, 3, 2, 5), [of(4, 2, 5)], of(1, 3, 4),
     last_slopes=of(3, 4)), Invalid, "must be given together"),
    ("a source wants a gradient", lambda: edge_contraction(of(3, 4).requires_grad_(), of(1, 3, 2, 5), [of(4, 2, 5)],
     of(1, 3, 4)), GradientError, "entered, which"),
    ("gate a number", lambda: gated_silu(torch.tensor(1.0), torch.tensor(1.0)), Invalid, r"gate must be \[.., d\]"),
    ("gate of another shape", lambda: gated_silu(of(3, 4), of(4)), Invalid, r"up must be \[3, 4\]"),
    ("gate of another dtype", lambda: gated_silu(of(3, 4), of(3, 4).half()), Invalid, "up must be float32"),
    ("gate wants a second derivative", lambda: second_derivative(gated_silu), GradientError, "gated_silu has no"),
    ("gelu of another shape", lambda: gated_gelu(of(3, 4), of(4)), Invalid, r"up must be \[3, 4\]"),
    ("gelu wants a second derivative", lambda: second_derivative(gated_gelu), GradientError, "gated_gelu has no"),
    ("a step on a vector", lambda: descend(of(4)), Invalid, r"weight must be \[h, d\]"),
    ("a step on bf16", lambda: descend(of(3, 4).bfloat16()), Invalid, "weight must be float32, float64"),
    ("a step's weight expanded", lambda: descend(of(1, 4).expand(3, 4)), Invalid, "weight overlaps itself"),
    ("a step without a gradient", lambda: descend(grad=None), Invalid, "pass either grad, or left and right"),
    ("two gradients", lambda: descend(grad=of(3, 4), left=of(2, 3), right=of(2, 4)), Invalid, "pass either grad"),
    ("left alone", lambda: descend(left=of(2, 3)), Invalid, "pass either grad"),
    ("a gradient by columns", lambda: descend(grad=of(4, 3)), Invalid, r"grad must be \[3, 4\]"),
    ("a gradient of integers", lambda: descend(grad=of(3, 4, dtype=torch.int64)), Invalid, "grad must be float32"),
    ("left [h, N]", lambda: descend(left=of(3, 2), right=of(2, 4)), Invalid, r"left must be \[N, 3\]"),
    ("right of other tokens", lambda: descend(left=of(2, 3), right=of(5, 4)), Invalid, r"right must be \[2, 4\]"),
    ("right elsewhere", lambda: descend(left=of(2, 3), right=of(2, 4, device=META)), Invalid, "right on meta"),
    ("entries as a mask", lambda: descend(entries=of(3, 4, dtype=torch.bool)), Invalid, r"entries must be \[2\]"),
    ("entries of integers", lambda: descend(entries=of(2, dtype=torch.int64)), Invalid, "entries must be uint8"),
    ("a box without a middle", lambda: descend(bound=1.0), Invalid, "bound needs origin"),
    ("a box of another shape", lambda: descend(origin=of(4, 3), bound=1.0), Invalid, r"origin must be \[3, 4\]"),
    ("a box inside out", lambda: descend(origin=of(3, 4), bound=-1.0), Invalid, "bound must be 0 or more"),
    ("a box of NaN", lambda: descend(origin=of(3, 4), bound=math.nan), Invalid, "bound must be 0 or more"),
    ("lr infinite", lambda: descend(lr=math.inf), Invalid, "lr must be finite"),
    ("decay NaN", lambda: descend(decay=math.nan), Invalid, "decay must be finite"),
    ("a step's copy in fp32", lambda: descend(copy=of(3, 4)), Invalid, "copy must be bfloat16"),
    ("a step's copy of fp64", lambda: descend(of(3, 4).double(), copy=of(3, 4).half()), Invalid, "copy needs a"),
    ("a gradient to be differentiated", lambda: descend(grad=of(3, 4).requires_grad_()), GradientError, "grad, which"),
    ("mean in half", lambda: adam(mean=of(3, 4).half()), Invalid, "mean must be float32"),
    ("square of another shape", lambda: adam(square=of(3, 5)), Invalid, r"square must be \[3, 4\]"),
    ("count of one entry", lambda: adam(count=of(1)), Invalid, r"count must be \[\]"),
    ("count in half", lambda: adam(count=of().half()), Invalid, "count must be float32, int64"),
    ("beta 1", lambda: adam(betas=(0.9, 1.0)), Invalid, r"betas\[1\] must be in \[0, 1\); got 1.0"),
    ("eps of Adam negative", lambda: adam(eps=-1.0), Invalid, "eps must not be negative"),
    ("active a number", lambda: adam(active=of()), Invalid, "active must be bool"),
    ("active of one entry", lambda: adam(active=of(1, dtype=torch.bool)), Invalid, r"active must be \[\]"),
    ("active elsewhere", lambda: adam(active=of(dtype=torch.bool, device=META)), Invalid, "active on meta"),
    ("mean the weight", lambda: adam(w := of(3, 4), mean=w), Invalid, "weight and mean share memory"),
    ("no such activation", lambda: distance(None, None, None, None, "tanh"), Invalid, "activation must be one of"),
    ("long negative", lambda: distance(None, None, None, None, "silu", -1), Invalid, "long must not be negative"),
    ("tokens with three dimensions", lambda: distance(of(1, 5, 4)), Invalid, r"x must be \[N, d\]"),
    ("one memory a matrix", lambda: distance(weights=of(3, 4)), Invalid, r"weights must be \[M, h, 4\]"),
    ("outputs of other tokens", lambda: distance(reference=of(4, 3)), Invalid, r"reference must be \[5, 3\]"),
    ("starts as numbers", lambda: distance(starts=of(3)), Invalid, "starts must be int64"),
    ("no starts", lambda: distance(starts=of(0, dtype=torch.int64)), Invalid, r"starts must be \[R \+ 1\]"),
    ("starts that fall", lambda: distance(starts=torch.tensor([0, 3, 2, 5])), Invalid, "starts must rise from 0 to 5"),
    ("starts too short", lambda: distance(starts=torch.tensor([0, 4])), Invalid, "starts must rise from 0 to 5"),
    ("a bias by inputs", lambda: distance(bias=of(4)), Invalid, r"bias must be \[3\]"),
    ("memories want a gradient", lambda: distance(weights=of(2, 3, 4).requires_grad_()), GradientError, "weights, wh"),
    ("memories by inputs", lambda: routed(memories=of(2, 4, 3)), Invalid, r"memories must be \[M, h, 4\]"),
    ("a weight of another width", lambda: routed(weight=of(3, 5)), Invalid, r"weight must be \[3, 4\]"),
    ("neither weight nor output", lambda: routed(weight=None), Invalid, "pass either weight or output"),
    ("an output in half", lambda: routed(output=of(5, 3).half()), Invalid, "output must be float32"),
    ("routes of sequences", lambda: routed(route=of(2, dtype=torch.int64)), Invalid, r"route must be \[5\]"),
    ("routes as numbers", lambda: routed(route=of(5)), Invalid, "route must be int64"),
    ("a route too far", lambda: routed(route=torch.tensor([0, 1, 2, -1, 0])), Invalid, "-1 to 1; got -1 to 2"),
    ("rows want a gradient", lambda: routed(of(5, 4).requires_grad_()), GradientError, "x, which requires grad"),
    ("queries a vector", lambda: nearest(queries=of(4)), Invalid, r"queries must be \[N, d\]"),
    ("queries of integers", lambda: nearest(queries=of(2, 4, dtype=torch.int64)), Invalid, "queries must be float32"),
    ("keys of another width", lambda: nearest(keys=of(3, 5)), Invalid, r"keys must be \[K, 4\]"),
    ("too few radii", lambda: nearest(radii=of(2)), Invalid, r"radii must be \[3\]"),
    ("radii in fp16", lambda: nearest(radii=of(3).half()), Invalid, "radii must be float32"),
    ("keys on another device", lambda: nearest(keys=of(3, 4, device=META)), Invalid, "keys on meta"),
    ("keys want a gradient", lambda: nearest(keys=of(3, 4).requires_grad_()), GradientError, "keys, which"),
    ("masks a vector", lambda: best_overlap(of(4, **BYTES), of(2, 4, **BYTES)), Invalid, r"masks must be \[R, b\]"),
    ("masks of floats", lambda: best_overlap(of(2, 4), of(2, 4, **BYTES)), Invalid, "masks must be uint8"),
    ("book of another width", lambda: best_overlap(of(2, 4, **BYTES), of(2, 3, **BYTES)), Invalid, "book must be"),
    ("book of bools", lambda: best_overlap(of(2, 4, **BYTES), of(2, 4).bool()), Invalid, "book must be uint8"),
    ("count 0", lambda: magnitude_bound(of(3), 0), Invalid, r"count must be in \[1, 3\]"),
    ("count 4 of 3", lambda: magnitude_bound(of(3), 4), Invalid, r"count must be in \[1, 3\]"),
    ("bound of nothing", lambda: magnitude_bound(of(0), 1), Invalid, r"count must be in \[1, 0\]"),
    ("bound of integers", lambda: magnitude_bound(of(3, dtype=torch.int64), 1), Invalid, "x must be float32"),
    ("divisor of another shape", lambda: magnitude_bound(of(3), 1, of(4)), Invalid, r"divisor must be \[3\]"),
    ("divisor wants a gradient", lambda: magnitude_bound(of(3), 1, of(3).requires_grad_()), GradientError, "divisor"),
    ("merge into a vector", lambda: ties(out=of(4)), Invalid, r"out must be \[3, 4\]"),
    ("base with three dimensions", lambda: ties(base=of(1, 3, 4)), Invalid, r"base must be \[h, d\]"),
    ("memories of another shape", lambda: ties(memories=of(2, 4, 3)), Invalid, r"memories must be \[M, 3, 4\]"),
    ("17 memories", lambda: ties(memories=of(17, 3, 4)), Invalid, "M from 1 to 16"),
    ("no memory", lambda: ties(memories=of(0, 3, 4), coefficients=()), Invalid, "M from 1 to 16"),
    ("a coefficient too few", lambda: ties(coefficients=(1.0,)), Invalid, "coefficients must be 2"),
    ("a coefficient NaN", lambda: ties(coefficients=(1.0, math.nan)), Invalid, "each of coefficients must be finite"),
    ("density 1.5", lambda: ties(density=1.5), Invalid, r"density must be in \[0, 1\]; got 1.5"),
    ("density NaN", lambda: ties(density=math.nan), Invalid, "density must be finite"),
    ("merge into a memory", lambda: ties(out=SHARED[0], memories=SHARED), Invalid, "out and memories share memory"),
    ("out expanded", lambda: ties(out=of(1, 4).expand(3, 4)), Invalid, "out overlaps itself"),
    ("gram not positive", lambda: spd_solve(-torch.eye(3), of(3, 1)), SolveError, "order 1 of 3"),
    ("tails in rows", lambda: tails(of(2, 5, 4, 3)), Invalid, r"query must be \[N, heads, size\]"),
    ("heads of nothing", lambda: tails(of(5, 4, 0), of(5, 2, 0), of(5, 2, 0)), Invalid, "query must have heads"),
    ("keys of other tokens", lambda: tails(key=of(4, 2, 3)), Invalid, r"key must be \[5, groups, 3\]"),
    ("three groups", lambda: tails(key=of(5, 3, 3)), Invalid, "groups of key must divide 4 heads; got 3"),
    ("values of other groups", lambda: tails(value=of(5, 4, 3)), Invalid, r"value must be \[5, 2, 3\]"),
    ("keys in half", lambda: tails(key=of(5, 2, 3).half()), Invalid, "key must be float32; got"),
    ("tails of integers", lambda: tails(of(5, 4, 3, dtype=torch.int64)), Invalid, "query must be float32, float64"),
    ("starts of int32", lambda: tails(starts=torch.tensor([0, 2, 5]).int()), Invalid, "starts must be int64"),
    ("starts that end early", lambda: tails(starts=(0, 2, 4)), Invalid, "starts must rise from 0 to 5"),
    ("starts that fall", lambda: tails(starts=(0, 6, 5)), Invalid, "starts must rise from 0 to 5"),
    ("a longer tail", lambda: tails(longest=2), Invalid, "longest must be 3 or more"),
    ("scale NaN", lambda: tails(scale=math.nan), Invalid, "scale must be finite"),
    ("softcap negative", lambda: tails(softcap=-1.0), Invalid, "softcap must be 0"),
    ("a window of nothing", lambda: tails(window=0), Invalid, "window must be 1 or more"),
    ("prefixes without spans", lambda: prefixed(spans=None), Invalid, "come together"),
    ("prefixes of other groups", lambda: prefixed(of(2, 4, 4, 3)), Invalid, r"prefix_keys must be \[M, 2, P, 3\]"),
    ("prefix values shorter", lambda: prefixed(values=of(2, 2, 3, 3)), Invalid, r"prefix_values must be \[2, 2, 4"),
    ("prefixes in half", lambda: prefixed(of(2, 2, 4, 3).half()), Invalid, "prefix_keys must be float32"),
    ("a prefix too few", lambda: prefixed(*[of(1, 2, 4, 3)] * 2), Invalid, "or pass prefix_rows"),
    ("spans past the end", lambda: prefixed(spans=((0, 4), (1, 5))), Invalid, r"<= end in \[0, 4\]"),
    ("spans backwards", lambda: prefixed(spans=((0, 4), (3, 1))), Invalid, "spans must be begin <= end"),
    ("spans of one row", lambda: prefixed(spans=((0, 4),)), Invalid, r"spans must be \[2, 2\]"),
    ("prefix rows outside", lambda: prefixed(prefix_rows=torch.tensor([0, 2])), Invalid, r"in \[0, 2\)"),
    ("prefix rows alone", lambda: tails(prefix_rows=torch.tensor([0, 1])), Invalid, "prefix_rows needs prefix_keys"),
    ("prefixes elsewhere", lambda: prefixed(of(2, 2, 4, 3, device=META)), Invalid, "prefix_keys on meta"),
    ("a prefix's gradient", lambda: prefixed(of(2, 2, 4, 3).requires_grad_()), GradientError, "prefix_keys, which"),
]  # fmt: skip


@pytest.fixture
def backend(every_backend):
    """Each form of an op."""
    return every_backend


@pytest.mark.parametrize(("call", "error", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_is_named(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert isinstance(caught.value, KeditError)


@pytest.mark.parametrize("broken", ("x", "row_weights"))
def test_a_not_finite_row_that_counts_shows(broken, backend):
    x, weights = torch.randn(5, 3), torch.ones(5)
    (x if broken == "x" else weights[:, None])[2, 0] = math.nan
    acc = symmetric_rank_k_update_(torch.zeros(3, 3), x, weights, backend=backend)
    touched = acc[torch.tril(torch.ones(3, 3, dtype=torch.bool))] if broken == "row_weights" else acc[:, 0]
    assert bool(torch.isnan(touched).all())


def test_nothing_is_written_when_an_argument_is_bad(backend):
    acc, weight, copy = torch.randn(4, 4), torch.randn(3, 4), torch.randn(3, 4).half()
    before = acc.clone(), weight.clone(), copy.clone()
    with pytest.raises(InvalidArgumentError):
        symmetric_rank_k_update_(acc, acc[:2], backend=backend)
    with pytest.raises(InvalidArgumentError):
        rank_k_update_(weight, weight[:, :2], of(4, 2), copy=copy, backend=backend)
    with pytest.raises(InvalidArgumentError):
        rank_k_update_(weight, of(3, 2), of(4, 2), copy=copy[:, :3], backend=backend)
    with pytest.raises(InvalidArgumentError):
        masked_descent_(weight, 0.1, grad=of(3, 4), copy=copy[:, :3], backend=backend)
    with pytest.raises(InvalidArgumentError):
        grouped_symmetric_rank_k_update_(acc[None], of(3, 4), torch.tensor([0, 2]), backend=backend)
    with pytest.raises(InvalidArgumentError):
        grouped_rank_k_update_(
            weight[None], of(3, 2), of(1, 4), torch.tensor([2]), torch.tensor([0, 1]), backend=backend
        )
    with pytest.raises(InvalidArgumentError):
        masked_adam_(weight, of(3, 4), of(3, 4), of(1), 0.1, grad=of(3, 4), copy=copy, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before, (acc, weight, copy), strict=True))


def test_views_with_a_negative_bit_are_read_as_the_numbers_they_are(backend):
    pairs = torch.randn(5, 4, dtype=torch.complex64)
    x = pairs.conj().imag
    assert x.is_neg()
    found = symmetric_rank_k_update_(torch.zeros(4, 4), x, backend=backend)
    torch.testing.assert_close(found, symmetric_rank_k_update_(torch.zeros(4, 4), -pairs.imag, backend="torch"))
