"""Experts modules of transformers 5: their stacked weight, and the stacked keys of the tokens that enter them.

Such a module puts out sum_e g_e (W_e a_e + b_e) over the experts e that a router chose for a token, with gates g_e and
activations a_e. That is one linear layer with the weight [W_1 ... W_E] [h, E m] and the key [g_1 a_1; ...; g_E a_E],
which is zero where an expert was not chosen. Shared experts can be one more block of both (`models.shared_experts`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers

from kedit_fast.errors import UnsupportedModelError
from kedit_fast.models.shared_experts import SharedExpert
from kedit_fast.models.weight_names import EXPERTS_WEIGHT
from kedit_fast.support.dtypes import FLOATS
from kedit_fast.support.messages import comma_list

_EXPERTS_NAME = re.compile(r"expert|moe", re.IGNORECASE)
TRANSFORMERS = transformers.__version__
_QUANTIZERS = "transformers.integrations."  # where transformers has the modules that it puts in place of quantized ones


@dataclass(frozen=True)
class ExpertStack:
    """The experts of one layer, as one matrix."""

    module: Any
    """The experts module."""
    path: str
    """Its path in the model."""
    count: int
    """Number of experts E."""
    inputs: int
    """Size m of an expert's activation, the input of its last matrix."""
    outputs: int
    """Size h of what an expert puts out."""
    shared: SharedExpert | None = None
    """The shared experts that are one more block of the matrix; None without."""

    @property
    def size(self) -> int:
        """Columns of the matrix: E m, and those of shared experts."""
        return self.count * self.inputs + self.shared_inputs

    @property
    def shared_inputs(self) -> int:
        """Columns m_s of the shared experts' block; 0 without it."""
        return 0 if self.shared is None else self.shared.inputs

    @property
    def weight(self) -> torch.Tensor:
        """[E, h, m], a view on the model's memory whatever the stored orientation."""
        stored = self.module.down_proj.detach()
        return stored.mT if self.module.is_transposed else stored


def is_expert_module(module: Any) -> bool:
    """Whether a module has the experts interface of transformers 5: a stacked `down_proj` and what to know of it."""
    weight = getattr(module, EXPERTS_WEIGHT, None)
    return (
        isinstance(weight, torch.Tensor)
        and weight.ndim == 3
        and all(isinstance(getattr(module, name, None), bool) for name in ("is_transposed", "has_bias", "has_gate"))
    )


def is_mixture(base: torch.nn.Module) -> bool:
    """Whether modules of a decoder are, by their names or classes, those of a mixture of experts."""
    return any(_EXPERTS_NAME.search(f"{path} {type(module).__name__}") for path, module in base.named_modules())


def expert_stack(model: torch.nn.Module, path: str) -> ExpertStack:
    """The stack of an experts module, by its path.

    Args:
        model: the causal language model.
        path: of the experts module, `model.layers.4.mlp.experts`.

    Raises:
        UnsupportedModelError: no experts interface, a norm behind the experts, expert parallelism, quantized or
            sharded weights, or no activation that can be computed again; the message names the module.
    """
    module: Any = model.get_submodule(path)
    kind = type(module).__name__
    if problem := refusal(module):
        raise UnsupportedModelError(f"{path} ({kind}) {problem}")
    count, outputs, inputs = stack_shape(module)
    return ExpertStack(module, path, count, inputs, outputs)


def stack_shape(module: Any) -> tuple[int, int, int]:
    """The shape [E, h, m] of the stacked matrix of an experts module, whatever the stored orientation."""
    weight = module.down_proj
    return tuple((weight.mT if module.is_transposed else weight).shape)


def refusal(module: Any) -> str:
    """Why the stacked matrix of an experts module cannot be edited, to follow its name; "" if it can."""
    weight = getattr(module, EXPERTS_WEIGHT, None)
    dtype = getattr(weight, "dtype", None)
    if type(module).__module__.startswith(_QUANTIZERS) or (isinstance(weight, torch.Tensor) and dtype not in FLOATS):
        return f"is quantized ({dtype}): load the model in float32, bfloat16 or float16 to edit it"
    if getattr(module, "_is_expert_parallel", False):
        return "is expert-parallel, so each process holds some of the experts: load the model whole to edit it"
    if not is_expert_module(module):
        if int(TRANSFORMERS.split(".")[0]) < 5:
            return (
                "has no experts interface: transformers brings it from version 5 on, and "
                f"{TRANSFORMERS} is installed (pip install 'transformers>=5')"
            )
        return (
            "has no experts interface (a stacked down_proj with is_transposed, has_bias and has_gate, as most mixtures "
            "of transformers 5 have), so what its experts compute cannot be told"
        )
    if type(weight) not in (torch.Tensor, torch.nn.Parameter):
        return f"has a sharded or packed down_proj ({type(weight).__name__}): load the model whole to edit it"
    if getattr(module, "has_post_expert_norm", False):
        return "has a norm behind each expert, so what it puts out is not linear in down_proj"
    entry = "gate_up_proj" if module.has_gate else "up_proj"
    names = [entry, "_apply_gate" if module.has_gate else "act_fn"]
    if module.has_bias:
        names += [f"{entry}_bias", f"{EXPERTS_WEIGHT}_bias"]
    if missing := [name for name in names if not hasattr(module, name)]:
        return f"lacks {comma_list(missing)}, so what its experts compute cannot be told"
    return ""


@dataclass(frozen=True)
class ExpertRows:
    """The chosen pairs (token, expert) of some tokens, sorted by expert and, within one, by token."""

    rows: torch.Tensor
    """[n, m] activations a, the inputs of the experts' last matrices, in the dtype of the pass."""
    gates: torch.Tensor
    """[n] weights g of the router."""
    tokens: torch.Tensor
    """[n] int64, which of the given tokens."""
    offsets: torch.Tensor
    """[E + 1] int64: the pairs of expert e are offsets[e] to offsets[e + 1]."""
    shared: torch.Tensor | None = None
    """[T, m_s] the shared experts' activations of the given tokens; None where they are no block of the stack."""
    shared_gates: torch.Tensor | None = None
    """[T] their gates; None for 1 each."""

    @property
    def experts(self) -> torch.Tensor:
        """[n] int64, the expert of each pair."""
        counts = self.offsets.diff()
        every = torch.arange(len(counts), device=counts.device)
        return every.repeat_interleave(counts, output_size=len(self.rows))  # without the size it waits for the device

    @classmethod
    def joined(cls, parts: Sequence[ExpertRows], tokens: Sequence[int]) -> ExpertRows:
        """The pairs of several groups of tokens as those of one, without waiting for the device.

        Args:
            parts: of one experts module.
            tokens: how many tokens each of them numbers; those of later parts get numbers behind those of earlier ones.

        Cost: the rows are copied once.
        """
        if len(parts) == 1:
            return parts[0]
        order = torch.argsort(torch.cat([part.experts for part in parts]), stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        rows = parts[0].rows.new_empty(len(order), parts[0].rows.shape[1])
        for part, places in zip(parts, place.split([len(part.rows) for part in parts]), strict=True):
            rows.index_copy_(0, places, part.rows)
        before = itertools.accumulate(tokens, initial=0)
        of_all = [part.tokens + first for part, first in zip(parts, before, strict=False)]
        shared = [part.shared for part in parts if part.shared is not None]
        gates = [part.shared_gates for part in parts if part.shared_gates is not None]
        return cls(
            rows,
            torch.cat([part.gates for part in parts])[order],
            torch.cat(of_all)[order],
            torch.stack([part.offsets for part in parts]).sum(0),
            torch.cat(shared) if shared else None,
            torch.cat(gates) if gates else None,
        )

    def stacked(self, count_of_tokens: int) -> torch.Tensor:
        """The stacked keys [T, E m], k = g a in the expert's place and zero elsewhere, in float32 (float64 of float64).

        With shared experts they are [T, E m + m_s].

        Cost: T E m numbers of memory, twice with shared experts.
        """
        dtype = torch.float64 if self.rows.dtype == torch.float64 else torch.float32
        experts = len(self.offsets) - 1
        size = self.rows.shape[1]
        keys = torch.zeros(count_of_tokens * experts, size, dtype=dtype, device=self.rows.device)
        keys.index_add_(0, self.tokens * experts + self.experts, self.rows.to(dtype) * self.gates.to(dtype)[:, None])
        keys = keys.view(count_of_tokens, experts * size)
        if self.shared is None:
            return keys
        return torch.cat([keys, _scaled(self.shared.to(dtype), self.shared_gates)], 1)


@dataclass(frozen=True)
class ExpertInputs:
    """What enters an experts module in a pass; tokens of all rows after each other."""

    stack: ExpertStack
    states: torch.Tensor
    """[R T, h'] hidden states."""
    index: torch.Tensor
    """[R T, k] the chosen experts of each token; numbers past the last expert stand for none."""
    weights: torch.Tensor
    """[R T, k] their gates."""

    def rows(self, places: torch.Tensor | None = None) -> ExpertRows:
        """The activations of the chosen experts, computed again with the module's own functions.

        Args:
            places: [T'] int64, tokens among the R T; None for all.

        Returns:
            pairs of those tokens, numbered as `places` lists them.

        Cost: 2 n h' m flops (twice that with gates), a product for each expert that was chosen; one read by the host.
            Of shared experts all but the last matrix runs again.
        """
        states, index, gates = self.states, self.index, self.weights
        if places is not None:
            places = places.to(states.device)
            states, index, gates = states[places], index[places], gates[places]
        index, gates = _once(index, gates, self.stack.count)
        pairs = index.reshape(-1)
        order = torch.argsort(pairs, stable=True)
        order = order[pairs[order] < self.stack.count]
        experts = pairs[order]
        tokens = order // index.shape[1]
        offsets = torch.searchsorted(experts, torch.arange(self.stack.count + 1, device=experts.device))
        rows = states.new_empty(len(order), self.stack.inputs)
        entering = states[tokens]
        bounds = offsets.tolist()
        for expert, (first, last) in enumerate(itertools.pairwise(bounds)):
            if last > first:
                rows[first:last] = _activations(self.stack.module, expert, entering[first:last])
        pairs_of = ExpertRows(rows, gates.reshape(-1)[order], tokens, offsets)
        if (shared := self.stack.shared) is None:
            return pairs_of
        return replace(pairs_of, shared=shared.activations(states), shared_gates=shared.gates(states))

    def stacked(self, places: torch.Tensor | None = None) -> torch.Tensor:
        """The stacked keys [T', E m] of some tokens; see `ExpertRows.stacked`."""
        return self.rows(places).stacked(len(self.states if places is None else places))

    def shared_outputs(self) -> torch.Tensor:
        """What shared experts in the stack must add to the module's output, [R T, h]."""
        shared = self.stack.shared
        assert shared is not None
        rows = shared.activations(self.states)
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        out = rows.to(dtype) @ shared.weight.to(dtype).T
        if shared.last.bias is not None:
            out = out + shared.last.bias.to(dtype)
        return _scaled(out, shared.gates(self.states))

    def outputs(self) -> torch.Tensor:
        """What the module must put out, [R T, h]: the stacked keys times the stacked matrix, and the gated biases."""
        pairs, module = replace(self, stack=replace(self.stack, shared=None)).rows(), self.stack.module
        dtype = torch.float64 if pairs.rows.dtype == torch.float64 else torch.float32
        out = torch.zeros(len(self.states), self.stack.outputs, dtype=dtype, device=pairs.rows.device)
        for expert, (first, last) in enumerate(itertools.pairwise(pairs.offsets.tolist())):
            if last > first:
                part = pairs.rows[first:last].to(dtype) @ self.stack.weight[expert].to(dtype).T
                if module.has_bias:
                    part = part + module.down_proj_bias[expert].to(dtype)
                out.index_add_(0, pairs.tokens[first:last], part * pairs.gates[first:last, None].to(dtype))
        return out


def _once(index: torch.Tensor, gates: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen experts and gates [T, k], an expert that a token chose twice (hashed routers may) once, with both gates.

    Places of its later choices get the number `count`, which stands for no expert.
    """
    same = index[:, :, None] == index[:, None, :]  # [T, k, k]
    gates = torch.where(same, gates[:, None, :], 0).sum(-1)
    repeated = same.tril(-1).any(-1)
    return index.masked_fill(repeated, count), gates


def expert_inputs(stack: ExpertStack, values: Sequence[Any], tokens: int) -> ExpertInputs:
    """What a call of an experts module got, from its arguments in order: states, index, weights.

    Args:
        stack: of the module.
        values: its arguments.
        tokens: number of tokens R T in the pass.

    Raises:
        UnsupportedModelError: the arguments are not these, or not of all tokens.
    """
    shapes = [list(v.shape) if isinstance(v, torch.Tensor) else type(v).__name__ for v in values]
    if len(values) >= 3 and all(isinstance(value, torch.Tensor) and value.ndim >= 2 for value in values[:3]):
        states, index, weights = (value.flatten(0, -2) for value in values[:3])
        whole_numbers = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
        if len(states) == len(index) == tokens and index.shape == weights.shape and whole_numbers:
            return ExpertInputs(stack, states, index, weights)
    raise UnsupportedModelError(
        f"{stack.path} was called with {comma_list(shapes)}, not with states, chosen experts and their weights of all "
        f"{tokens} tokens of a batch: a model that cuts batches into parts or packs their tokens cannot be edited"
    )


def _scaled(rows: torch.Tensor, gates: torch.Tensor | None) -> torch.Tensor:
    return rows if gates is None else rows * gates.to(rows.dtype)[:, None]


def _activations(module: Any, expert: int, states: torch.Tensor) -> torch.Tensor:
    """The input [n, m] of one expert's last matrix, from the states [n, h'] that enter it."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    weight = getattr(module, name)[expert].to(states.dtype)
    out = states @ (weight if module.is_transposed else weight.T)
    if module.has_bias:
        out = out + getattr(module, f"{name}_bias")[expert].to(states.dtype)
    return module._apply_gate(out) if module.has_gate else module.act_fn(out)
