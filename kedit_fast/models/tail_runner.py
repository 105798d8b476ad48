"""Forward passes over the tail of prompts: what a change at one token can reach, and nothing else.

When a delta is added at the lookup token of a block, causality keeps everything before that token as it was, and so
does the order of blocks for everything below. One full pass remembers, for each row, the keys and values of the
positions before the lookup token and the hidden states that enter the first live block; after that a pass runs the
live blocks on the tail alone, and their MLPs on the tokens of it that matter. The function computed is the same.

Rows are laid out as [gap, prefix, tail]: the gap is masked, and positions are given explicitly, so every token attends
to the tokens it would attend to in its own unpadded prompt. The prefix ends where the tail begins, so that a sliding
window, which is measured in slots, covers the tokens that it covers there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import pad as pad_with_zeros
from transformers import DynamicCache

from kedit_fast.models import tail_attention
from kedit_fast.models.forward import (
    Site,
    TokenBatch,
    did_not_run,
    hidden_of,
    module_at,
    pad,
    stubs,
    with_hidden,
)
from kedit_fast.models.patching import output_hooks, replaced_forwards
from kedit_fast.models.view import ModelView
from kedit_fast.support.torch_state import plain_torch

PACK_BELOW = 0.9  # an MLP runs on picked tokens when they are fewer than this share of all


class TailRunner:
    """R prompts with the states that do not change, ready to run their tails again and again.

    Args:
        view: the model, in evaluation mode for as long as the runner lives.
        rows: token ids of each prompt.
        lookups: index of the lookup token in each; the tail starts there.
        sites: of one layer, where deltas will be added at the lookup token: the output of the block, or of its MLP,
            or of its attention and its MLP.
        references: rows whose last hidden state at the lookup token, without a delta, is kept in `reference`.
    """

    @plain_torch()
    def __init__(
        self,
        view: ModelView,
        rows: Sequence[Sequence[int]],
        lookups: Sequence[int],
        sites: Sequence[Site],
        references: Sequence[int] = (),
    ):
        self.view, self.sites = view, tuple(sites)
        site = self.sites[0]
        self.first_live = site.layer + 1 if site.kind == "block" else site.layer
        self.as_tuple = False
        batch = pad(rows, view.device)
        lookup = torch.tensor(list(lookups), device=view.device)
        lengths = batch.attention_mask.sum(1)
        tail = int((lengths - lookup).max())
        self.lookup, self.prefix = lookup, int(lookup.max())
        offsets = torch.arange(tail, device=view.device)
        self.positions = lookup[:, None] + offsets  # [R, S], those past the end are masked
        self.inside = self.positions < lengths[:, None]
        at = self.positions.clamp(max=batch.input_ids.shape[1] - 1)
        self.ids = batch.input_ids.gather(1, at)  # [R, S]
        self.positions = torch.where(self.inside, self.positions, at)
        slots = torch.arange(self.prefix, device=view.device) - (self.prefix - lookup)[:, None]  # [R, P] positions
        self.mask = torch.cat([slots >= 0, self.inside], 1).long()  # [R, P + S]
        which = torch.tensor(list(references), dtype=torch.int64, device=view.device)
        self._remember(batch, at, slots.clamp(min=0), which)
        self._place()

    @torch.no_grad()
    def _remember(self, batch: TokenBatch, at: torch.Tensor, slots: torch.Tensor, references: torch.Tensor) -> None:
        """One full pass: prefix keys and values, entering states, the sites' outputs, and the reference states."""
        seen: dict[Any, torch.Tensor] = {}
        windowed = getattr(self.view.config, "sliding_window", None)
        cache = DynamicCache() if windowed else None  # the model's own would keep no more than the window
        view, lookup, rows = self.view, self.lookup, torch.arange(at.shape[0], device=at.device)

        def keep_site(site: Site) -> Callable[..., None]:
            def hook(module, args, output):
                hidden = hidden_of(output)
                seen[site] = hidden[rows.to(hidden.device), lookup.to(hidden.device)]

            return hook

        def keep_entering(module, args, output):
            hidden = hidden_of(output)
            index = at.to(hidden.device)[:, :, None].expand(-1, -1, hidden.shape[-1])
            seen["entering"] = hidden.gather(1, index)  # [R, S, h]
            self.as_tuple = isinstance(output, tuple)  # what this version's blocks return

        # From the first live block on, nothing that is kept looks at a token after the lookup token.
        length, valid = batch.input_ids.shape[1], batch.attention_mask.bool()
        before = torch.arange(length, device=lookup.device) < lookup[:, None]
        before[rows, lookup] = True
        ends = references * length + lookup[references]
        below, above = (torch.nonzero(mask.flatten())[:, 0] for mask in (valid, before))
        last = view.num_layers - 1
        picks = dict.fromkeys(range(view.num_layers), above) | dict.fromkeys(range(self.first_live), below)
        if last > self.sites[0].layer:
            picks[last] = ends

        hooks: list[tuple[torch.nn.Module, Callable[..., None]]]
        hooks = [(module_at(view, site), keep_site(site)) for site in self.sites]
        if self.first_live > 0:
            hooks.append((view.block(self.first_live - 1), keep_entering))
        with output_hooks(hooks), replaced_forwards(_packed_mlps(view, picks)):
            output = view.base(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                past_key_values=cache,
                use_cache=True,
            )
        missing = [site for site in self.sites if site not in seen]
        if self.first_live and "entering" not in seen:
            missing.append(Site(self.first_live - 1, "block"))
        if missing:
            raise did_not_run(view, missing[0])
        self.site_outputs = torch.stack([seen[site].to(view.device) for site in self.sites], 1)  # [R, sites, h]
        self.entering = seen.get("entering")
        hidden = output.last_hidden_state
        self.reference = hidden.flatten(0, 1)[ends.to(hidden.device)]  # [references, h]
        self.own_attention = tail_attention.usable(view)
        self.caches = {}
        for layer in range(self.first_live, view.num_layers):
            keys, values = (at_slots(part, slots) for part in keys_values(output.past_key_values, layer))
            self.caches[layer] = tail_attention.Joint(keys, values).padded(0, at.shape[1])

    def select(self, rows: torch.Tensor) -> TailRunner:
        """A runner with some of the rows, no longer than they need."""
        chosen, rows = self._like(), rows.to(self.lookup.device)  # of a model on several devices, where its head is
        lookup, lengths = (part[rows] for part in (self.lookup, self.inside.sum(1)))
        chosen.lookup, chosen.prefix = lookup, int(lookup.max())
        gap, tail = self.prefix - chosen.prefix, int(lengths.max())
        for name in ("positions", "ids", "inside", "entering"):
            value = getattr(self, name)
            setattr(chosen, name, None if value is None else value[rows.to(value.device), :tail])
        chosen.mask = self.mask[rows, gap : self.prefix + tail]
        chosen.site_outputs = self.site_outputs[rows]
        chosen.caches = {layer: cache.select(rows, gap, self.prefix + tail) for layer, cache in self.caches.items()}
        chosen._place()
        return chosen

    def joined(self, other: TailRunner) -> TailRunner:
        """A runner with the rows of both, of one model and the same sites."""
        whole = self._like()
        whole.lookup = torch.cat([self.lookup, other.lookup])
        whole.prefix = max(self.prefix, other.prefix)
        tail = max(self.ids.shape[1], other.ids.shape[1])
        pairs = [(runner, whole.prefix - runner.prefix, tail - runner.ids.shape[1]) for runner in (self, other)]
        for name in ("positions", "ids", "inside"):
            setattr(whole, name, torch.cat([pad_with_zeros(getattr(r, name), (0, more)) for r, _, more in pairs]))
        whole.mask = torch.cat([pad_with_zeros(r.mask, (gap, more)) for r, gap, more in pairs])
        whole.entering = None
        if self.entering is not None and other.entering is not None:
            whole.entering = torch.cat([
                pad_with_zeros(r.entering, (0, 0, 0, more)) for r, _, more in pairs
            ])  # fmt: skip
        whole.site_outputs = torch.cat([self.site_outputs, other.site_outputs])
        whole.caches = {
            layer: tail_attention.Joint.cat([r.caches[layer].padded(gap, more) for r, gap, more in pairs])
            for layer in self.caches
        }
        whole._place()
        return whole

    def _like(self) -> TailRunner:
        chosen = object.__new__(TailRunner)
        for name in ("view", "sites", "first_live", "as_tuple", "own_attention"):
            setattr(chosen, name, getattr(self, name))
        return chosen

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
        if self.own_attention:  # one row of all tail tokens, no padding
            first, wanted = self.number[:, 0], self.number.flatten()[wanted.to(self.number.device)]
            ids, positions = (part.flatten()[self.tokens][None] for part in (self.ids, self.positions))
            mask, cache = None, tail_attention.TailCache(self.caches, self.layout)
            attention = tail_attention.installed(self.view)
            picks = {last: wanted} if last >= self.first_live else {}
        else:
            first = torch.arange(len(self.ids), device=delta.device) * self.ids.shape[1]
            ids, positions, mask, cache = self.ids, self.positions, self.mask, self._fresh_cache()
            attention = contextlib.nullcontext()
            picks = {layer: wanted if layer == last else self.tokens for layer in self.caches}
        forwards = {**self._stubs(delta, first), **_packed_mlps(self.view, picks)}
        with replaced_forwards(forwards), self._hooks(delta, first), attention:
            hidden = self.view.base(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state
        return _Gather.apply(hidden.flatten(0, 1), wanted.to(hidden.device))

    def _place(self) -> None:
        """Which of the [R * S] places hold tokens, and their numbers when packed."""
        self.tokens = torch.nonzero(self.inside.flatten())[:, 0]
        if self.own_attention:
            self.number = (self.inside.flatten().cumsum(0) - 1).view_as(self.inside)
            self.layout = tail_attention.Layout(self.inside, self.positions, self.prefix, self.lookup)

    def _fresh_cache(self) -> DynamicCache | None:
        """A new Cache object, each pass appends the tail to it; None without prefixes: older models want none."""
        if self.prefix == 0:
            return None
        cache = DynamicCache()
        for layer in range(self.view.num_layers):
            if layer in self.caches:
                joint = self.caches[layer]
                cache.update(joint.keys[:, :, : self.prefix], joint.values[:, :, : self.prefix], layer)
            else:  # never read: only its length is, by masks and positions
                none = self.mask.new_zeros((), dtype=torch.float32).expand(len(self.ids), 1, self.prefix, 1)
                cache.update(none, none, layer)
        return cache

    def _stubs(self, delta: torch.Tensor, first: torch.Tensor) -> dict[torch.nn.Module, Callable[..., Any]]:
        """Blocks below the first live one return at once; the last of them returns the entering states."""
        if self.entering is None:
            return {}
        states = self.entering
        if self.own_attention:
            states = states.flatten(0, 1)[self.tokens.to(states.device)][None]
        if self.sites[0].kind == "block":
            states = _added(states, delta[:, 0], first)
        return stubs(self.view, self.first_live, states, self.as_tuple)

    def _hooks(self, delta: torch.Tensor, first: torch.Tensor) -> contextlib.AbstractContextManager:
        def add(index: int) -> Callable[..., Any]:
            return lambda module, args, output: with_hidden(output, _added(hidden_of(output), delta[:, index], first))

        sites = enumerate(self.sites)
        return output_hooks([(module_at(self.view, site), add(i)) for i, site in sites if site.kind != "block"])


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


def _packed_mlps(view: ModelView, picks: dict[int, torch.Tensor]) -> dict[torch.nn.Module, Callable[..., Any]]:
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

    return {view.mlp(layer): packed(view.mlp(layer).forward, index) for layer, index in picks.items()}


def at_slots(part: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Keys or values [R, heads, T, size] of the positions `slots` [R, P]."""
    index = slots.to(part.device)[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3])
    return part.gather(2, index)


def keys_values(cache: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [R, heads, T, size] of one layer, from any version's cache."""
    if hasattr(cache, "layers"):
        return cache.layers[layer].keys, cache.layers[layer].values
    if hasattr(cache, "key_cache"):
        return cache.key_cache[layer], cache.value_cache[layer]
    return cache[layer][0], cache[layer][1]
