"""Forward passes over the tails of prompts: over what a change at one token can reach, and nothing else.

When a delta is added at the lookup token of a block, causality leaves everything before that token as it was, and the
order of blocks everything below. One full pass records, for each row, the keys and values of the positions before the
lookup token and the hidden states that enter the first live block. After that a pass runs the live blocks on the tail
alone, and their MLPs on those of its tokens that matter. The function that it computes is the same.

Rows are laid out as [gap, prefix, tail]: the gap is masked, and positions are given explicitly, so every token attends
to the tokens that it would attend to in its own unpadded prompt. The prefix ends where the tail begins, so that a
sliding window, which is measured in slots, covers the same tokens as there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad as pad_with_zeros
from transformers import DynamicCache

from kedit_fast.models import tail_attention
from kedit_fast.models.fixed_deltas import FixedDeltas
from kedit_fast.models.forward import (
    Entering,
    Site,
    TokenBatch,
    did_not_run,
    fused_modules,
    hidden_of,
    module_at,
    stubs,
    with_hidden,
)
from kedit_fast.models.patching import output_hooks, replaced_forwards
from kedit_fast.models.shared_prefixes import SharedRows, SharingCache
from kedit_fast.models.view import ModelView
from kedit_fast.support.torch_state import plain_torch

PACK_BELOW = 0.9  # an MLP runs on picked tokens when they are fewer than this share of all


@dataclass
class TailRunner:
    """R prompts with the states that do not change, ready to run their tails of at most S tokens again and again.

    `record_tails` makes one, for models whose tails can run (`prompt_runner.pass_kind`). The model must stay in
    evaluation mode, with the same weights, as long as it is used.
    """

    view: ModelView
    """The model."""
    sites: tuple[Site, ...]
    """Where deltas are added at the lookup token, all in one layer: the output of the block, or of its MLP, or of its
    attention and its MLP."""
    packs_rows: bool
    """Whether the tail tokens of all rows run as one row without padding, under `tail_attention`."""
    returns_tuple: bool
    """Whether blocks of this version of transformers return tuples."""
    prefix: int
    """P, places for the prefixes; those of a row end where its tail begins."""
    lookup: torch.Tensor
    """[R] int64, position of the lookup token in each prompt, where the tail begins."""
    ids: torch.Tensor
    """[R, S] int64, token ids of the tails."""
    positions: torch.Tensor
    """[R, S] int64, positions of these tokens in their prompts."""
    inside: torch.Tensor
    """[R, S] bool, which places of the tails hold a token."""
    mask: torch.Tensor
    """[R, P + S] int64, 1 where prefix and tail hold a token."""
    entering: torch.Tensor | None
    """[R, S, h] hidden states that enter the first live block; None where that is block 0."""
    caches: dict[int, tail_attention.KeysValues]
    """Keys and values of the prefixes by live layer."""
    tokens: torch.Tensor = field(init=False)
    """[N] int64, the places of the flattened [R * S] that hold a token."""
    packed_place: torch.Tensor | None = field(init=False, default=None)
    """[R, S] int64, each place's index among these tokens; None where rows are not packed."""
    layout: tail_attention.Layout | None = field(init=False, default=None)
    """Which packed tokens attend to which; None where rows are not packed."""

    def __post_init__(self):
        self.tokens = torch.nonzero(self.inside.flatten())[:, 0]
        if self.packs_rows:
            self.packed_place = (self.inside.flatten().cumsum(0) - 1).view_as(self.inside)
            self.layout = tail_attention.Layout.of_tails(self.inside, self.prefix, self.lookup)

    @property
    def first_live(self) -> int:
        """The first block that runs again in each pass."""
        return _first_live(self.sites)

    @property
    def state_bytes(self) -> int:
        """Bytes of the recorded states."""
        tensors = [part for cache in self.caches.values() for part in (cache.keys, cache.values)]
        return sum(part.nbytes for part in tensors) + (0 if self.entering is None else self.entering.nbytes)

    def select(self, rows: torch.Tensor) -> TailRunner:
        """A runner with some of the rows [n] int64, no longer than they need."""
        rows = rows.to(self.lookup.device)  # the head's device may be another one
        lookup, lengths = (part[rows] for part in (self.lookup, self.inside.sum(1)))
        prefix, tail = int(lookup.max()), int(lengths.max())
        gap = self.prefix - prefix

        def cut(part: torch.Tensor) -> torch.Tensor:
            return part[rows.to(part.device), :tail]

        return TailRunner(
            view=self.view,
            sites=self.sites,
            packs_rows=self.packs_rows,
            returns_tuple=self.returns_tuple,
            prefix=prefix,
            lookup=lookup,
            ids=cut(self.ids),
            positions=cut(self.positions),
            inside=cut(self.inside),
            mask=self.mask[rows, gap : self.prefix + tail],
            entering=None if self.entering is None else cut(self.entering),
            caches={layer: cache.select(rows, gap, self.prefix) for layer, cache in self.caches.items()},
        )

    def append(self, other: TailRunner) -> TailRunner:
        """A runner with the rows of both, which are of one model and have the same sites."""
        prefix, tail = max(self.prefix, other.prefix), max(self.ids.shape[1], other.ids.shape[1])
        first, second = (one.padded(prefix - one.prefix, tail - one.ids.shape[1]) for one in (self, other))
        entering = None
        if first.entering is not None and second.entering is not None:
            entering = torch.cat([first.entering, second.entering])
        return TailRunner(
            view=self.view,
            sites=self.sites,
            packs_rows=self.packs_rows,
            returns_tuple=self.returns_tuple,
            prefix=prefix,
            lookup=torch.cat([first.lookup, second.lookup]),
            ids=torch.cat([first.ids, second.ids]),
            positions=torch.cat([first.positions, second.positions]),
            inside=torch.cat([first.inside, second.inside]),
            mask=torch.cat([first.mask, second.mask]),
            entering=entering,
            caches={
                layer: tail_attention.KeysValues.cat([first.caches[layer], second.caches[layer]])
                for layer in self.caches
            },
        )

    def padded(self, before: int, behind: int) -> TailRunner:
        """A runner with more places, which hold no token: before the prefixes and behind the tails."""
        if before == behind == 0:
            return self
        return TailRunner(
            view=self.view,
            sites=self.sites,
            packs_rows=self.packs_rows,
            returns_tuple=self.returns_tuple,
            prefix=self.prefix + before,
            lookup=self.lookup,
            ids=pad_with_zeros(self.ids, (0, behind)),
            positions=pad_with_zeros(self.positions, (0, behind)),
            inside=pad_with_zeros(self.inside, (0, behind)),
            mask=pad_with_zeros(self.mask, (before, behind)),
            entering=None if self.entering is None else pad_with_zeros(self.entering, (0, 0, 0, behind)),
            caches={layer: cache.padded(before) for layer, cache in self.caches.items()},
        )

    def write_(self, rows: torch.Tensor, other: TailRunner) -> None:
        """Put the rows of another runner in the place of some of this one's, in its own memory.

        Args:
            rows: [n] int64.
            other: of n rows of the same model and sites, with as many places for prefixes and tails. Every place of
                the tails of both holds a token, so that what is computed has one shape.
        """
        for name in ("lookup", "ids", "positions", "mask"):
            part: torch.Tensor = getattr(self, name)
            part[rows.to(part.device)] = getattr(other, name)
        if self.entering is not None and other.entering is not None:
            self.entering[rows.to(self.entering.device)] = other.entering
        for layer, cache in self.caches.items():
            cache.write_(rows, other.caches[layer])
        if self.layout is not None and other.layout is not None:
            self.layout.write_(rows.to(self.lookup.device), other.layout)

    @plain_torch()
    def run(self, delta: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Last hidden states of some tail tokens with deltas added at the sites' lookup token.

        Args:
            delta: [R, sites, h].
            wanted: [n] index into the flattened [R * S] tail tokens, without repetition.

        Returns:
            [n, h].
        """
        last = self.view.num_layers - 1
        if (layout := self.layout) is not None and self.packed_place is not None:
            first, wanted = self.packed_place[:, 0], self.packed_place.flatten()[wanted.to(self.packed_place.device)]
            ids, positions = (part.flatten()[self.tokens][None] for part in (self.ids, self.positions))
            mask, cache = None, tail_attention.TailCache(lambda layer: (self.caches.get(layer), layout))
            attention = tail_attention.installed(self.view)
            picks = {last: wanted} if last >= self.first_live else {}
        else:
            first = torch.arange(len(self.ids), device=delta.device) * self.ids.shape[1]
            ids, positions, mask, cache = self.ids, self.positions, self.mask, self._fresh_cache()
            attention = contextlib.nullcontext()
            picks = {layer: wanted if layer == last else self.tokens for layer in self.caches}
        below = self._stubs(delta, first)
        with (
            fused_modules(self.view),  # first: picked MLPs call the forward functions that it puts in
            replaced_forwards({**below, **picked_mlps(self.view, picks)}),
            self._hooks(delta, first),
            attention,
        ):
            hidden = self.view.base(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state
        return _Gather.apply(hidden.flatten(0, 1), wanted.to(hidden.device))

    @plain_torch()
    def run_states(self, states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Last hidden states of some tokens of whole rows, from states that leave the sites' block.

        For runners that `whole_rows` makes. Differentiable in `states`.

        Args:
            states: [N, h] of the rows' tokens, one row after another without padding.
            wanted: [n] int64, indices into these, without repetition.

        Returns:
            [n, h].

        Cost: the blocks above the sites' layer; in the last one the MLP runs on the wanted tokens alone.
        """
        last, first = self.view.num_layers - 1, self.first_live
        ids, positions = (part.flatten()[self.tokens] for part in (self.ids, self.positions))
        wanted = wanted.to(states.device)
        mask, cache, attention = None, None, contextlib.nullcontext()
        if first > last:  # the norm alone is left: it needs no other token
            states, ids, positions = (_Gather.apply(states, wanted), ids[wanted.to(ids.device)], positions[wanted])
            wanted = torch.arange(len(wanted), device=states.device)
            entering, picks = states[None], {}
            ids, positions = ids[None], positions[None]
        elif (layout := self.layout) is not None:
            entering, ids, positions = states[None], ids[None], positions[None]
            cache = tail_attention.TailCache(lambda layer: (None, layout))
            attention = tail_attention.installed(self.view)
            picks = {last: wanted}
        else:
            here = self.tokens.to(states.device)
            entering = _Scatter.apply(states, here, self.inside.numel()).view(*self.inside.shape, -1)
            wanted = here[wanted]
            ids, positions, mask = self.ids, self.positions, self.mask
            picks = {layer: wanted if layer == last else here for layer in range(first, last + 1)}
        below = stubs(self.view, Entering(first, entering, self.returns_tuple))
        with (
            fused_modules(self.view),
            replaced_forwards({**below, **picked_mlps(self.view, picks)}),
            attention,
        ):
            hidden = self.view.base(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state
        return _Gather.apply(hidden.flatten(0, 1), wanted.to(hidden.device))

    def _fresh_cache(self) -> DynamicCache | None:
        """A new Cache object, each pass appends the tail to it; None without prefixes: older models want none."""
        if self.prefix == 0:
            return None
        cache = DynamicCache()
        for layer in range(self.view.num_layers):
            if layer in self.caches:
                states = self.caches[layer]
                cache.update(states.keys[:, :, : self.prefix], states.values[:, :, : self.prefix], layer)
            else:  # never read: only its length is, by masks and positions
                none = self.mask.new_zeros((), dtype=torch.float32).expand(len(self.ids), 1, self.prefix, 1)
                cache.update(none, none, layer)
        return cache

    def _stubs(self, delta: torch.Tensor, first: torch.Tensor) -> dict[torch.nn.Module, Callable[..., Any]]:
        """Blocks below the first live one return at once; the last of them returns the entering states."""
        if self.entering is None:
            return {}
        states = self.entering
        if self.packs_rows:
            states = states.flatten(0, 1)[self.tokens.to(states.device)][None]
        if self.sites[0].kind == "block":
            states = _added(states, delta[:, 0], first)
        return stubs(self.view, Entering(self.first_live, states, self.returns_tuple))

    def _hooks(self, delta: torch.Tensor, first: torch.Tensor) -> contextlib.AbstractContextManager:
        """The deltas of sites inside a block, added to their modules' outputs."""

        def add(index: int) -> Callable[..., Any]:
            return lambda module, args, output: with_hidden(output, _added(hidden_of(output), delta[:, index], first))

        sites = enumerate(self.sites)
        return output_hooks([(module_at(self.view, site), add(i)) for i, site in sites if site.kind != "block"])


@plain_torch()
@torch.no_grad()
def record_tails(
    view: ModelView,
    batch: TokenBatch,
    lookups: Sequence[int],
    sites: Sequence[Site],
    references: Sequence[int],
    packs_rows: bool,
    fixed: FixedDeltas | None = None,
    shared: SharedRows | None = None,
) -> tuple[TailRunner, torch.Tensor, torch.Tensor]:
    """A runner of R prompts; the sites' outputs [R, sites, h] at their lookup tokens; last hidden states of references.

    Args:
        view: the model, in evaluation mode.
        batch: R prompts.
        lookups: index of the lookup token in each; the tail starts there.
        sites: of one layer, where deltas will be added at the lookup token: the output of the block, or of its MLP,
            or of its attention and its MLP.
        references: rows whose last hidden state at the lookup token is returned.
        packs_rows: whether the tail tokens of all rows are to run as one row, under `tail_attention`.
        fixed: other deltas at the same sites, at tokens before the lookup tokens. They are in the recorded states, so
            that no pass over the tails adds them again.
        shared: the same prompts, taken apart into prefixes that end before the lookup tokens and run once, and what
            follows; None to run whole prompts. Not with `fixed`.

    Raises:
        UnsupportedModelError: a site, or the block below the first live one, did not run.

    Cost: one forward pass, without the head.
    """
    sites = tuple(sites)
    assert batch.attention_mask is not None and (shared is None or fixed is None)
    lookup = torch.tensor(list(lookups), device=view.device)
    lengths = batch.attention_mask.sum(1)
    prefix, tail = int(lookup.max()), int((lengths - lookup).max())
    offsets = torch.arange(tail, device=view.device)
    positions = lookup[:, None] + offsets  # [R, S], those past the end are masked
    inside = positions < lengths[:, None]
    places = positions.clamp(max=batch.input_ids.shape[1] - 1)
    slots = torch.arange(prefix, device=view.device) - (prefix - lookup)[:, None]  # [R, P] positions
    rows_of_references = torch.tensor(list(references), dtype=torch.int64, device=view.device)
    earlier = contextlib.nullcontext() if fixed is None else fixed.added(view, sites, batch.input_ids.shape)
    with earlier:
        full_pass = _full_pass(view, batch, sites, lookup, places, rows_of_references, shared)
    caches, recorded_at = {}, slots.clamp(min=0)
    if shared is not None:  # in the memory of a pass over shared rows, a prefix ends where what follows it begins
        recorded_at = recorded_at + (shared.prefix - shared.lengths)[:, None]
    for layer in range(_first_live(sites), view.num_layers):
        keys, values = (at_slots(part, recorded_at) for part in _recorded(full_pass.cache, layer))
        caches[layer] = tail_attention.KeysValues(keys, values)
    runner = TailRunner(
        view=view,
        sites=sites,
        packs_rows=packs_rows,
        returns_tuple=full_pass.returns_tuple,
        prefix=prefix,
        lookup=lookup,
        ids=batch.input_ids.gather(1, places),
        positions=torch.where(inside, positions, places),
        inside=inside,
        mask=torch.cat([slots >= 0, inside], 1).long(),
        entering=full_pass.entering,
        caches=caches,
    )
    return runner, full_pass.site_outputs, full_pass.reference


def whole_rows(view: ModelView, batch: TokenBatch, layer: int, packs_rows: bool, returns_tuple: bool) -> TailRunner:
    """A runner of whole rows for `run_states`: what leaves block `layer` is given in each pass, nothing is recorded.

    Args:
        view: the model, in evaluation mode.
        batch: R rows.
        layer: the block whose output is given.
        packs_rows: whether the tokens of all rows are to run as one row, under `tail_attention`.
        returns_tuple: whether blocks of this version of transformers return tuples.
    """
    assert batch.attention_mask is not None
    return TailRunner(
        view=view,
        sites=(Site(layer, "block"),),
        packs_rows=packs_rows,
        returns_tuple=returns_tuple,
        prefix=0,
        lookup=torch.zeros(len(batch.input_ids), dtype=torch.int64, device=batch.input_ids.device),
        ids=batch.input_ids,
        positions=batch.position_ids,
        inside=batch.attention_mask.bool(),
        mask=batch.attention_mask,
        entering=None,
        caches={},
    )


class _FullPass(NamedTuple):
    site_outputs: torch.Tensor
    """[R, sites, h]."""
    reference: torch.Tensor
    """[references, h]."""
    entering: torch.Tensor | None
    """[R, S, h]."""
    returns_tuple: bool
    """Whether the block below the first live one returned a tuple."""
    cache: Any
    """Keys and values of all positions, in the class of this version of transformers."""


def _full_pass(
    view: ModelView,
    batch: TokenBatch,
    sites: Sequence[Site],
    lookup: torch.Tensor,
    places: torch.Tensor,
    references: torch.Tensor,
    shared: SharedRows | None,
) -> _FullPass:
    """Run whole prompts, or what they share once; `places` [R, S] are the tails' positions, `references` rows."""
    outputs: dict[Site, torch.Tensor] = {}
    entering: list[torch.Tensor] = []
    returns_tuple: list[bool] = []
    first_live, last = _first_live(sites), view.num_layers - 1
    rows = torch.arange(places.shape[0], device=places.device)
    assert batch.attention_mask is not None
    length, valid = batch.input_ids.shape[1], batch.attention_mask.bool()

    def index(row: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Where tokens stand among all tokens of the pass."""
        return row * length + position if shared is None else shared.index(row, position)

    at_lookup, at_tails = index(rows, lookup), index(rows[:, None], places)
    ends = at_lookup[references]

    def record_site(site: Site) -> Callable[..., None]:
        def hook(module, args, output):
            hidden = hidden_of(output)
            outputs[site] = hidden.flatten(0, 1)[at_lookup.to(hidden.device)]

        return hook

    def record_entering(module, args, output):
        hidden = hidden_of(output)
        entering.append(hidden.flatten(0, 1)[at_tails.to(hidden.device)])  # [R, S, h]
        returns_tuple.append(isinstance(output, tuple))

    # From the first live block on, nothing that is recorded depends on a token after the lookup token.
    if shared is None:
        before = torch.arange(length, device=lookup.device) <= lookup[:, None]
        below, above = (torch.nonzero(mask.flatten())[:, 0] for mask in (valid, before))
        picks = dict.fromkeys(range(view.num_layers), above) | dict.fromkeys(range(first_live), below)
    else:
        picks = dict.fromkeys(range(first_live, view.num_layers), shared.up_to(lookup))
    if last > sites[0].layer:
        picks[last] = ends

    hooks: list[tuple[torch.nn.Module, Callable[..., None]]]
    hooks = [(module_at(view, site), record_site(site)) for site in sites]
    if first_live > 0:
        hooks.append((view.block(first_live - 1), record_entering))
    with fused_modules(view), output_hooks(hooks), replaced_forwards(picked_mlps(view, picks)):
        if shared is not None:
            cache = SharingCache(shared, range(first_live, view.num_layers))
            hidden = shared.run(view, cache)
        else:
            windowed = getattr(view.config, "sliding_window", None)
            new = DynamicCache() if windowed else None  # the model's would hold no more than the window
            output = view.base(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                past_key_values=new,
                use_cache=True,
            )
            cache, hidden = output.past_key_values, output.last_hidden_state
    missing = [site for site in sites if site not in outputs]
    if first_live and not entering:
        missing.append(Site(first_live - 1, "block"))
    if missing:
        raise did_not_run(view, missing[0])
    return _FullPass(
        site_outputs=torch.stack([outputs[site].to(view.device) for site in sites], 1),
        reference=hidden.flatten(0, 1)[ends.to(hidden.device)],
        entering=entering[-1] if entering else None,
        returns_tuple=returns_tuple[-1] if returns_tuple else False,
        cache=cache,
    )


def _first_live(sites: Sequence[Site]) -> int:
    """The first block that a delta at the sites changes, or that must run again to add it."""
    return sites[0].layer + 1 if sites[0].kind == "block" else sites[0].layer


def _added(states: torch.Tensor, delta: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """States with delta [R, h] added at the tokens `first` [R], counted through all rows of states."""
    flat = states.flatten(0, 1)
    return flat.index_add(0, first.to(flat.device), delta.to(flat.dtype).to(flat.device)).view(states.shape)


class _Gather(torch.autograd.Function):
    """Rows `index`, none twice, of a matrix; the gradient is written, not added up."""

    @staticmethod
    def forward(ctx, matrix: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.rows = matrix.shape[0]
        return matrix.index_select(0, index)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (index,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.rows, gradient.shape[1]).index_copy_(0, index, gradient), None


class _Scatter(torch.autograd.Function):
    """A matrix of zeros with rows `index`, none twice, from another."""

    @staticmethod
    def forward(ctx, matrix: torch.Tensor, index: torch.Tensor, rows: int) -> torch.Tensor:
        ctx.save_for_backward(index)
        return matrix.new_zeros(rows, matrix.shape[1]).index_copy_(0, index, matrix)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (index,) = ctx.saved_tensors
        return gradient.index_select(0, index), None, None


def picked_mlps(view: ModelView, picks: dict[int, torch.Tensor]) -> dict[torch.nn.Module, Callable[..., Any]]:
    """Forward functions of MLPs that compute only the tokens picks[layer] of the flattened [R * T], zero elsewhere."""

    def packed(forward: Callable[..., Any], index: torch.Tensor) -> Callable[..., Any]:
        def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            flat = hidden.flatten(0, 1)  # [R * T, h]
            if index.numel() > PACK_BELOW * flat.shape[0]:
                return forward(hidden, *args, **kwargs)
            here = index.to(flat.device)
            output = forward(_Gather.apply(flat, here)[None], *args, **kwargs)
            states = _Scatter.apply(hidden_of(output)[0], here, flat.shape[0]).unflatten(0, hidden.shape[:2])
            return with_hidden(output, states)

        return run

    mlps = {layer: view.mlp(layer) for layer in picks if layer in view.editable}
    return {mlp: packed(mlp.forward, picks[layer]) for layer, mlp in mlps.items()}


def at_slots(part: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Keys or values [R, heads, T, size] of the positions `slots` [R, P]."""
    index = slots.to(part.device)[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3])
    return part.gather(2, index)


def _recorded(cache: Any, layer: int) -> Sequence[torch.Tensor]:
    """Keys and values of one layer, by rows, from a full pass."""
    if isinstance(cache, SharingCache):
        states, count = cache.recorded[layer], cache.rows.prefixes
        return states.keys[count:], states.values[count:]
    return keys_values(cache, layer)


def keys_values(cache: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [R, heads, T, size] of one layer, from any version's cache."""
    if hasattr(cache, "layers"):
        return cache.layers[layer].keys, cache.layers[layer].values
    if hasattr(cache, "key_cache"):
        return cache.key_cache[layer], cache.value_cache[layer]
    return cache[layer][0], cache[layer][1]
