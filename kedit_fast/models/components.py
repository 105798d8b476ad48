"""Decoder blocks opened into the nodes of a circuit: attention heads with their q, k and v, MLPs, and what joins them.

Where the parts are is read from one observed pass, not from names alone: the norm before the attention is the module
whose output the attention takes, the norm before the MLP likewise, and so on. Then it is tried on a few tokens that
the residual stream is the sum of what enters it, that a norm computes what its formula says, and that y = W norm(x) + b
and W_O z + b are what the model computes. A model where this does not hold is refused, by the module's name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from kedit_fast.errors import UnsupportedModelError
from kedit_fast.models.editable import is_adapter
from kedit_fast.models.forward import (
    TokenBatch,
    as_rows,
    evaluating,
    hidden_of,
    last_states,
    pad,
    with_hidden,
)
from kedit_fast.models.head import error_limit, refused_by_name, relative_error, sample_rows
from kedit_fast.models.patching import attribute_slot, input_hooks, output_hooks
from kedit_fast.models.view import ModelView
from kedit_fast.support.dtypes import FLOATS
from kedit_fast.support.messages import first_line
from kedit_fast.support.torch_state import plain_torch

HeadInput = Literal["q", "k", "v"]
HEAD_INPUTS: tuple[HeadInput, ...] = get_args(HeadInput)
_SEPARATE = ("q_proj", "k_proj", "v_proj")
# Fused projections: name -> how their outputs are ordered.
_FUSED = {"c_attn": "thirds", "query_key_value": "by head", "qkv_proj": "thirds"}
_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense")
_COUNTS_OF_GROUPS = ("num_key_value_heads", "num_key_value_groups")
_EPSILONS = ("eps", "variance_epsilon")


@dataclass(frozen=True)
class NormFormula:
    """gain * (x - mean) / sigma + offset with a mean (LayerNorm), or gain * x / root mean square without."""

    centered: bool
    """Whether the mean is subtracted."""
    eps: float
    """Added to the variance, or to the mean square."""
    plus_one: bool
    """Whether the gain is 1 + the stored weight."""

    def scale(self, x: torch.Tensor) -> torch.Tensor:
        """sigma or the root mean square [..], of states [.., d]."""
        if self.centered:
            return (x.var(-1, correction=0) + self.eps).sqrt()
        return (x.square().mean(-1) + self.eps).sqrt()

    def standardized(self, x: torch.Tensor) -> torch.Tensor:
        """x over its scale, minus the mean where one is subtracted, [.., d]."""
        centered = x - x.mean(-1, keepdim=True) if self.centered else x
        return centered / self.scale(x)[..., None]


class Visitor:
    """What is called in a pass at the places of a circuit's nodes; a returned tensor takes the place of what was there.

    States are [R, T, d], inputs of heads and their mixed values [R, T, H, e] with H query heads of size e. Layers count
    from zero. In models with grouped queries each query head has keys and values of its own, see `Components`.
    """

    def entering(self, states: torch.Tensor) -> torch.Tensor | None:
        """The residual stream before the first block: what the node "input" puts out, and positions, if any."""

    def attention_input(self, layer: int, states: torch.Tensor) -> torch.Tensor | None:
        """The residual stream before the norm of the attention."""

    def head_input(self, layer: int, kind: HeadInput, y: torch.Tensor) -> torch.Tensor | None:
        """y = W norm(x) + b: before norms of heads and before rotary positions. Not called where attention is whole."""

    def mixed(self, layer: int, z: torch.Tensor) -> torch.Tensor | None:
        """What the heads put out before their output matrix. Not called where attention is whole."""

    def attention_output(self, layer: int, output: torch.Tensor) -> torch.Tensor | None:
        """What the attention adds to the residual stream, behind a post-norm."""

    def mlp_input(self, layer: int, states: torch.Tensor) -> torch.Tensor | None:
        """The residual stream before the norm of the MLP. A replacement reaches the MLP alone."""

    def mlp_output(self, layer: int, output: torch.Tensor) -> torch.Tensor | None:
        """What the MLP adds to the residual stream, behind a post-norm."""

    def last(self, states: torch.Tensor) -> torch.Tensor | None:
        """The residual stream before the last norm."""


@dataclass(frozen=True)
class _Projection:
    """One linear layer that gives q, k and v, or one of them."""

    module: Any
    kinds: tuple[HeadInput, ...]
    order: str
    """Of a fused one: "thirds" for all queries, keys, values; "by head" for q, k, v of one head after another."""


@dataclass(frozen=True)
class _Block:
    """The modules of one block that are hooked."""

    attention: Any
    attention_norm: Any
    """None where the attention reads the residual stream as it is (OLMo 2)."""
    attention_end: Any
    """Whose output is added to the residual stream: the attention, or the norm after it."""
    mlp: Any
    mlp_norm: Any
    mlp_end: Any
    projections: tuple[_Projection, ...]
    """Empty where the attention is whole."""
    output: Any
    """The linear layer of the heads' outputs; None where the attention is whole."""


class Components:
    """The nodes of a model's blocks, with their matrices, and passes that read and change what goes between them.

    Made by `open_components`. Where keys and values are shared by a group of query heads, passes inside `running` give
    each query head its own copy, so that an input of one head can be read, changed and differentiated alone.
    """

    view: ModelView
    layers: int
    heads: int
    """H, query heads of a layer; 1 where the attention is whole."""
    groups: int
    """Heads of keys and values, as the model has them."""
    head_size: int
    """e, the size of a head's q, k and v; 0 where the attention is whole."""
    width: int
    """d, the size of the residual stream."""
    parallel: bool
    """Whether MLPs read what attention reads: the state that enters the block."""
    attention_whole: bool
    """Whether a layer's attention is one node, because a norm stands between its heads and the residual stream."""

    def __init__(self, view: ModelView, blocks: tuple[_Block, ...], parallel: bool, whole: bool):
        self.view, self._blocks, self.parallel, self.attention_whole = view, blocks, parallel, whole
        self.layers = len(blocks)
        self.width = int(view.model.get_input_embeddings().weight.shape[1])
        self.heads, self.groups, self.head_size = 1, 1, 0
        self._formulas: tuple[NormFormula, ...] = ()

    # --- matrices ---

    def in_weight(self, layer: int, kind: HeadInput) -> torch.Tensor:
        """W of a head's q, k or v [heads or groups, e, d], a view on the model's memory."""
        projection = self._projection(layer, kind)
        weight = _weight(projection.module)  # [out, d]
        return self._of_kind(projection, kind, weight)

    def in_bias(self, layer: int, kind: HeadInput) -> torch.Tensor | None:
        """b of a head's q, k or v [heads or groups, e]; None where there is none."""
        projection = self._projection(layer, kind)
        bias = projection.module.bias
        return None if bias is None else self._of_kind(projection, kind, bias.detach())

    def by_head(self, values: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Values [.., groups, ..] of shared keys and values for every query head [.., H, ..]."""
        return values if values.shape[dim] == self.heads else values.repeat_interleave(self.heads // self.groups, dim)

    def out_weight(self, layer: int) -> torch.Tensor:
        """W_O [d, H, e], a view on the model's memory: head h adds W_O[:, h] z_h to the residual stream."""
        return _weight(self._blocks[layer].output).unflatten(1, (self.heads, self.head_size))

    def out_bias(self, layer: int) -> torch.Tensor | None:
        """b_O [d], which belongs to no head; or None."""
        bias = self._blocks[layer].output.bias
        return None if bias is None else bias.detach()

    def norm_formula(self, layer: int) -> NormFormula:
        """What the norm before the attention computes. Not for models whose attention is whole."""
        return self._formulas[layer]

    def norm_gain(self, layer: int) -> torch.Tensor:
        """The gain [d] of the norm before the attention."""
        weight = self._blocks[layer].attention_norm.weight.detach()
        return weight + 1 if self._formulas[layer].plus_one else weight

    def norm_offset(self, layer: int) -> torch.Tensor | None:
        """The offset [d] of the norm before the attention; None where there is none."""
        bias = getattr(self._blocks[layer].attention_norm, "bias", None)
        return None if bias is None else bias.detach()

    def project(self, layer: int, kind: HeadInput, states: torch.Tensor, head: int | None = None) -> torch.Tensor:
        """y of residual streams before the norm: [.., d] -> [.., H, e], or [.., e] of one query head."""
        weight, bias = self.in_weight(layer, kind), self.in_bias(layer, kind)
        if head is not None:
            own_group = head * weight.shape[0] // self.heads
            weight = weight[own_group]
            bias = None if bias is None else bias[own_group]
        else:
            weight = self.by_head(weight)
            bias = None if bias is None else self.by_head(bias)
        normed = self._blocks[layer].attention_norm.forward(states)
        flat = weight.reshape(-1, weight.shape[-1]).to(normed.dtype)
        y = torch.nn.functional.linear(normed, flat, None if bias is None else bias.flatten().to(normed.dtype))
        return y if head is not None else y.unflatten(-1, (self.heads, self.head_size))

    def _projection(self, layer: int, kind: HeadInput) -> _Projection:
        return next(p for p in self._blocks[layer].projections if kind in p.kinds)

    def _of_kind(self, projection: _Projection, kind: HeadInput, values: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """The part of outputs [.., out, ..] that is q, k or v: [.., heads or groups, e, ..]."""
        e, place, dim = self.head_size, projection.kinds.index(kind), dim % values.ndim
        if len(projection.kinds) == 1:
            return values.unflatten(dim, (-1, e))
        if projection.order == "by head":
            return values.unflatten(dim, (self.heads, 3, e)).select(dim + 1, place)
        counts = [self.heads, self.groups, self.groups]
        return values.unflatten(dim, (-1, e)).narrow(dim, sum(counts[:place]), counts[place])

    # --- passes ---

    @contextlib.contextmanager
    def running(self, visitor: Visitor) -> Iterator[None]:
        """Inside the block, every pass of the model calls the visitor; to be used inside of `evaluating(view)`.

        A pass calls each place once, in the order of the model. A visitor that returns None everywhere changes nothing.
        """
        before, after = [], []
        before.append((self.view.block(0), _first_argument(visitor.entering)))
        for layer, block in enumerate(self._blocks):
            before += self._on_inputs(layer, block, visitor)
            after.append((block.attention_end, _output(_at(visitor.attention_output, layer))))
            after.append((block.mlp_end, _output(_at(visitor.mlp_output, layer))))
            for projection in block.projections:
                after.append((projection.module, self._on_projection(layer, projection, visitor)))
            if block.output is not None:
                before.append((block.output, self._on_mixed(layer, visitor)))
        before.append((self.view.model.get_submodule(self.view.spec.norm), _first_argument(visitor.last)))
        with contextlib.ExitStack() as stack:
            for slot, value in self._ungrouping():
                stack.callback(slot.restore)
                slot.put(value)
            stack.enter_context(input_hooks(before))
            stack.enter_context(output_hooks(after))
            yield

    def _ungrouping(self) -> list[tuple[Any, int]]:
        """Attributes of attention modules, and the values with which each query head has its own keys and values."""
        if self.groups == self.heads:
            return []
        values = {"num_key_value_heads": self.heads, "num_key_value_groups": 1}
        return [
            (attribute_slot(block.attention, name), values[name])
            for block in self._blocks
            for name in _COUNTS_OF_GROUPS
            if name in vars(block.attention)
        ]

    def _on_inputs(self, layer: int, block: _Block, visitor: Visitor) -> list[tuple[Any, Callable[..., Any]]]:
        attention_reads = block.attention_norm or block.attention
        see_attention, see_mlp = _at(visitor.attention_input, layer), _at(visitor.mlp_input, layer)
        if block.mlp_norm is None or block.mlp_norm is not block.attention_norm:
            mlp_reads = block.mlp_norm or block.mlp
            return [(attention_reads, _first_argument(see_attention)), (mlp_reads, _first_argument(see_mlp))]
        entered: list[torch.Tensor] = []  # both read one norm's output: the MLP's is computed anew where it differs

        def see(states: torch.Tensor) -> torch.Tensor | None:
            entered[:] = [states]
            return see_attention(states)

        def before_mlp(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            other = see_mlp(entered.pop())
            return None if other is None else _with_first(args, kwargs, block.mlp_norm.forward(other))

        return [(attention_reads, _first_argument(see)), (block.mlp, before_mlp)]

    def _on_projection(self, layer: int, projection: _Projection, visitor: Visitor) -> Callable[..., Any]:
        def hook(module: Any, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
            parts = [self._heads_of(projection, kind, output) for kind in projection.kinds]
            seen = [visitor.head_input(layer, kind, y) for kind, y in zip(projection.kinds, parts, strict=True)]
            if self.groups == self.heads and all(other is None for other in seen):
                return None
            parts = [y if other is None else other for y, other in zip(parts, seen, strict=True)]
            if projection.order == "by head":
                return torch.stack(parts, -2).flatten(-3)
            return torch.cat([y.flatten(-2) for y in parts], -1) if len(parts) > 1 else parts[0].flatten(-2)

        return hook

    def _heads_of(self, projection: _Projection, kind: HeadInput, output: torch.Tensor) -> torch.Tensor:
        """q, k or v [.., H, e] of every query head, in a projection's output [.., out]."""
        return self.by_head(self._of_kind(projection, kind, output, -1), -2)

    def _on_mixed(self, layer: int, visitor: Visitor) -> Callable[..., Any]:
        def see(z: torch.Tensor) -> torch.Tensor | None:
            other = visitor.mixed(layer, z.unflatten(-1, (self.heads, self.head_size)))
            return None if other is None else other.flatten(-2)

        return _first_argument(see)


def _weight(module: Any) -> torch.Tensor:
    """The weight of a linear layer as [out, in], a view."""
    weight = module.weight.detach()
    return weight.T if type(module).__name__ == "Conv1D" else weight


def _at(method: Callable[..., Any], layer: int) -> Callable[[torch.Tensor], torch.Tensor | None]:
    return lambda states: method(layer, states)


def _first(args: tuple, kwargs: dict) -> Any:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)


def _with_first(args: tuple, kwargs: dict, states: torch.Tensor) -> tuple[tuple, dict]:
    """The arguments with another first tensor."""
    for place, value in enumerate(args):
        if isinstance(value, torch.Tensor):
            return (*args[:place], states, *args[place + 1 :]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))
    return args, {**kwargs, name: states}


def _first_argument(see: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[..., Any]:
    def hook(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        other = see(_first(args, kwargs))
        return None if other is None else _with_first(args, kwargs, other)

    return hook


def _output(see: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[..., Any]:
    def hook(module: Any, args: tuple, output: Any) -> Any:
        other = see(hidden_of(output))
        return None if other is None else with_hidden(output, other)

    return hook


# --- opening a model ---


@plain_torch()
@torch.no_grad()
def open_components(view: ModelView) -> Components:
    """The nodes of a model, read from an observed pass and tried on a few tokens; nothing in the model is changed.

    Args:
        view: the model, whole in this process, with its weights in memory and in a float dtype.

    Returns:
        its Components. Where a norm stands between attention and residual stream (Gemma 2 and 3, OLMo 2), heads do not
        add up in the stream, and the attention of a layer is one node (`attention_whole`).

    Raises:
        UnsupportedModelError: a module that is missing, of an unknown kind, quantized, offloaded or split among
            processes, or that computes something else than the formulas; by name.

    Cost: two passes of a few tokens, once for a view.

    Example:
        >>> from kedit_fast import demo
        >>> components = open_components(ModelView(demo.load()[0]))
        >>> components.layers, components.heads, components.parallel
        (6, 4, False)
    """
    return view.once(_open)


def _open(view: ModelView) -> Components:
    if view.is_sharded:
        raise UnsupportedModelError(
            f"{type(view.model).__name__} is held by several processes together, so no process has all heads: load it "
            "whole, without tp_plan, to see into its attention"
        )
    if not view.spec.norm:
        raise UnsupportedModelError(f"the spec of {view.spec.name} names no norm before the head: pass one that does")
    if not view.spec.attention:
        raise UnsupportedModelError(f"not every block of {view.spec.name} has an attention: its heads are no nodes")
    with evaluating(view):
        batch = pad(sample_rows(view.model.config, view.vocabulary)[:1], view.device)
        batch = TokenBatch(batch.input_ids, None)
        with refused_by_name(view.model, "hooks on its attention and MLPs"):
            components = _observed(view, batch)
            _require_formulas(components, batch)
    return components


@dataclass
class _Call:
    """What one call of a module took and gave."""

    taken: Any
    given: Any


def _observed(view: ModelView, batch: TokenBatch) -> Components:
    """The components by which module takes what another one gives, in one pass."""
    calls: dict[int, _Call] = {}
    modules = {id(m): m for layer in range(view.num_layers) for m in view.block(layer).modules()}
    watched = list(modules.values())

    def see(module: Any, args: tuple, kwargs: dict) -> None:
        calls[id(module)] = _Call(_first(args, kwargs), None)

    def see_output(module: Any, args: tuple, output: Any) -> None:
        if id(module) in calls:
            calls[id(module)].given = hidden_of(output)

    with input_hooks([(m, see) for m in watched]), output_hooks([(m, see_output) for m in watched]):
        last_states(view, batch)
    blocks, parallels, wholes = [], set(), set()
    for layer in range(view.num_layers):
        block, parallel, whole = _observed_block(view, layer, calls)
        blocks.append(block)
        parallels.add(parallel)
        wholes.add(whole)
    if len(parallels) > 1 or len(wholes) > 1:
        raise UnsupportedModelError(f"the blocks of {view.spec.name} are of several kinds, parallel and serial")
    components = Components(view, tuple(blocks), parallels.pop(), wholes.pop())
    if not components.attention_whole:
        _count_heads(components)
    return components


def _is_norm(module: Any) -> bool:
    return "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None


def _observed_block(view: ModelView, layer: int, calls: dict[int, _Call]) -> tuple[_Block, bool, bool]:
    block, attention, mlp = view.block(layer), view.attention(layer), view.mlp(layer)
    path = f"{view.spec.blocks}.{layer}"
    for name, module in ((view.spec.attention, attention), (view.spec.mlp, mlp), ("", block)):
        if id(module) not in calls or not isinstance(calls[id(module)].given, torch.Tensor):
            raise UnsupportedModelError(
                f"{path}.{name} ({type(module).__name__}) did not run, or puts out no tensor: it is no node"
            )
    norms = [m for m in block.modules() if _is_norm(m) and id(m) in calls]
    inside = {id(m) for m in attention.modules()} | {id(m) for m in mlp.modules()}
    norms = [m for m in norms if id(m) not in inside]

    def before(module: Any) -> Any:
        return next((m for m in norms if calls[id(m)].given is calls[id(module)].taken), None)

    def behind(module: Any) -> Any:
        return next((m for m in norms if calls[id(m)].taken is calls[id(module)].given), module)

    entered = calls[id(block)].taken
    attention_norm, mlp_norm = before(attention), before(mlp)
    attention_read = calls[id(attention_norm or attention)].taken
    if attention_read is not entered:
        raise UnsupportedModelError(
            f"{path}.{view.spec.attention} ({type(attention).__name__}) does not read the state that enters its block, "
            "or its norm: its heads are no nodes of a circuit"
        )
    parallel = calls[id(mlp_norm or mlp)].taken is entered
    end, mlp_end = behind(attention), behind(mlp)
    whole = end is not attention
    if not whole and (attention_norm is None or mlp_norm is None):
        raise UnsupportedModelError(
            f"{path} ({type(block).__name__}) has no norm before its attention and MLP whose output they take"
        )
    projections, output = (), None
    if not whole:
        projections, output = _projections(f"{path}.{view.spec.attention}", attention, calls)
    return _Block(attention, attention_norm, end, mlp, mlp_norm, mlp_end, projections, output), parallel, whole


def _projections(path: str, attention: Any, calls: dict[int, _Call]) -> tuple[tuple[_Projection, ...], Any]:
    children = dict(attention.named_children())
    while not any(name in children for name in (*_SEPARATE, *_FUSED)) and len(children) == 1:
        (name, inner), *_ = children.items()  # GPT-Neo's attention is inside of another
        path, children = f"{path}.{name}", dict(inner.named_children())
    if all(name in children for name in _SEPARATE):
        named = {name: _Projection(children[name], (name[0],), "") for name in _SEPARATE}  # type: ignore[arg-type]
    else:
        named = {n: _Projection(children[n], HEAD_INPUTS, order) for n, order in _FUSED.items() if n in children}
    outputs = {name: children[name] for name in _OUTPUTS if name in children}
    if not named or len(outputs) != 1:
        raise UnsupportedModelError(
            f"{path} ({type(attention).__name__}) cannot be opened into heads: it has {', '.join(children)}; what is "
            f"known are {', '.join((*_SEPARATE, *_FUSED))} and one of {', '.join(_OUTPUTS)}"
        )
    for name, module in {**{n: p.module for n, p in named.items()}, **outputs}.items():
        _require_linear(f"{path}.{name}", module)
        if id(module) not in calls:
            raise UnsupportedModelError(f"{path}.{name} ({type(module).__name__}) did not run in a pass")
    return tuple(named.values()), next(iter(outputs.values()))


def _require_linear(path: str, module: Any) -> None:
    if is_adapter(module):
        raise UnsupportedModelError(
            f"{path} is an adapter's {type(module).__name__}: merge it first (peft's merge_and_unload())"
        )
    weight = getattr(module, "weight", None)
    if not isinstance(module, torch.nn.Linear) and type(module).__name__ != "Conv1D":
        raise UnsupportedModelError(f"{path} is a {type(module).__name__}, not a linear layer")
    if not isinstance(weight, torch.Tensor) or weight.dtype not in FLOATS or weight.ndim != 2:
        raise UnsupportedModelError(
            f"{path} ({type(module).__name__}) is quantized: load the model in float32, bfloat16 or float16 to see "
            "into its attention"
        )
    if weight.device.type == "meta":
        raise UnsupportedModelError(f"{path} has no values in memory: it is offloaded, or the model is not loaded")


def _count_heads(components: Components) -> None:
    """Set the numbers of heads and groups, and check them against the shapes of every layer."""
    view = components.view
    heads = int(view.config.num_attention_heads)
    for layer, block in enumerate(components._blocks):
        path = f"{view.spec.blocks}.{layer}.{view.spec.attention}"
        size, remainder = divmod(_weight(block.output).shape[1], heads)
        rows = [_weight(p.module).shape[0] for p in block.projections]
        if len(rows) == 3:
            queries, keys, values = rows
        else:
            queries = size * heads
            keys = values = (rows[0] - queries) // 2
        groups = keys // max(size, 1)
        fits = not remainder and size and queries == size * heads and keys == values == groups * size > 0
        by_head = block.projections[0].order == "by head"
        if not fits or heads % groups or (by_head and groups != heads) or sum(rows) != queries + keys + values:
            raise UnsupportedModelError(
                f"{path} ({type(block.attention).__name__}) has projections of {rows} rows, which are not those of "
                f"{heads} heads of one size with keys and values of their own or of equal groups"
            )
        if groups != heads:
            names = {n: vars(block.attention).get(n) for n in _COUNTS_OF_GROUPS if n in vars(block.attention)}
            expected = {"num_key_value_heads": groups, "num_key_value_groups": heads // groups}
            if not names or any(expected[name] != value for name, value in names.items()):
                raise UnsupportedModelError(
                    f"{path} ({type(block.attention).__name__}) shares keys among heads and does not say how in "
                    f"{' and '.join(_COUNTS_OF_GROUPS)}"
                )
        if layer and (components.groups, components.head_size) != (groups, size):
            raise UnsupportedModelError(f"{path} has {groups} groups of heads of size {size}; other layers have others")
        components.heads, components.groups, components.head_size = heads, groups, size


class _Recorder(Visitor):
    """Everything that a pass shows, by place."""

    def __init__(self):
        self.seen: dict[Any, torch.Tensor] = {}
        self.repeated: list[Any] = []

    def _see(self, place: Any, states: torch.Tensor) -> None:
        if place in self.seen:
            self.repeated.append(place)
        self.seen[place] = states

    def entering(self, states):
        self._see("entering", states)

    def attention_input(self, layer, states):
        self._see(("attention input", layer), states)

    def head_input(self, layer, kind, y):
        self._see((kind, layer), y)

    def mixed(self, layer, z):
        self._see(("z", layer), z)

    def attention_output(self, layer, output):
        self._see(("attention", layer), output)

    def mlp_input(self, layer, states):
        self._see(("mlp input", layer), states)

    def mlp_output(self, layer, output):
        self._see(("mlp", layer), output)

    def last(self, states):
        self._see("last", states)


def _require_formulas(components: Components, batch: TokenBatch) -> None:
    """Raise UnsupportedModelError unless a pass of a few tokens computes what the nodes' formulas say."""
    view, recorder = components.view, _Recorder()
    shape = batch.input_ids.shape
    plain = last_states(view, batch)
    try:
        with components.running(recorder):
            opened = last_states(view, batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # it may be any code, such as a norm over all keys of a layer together
        raise UnsupportedModelError(
            f"{view.spec.blocks}.0.{view.spec.attention} ({type(view.attention(0)).__name__}) does not run with "
            f"keys and values for each of its {components.heads} heads ({type(error).__name__}: {first_line(error)})"
        ) from error
    limit = error_limit(plain.dtype, view.head.rounding)
    if recorder.repeated:
        raise UnsupportedModelError(f"{view.spec.name} runs {recorder.repeated[0]} more than once in a pass")
    seen = {place: as_rows(states, shape) for place, states in recorder.seen.items()}

    def require(result: torch.Tensor, expected: torch.Tensor, path: str, claim: str) -> None:
        error = relative_error(result.flatten(0, 1).flatten(1), expected.flatten(0, 1).flatten(1))
        if not error <= limit and bool(torch.isfinite(expected).all()):
            raise UnsupportedModelError(f"{path}: {claim} does not hold, it is off by {error:.1g}")

    require(opened, plain, view.spec.blocks, "that heads with keys and values of their own give the same states")
    formulas = []
    stream = seen["entering"]
    for layer, block in enumerate(components._blocks):
        path = f"{view.spec.blocks}.{layer}"
        require(stream, seen["attention input", layer], path, "that states are the sum of what blocks put out")
        attention, mlp = seen["attention", layer], seen["mlp", layer].to(stream.device)
        middle = stream if components.parallel else stream + attention.to(stream.device)
        require(middle, seen["mlp input", layer], path, "that the MLP reads the sum of what is before it")
        stream = stream + attention.to(stream.device) + mlp
        if layer + 1 < components.layers:
            stream = stream.to(seen["attention input", layer + 1].device)
        if components.attention_whole:
            continue
        path = f"{path}.{view.spec.attention}"
        formulas.append(_formula(view, layer, block.attention_norm, seen["attention input", layer], limit))
        for kind in HEAD_INPUTS:
            y = components.project(layer, kind, seen["attention input", layer])
            require(y, seen[kind, layer], path, f"that {kind} is a linear function of the norm's output")
        z = seen["z", layer]
        out = torch.einsum("rthe,dhe->rtd", z, components.out_weight(layer).to(z.dtype))
        bias = components.out_bias(layer)
        out = out if bias is None else out + bias.to(out.dtype)
        require(out, attention, path, "that its output is the sum of its heads' outputs")
    require(stream, seen["last"].to(stream.device), view.spec.norm, "that it reads the sum of what blocks put out")
    if len({formula.centered for formula in formulas}) > 1:
        raise UnsupportedModelError(f"the blocks of {view.spec.name} have norms of several kinds")
    components._formulas = tuple(formulas)


def _formula(view: ModelView, layer: int, norm: Any, states: torch.Tensor, limit: float) -> NormFormula:
    """The formula of a norm, of those that are known, that gives its outputs."""
    eps = next((float(e) for name in _EPSILONS if isinstance(e := getattr(norm, name, None), float)), 0.0)
    expected = norm.forward(states).double()
    wide, weight = states.double(), norm.weight.detach().double()
    bias = getattr(norm, "bias", None)
    for centered in (isinstance(norm, torch.nn.LayerNorm), not isinstance(norm, torch.nn.LayerNorm)):
        for plus_one in (False, True):
            formula = NormFormula(centered, eps, plus_one)
            result = formula.standardized(wide) * (weight + 1 if plus_one else weight)
            result = result if bias is None else result + bias.detach().double()
            if relative_error(result.flatten(0, 1), expected.flatten(0, 1)) <= limit:
                return formula
    raise UnsupportedModelError(
        f"the norm before {view.spec.blocks}.{layer}.{view.spec.attention} ({type(norm).__name__}) is neither a "
        "LayerNorm nor an RMS norm"
    )
