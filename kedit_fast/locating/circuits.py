"""Edge attribution patching: how much each edge between heads and MLPs matters to an answer, for all edges at once.

The score of an edge u -> v is <D_u, d loss / d input of v>, summed over tokens: D_u is what the output of u changes by
when the prompt is corrupted. It estimates the rise of the loss if that edge alone carried the corrupted value.
Published code makes every head's output and input in the size of the residual stream, [T, H, d], and one product per
step. Here both sides stay in the size of a head, and steps are added up before one product (the op
`edge_contraction`).

With x the residual stream before a norm, s its scale and xh = (x - mean) / s, a head computes y = W (gain xh) + b', and
with delta = d loss / d y, before rotary positions and before keys of a group are shared,

    d loss / d x through this head alone = (1/s) [ G - mean(G) - xh <y - b', delta> / d ],   G = gain * (W^T delta)

without mean(G) for an RMS norm. D_u does not depend on the step, so delta / s is added up over steps, [N, H, e]. What
is left of each step is the last term: a product of <D_u, xh> and a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from tqdm import tqdm

from kedit_fast.errors import EvaluationError, InvalidArgumentError, RequestError, UnsupportedModelError
from kedit_fast.locating.graph import Graph, graph_of
from kedit_fast.locating.metrics import Metric, check_metric, losses, metric_values
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.components import HEAD_INPUTS, Components, HeadInput, Visitor, open_components
from kedit_fast.models.forward import TokenBatch, evaluating, last_states, pad
from kedit_fast.models.routes import require_no_memory
from kedit_fast.models.view import ModelView, view_without_memory
from kedit_fast.ops import edge_contraction
from kedit_fast.support.dtypes import accumulation_dtype
from kedit_fast.support.messages import first_line
from kedit_fast.support.torch_state import plain_torch

Scoring = Literal["eap", "eap-ig", "eap-ig-right", "clean-corrupted"]
Scale = Literal["mean", "published"]
See = Callable[[torch.Tensor], None]


class Pair(Protocol):
    """A clean and a corrupted prompt of the same length, see `prompt_pairs.PromptPair`."""

    @property
    def clean(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def corrupted(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def answer(self) -> int: ...  # noqa: D102
    @property
    def wrong(self) -> int: ...  # noqa: D102
    @property
    def label(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class EdgeScores:
    """Scores of all edges: the estimated rise of the loss when an edge alone is corrupted."""

    graph: Graph
    """Whose sources and targets are the rows and columns."""
    scores: torch.Tensor
    """[F, V] float32 on the CPU, float64 of float64 models; 0 where there is no edge."""
    scoring: str
    """Where gradients were taken; see `edge_scores`."""
    steps: int
    """Points between the corrupted and the clean input at which gradients were taken."""
    metric: str
    """What the loss is: minus a difference, or the KL."""
    pairs: int
    """Number of prompt pairs."""
    clean: float
    """Mean metric of the clean prompts."""
    corrupted: float
    """Mean metric of the corrupted prompts."""


@plain_torch()
@torch.no_grad()
def edge_scores(
    model: Any,
    pairs: Sequence[Pair],
    *,
    scoring: Scoring = "eap-ig",
    steps: int = 5,
    metric: Metric = "logit-difference",
    scale: Scale = "mean",
    batch_size: int | None = None,
    max_tokens: int = 1024,
    spec: ArchSpec | None = None,
    progress: bool = False,
) -> EdgeScores:
    """Scores of all edges by edge attribution patching; the model is left as it was.

    Args:
        model: a causal language model, its ModelView, or its opened Components. Whole in this process; of any float
            dtype. With post-norm blocks (Gemma 2 and 3, OLMo 2) a layer's attention is one node: see `Graph`.
        pairs: clean and corrupted prompts; each pair has one length.
        scoring: at which inputs gradients are taken, on the line from the corrupted input (0) to the clean one (1):

            - "eap": at 1;
            - "eap-ig": at 0, 1/m, .., (m - 1)/m, the published sum of EAP-IG;
            - "eap-ig-right": at 1/m, .., 1, the sum of the paper and of KnowledgeCircuits;
            - "clean-corrupted": at 0 and 1.
        steps: m.
        metric: see `metric_values`; the loss is minus a difference, or the KL. The KL has no slope at the clean prompt,
            so it does not go with "eap".
        scale: "mean": the mean over pairs. "published": as EAP-IG's code divides, a factor 1/B smaller for pairs in a
            batch of B; batches are `batch_size` pairs in the order given.
        batch_size: the most pairs of one batch; None for as many as `max_tokens` allow (for "published": 1).
        max_tokens: of one pass with gradients: pairs times steps times length. One row always runs.
        spec: the module names, where `model` is a model; None for those that are read from it.
        progress: show a bar on stderr.

    Returns:
        EdgeScores.

    Raises:
        RequestError: a pair whose prompts have different lengths, or are the same, empty, too long for the model, or
            have unknown tokens; by its label.
        UnsupportedModelError: attention that cannot be opened, by the module's name; no gradients; or a memory that is
            attached.
        EvaluationError: a pair for which the model gives no finite logits.
        InvalidArgumentError: an unknown word or number.

    Cost: for each pair two forward passes, and a forward and backward pass for each step; then the product over edges,
        once for any number of steps (see `edge_contraction`). Memory beside a plain forward and backward pass: per
        token of a pair (2 L + 1) d for D and (4 L + 1) d for slopes, per token and step 3 L d for y, whose place slopes
        take; in fp32 at most 4.7 MB for Llama 2 7B.
    Source: Syed et al. 2023, arXiv 2310.10348 (EAP); Hanna et al. 2024, arXiv 2403.17806 (EAP-IG).

    Example:
        >>> from types import SimpleNamespace
        >>> from kedit_fast import demo
        >>> model, tokenizer = demo.load()
        >>> pair = SimpleNamespace(clean=(4, 5, 6), corrupted=(4, 9, 6), answer=7, wrong=8, label="first")
        >>> result = edge_scores(model, [pair], scoring="eap")
        >>> result.scores.shape == result.graph.mask.shape
        True
    """
    points = _points(scoring, steps)
    check_metric(metric)
    if scale not in get_args(Scale):
        raise InvalidArgumentError(f"scale must be one of {', '.join(get_args(Scale))}; got {scale!r}")
    if metric == "kl" and scoring == "eap":
        raise InvalidArgumentError(
            'the KL has no slope at the clean prompt, so "eap" would score every edge 0: use "eap-ig" or another metric'
        )
    for name, number in (("batch_size", 1 if batch_size is None else batch_size), ("max_tokens", max_tokens)):
        if number < 1:
            raise InvalidArgumentError(f"{name} must be 1 or more; got {number}")
    components = _opened(model, spec)
    check_pairs(components.view, pairs)
    size = (batch_size or 1) if scale == "published" else 1
    shares = [1.0] * len(pairs)
    if scale == "published":  # each batch's loss is a mean
        shares = [1 / min(size, len(pairs) - i // size * size) for i in range(len(pairs))]
    weights = [share / (len(pairs) * len(points)) for share in shares]
    graph = graph_of(components)
    total: torch.Tensor | None = None
    sums = torch.zeros(2, dtype=torch.float64, device="cpu")
    bar = tqdm(total=len(pairs), desc="edge scores", unit="pair", disable=not progress)
    with evaluating(components.view), bar:
        for chosen in _batches(pairs, len(points), batch_size, max_tokens):
            batch = _Batch(components, [pairs[i] for i in chosen], [weights[i] for i in chosen], metric)
            scores = batch.scores(points, max_tokens)
            total = scores if total is None else total.add_(scores)
            sums += batch.metrics.double().sum(1).cpu()
            bar.update(len(chosen))
    assert total is not None
    result = total.cpu() * graph.mask
    if not bool(torch.isfinite(result).all()):
        raise EvaluationError(
            f"{type(components.view.model).__name__} gives gradients that are not finite: load it in float32"
        )
    clean, corrupted = (sums / len(pairs)).tolist()
    return EdgeScores(graph, result, scoring, len(points), metric, len(pairs), clean, corrupted)


def _points(scoring: str, steps: int) -> list[float]:
    """Where gradients are taken: 0 at the corrupted input, 1 at the clean one."""
    if scoring not in get_args(Scoring):
        raise InvalidArgumentError(f"scoring must be one of {', '.join(get_args(Scoring))}; got {scoring!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InvalidArgumentError(f"steps must be a whole number, 1 or more; got {steps!r}")
    if scoring == "eap":
        return [1.0]
    if scoring == "clean-corrupted":
        return [0.0, 1.0]
    return [(k + (scoring == "eap-ig-right")) / steps for k in range(steps)]


def _opened(model: Any, spec: ArchSpec | None) -> Components:
    if isinstance(model, Components):
        require_no_memory(model.view.model)
        return model
    return open_components(view_without_memory(model, spec))


def check_pairs(view: ModelView, pairs: Sequence[Pair]) -> None:
    """Raise RequestError, by its label, for a pair that cannot be scored."""
    if not pairs:
        raise RequestError("no prompt pairs given")
    for pair in pairs:
        name, length = f"pair {pair.label!r}", len(pair.clean)
        if length != len(pair.corrupted):
            raise RequestError(
                f"{name}: its prompts have {length} and {len(pair.corrupted)} tokens; a corrupted prompt needs as "
                "many as the clean one: choose a subject with as many tokens"
            )
        if not length:
            raise RequestError(f"{name}: its prompts are empty")
        if length > view.max_length:
            raise RequestError(f"{name}: its prompts have {length} tokens, and the model takes {view.max_length}")
        if list(pair.clean) == list(pair.corrupted):
            raise RequestError(f"{name}: its prompts are the same, so that no edge could matter")
        ids = (*pair.clean, *pair.corrupted, pair.answer, pair.wrong)
        if min(ids) < 0 or max(ids) >= view.vocabulary:
            bad = next(i for i in ids if not 0 <= i < view.vocabulary)
            raise RequestError(f"{name}: token {bad} is not one of the model's {view.vocabulary:,}")


def _batches(pairs: Sequence[Pair], points: int, batch_size: int | None, max_tokens: int) -> Iterator[list[int]]:
    """Numbers of pairs that run together: of similar length, and few enough for all their steps to run in one pass."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].clean), reverse=True)
    begin = 0
    while begin < len(order):
        length = len(pairs[order[begin]].clean)
        count = max(1, max_tokens // (length * min(points, max(1, max_tokens // length))))
        count = min(count, batch_size or count)
        yield order[begin : begin + count]
        begin += count


class _Watched(torch.autograd.Function):
    """A tensor as it is; its gradient is shown to a function on the way back."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, see: Callable[[torch.Tensor], None]) -> torch.Tensor:
        ctx.see = see
        return states.view_as(states)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        ctx.see(gradient)
        return gradient, None


class _Batch:
    """Some prompt pairs: what their sources differ by, and the slopes of their targets."""

    def __init__(self, components: Components, pairs: Sequence[Pair], weights: Sequence[float], metric: Metric):
        self.components, self.view, self.pairs = components, components.view, pairs
        self.metric: Metric = metric
        device = self.view.device
        self.both = pad([p.clean for p in pairs] + [p.corrupted for p in pairs], device)
        self.shape = self.both.input_ids.shape[0] // 2, self.both.input_ids.shape[1]  # B, T
        first = [next(t for t, (a, b) in enumerate(zip(p.clean, p.corrupted, strict=True)) if a != b) for p in pairs]
        lengths = [len(p.clean) for p in pairs]
        # D is zero before the first token that differs, and slopes are zero after the last token.
        places = [i * self.shape[1] + t for i in range(len(pairs)) for t in range(first[i], lengths[i])]
        self.active = torch.tensor(places, device=device)  # [N] of the B T tokens
        self.last_places = torch.tensor(lengths, device=device) - 1
        self.answers = torch.tensor([p.answer for p in pairs], device=device)
        self.wrongs = torch.tensor([p.wrong for p in pairs], device=device)
        self.weights = torch.tensor(weights, dtype=torch.float64, device="cpu")
        self.metrics, self.clean_logits, self.changes = self._run_both()

    def _run_both(self) -> tuple[torch.Tensor, torch.Tensor, _Changes]:
        """Metrics [2, B] of the clean and the corrupted prompts, logits [B, V] of the clean ones, and D."""
        changes = _Changes(self.components, self.active, self.shape)
        with self.components.running(changes):
            states = last_states(self.view, TokenBatch(self.both.input_ids, None))
        logits = self._logits(states, self.last_places.repeat(2))
        clean, corrupted = logits.chunk(2)
        metrics = torch.stack(
            [metric_values(self.metric, part, self.answers, self.wrongs, clean) for part in (clean, corrupted)]
        )
        if not bool(torch.isfinite(metrics).all()):
            row = int(torch.nonzero(~torch.isfinite(metrics).all(0))[0])
            raise EvaluationError(
                f"{type(self.view.model).__name__} gives no finite logits for pair {self.pairs[row].label!r}"
            )
        return metrics, clean, changes

    def _logits(self, states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] at one place of every row."""
        rows = torch.arange(len(places), device=states.device)
        return self.view.head.logits(states[rows, places.to(states.device)])

    def scores(self, points: Sequence[float], max_tokens: int) -> torch.Tensor:
        """[F, V] of these pairs, weighted and summed."""
        slopes = _Slopes(self.components, self.changes, self.active, self.shape)
        together = max(1, max_tokens // (self.shape[0] * self.shape[1]))
        total: torch.Tensor | None = None
        for begin in range(0, len(points), together):
            some = points[begin : begin + together]
            self._differentiate(slopes, some)
            part = slopes.contracted(whole=begin + together >= len(points))
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def _differentiate(self, slopes: _Slopes, points: Sequence[float]) -> None:
        """Run the pairs at some points, forward and backward; `slopes` sees the gradients."""
        rows, steps = self.shape[0], len(points)
        slopes.start(points)
        ids = self.both.input_ids[:rows].repeat(steps, 1)
        with torch.enable_grad(), self.components.running(slopes):
            states = last_states(self.view, TokenBatch(ids, None))
            logits = self._logits(states, self.last_places.repeat(steps))
            answers, wrongs = self.answers.repeat(steps), self.wrongs.repeat(steps)
            clean = self.clean_logits.repeat(steps, 1) if self.metric == "kl" else None
            each = losses(self.metric, logits, answers, wrongs, clean)
            loss = (each * self.weights.to(each).repeat(steps)).sum()
            del states, logits, each
            slopes.differentiate(loss)


class _Changes(Visitor):
    """D of every source at the active tokens, from a pass over clean and then corrupted prompts."""

    def __init__(self, components: Components, active: torch.Tensor, shape: tuple[int, int]):
        self.components, self.active, self.shape = components, active, shape
        self.clean = self.corrupted = torch.empty(0)
        """[B, T, d] of all tokens: the states that enter the first block."""
        self.of_input = self.of_heads = self.of_attentions = self.of_mlps = torch.empty(0)
        """[N, d], [L, N, H, e], [L, N, d] and [L, N, d]; heads or attentions alone."""

    def _difference(self, states: torch.Tensor) -> torch.Tensor:
        """Corrupted minus clean [N, size] of states [2 B, T, size], in fp32 at least."""
        both = states.reshape(2, self.shape[0] * self.shape[1], -1)[:, self.active.to(states.device)]
        clean, corrupted = both.to(accumulation_dtype(states)).unbind()
        return (corrupted - clean).to(self.active.device)

    def entering(self, states: torch.Tensor) -> None:
        """Remember the states, and allocate what is filled later."""
        self.clean, self.corrupted = states.chunk(2)
        self.of_input = self._difference(states)
        layers, heads, e = self.components.layers, self.components.heads, self.components.head_size
        self.of_mlps = self.of_input.new_empty(layers, *self.of_input.shape)
        if self.components.attention_whole:
            self.of_attentions = torch.empty_like(self.of_mlps)
        else:
            self.of_heads = self.of_input.new_empty(layers, len(self.active), heads, e)

    def mixed(self, layer: int, z: torch.Tensor) -> None:
        """Fill in what heads differ by."""
        self.of_heads[layer] = self._difference(z.flatten(-2)).view_as(self.of_heads[layer])

    def attention_output(self, layer: int, output: torch.Tensor) -> None:
        """Fill in what attention as a whole differs by."""
        if self.components.attention_whole:
            self.of_attentions[layer] = self._difference(output)

    def mlp_output(self, layer: int, output: torch.Tensor) -> None:
        """Fill in what MLPs differ by."""
        self.of_mlps[layer] = self._difference(output)


class _Slopes(Visitor):
    """Slopes of every target at the active tokens, added up over steps; and the product with D.

    In a pass it makes the gradients visible, and takes each as soon as the backward pass reaches it.
    """

    def __init__(self, components: Components, changes: _Changes, active: torch.Tensor, shape: tuple[int, int]):
        self.components, self.changes, self.active, self.shape = components, changes, active, shape
        layers, tokens = components.layers, changes.of_input.shape[0]
        self.of_heads: list[torch.Tensor | None] = [None] * layers
        """a, by layer [3, N, H, e]; they come into being in the first backward pass, from the last layer down."""
        self.of_attentions: list[torch.Tensor | None] = [None] * layers
        self.of_mlps: list[torch.Tensor | None] = [None] * (layers + 1)
        """By layer [N, d]; the last one is that of the logits."""
        self.constants = self._constants() if not components.attention_whole else []
        self.points: Sequence[float] = ()
        self.leaf = torch.empty(0)
        self.states: list[torch.Tensor] = []
        self.scales: dict[int, torch.Tensor] = {}
        self.shares = changes.of_input.new_empty(0)
        self.pending: set[tuple[str, int]] = set()
        self.tokens = tokens

    def _constants(self) -> list[torch.Tensor]:
        """b' = b + W offset of q, k and v [3, H, e], by layer: y less this is linear in xh."""
        dtype, device = self.changes.of_input.dtype, self.active.device
        constants = []
        for layer in range(self.components.layers):
            offset, parts = self.components.norm_offset(layer), []
            for kind in HEAD_INPUTS:
                weight, bias = self.components.in_weight(layer, kind), self.components.in_bias(layer, kind)
                part = torch.zeros(weight.shape[:2], dtype=dtype, device=weight.device)
                if offset is not None:
                    part += weight.to(dtype) @ offset.to(weight.device, dtype)
                if bias is not None:
                    part += bias.to(dtype)
                parts.append(self.components.by_head(part).to(device))
            constants.append(torch.stack(parts))
        return constants

    # --- a pass ---

    def start(self, points: Sequence[float]) -> None:
        """Get ready for a pass over the pairs at some points, one after another."""
        self.points, self.states, self.scales, self.pending = points, [], {}, set()
        if not self.components.attention_whole:
            heads, layers = self.components.heads, self.components.layers
            self.shares = self.changes.of_input.new_zeros(layers, 3, len(points), self.tokens, heads)

    def entering(self, states: torch.Tensor) -> torch.Tensor:
        """The inputs between the corrupted and the clean one, [steps B, T, d]."""
        clean, corrupted = self.changes.clean, self.changes.corrupted
        wide = accumulation_dtype(clean)
        at = torch.tensor(self.points, dtype=wide, device=clean.device)[:, None, None, None]
        inputs = corrupted.to(wide) + at * (clean.to(wide) - corrupted.to(wide))
        self.leaf = inputs.flatten(0, 1).to(clean.dtype).requires_grad_()
        return self.leaf

    def _chosen(self, states: torch.Tensor) -> torch.Tensor:
        """Of states [steps B, T, ..] those of active tokens [steps, N, ..], in fp32 at least."""
        states = states.reshape(len(self.points), self.shape[0] * self.shape[1], *states.shape[2:])
        if self.tokens != states.shape[1]:
            states = states[:, self.active.to(states.device)]
        return states.to(self.active.device, accumulation_dtype(states))

    def _watched(self, states: torch.Tensor, name: str, layer: int, see: See) -> torch.Tensor:
        self.pending.add((name, layer))

        def seen(gradient: torch.Tensor) -> None:
            self.pending.discard((name, layer))
            with torch.no_grad():
                see(self._chosen(gradient))

        return _Watched.apply(states, seen)

    def attention_input(self, layer: int, states: torch.Tensor) -> torch.Tensor | None:
        """Remember the states; where attention is a node, watch them."""
        if not self.components.attention_whole:
            self.states.append(states.detach())
            return None
        return self._watched(states, "attention", layer, self._adding(self.of_attentions, layer))

    def head_input(self, layer: int, kind: HeadInput, y: torch.Tensor) -> torch.Tensor:
        """Watch a head's q, k or v."""
        place, plain = HEAD_INPUTS.index(kind), y.detach()
        return self._watched(y, kind, layer, lambda slope: self._see_head(layer, place, plain, slope))

    def mlp_input(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """Watch what an MLP reads."""
        return self._watched(states, "mlp", layer, self._adding(self.of_mlps, layer))

    def last(self, states: torch.Tensor) -> torch.Tensor:
        """Watch what the head of the model reads."""
        layer = self.components.layers
        return self._watched(states, "logits", layer, self._adding(self.of_mlps, layer))

    @staticmethod
    def _adding(slots: list[torch.Tensor | None], layer: int) -> See:
        def add(slope: torch.Tensor) -> None:
            before, some = slots[layer], slope.sum(0)
            slots[layer] = some if before is None else before.add_(some)

        return add

    def _see_head(self, layer: int, place: int, plain: torch.Tensor, slope: torch.Tensor) -> None:
        """Add up delta / s, and note <y - b', delta> / (s d), from the gradient [steps, N, H, e]."""
        if layer not in self.scales:
            states = self._chosen(self.states[layer])
            self.scales[layer] = self.components.norm_formula(layer).scale(states)  # [steps, N]
        slope = slope / self.scales[layer][..., None, None]
        linear = self._chosen(plain) - self.constants[layer][place]
        self.shares[layer, place] = (linear.mul_(slope)).sum(-1).div_(self.components.width)
        total = self.of_heads[layer]
        if total is None:
            self.of_heads[layer] = total = slope.new_zeros(3, *slope.shape[1:])
        total[place] += slope.sum(0)

    def differentiate(self, loss: torch.Tensor) -> None:
        """Run the backward pass of a loss.

        Raises:
            UnsupportedModelError: there are no gradients, of the whole model or at a place.
        """
        model = type(self.components.view.model).__name__
        if not loss.requires_grad:
            raise UnsupportedModelError(f"{model} computes no gradients: its logits do not depend on its blocks")
        try:
            torch.autograd.grad(loss, [self.leaf])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # it may be any code
            raise UnsupportedModelError(
                f"{model} has no gradients in its blocks ({type(error).__name__}: {first_line(error)}): load it in "
                "float32, bfloat16 or float16, not quantized, and without compiled code"
            ) from error
        if self.pending:
            name, layer = min(self.pending, key=lambda place: place[1])
            raise UnsupportedModelError(f"{model}: its logits do not depend on the {name} of layer {layer}")

    # --- the product ---

    def contracted(self, whole: bool) -> torch.Tensor:
        """[F, V]: each step's own term of the last pass; and with `whole`, the product of what all steps added up."""
        if self.components.attention_whole:
            return self._of_whole_attention() if whole else self._nothing()
        components, layers = self.components, range(self.components.layers)
        formula = components.norm_formula(0)
        for layer in layers:  # in place of the states, layer by layer
            self.states[layer] = components.norm_formula(layer).standardized(self._chosen(self.states[layer]))
        slopes: dict[str, Any] = {}
        if whole:
            mlp_slopes = torch.stack([self._of(self.of_mlps, layer) for layer in range(components.layers + 1)])
            slopes = {
                "slopes": torch.stack([self._of(self.of_heads, layer) for layer in layers]),
                "in_weights": [components.in_weight(layer, kind) for layer in layers for kind in HEAD_INPUTS],
                "gains": [components.norm_gain(layer) for layer in layers],
                "centered": formula.centered,
                "mlp_slopes": mlp_slopes[:-1],
                "last_slopes": mlp_slopes[-1],
            }
        changes = self.changes
        scores = edge_contraction(
            changes.of_input,
            changes.of_heads,
            [components.out_weight(layer) for layer in layers],
            changes.of_mlps,
            standardized=self.states,
            shares=self.shares,
            parallel=components.parallel,
            **slopes,
        )
        self.states, self.scales = [], {}
        return scores

    @staticmethod
    def _of(slots: list[Any], layer: int) -> torch.Tensor:
        slope, slots[layer] = slots[layer], None  # freed as soon as it is copied
        return slope

    def _nothing(self) -> torch.Tensor:
        graph = graph_of(self.components)
        return self.changes.of_input.new_zeros(len(graph.sources), len(graph.targets))

    def _of_whole_attention(self) -> torch.Tensor:
        """[F, V] where a layer has two nodes; edges that do not exist have values, which the caller masks."""
        changes, layers = self.changes, range(self.components.layers)
        pairs = [part for layer in layers for part in (changes.of_attentions[layer], changes.of_mlps[layer])]
        sources = [changes.of_input, *pairs]
        targets = [slots[layer] for layer in layers for slots in (self.of_attentions, self.of_mlps)]
        targets.append(self.of_mlps[-1])
        scores = self._nothing()
        for i, source in enumerate(sources):
            for j, target in enumerate(targets):
                if target is not None and j >= i - 1:
                    scores[i, j] = torch.dot(source.flatten(), target.flatten())
        return scores
