"""Passes over prompts with noise at some embeddings, in each of which states of the clean run are restored.

One pass over every prompt, without noise and with each sample of it, records what all later passes share. A
restoration changes one position of some layers' outputs. By causality nothing before that position differs from the
noisy run, and nothing below the first restored layer; so rows of a pass begin at their restored token, in the block
where they begin to differ, and attend to the noisy run's keys and values before it. All restorations of all layers run
as *one* pass: block after block, the rows that begin there join those that run already. Restorations that begin in the
same layer are one row until the first of them ends.

That takes for granted how a model makes positions and calls its attention, so before it is trusted a few tokens run
both ways (`way_of`). Where the results differ, whole prompts run: from the first restored block, or from the
embeddings. All ways compute the same function.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from transformers import DynamicCache

from kedit_fast.errors import UnsupportedModelError
from kedit_fast.models import tail_attention
from kedit_fast.models.forward import (
    Entering,
    Site,
    TokenBatch,
    as_rows,
    did_not_run,
    evaluating,
    fused_modules,
    hidden_of,
    last_states,
    module_at,
    name_of,
    pad,
    starts_midway,
    stubs,
    with_hidden,
)
from kedit_fast.models.head import error_limit, relative_error, sample_rows
from kedit_fast.models.patching import input_hooks, output_hooks, replaced_forwards
from kedit_fast.models.prompt_runner import obstacle_of_tails, sees_windows
from kedit_fast.models.tail_runner import keys_values, picked_mlps
from kedit_fast.models.view import ModelView
from kedit_fast.support.messages import first_line
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
RestoredKind = Literal["block", "mlp", "attention"]
RestoringWay = Literal["joining rows", "whole prompts from a block", "whole prompts"]
"""How passes run: rows that begin at their restored token and join the pass in their first block; or whole prompts,
from the first restored block or from the embeddings."""


@dataclass(frozen=True)
class Restoration:
    """Outputs of a kind of module that are restored at one position."""

    kind: RestoredKind
    """Whose outputs."""
    first: int
    """The first layer."""
    end: int
    """The layer after the last one; of blocks `first + 1`."""


@dataclass(frozen=True)
class Units:
    """U pairs of a position to restore and a sample of noise; each restoration is made in each of them."""

    prompt: torch.Tensor
    """[U] int64, index of the prompt."""
    position: torch.Tensor
    """[U] int64, of the restored token."""
    sample: torch.Tensor
    """[U] int64, of the noise, from 0."""

    def __getitem__(self, part: slice) -> Units:
        return Units(self.prompt[part], self.position[part], self.sample[part])

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True)
class NoisyRuns:
    """P prompts that have run without noise and with each of S samples of it; `record_runs` makes it.

    The model must stay in evaluation mode, with the same weights, as long as it is used. Row p (S + 1) of the recorded
    states is prompt p without noise; its samples follow.
    """

    view: ModelView
    """The model."""
    way: RestoringWay
    """How passes run."""
    samples: int
    """S."""
    ids: torch.Tensor
    """[P, T] int64, padded on the right."""
    lengths: torch.Tensor
    """[P] int64."""
    embedded: torch.Tensor
    """[P (S + 1), T, d] what the embedding puts out, with noise."""
    entering: dict[int, torch.Tensor]
    """By layer, [P (S + 1), T, h] states that enter the block."""
    clean: dict[Site, torch.Tensor]
    """[P, T, h] outputs without noise."""
    keys_values: dict[int, tuple[torch.Tensor, torch.Tensor]]
    """By layer, [P (S + 1), groups, T, size]; empty where whole prompts run."""
    last: torch.Tensor
    """[P, S + 1, h] last states at each prompt's last token (logits [P, S + 1, V] where `Head.matrix` is None)."""
    returns_tuple: bool
    """Whether blocks of this version of transformers return tuples."""

    def unit_tokens(self, positions: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """[n] tokens of one row of a pass that restores these positions [n] of prompts [n]."""
        if self.way == "joining rows":
            return self.lengths[prompts] - positions
        return torch.full_like(positions, self.ids.shape[1])

    @plain_torch()
    @torch.no_grad()
    def restore(self, restorations: Sequence[Restoration], units: Units) -> torch.Tensor:
        """Last states at the prompts' last tokens, with restored states.

        Args:
            restorations: Q of them, none twice, and no block of the last layer: what that changes is known.
            units: U positions and samples.

        Returns:
            [Q, U, h], or logits [Q, U, V] where `Head.matrix` is None.

        Cost: see the module; of "joining rows" each block runs once.
        """
        if self.way == "joining rows":
            return _joining(self, restorations, units)[0]
        results: list[torch.Tensor | None] = [None] * len(restorations)
        midway = self.way == "whole prompts from a block"
        groups: dict[int, list[int]] = {}
        for q, restoration in enumerate(restorations):
            groups.setdefault(_first_block(restoration) if midway else 0, []).append(q)
        for start, members in groups.items():
            states = _run_whole(self, start, [restorations[q] for q in members], units)
            for q, part in zip(members, states, strict=True):
                results[q] = part
        return torch.stack([part for part in results if part is not None])


def _first_block(restoration: Restoration) -> int:
    """The first block whose states a restoration changes, or that must run to change them."""
    return restoration.first + (restoration.kind == "block")


@plain_torch()
@torch.no_grad()
def record_runs(
    view: ModelView,
    rows: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int]],
    noise: Sequence[torch.Tensor],
    kinds: Sequence[RestoredKind],
    way: RestoringWay | None = None,
) -> NoisyRuns:
    """Run P prompts without and with noise, and record what restorations need.

    Args:
        view: the model, in evaluation mode.
        rows: token ids of each prompt.
        spans: of each prompt, the first token with noise and the one after the last.
        noise: of each prompt, [S, tokens of its span, d] float64, added to what the embedding puts out.
        kinds: which outputs are going to be restored.
        way: how passes run; None for `way_of`.

    Raises:
        UnsupportedModelError: a module did not run, or not on all tokens; or the model has no such module in a layer.

    Cost: one forward pass over P (S + 1) rows. Memory: their states in each layer, with keys and values.
    """
    way = way_of(view) if way is None else way
    samples = len(noise[0])
    batch = pad([row for row in rows for _ in range(samples + 1)], view.device)
    assert batch.attention_mask is not None
    shape, copies = batch.input_ids.shape, samples + 1
    sites = [Site(layer, "block") for layer in range(view.num_layers)]
    sites += [Site(layer, kind) for kind in kinds if kind != "block" for layer in range(view.num_layers)]
    require_sites(view, kinds)
    seen: dict[Site, torch.Tensor] = {}
    embedded: list[torch.Tensor] = []
    first: list[torch.Tensor] = []
    tuples: list[bool] = []

    def add_noise(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if tuple(output.shape[:2]) != tuple(shape):
            raise UnsupportedModelError(
                f"the embedding of {type(view.model).__name__} puts out {list(output.shape)} for {list(shape)} tokens: "
                "noise cannot be added to the tokens of a subject"
            )
        result = output.clone()
        for p, ((begin, end), one) in enumerate(zip(spans, noise, strict=True)):
            part = result[p * copies + 1 : (p + 1) * copies, begin:end]
            part.copy_(part.double() + one.to(part.device))
        embedded.append(result)
        return result

    def see(site: Site) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple, output: Any) -> None:
            states = as_rows(hidden_of(output), shape)
            if states.shape[:2] != shape:
                raise UnsupportedModelError(
                    f"{name_of(view, site)} puts out {list(states.shape)}, not all {list(shape)} tokens of a batch"
                )
            if site.kind == "block" and site.layer == 0:
                tuples.append(isinstance(output, tuple | list))
            # Restored outputs are those of clean rows alone.
            seen[site] = states if site.kind == "block" else states[::copies].clone()

        return hook

    def see_first(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        first.append(args[0] if args else kwargs["hidden_states"])

    cache = DynamicCache() if way == "joining rows" else None
    hooks = [(view.model.get_input_embeddings(), add_noise), *((module_at(view, site), see(site)) for site in sites)]
    with output_hooks(hooks), input_hooks([(view.block(0), see_first)]):
        if cache is None:
            states = last_states(view, batch)
        else:
            with fused_modules(view):
                states = view.base(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    position_ids=batch.position_ids,
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
    missing = [site for site in sites if site not in seen]
    if missing:
        raise did_not_run(view, missing[0])
    if not embedded or not first:
        raise UnsupportedModelError(
            f"the embedding of {type(view.model).__name__} did not run in a forward pass: noise cannot be added to the "
            "tokens of a subject"
        )
    lengths = torch.tensor([len(row) for row in rows], device=view.device)
    ends = (lengths - 1).repeat_interleave(copies).to(states.device)
    layers = range(view.num_layers)
    blocks = {site.layer: states for site, states in seen.items() if site.kind == "block"}
    clean = {site: states for site, states in seen.items() if site.kind != "block"}
    if "block" in kinds:
        clean |= {Site(layer, "block"): blocks[layer][::copies] for layer in layers}
    return NoisyRuns(
        view=view,
        way=way,
        samples=samples,
        ids=batch.input_ids[::copies],
        lengths=lengths,
        embedded=embedded[-1],
        entering={0: first[-1], **{layer: blocks[layer - 1] for layer in layers if layer}},
        clean=clean,
        keys_values={} if cache is None else {layer: keys_values(cache, layer) for layer in layers},
        last=states[torch.arange(len(ends), device=states.device), ends].unflatten(0, (len(rows), copies)),
        returns_tuple=tuples[-1],
    )


def require_sites(view: ModelView, kinds: Sequence[RestoredKind]) -> None:
    """Raise UnsupportedModelError where a layer has no module of one of these kinds."""
    for kind in kinds:
        if kind == "attention" and not view.spec.attention:
            raise UnsupportedModelError(
                f"{view.spec.name} has no attention in every block, so its outputs cannot be restored in all layers: "
                'leave the kind "attention" out'
            )
        lacking = [layer for layer in range(view.num_layers) if layer not in view.editable]
        if kind != "block" and lacking:
            raise UnsupportedModelError(
                f"block {lacking[0]} of {view.spec.name} has no {getattr(view.spec, kind)}: trace blocks alone, with "
                'kinds=("block",)'
            )


# Rows that join ------------------------------------------------------------------------------------------------------


class _Branch(NamedTuple):
    """Rows that one restoration runs."""

    index: int
    """Of the restoration."""
    start: int
    """The first block that runs."""
    parent: int
    """Place, in the order of joining, of the branch whose states it begins with; -1 for those of the noisy run."""


def _branches(restorations: Sequence[Restoration]) -> list[_Branch]:
    """In the order of joining. Those that begin in one layer follow the longest of them until they end."""
    longest: dict[tuple[RestoredKind, int], int] = {}
    for q, one in enumerate(restorations):
        key = one.kind, one.first
        if one.kind != "block" and (key not in longest or one.end > restorations[longest[key]].end):
            longest[key] = q
    plan = []
    for q, one in enumerate(restorations):
        parent = longest.get((one.kind, one.first), q)
        plan.append((one.end if parent != q else _first_block(one), q, parent))
    plan.sort()
    place = {q: k for k, (_, q, _) in enumerate(plan)}
    return [_Branch(q, start, place[parent] if parent != q else -1) for start, q, parent in plan]


def _joining(
    runs: NoisyRuns, restorations: Sequence[Restoration], units: Units
) -> tuple[torch.Tensor, set[int | None]]:
    """[Q, U, h] last states; and the sliding windows that attention was called with.

    Tokens are laid out by branch, in the order of joining, then by unit: those of branch k are k W to (k + 1) W - 1.
    """
    view, plan, count = runs.view, _branches(restorations), len(units)
    device, width = view.device, runs.ids.shape[1]
    prompt, place = units.prompt.to(device), units.position.to(device)
    tails = runs.lengths.to(device)[prompt] - place  # [U]
    unit = torch.repeat_interleave(torch.arange(count, device=device), tails)  # [W]
    first = tails.cumsum(0) - tails  # [U]
    position = torch.arange(len(unit), device=device) - first[unit] + place[unit]  # [W]
    origin = prompt * (runs.samples + 1) + units.sample.to(device) + 1  # [U] rows of the noisy runs
    tokens = len(unit)
    total = len(plan) * tokens
    # Keys of the noisy run stand at their positions: those before a unit's tail are its prefix.
    starts = torch.nn.functional.pad(tails.cumsum(0), (1, 0))
    spans = torch.stack([torch.zeros_like(place), place], 1)
    layout = tail_attention.Layout(starts, int(tails.max()), spans, origin)
    active = [sum(branch.start <= layer for branch in plan) for layer in range(view.num_layers)]
    begins = torch.arange(len(plan), device=device)[:, None] * tokens

    def noisy(layer: int) -> torch.Tensor:
        states = runs.entering[layer]
        return states.flatten(0, 1).index_select(0, (origin[unit] * width + position).to(states.device))

    def restored(site: Site) -> torch.Tensor:
        states = runs.clean[site]
        return states.flatten(0, 1).index_select(0, (prompt * width + place).to(states.device))  # [U, h]

    def joined(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The states of all rows that run in a block."""
        new = [branch for branch in plan if branch.start == layer]
        if not new:
            return hidden
        running = active[layer] - len(new)
        parts = [hidden[0, : running * tokens]]
        entering = noisy(layer) if any(branch.parent < 0 for branch in new) else None
        for branch in new:
            if branch.parent >= 0:
                parts.append(hidden[0, branch.parent * tokens : (branch.parent + 1) * tokens])
                continue
            assert entering is not None
            states = entering
            if restorations[branch.index].kind == "block":
                values = restored(Site(layer - 1, "block")).to(states.device)
                states = states.index_copy(0, first.to(states.device), values)
            parts.append(states)
        return torch.cat([part.to(parts[-1].device) for part in parts])[None]

    def block(layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not active[layer]:
                return (hidden_states, None) if runs.returns_tuple else hidden_states
            size = active[layer] * tokens
            args, kwargs = _first_tokens(args, total, size), _first_tokens(kwargs, total, size)
            return forward(joined(layer, hidden_states), *args, **kwargs)

        return run

    def restore(site: Site, ranks: list[int]) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: tuple, output: Any) -> Any:
            hidden = hidden_of(output)
            flat = hidden.reshape(-1, hidden.shape[-1])
            at = (begins[ranks] + first).flatten().to(flat.device)
            changed = flat.index_copy(0, at, restored(site).to(flat.device).repeat(len(ranks), 1))
            return with_hidden(output, changed.view(hidden.shape))

        return hook

    def of_layer(layer: int) -> tuple[tail_attention.KeysValues, tail_attention.Layout]:
        keys, values = runs.keys_values[layer]
        return tail_attention.KeysValues(keys, values), layout.repeated(active[layer], tokens)

    hooks = []
    for kind in ("mlp", "attention"):
        for layer in range(view.num_layers):
            ranks = [
                k
                for k, branch in enumerate(plan)
                if (one := restorations[branch.index]).kind == kind and max(one.first, branch.start) <= layer < one.end
            ]
            if ranks:
                site = Site(layer, kind)
                hooks.append((module_at(view, site), restore(site, ranks)))
    wanted = (begins + first + tails - 1).flatten()  # [Q U]
    ids = runs.ids[prompt[unit], position].repeat(len(plan))[None]
    with fused_modules(view), tail_attention.installed(view):
        blocks = {view.block(layer): block(layer, view.block(layer).forward) for layer in range(view.num_layers)}
        last = {view.num_layers - 1: wanted}
        with replaced_forwards({**blocks, **picked_mlps(view, last)}), output_hooks(hooks):
            hidden = view.base(
                input_ids=ids,
                attention_mask=None,
                position_ids=position.repeat(len(plan))[None],
                past_key_values=tail_attention.TailCache(of_layer),
                use_cache=True,
            ).last_hidden_state
    states = hidden.flatten(0, 1).index_select(0, wanted.to(hidden.device)).view(len(plan), count, -1)
    order = torch.empty(len(plan), dtype=torch.int64)
    order[[branch.index for branch in plan]] = torch.arange(len(plan))
    return states[order.to(states.device)], layout.windows


def _first_tokens(given: Any, total: int, count: int) -> Any:
    """What a block is given beside its states, of the first tokens alone: positions, and what is made from them."""
    if isinstance(given, torch.Tensor):
        dim = next((d for d, size in enumerate(given.shape) if size == total), None)
        return given if dim is None else given.narrow(dim, 0, count)
    if isinstance(given, tuple | list) and type(given) in (tuple, list):
        return type(given)(_first_tokens(part, total, count) for part in given)
    if type(given) is dict:
        return {name: _first_tokens(part, total, count) for name, part in given.items()}
    return given


# Whole prompts -------------------------------------------------------------------------------------------------------


def _run_whole(runs: NoisyRuns, start: int, restorations: Sequence[Restoration], units: Units) -> torch.Tensor:
    """[q, U, h] last states of restorations whose blocks below `start` run as they did with noise."""
    view, count, width = runs.view, len(units), runs.ids.shape[1]
    device = view.device
    prompt, place = units.prompt.to(device), units.position.to(device)
    origin = prompt * (runs.samples + 1) + units.sample.to(device) + 1
    copies = len(restorations)
    lengths = runs.lengths.to(device)[prompt]
    mask = (torch.arange(width, device=device) < lengths[:, None]).long()
    batch = TokenBatch(runs.ids[prompt].repeat(copies, 1), mask.repeat(copies, 1))
    begins = torch.arange(copies, device=device)[:, None] * (count * width)
    restored = torch.arange(count, device=device) * width + place  # [U]

    def put(states: torch.Tensor, site: Site, members: list[int]) -> torch.Tensor:
        """States [q U, T, h] with the clean run's at the restored tokens of some restorations."""
        clean = runs.clean[site]
        values = clean[prompt.to(clean.device), place.to(clean.device)].to(states.device)
        at = (begins[members] + restored).flatten().to(states.device)
        return states.flatten(0, 1).index_copy(0, at, values.repeat(len(members), 1)).view(states.shape)

    def restore(site: Site, members: list[int]) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: tuple, output: Any) -> Any:
            hidden = hidden_of(output)
            states = as_rows(hidden, batch.input_ids.shape)
            return with_hidden(output, put(states, site, members).view(hidden.shape))

        return hook

    members: dict[Site, list[int]] = {}
    for q, one in enumerate(restorations):
        for layer in range(one.first, one.end):
            members.setdefault(Site(layer, one.kind), []).append(q)
    with contextlib.ExitStack() as stack:
        if start:
            below = Site(start - 1, "block")
            states = runs.entering[start]
            states = states[origin.to(states.device)].repeat(copies, 1, 1)
            if below in members:
                states = put(states, below, members.pop(below))
            stack.enter_context(replaced_forwards(stubs(view, Entering(start, states, runs.returns_tuple))))
        else:
            embedded = runs.embedded[origin.to(runs.embedded.device)].repeat(copies, 1, 1)
            hook = (view.model.get_input_embeddings(), lambda module, args, output: embedded)
            stack.enter_context(output_hooks([hook]))
        stack.enter_context(output_hooks([(module_at(view, site), restore(site, qs)) for site, qs in members.items()]))
        last = last_states(view, batch)
    ends = (lengths - 1).repeat(copies).to(last.device)
    return last[torch.arange(len(ends), device=last.device), ends].unflatten(0, (copies, count))


# Which way -----------------------------------------------------------------------------------------------------------


def way_of(view: ModelView) -> RestoringWay:
    """How passes with restored states run in a model; tried once for a view, with a few tokens."""
    return view.once(_try)


@plain_torch()
@torch.no_grad()
def _try(view: ModelView) -> RestoringWay:
    """How passes run; said at INFO where rows do not join. Cost: some passes of a few tokens."""
    plain: RestoringWay = "whole prompts from a block" if view.once(starts_midway) else "whole prompts"
    obstacle = obstacle_of_tails(view)
    if not obstacle and plain == "whole prompts":
        obstacle = "its blocks need more than the states that enter them"
    if not obstacle and not tail_attention.usable(view):
        obstacle = "its attention is not taken from transformers' registry"
    if not obstacle:
        rows = sample_rows(view.model.config, view.vocabulary)
        last, complete = view.num_layers - 1, len(view.editable) == view.num_layers
        kinds: list[RestoredKind] = ["block", *(["mlp", "attention"] if complete and view.spec.attention else [])]
        restorations = [Restoration("block", layer, layer + 1) for layer in sorted({0, last - 1}) if 0 <= layer < last]
        for kind in kinds[1:]:
            ends = dict.fromkeys((1, last + 1))
            restorations += [Restoration(kind, 0, end) for end in ends]
            restorations += [Restoration(kind, last, last + 1)] if last else []
        with evaluating(view):
            try:
                results, windows = [], set()
                ways: tuple[RestoringWay, ...] = (plain, "joining rows")
                for way in ways:
                    runs = record_runs(view, rows, [(0, 1)] * len(rows), _sample_noise(view, rows), kinds, way)
                    units = _sample_units(rows)
                    if way == plain:
                        results.append(runs.restore(restorations, units))
                    else:
                        states, windows = _joining(runs, restorations, units)
                        results.append(states)
                expected, states = (part.flatten(0, 1) for part in results)
                error = relative_error(states, expected)
                if not sees_windows(view, windows, 0):
                    obstacle = "its attention does not say its sliding window"
                elif error <= error_limit(expected.dtype, view.head.rounding):
                    return "joining rows"
                else:
                    obstacle = f"their states differ by {error:.1g}"
            except Exception as error:  # it may be any code
                obstacle = first_line(error) or type(error).__name__
    _log.info("restored states of %s: %s run: %s", view.spec.name, plain, obstacle)
    return plain


def _sample_noise(view: ModelView, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """A sample at the first token of each row, as large as embeddings."""
    embedding = view.model.get_input_embeddings()
    states = embedding(torch.tensor([list(rows[0])], device=view.device)).double()
    generator = torch.Generator().manual_seed(0)
    scale = float(states.std())
    return [scale * torch.randn(1, 1, states.shape[-1], generator=generator).double() for _ in rows]


def _sample_units(rows: Sequence[Sequence[int]]) -> Units:
    """The first position of every row, one in the middle and the last one."""
    every = [(p, t, 0) for p, row in enumerate(rows) for t in sorted({0, len(row) // 2, len(row) - 1})]
    return Units(*torch.tensor(every).T)
