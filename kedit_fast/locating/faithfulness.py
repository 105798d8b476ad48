"""Whether a circuit does what the model does: the model runs with all other edges corrupted.

Every node's input x gets + the sum over absent edges u -> v of (corrupted_u - current_u). What u puts out on the
corrupted prompt comes from an earlier pass; current is what it puts out in this very pass, where its own input was
changed, too. The residual stream itself stays the sum of the current outputs.

All edges into a node may be absent, most of them, or few. The sum over all sources is one running state, so a node
takes either x + the absent ones, or x + this state - the present ones, whichever are fewer. Heads whose edges are the
same are computed together. Differences are stored as heads mix their values, [R, T, H, e], not as what each head adds
to the residual stream, which is H times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kedit_fast.errors import EvaluationError, InvalidArgumentError
from kedit_fast.locating.circuit import Circuit, require_graph
from kedit_fast.locating.circuits import EdgeScores, check_pairs
from kedit_fast.locating.graph import Graph, graph_of
from kedit_fast.locating.metrics import Metric, check_metric, metric_values
from kedit_fast.locating.prompt_pairs import PromptPair
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.components import HEAD_INPUTS, Components, HeadInput, Visitor, open_components
from kedit_fast.models.forward import TokenBatch, evaluating, last_states, pad
from kedit_fast.models.view import ModelView, view_without_memory
from kedit_fast.support.dtypes import accumulation_dtype
from kedit_fast.support.torch_state import plain_torch

BATCH_TOKENS = 2048
"""Tokens of one pass, where no batch size is given."""
EXACT_PASSES = 20_000
"""Rows that `exact_scores` runs at most, where no other limit is given."""
NEAR_ZERO = 0.01
"""A difference of means below this share of the metric's own size says nothing about faithfulness."""
_ENTRIES = 1 << 24  # of one temporary: inputs of some groups of heads, or what some heads add to the residual stream


@dataclass(frozen=True)
class Faithfulness:
    """How much of what sets clean and corrupted prompts apart a circuit does: means of the metric over pairs."""

    clean: float
    """Of the whole model on the clean prompts."""
    corrupted: float
    """Of the whole model on the corrupted prompts."""
    circuit: float
    """On the clean prompts, with all edges corrupted that the circuit does not have."""
    value: float | None
    """(circuit - corrupted) / (clean - corrupted): 1 for what the model does, 0 for nothing; None where `reason` says
    why there is none."""
    reason: str
    """Why there is no value; "" where there is one."""
    pairs: int
    """Number of prompt pairs."""


def run_circuit(
    model: Any,
    circuit: Circuit,
    pairs: Sequence[PromptPair],
    metric: Metric = "logit-difference",
    *,
    batch_size: int | None = None,
    spec: ArchSpec | None = None,
    progress: Callable[[int], Any] | None = None,
) -> torch.Tensor:
    """The metric of each pair at the end of its clean prompt, with all edges corrupted that a circuit does not have.

    Args:
        model: a causal language model of transformers, or a ModelView of it; nothing in it changes.
        circuit: of this model's graph; it need not be pruned.
        pairs: prompts.
        metric: "logit-difference" and "probability-difference": of the answer and the wrong one. "kl": the divergence
            KL(p(clean) || p(circuit)) of the next token.
        batch_size: pairs of one pass; None for passes of 2,048 tokens.
        spec: the model's module names; None to find them.
        progress: called with the number of pairs that ran since the last call.

    Returns:
        [n] fp32 (fp64 of fp64 models), on the CPU.

    Raises:
        InvalidArgumentError: a circuit of another model's graph, or without edges; an unknown metric.
        RequestError: no pairs, or a pair with tokens that the model does not take, by label.
        EvaluationError: the model's output is not finite for a pair, which is named.
        UnsupportedModelError: a model whose attention cannot be opened, by the module's name; or a memory is attached.

    Cost: two passes over the prompts (three for "kl"). In addition, for a layer whose heads have G different sets of
        edges: G d numbers a token for their inputs, at most 64 MiB at a time, and for each pair of a source head and a
        group that are in question 2 d e flops a token, or 2 d (e + G) for a head with all of its groups if that is
        less. Heads that no edge of the circuit leaves cost nothing. Memory: (2 L + 1) d numbers a token.

    Source: EAP-IG (arXiv 2403.17806), its released `evaluate_graph` with the intervention "patching".

    Example:
        >>> from kedit_fast.locating.circuits import edge_scores
        >>> from kedit_fast.locating.pruning import greedy_edges
        >>> from kedit_fast.locating.prompt_pairs import prompt_pairs
        >>> pairs = prompt_pairs(model, tokenizer, requests, on_error="skip")
        >>> circuit = greedy_edges(edge_scores(model, pairs), 100)
        >>> run_circuit(model, circuit, pairs).shape == (len(pairs),)
        True
    """
    view = view_without_memory(model, spec)
    return _run(view, circuit, pairs, metric, batch_size, progress, with_clean=metric == "kl")[2]


def faithfulness(
    model: Any,
    circuit: Circuit,
    pairs: Sequence[PromptPair],
    metric: Metric = "logit-difference",
    *,
    batch_size: int | None = None,
    spec: ArchSpec | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Faithfulness:
    """The share of what the model does that a circuit does: (m(circuit) - m(corrupted)) / (m(clean) - m(corrupted)).

    m is the mean of the metric over pairs. Arguments, errors and cost are those of `run_circuit`; passes are three for
    every metric.

    Example:
        >>> from kedit_fast.locating.circuits import edge_scores
        >>> from kedit_fast.locating.pruning import top_edges
        >>> from kedit_fast.locating.prompt_pairs import prompt_pairs
        >>> pairs = prompt_pairs(model, tokenizer, requests, on_error="skip")
        >>> scores = edge_scores(model, pairs)
        >>> whole = top_edges(scores, scores.graph.edge_count)
        >>> round(faithfulness(model, whole, pairs).value, 4)
        1.0
    """
    view = view_without_memory(model, spec)
    clean, corrupted, circuit_values = _run(view, circuit, pairs, metric, batch_size, progress, with_clean=True)
    assert clean is not None
    means = [float(values.double().mean()) for values in (clean, corrupted, circuit_values)]
    reason = no_gap(clean, corrupted, metric)
    value = None if reason else (means[2] - means[1]) / (means[0] - means[1])
    return Faithfulness(means[0], means[1], means[2], value, reason, len(pairs))


def no_gap(clean: torch.Tensor, corrupted: torch.Tensor, metric: str) -> str:
    """Why no share of m(clean) - m(corrupted) can be given, of the metrics [n] of pairs; "" where one can."""
    means = [float(values.double().mean()) for values in (clean, corrupted)]
    gap, size = means[0] - means[1], float(torch.cat([clean, corrupted]).double().abs().mean())
    if gap and abs(gap) > NEAR_ZERO * size:
        return ""
    return (
        f"the mean {metric} is {means[0]:.3g} on the clean and {means[1]:.3g} on the corrupted prompts: with so small "
        "a difference there is nothing that a circuit could explain"
    )


@plain_torch()
@torch.no_grad()
def _run(
    view: ModelView,
    circuit: Circuit,
    pairs: Sequence[PromptPair],
    metric: Metric,
    batch_size: int | None,
    progress: Callable[[int], Any] | None,
    with_clean: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """The metric [n] of clean prompts, where asked for (the KL needs it), of corrupted ones, and of the circuit."""
    check_metric(metric)
    components = open_components(view)
    graph = graph_of(components)
    require_graph(graph, circuit.graph, "the circuit")
    if not circuit.edge_count:
        raise InvalidArgumentError("the circuit is empty: without edges every prompt is the corrupted one")
    check_pairs(view, pairs)
    plan = _Plan.of(graph, circuit.edges)
    result: list[list[torch.Tensor | None]] = [[None] * len(pairs) for _ in range(3)]
    with evaluating(view):
        for chunk in batches_of(pairs, batch_size):
            part = [pairs[i] for i in chunk]
            batch = pad([pair.clean for pair in part], view.device)
            clean = end_logits(view, batch, part) if with_clean else None
            recorded = _Recorded(components)
            with components.running(recorded):
                corrupted = end_logits(view, pad([pair.corrupted for pair in part], view.device), part)
            with components.running(_CircuitPass(components, graph, plan, recorded)):
                changed = end_logits(view, batch, part)
            for values, logits in zip(result, (clean, corrupted, changed), strict=True):
                if logits is not None:
                    for i, value in zip(chunk, metric_of_pairs(logits, clean, part, metric).cpu(), strict=True):
                        values[i] = value
            if progress is not None:
                progress(len(chunk))
    clean, corrupted, changed = ([value for value in values if value is not None] for values in result)
    return torch.stack(clean) if with_clean else None, torch.stack(corrupted), torch.stack(changed)


@plain_torch()
@torch.no_grad()
def exact_scores(
    model: Any,
    pairs: Sequence[PromptPair],
    metric: Metric = "logit-difference",
    *,
    limit: int = EXACT_PASSES,
    spec: ArchSpec | None = None,
    progress: Callable[[int], Any] | None = None,
) -> EdgeScores:
    """What scores of edges estimate: the rise of the loss when one edge is corrupted and nothing else.

    score(u, v) = mean over pairs of loss(edge u -> v corrupted) - loss(clean), where the loss is -metric, or the
    divergence itself for "kl". (Published code averages means of batches: pairs of a short last batch weigh more.)

    Args:
        model: a causal language model of transformers, or a ModelView of it; nothing in it changes.
        pairs: prompts.
        metric: see `run_circuit`.
        limit: the largest number of passes, one for each edge and pair.
        spec: the model's module names; None to find them.
        progress: called with the number of edges that were scored since the last call.

    Raises:
        InvalidArgumentError: more passes than `limit`, with their number; an unknown metric.
        RequestError, EvaluationError, UnsupportedModelError: see `run_circuit`.

    Cost: one pass for each edge and pair, in batches of 2,048 tokens.

    Source: EAP-IG (arXiv 2403.17806), its released `get_scores_exact`.

    Example:
        >>> from kedit_fast.locating.prompt_pairs import prompt_pairs
        >>> [pair, *_] = prompt_pairs(model, tokenizer, requests, on_error="skip")
        >>> exact_scores(model, [pair]).scoring
        'exact'
    """
    check_metric(metric)
    view = view_without_memory(model, spec)
    components = open_components(view)
    graph = graph_of(components)
    check_pairs(view, pairs)
    passes = graph.edge_count * len(pairs)
    if passes > limit:
        raise InvalidArgumentError(
            f"exact scores take one pass for each of {graph.edge_count:,} edges and {len(pairs):,} pairs: {passes:,} "
            f"passes, more than limit = {limit:,}. Use edge_scores, fewer pairs, or a larger limit"
        )
    sums = torch.zeros(graph.mask.shape, dtype=torch.float64, device="cpu")
    totals, is_double = [0.0, 0.0], False
    with evaluating(view):
        for chunk in batches_of(pairs, 1):  # the rows of a pass are edges
            part = [pairs[i] for i in chunk]
            clean, corrupted = _Recorded(components), _Recorded(components)
            logits = []
            for recorded, rows in ((clean, [p.clean for p in part]), (corrupted, [p.corrupted for p in part])):
                with components.running(recorded):
                    logits.append(end_logits(view, pad(rows, view.device), part))
            base = metric_of_pairs(logits[0], logits[0], part, metric)
            totals[0] += float(base.sum())
            totals[1] += float(metric_of_pairs(logits[1], logits[0], part, metric).sum())
            is_double = base.dtype == torch.float64
            sign = 1 if metric == "kl" else -1
            for target, sources in _edges_by_target(graph, len(part[0].clean)):
                deltas = torch.cat([_difference(components, graph, clean, corrupted, u) for u in sources])
                rows = part * len(sources)
                with components.running(_EdgePass(components, graph, target, deltas)):
                    changed = end_logits(view, pad([p.clean for p in rows], view.device), rows)
                rises = sign * (metric_of_pairs(changed, logits[0].expand_as(changed), rows, metric) - base)
                sums[sources, target] += rises.double().cpu()
                if progress is not None:
                    progress(len(sources))
    dtype = torch.float64 if is_double else torch.float32
    scores = (sums / len(pairs)).to(dtype)
    clean_mean, corrupted_mean = (total / len(pairs) for total in totals)
    return EdgeScores(graph, scores, "exact", 0, metric, len(pairs), clean_mean, corrupted_mean)


def batches_of(pairs: Sequence[PromptPair], batch_size: int | None = None) -> Iterator[list[int]]:
    """Indices of pairs that run together, the longest first; without a size, of `BATCH_TOKENS` tokens."""
    if batch_size is not None and batch_size < 1:
        raise InvalidArgumentError(f"batch_size = {batch_size!r}: run at least one pair at a time")
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].clean), reverse=True)
    while order:
        count = batch_size or max(1, BATCH_TOKENS // len(pairs[order[0]].clean))
        yield order[:count]
        order = order[count:]


def end_logits(view: ModelView, batch: TokenBatch, part: Sequence[PromptPair]) -> torch.Tensor:
    """Logits [R, V] at the last token of each row, fp32 at least."""
    hidden = last_states(view, batch)
    ends = torch.tensor([len(pair.clean) - 1 for pair in part], device=hidden.device)
    logits = view.head.logits(hidden[torch.arange(len(part), device=hidden.device), ends])
    return logits.to(accumulation_dtype(logits))


def metric_of_pairs(
    logits: torch.Tensor, clean: torch.Tensor | None, part: Sequence[PromptPair], metric: Metric
) -> torch.Tensor:
    """The metric [R] of logits [R, V], where those of the clean prompts are `clean`; the KL alone needs them."""
    answers, wrongs = (
        torch.tensor(tokens, device=logits.device) for tokens in zip(*((p.answer, p.wrong) for p in part), strict=True)
    )
    values = metric_values(metric, logits, answers, wrongs, clean)
    wrong = (~torch.isfinite(values)).tolist()
    if any(wrong):
        raise EvaluationError(f"{part[wrong.index(True)].label}: the model's output is not finite on its prompts")
    return values


class _Recorded(Visitor):
    """What the nodes put out in a pass."""

    def __init__(self, components: Components):
        self.components = components
        self.input: torch.Tensor | None = None
        self.heads: dict[int, torch.Tensor] = {}
        self.attentions: dict[int, torch.Tensor] = {}
        self.mlps: dict[int, torch.Tensor] = {}

    def entering(self, states: torch.Tensor) -> None:
        self.input = _wide(states)

    def mixed(self, layer: int, z: torch.Tensor) -> None:
        self.heads[layer] = _wide(z)

    def attention_output(self, layer: int, output: torch.Tensor) -> None:
        if self.components.attention_whole:
            self.attentions[layer] = _wide(output)

    def mlp_output(self, layer: int, output: torch.Tensor) -> None:
        self.mlps[layer] = _wide(output)


def _wide(states: torch.Tensor) -> torch.Tensor:
    return states.detach().to(accumulation_dtype(states))


@dataclass(frozen=True)
class _Group:
    """Heads of a layer, by kind of input, that read the same edges."""

    members: tuple[tuple[HeadInput, int], ...]
    """(kind, head) of each; empty for an MLP, the logits, or attention as a whole."""
    signs: torch.Tensor
    """[U] +1 for sources to add, -1 for sources to take away, 0 for others; on the CPU."""
    from_all: bool
    """Whether it starts from the sum over all sources, from which the present ones are taken away."""


@dataclass(frozen=True)
class _Plan:
    """For every place where nodes read, what the inputs of its nodes get."""

    attentions: tuple[tuple[_Group, ...], ...]
    """By layer."""
    mlps: tuple[_Group | None, ...]
    """By layer."""
    logits: _Group | None
    """Of the last state."""

    @classmethod
    def of(cls, graph: Graph, edges: torch.Tensor) -> _Plan:
        """The plan of a circuit's edges [F, V]. Nodes that no edge leaves are not changed: all that they put out is
        replaced by what they put out on the corrupted prompt."""
        needed = [*edges.any(1).tolist()]

        def group(target: int, members: tuple[tuple[HeadInput, int], ...]) -> _Group | None:
            count = graph.reads[target]
            present = edges[:count, target]
            owner = graph.source_of(target)
            if (owner is not None and not needed[owner]) or bool(present.all()):
                return None
            from_all = 2 * int(present.sum()) <= count
            signs = -present.to(torch.float32) if from_all else (~present).to(torch.float32)
            return _Group(members, signs, from_all)

        attentions, mlps = [], []
        for layer in range(graph.layers):
            first = layer * graph.inputs_of_layer
            if graph.attention_whole:
                whole = group(first, ())
                attentions.append(() if whole is None else (whole,))
            else:
                attentions.append(tuple(_head_groups(graph, first, group)))
            mlps.append(group(first + graph.inputs_of_layer - 1, ()))
        return cls(tuple(attentions), tuple(mlps), group(len(graph.targets) - 1, ()))


def _head_groups(graph: Graph, first: int, group: Callable[..., _Group | None]) -> list[_Group]:
    """The groups of a layer's heads, whose targets begin at `first`."""
    merged: dict[tuple[bool, bytes], tuple[_Group, list[tuple[HeadInput, int]]]] = {}
    for place, kind in enumerate(HEAD_INPUTS):
        for head in range(graph.heads):
            one = group(first + place * graph.heads + head, ())
            if one is not None:
                name = (one.from_all, one.signs.to(torch.int8).numpy().tobytes())
                merged.setdefault(name, (one, []))[1].append((kind, head))
    return [_Group(tuple(members), one.signs, one.from_all) for one, members in merged.values()]


class _CircuitPass(Visitor):
    """A pass over clean prompts in which every node reads its present edges as they are, and the others corrupted."""

    def __init__(self, components: Components, graph: Graph, plan: _Plan, corrupted: _Recorded):
        self.components, self.graph, self.plan = components, graph, plan
        self.differences = corrupted
        """Corrupted outputs; from the moment a node has run in this pass, minus what it put out."""
        self.all: torch.Tensor | None = None
        """[R, T, d], the sum of the differences of all sources so far."""
        self.all_at_entry: torch.Tensor | None = None
        """The same where the block begins."""
        self.heads: dict[tuple[HeadInput, int], torch.Tensor] = {}
        """(kind, head) -> its q, k or v [R, T, e] in the present layer."""

    def entering(self, states: torch.Tensor) -> None:
        assert self.differences.input is not None
        self.differences.input = self.differences.input - _wide(states)
        self.all = self.differences.input

    def attention_input(self, layer: int, states: torch.Tensor) -> torch.Tensor | None:
        self.all_at_entry, self.heads = self.all, {}
        groups = self.plan.attentions[layer]
        for group, other in zip(groups, self._inputs(states, groups, self.all), strict=True):
            if not group.members:
                return other
            self._project(layer, group, other)
        return None

    def _project(self, layer: int, group: _Group, states: torch.Tensor) -> None:
        """Compute q, k and v of a group's heads from its input."""
        for kind in HEAD_INPUTS:
            heads = [head for part, head in group.members if part == kind]
            if 2 * len(heads) > self.components.heads:
                y = self.components.project(layer, kind, states)
                self.heads |= {(kind, head): y[..., head, :] for head in heads}
            else:
                self.heads |= {(kind, head): self.components.project(layer, kind, states, head) for head in heads}

    def head_input(self, layer: int, kind: HeadInput, y: torch.Tensor) -> torch.Tensor | None:
        changed = {head: other for (part, head), other in self.heads.items() if part == kind}
        if not changed:
            return None
        y = y.clone()
        for head, other in changed.items():
            y[..., head, :] = other
        return y

    def mixed(self, layer: int, z: torch.Tensor) -> None:
        difference = self.differences.heads[layer] - _wide(z)
        self.differences.heads[layer] = difference
        matrix = self.components.out_weight(layer).flatten(1)
        self._add(torch.nn.functional.linear(difference.flatten(-2), matrix.to(difference)))

    def attention_output(self, layer: int, output: torch.Tensor) -> None:
        if self.graph.attention_whole:
            self.differences.attentions[layer] = self.differences.attentions[layer] - _wide(output)
            self._add(self.differences.attentions[layer])

    def mlp_input(self, layer: int, states: torch.Tensor) -> torch.Tensor | None:
        group = self.plan.mlps[layer]
        if group is None:
            return None
        return next(self._inputs(states, (group,), self.all_at_entry if self.graph.parallel else self.all))

    def mlp_output(self, layer: int, output: torch.Tensor) -> None:
        self.differences.mlps[layer] = self.differences.mlps[layer] - _wide(output)
        self._add(self.differences.mlps[layer])

    def last(self, states: torch.Tensor) -> torch.Tensor | None:
        return None if self.plan.logits is None else next(self._inputs(states, (self.plan.logits,), self.all))

    def _add(self, difference: torch.Tensor) -> None:
        assert self.all is not None
        self.all = self.all.to(difference.device) + difference  # a new tensor: the block's beginning may be needed

    def _inputs(
        self, states: torch.Tensor, groups: Sequence[_Group], everything: torch.Tensor | None
    ) -> Iterator[torch.Tensor]:
        """The input [R, T, d] of each group, where all sources together differ by `everything`."""
        assert everything is not None
        wide, everything = _wide(states), everything.to(states.device)
        size = max(1, _ENTRIES // wide.numel())
        for begin in range(0, len(groups), size):
            part = groups[begin : begin + size]
            inputs = torch.stack([wide + everything if group.from_all else wide for group in part])  # [G, R, T, d]
            self._add_sources(inputs, torch.stack([group.signs for group in part]))
            yield from inputs.to(states.dtype)

    def _add_sources(self, inputs: torch.Tensor, signs: torch.Tensor) -> None:
        """Add the differences of sources to inputs [G, R, T, d], as signs [G, U] say."""
        recorded, width = self.differences, self.graph.outputs_of_layer
        assert recorded.input is not None
        _add_where(inputs, recorded.input, signs[:, 0])
        for layer in range(-(-(signs.shape[1] - 1) // width)):
            part = signs[:, 1 + layer * width : 1 + (layer + 1) * width]
            if self.graph.attention_whole:
                _add_where(inputs, recorded.attentions[layer], part[:, 0])
            elif bool((heads := part[:, : self.graph.heads]).any()):
                self._add_heads(inputs, layer, heads)
            if part.shape[1] == width:
                _add_where(inputs, recorded.mlps[layer], part[:, -1])

    def _add_heads(self, inputs: torch.Tensor, layer: int, signs: torch.Tensor) -> None:
        """Add what heads of a layer add to the residual stream, by signs [G, H], in the way that takes fewer flops."""
        matrix = self.components.out_weight(layer)  # [d, H, e]
        z = self.differences.heads[layer]  # [R, T, H, e]
        used = torch.nonzero(signs.any(0))[:, 0].tolist()
        size, count = self.components.head_size, int(signs.count_nonzero())
        if count * size <= len(used) * (size + len(signs)):
            for group, row in enumerate(signs):
                heads = torch.nonzero(row)[:, 0].tolist()
                if heads:
                    sign = float(row[heads[0]])  # of a group all are the same
                    added = torch.nn.functional.linear(z[..., heads, :].flatten(-2), matrix[:, heads].flatten(1).to(z))
                    inputs[group] += (sign * added).to(inputs.device)
            return
        most = max(1, _ENTRIES // inputs[0].numel())
        for begin in range(0, len(used), most):
            heads = used[begin : begin + most]
            added = torch.einsum("rthe,dhe->hrtd", z[..., heads, :], matrix[:, heads].to(z)).to(inputs.device)
            inputs += torch.tensordot(signs[:, heads].to(added), added, 1)


def _add_where(inputs: torch.Tensor, difference: torch.Tensor, signs: torch.Tensor) -> None:
    """Add a source's difference [R, T, d] to inputs [G, R, T, d] by signs [G]."""
    for group, sign in enumerate(signs.tolist()):
        if sign:
            inputs[group] += sign * difference.to(inputs.device)


class _EdgePass(Visitor):
    """A pass in which one input gets a difference of its own in each row."""

    def __init__(self, components: Components, graph: Graph, target: int, deltas: torch.Tensor):
        self.components, self.deltas = components, deltas
        self.layer = graph.target_layers[target]
        place = target - self.layer * graph.inputs_of_layer
        self.is_logits = self.layer == graph.layers
        self.is_mlp = not self.is_logits and place == graph.inputs_of_layer - 1
        self.is_whole = graph.attention_whole and not self.is_logits and not self.is_mlp
        self.kind, self.head = "", place % graph.heads
        if not (self.is_logits or self.is_mlp or self.is_whole):
            self.kind = HEAD_INPUTS[place // graph.heads]
        self.states: torch.Tensor | None = None

    def _changed(self, states: torch.Tensor) -> torch.Tensor:
        return (_wide(states) + self.deltas.to(states.device)).to(states.dtype)

    def attention_input(self, layer: int, states: torch.Tensor) -> torch.Tensor | None:
        if layer != self.layer:
            return None
        self.states = states
        return self._changed(states) if self.is_whole else None

    def head_input(self, layer: int, kind: HeadInput, y: torch.Tensor) -> torch.Tensor | None:
        if layer != self.layer or kind != self.kind:
            return None
        assert self.states is not None
        y = y.clone()
        y[..., self.head, :] = self.components.project(layer, kind, self._changed(self.states), self.head)
        return y

    def mlp_input(self, layer: int, states: torch.Tensor) -> torch.Tensor | None:
        return self._changed(states) if self.is_mlp and layer == self.layer else None

    def last(self, states: torch.Tensor) -> torch.Tensor | None:
        return self._changed(states) if self.is_logits else None


def _difference(
    components: Components, graph: Graph, clean: _Recorded, corrupted: _Recorded, source: int
) -> torch.Tensor:
    """What a source puts out on the corrupted prompts, minus on the clean ones [R, T, d]."""
    layer = graph.source_layers[source]
    if layer < 0:
        assert corrupted.input is not None and clean.input is not None
        return corrupted.input - clean.input
    place = source - 1 - layer * graph.outputs_of_layer
    if place == graph.outputs_of_layer - 1:
        return corrupted.mlps[layer] - clean.mlps[layer]
    if graph.attention_whole:
        return corrupted.attentions[layer] - clean.attentions[layer]
    z = corrupted.heads[layer][..., place, :] - clean.heads[layer][..., place, :]
    return torch.nn.functional.linear(z, components.out_weight(layer)[:, place].to(z))


def _edges_by_target(graph: Graph, tokens: int) -> Iterator[tuple[int, list[int]]]:
    """Each target with some of the sources that it reads, as many as rows of `tokens` tokens fit a batch."""
    size = max(1, BATCH_TOKENS // tokens)
    for target, count in enumerate(graph.reads):
        for begin in range(0, count, size):
            yield target, list(range(begin, min(begin + size, count)))
