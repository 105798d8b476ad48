"""Attention of tail tokens over prefixes that do not change, with the tokens of all rows packed into one.

transformers' own path pads rows to one length, puts prefix and tail together anew for every layer and pass, repeats
keys and values for grouped heads, makes a mask, and computes gradients for the prefix. Here the blocks see the tail
tokens of all rows as one row without padding; only the attention between them is laid out by rows, in a place where
the prefix already lies, and gradients go to the tail alone. It takes the place of the model's attention function
through transformers' registry of attention functions; models or versions without one keep theirs, see `usable`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from kedit_fast.models.patching import replaced_attention, takes_attention_functions
from kedit_fast.models.view import ModelView


def usable(view: ModelView) -> bool:
    """Whether the model takes its attention from transformers' registry, and states its scaling."""
    return (
        takes_attention_functions(view.base, view.config)
        and not getattr(view.config, "use_bidirectional_attention", False)
        and all(hasattr(view.attention(layer), "scaling") for layer in range(view.num_layers))
    )


@dataclass(frozen=True)
class Joint:
    """Keys and values [R, groups, P + S, size] of one layer, the last S places written anew by each pass."""

    keys: torch.Tensor
    values: torch.Tensor

    def padded(self, before: int, behind: int) -> Joint:
        """With empty places before and behind."""
        return Joint(*(torch.nn.functional.pad(part, (0, 0, before, behind)) for part in (self.keys, self.values)))

    def select(self, rows: torch.Tensor, begin: int, end: int) -> Joint:
        """The places begin to end of some rows."""
        return Joint(*(part[rows.to(part.device), :, begin:end].contiguous() for part in (self.keys, self.values)))

    @staticmethod
    def cat(joints: Sequence[Joint]) -> Joint:
        """All rows of joints of one length."""
        return Joint(torch.cat([joint.keys for joint in joints]), torch.cat([joint.values for joint in joints]))


class Layout:
    """Where the packed tail tokens of R rows stand, and who may look at whom.

    Args:
        inside: [R, S] which places of the tails hold a token; packed tokens are in this order.
        positions: [R, S] of the tokens in their own prompts.
        prefix: P, the places for prefixes; those of a row end where its tail begins.
        lookup: [R] position of each tail's first token, which is the length of its prefix.
    """

    def __init__(self, inside: torch.Tensor, positions: torch.Tensor, prefix: int, lookup: torch.Tensor):
        self.row, self.place = torch.nonzero(inside, as_tuple=True)  # of every packed token [N]
        self.shape, self.prefix = inside.shape, prefix
        slots = torch.arange(prefix, device=inside.device) - (prefix - lookup)[:, None]  # [R, P] positions
        self.keys_at = torch.cat([slots, positions], 1)  # [R, P + S]
        self.is_key = torch.cat([slots >= 0, inside], 1)
        self.queries_at = positions
        self._bias: dict[int | None, torch.Tensor] = {}

    def bias(self, window: int | None) -> torch.Tensor:
        """What is added to scores [R, 1, S, P + S]: 0, or the least number where a query may not look."""
        if window not in self._bias:
            ago = self.queries_at[:, :, None] - self.keys_at[:, None]  # [R, S, P + S]
            seen = self.is_key[:, None] & (ago >= 0)
            if window is not None:
                seen = seen & (ago < window)
            bias = torch.zeros(seen.shape, dtype=torch.float32, device=seen.device)
            self._bias[window] = bias.masked_fill_(~seen, torch.finfo(torch.float32).min)[:, None]
        return self._bias[window]


@dataclass(frozen=True)
class _Tail:
    """What the cache hands the attention function for keys: the tail's, and where they belong."""

    keys: torch.Tensor
    joint: Joint
    layout: Layout


class TailCache(DynamicCache):
    """A cache whose prefixes are fixed: `update` returns the tail's keys with the place they go to."""

    def __init__(self, joints: dict[int, Joint], layout: Layout):
        super().__init__()
        self.joints, self.layout = joints, layout

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):  # noqa: D102
        return _Tail(key_states, self.joints[layer_idx], self.layout), value_states

    def get_seq_length(self, *args, **kwargs) -> int:  # noqa: D102
        return 0

    def get_mask_sizes(self, *args, **kwargs) -> tuple[int, int]:  # noqa: D102
        return 0, 0


@contextlib.contextmanager
def installed(view: ModelView) -> Iterator[None]:
    """Inside the block the model's attention is `_attention`."""
    with replaced_attention(view.base, _attention):
        yield


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: _Tail,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    scale = module.scaling if scaling is None else scaling
    bias = key.layout.bias(sliding_window)
    packed = (part[0].transpose(0, 1) for part in (query, key.keys, value))  # [N, heads, size]
    output = _TailAttention.apply(*packed, key.joint, key.layout, bias, scale, softcap or 0.0)
    return output[None], None  # [1, N, heads, size]


class _TailAttention(torch.autograd.Function):
    """softmax(cap(scale Q [Kp, K]^T) + bias) [Vp, V] for every row, differentiable in Q, K and V of the tail.

    Source: Vaswani et al. 2017, arXiv 1706.03762, eq. 1; grouped heads by Ainslie et al. 2023, arXiv 2305.13245.
    """

    @staticmethod
    def forward(ctx, query, key, value, joint: Joint, layout: Layout, bias, scale: float, softcap: float):
        (rows, tail), prefix = layout.shape, layout.prefix
        heads, groups = query.shape[1], key.shape[1]
        row, place = layout.row.to(query.device), layout.place.to(query.device)
        joint.keys[row, :, prefix + place] = key
        joint.values[row, :, prefix + place] = value
        keys, values = (part.flatten(0, 1) for part in (joint.keys, joint.values))  # [R groups, P + S, size]
        queries = _rows(query, rows, tail, row, place).view(rows * groups, -1, query.shape[2])
        scores = torch.bmm(queries, keys.mT)  # [R groups, heads / groups * S, P + S]
        wide = scores if scores.dtype == torch.float64 else scores.float()
        wide = wide.mul_(scale)
        capped = ()
        if softcap:
            capped = (torch.tanh(wide / softcap),)
            wide = capped[0] * softcap
        wide.view(rows, heads, tail, -1).add_(bias.to(wide.device))
        weights = torch.softmax(wide, -1).to(query.dtype)
        ctx.save_for_backward(queries, weights, row, place, *capped)
        ctx.joint, ctx.scale, ctx.shape = (keys, values), scale, (rows, heads, groups, tail)
        return torch.bmm(weights, values).view(rows, heads, tail, -1)[row, :, place]

    @staticmethod
    def backward(ctx, gradient):
        queries, weights, row, place, *capped = ctx.saved_tensors
        keys, values = ctx.joint
        rows, heads, groups, tail = ctx.shape
        out = _rows(gradient, rows, tail, row, place).view(queries.shape)
        of_weights = torch.bmm(out, values.mT)
        wide = weights if weights.dtype == torch.float64 else weights.float()
        of_scores = torch._softmax_backward_data(of_weights.to(wide.dtype), wide, -1, wide.dtype)
        if capped:
            of_scores = of_scores * (1 - capped[0].square())
        of_scores = of_scores.mul_(ctx.scale).to(queries.dtype)
        of_query = torch.bmm(of_scores, keys).view(rows, heads, tail, -1)[row, :, place]
        of_key = torch.bmm(of_scores[..., -tail:].mT, queries).view(rows, groups, tail, -1)[row, :, place]
        of_value = torch.bmm(weights[..., -tail:].mT, out).view(rows, groups, tail, -1)[row, :, place]
        return of_query, of_key, of_value, None, None, None, None, None


def _rows(packed: torch.Tensor, rows: int, tail: int, row: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Packed tokens [N, heads, size] laid out as [rows, heads, tail, size], zero elsewhere."""
    laid = packed.new_zeros(rows, packed.shape[1], tail, packed.shape[2])
    laid[row, :, place] = packed
    return laid
