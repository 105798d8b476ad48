"""Forward passes over the tail of prompts: what a change at one token can reach, and nothing else.

When a delta is added at the lookup token of a block, causality keeps everything before that token as it was, and so
does the order of blocks for everything below. One full pass remembers, for each row, the keys and values of the
positions before the lookup token and the hidden states that enter the first live block; after that a pass runs the
live blocks on the tail alone. The function computed is the same.

Rows are laid out as [gap, prefix, tail]: the gap is masked, and positions are given explicitly, so every token attends
to the tokens it would attend to in its own unpadded prompt. The prefix ends where the tail begins, so that a sliding
window, which is measured in slots, covers the tokens that it covers there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from kedit_fast.models.architectures import ModelView
from kedit_fast.models.forward import Site, hidden_of, module_at, pad, with_hidden


class TailRunner:
    """R prompts with the states that do not change, ready to run their tails again and again.

    Args:
        view: the model, in evaluation mode for as long as the runner lives.
        rows: token ids of each prompt.
        lookups: index of the lookup token in each; the tail starts there.
        site: where a delta will be added: the output of a block or of its MLP.
    """

    def __init__(self, view: ModelView, rows: Sequence[Sequence[int]], lookups: Sequence[int], site: Site):
        self.view, self.site = view, site
        self.first_live = site.layer + 1 if site.what == "block" else site.layer
        self.as_tuple = False
        batch = pad(rows, view.device)
        lookup = torch.tensor(list(lookups), device=view.device)
        lengths = batch.attention_mask.sum(1)
        tail = int((lengths - lookup).max())
        self.prefix = int(lookup.max())
        offsets = torch.arange(tail, device=view.device)
        self.positions = lookup[:, None] + offsets  # [R, S], those past the end are masked
        inside = self.positions < lengths[:, None]
        at = self.positions.clamp(max=batch.input_ids.shape[1] - 1)
        self.ids = batch.input_ids.gather(1, at)  # [R, S]
        self.positions = torch.where(inside, self.positions, at)
        slots = torch.arange(self.prefix, device=view.device) - (self.prefix - lookup)[:, None]  # [R, P] positions
        self.mask = torch.cat([slots >= 0, inside], 1).long()  # [R, P + S]
        self._remember(batch, at, slots.clamp(min=0))

    @torch.no_grad()
    def _remember(self, batch, at: torch.Tensor, slots: torch.Tensor) -> None:
        """One full pass: prefix keys and values, entering states, and the site's output at the lookup token."""
        seen: dict[str, torch.Tensor] = {}
        windowed = getattr(self.view.config, "sliding_window", None)
        cache = DynamicCache() if windowed else None  # the model's own would keep no more than the window
        view, rows = self.view, torch.arange(at.shape[0], device=at.device)

        def keep_site(module, args, output):
            hidden = hidden_of(output)
            seen["site"] = hidden[rows.to(hidden.device), at[:, 0].to(hidden.device)]

        def keep_entering(module, args, output):
            hidden = hidden_of(output)
            index = at.to(hidden.device)[:, :, None].expand(-1, -1, hidden.shape[-1])
            seen["entering"] = hidden.gather(1, index)  # [R, S, h]
            self.as_tuple = isinstance(output, tuple)  # what this version's blocks return

        hooks = []
        try:
            hooks.append(module_at(view, self.site).register_forward_hook(keep_site))
            if self.first_live > 0:
                hooks.append(view.block(self.first_live - 1).register_forward_hook(keep_entering))
            output = view.base(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                past_key_values=cache,
                use_cache=True,
            )
        finally:
            for hook in hooks:
                hook.remove()
        self.site_output = seen["site"]  # [R, h]
        self.entering = seen.get("entering")
        hidden = output.last_hidden_state
        index = at.to(hidden.device)[:, :, None].expand(-1, -1, hidden.shape[-1])
        self.start = hidden.gather(1, index)  # [R, S, h] last hidden states at delta = 0
        self.cache = [
            tuple(_at_slots(part, slots) for part in _keys_values(output.past_key_values, layer))
            for layer in range(view.num_layers)
        ]
        for layer in range(self.first_live):  # never read: only their length is, by masks and positions
            self.cache[layer] = tuple(part[:, :, :, :1].expand_as(part) for part in self.cache[layer])

    def select(self, rows: torch.Tensor) -> TailRunner:
        """A runner with some of the rows."""
        chosen = object.__new__(TailRunner)
        chosen.view, chosen.site, chosen.first_live, chosen.prefix = self.view, self.site, self.first_live, self.prefix
        chosen.as_tuple = self.as_tuple
        for name in ("positions", "ids", "mask", "site_output", "entering", "start"):
            value = getattr(self, name)
            setattr(chosen, name, None if value is None else value[rows.to(value.device)])
        chosen.cache = [tuple(part[rows.to(part.device)] for part in pair) for pair in self.cache]
        return chosen

    def run(self, delta: torch.Tensor) -> torch.Tensor:
        """Last hidden states [R, S, h] of the tails with `delta` [R, h] added at the site's lookup token."""
        with self._stubs(delta), self._hook(delta):
            return self.view.base(
                input_ids=self.ids,
                attention_mask=self.mask,
                position_ids=self.positions,
                past_key_values=self._fresh_cache(),
                use_cache=self.prefix > 0,
            ).last_hidden_state

    def _fresh_cache(self):
        """A new Cache object: each pass appends the tail to it."""
        if self.prefix == 0:
            return None
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.cache):
            cache.update(keys, values, layer)
        return cache

    @contextlib.contextmanager
    def _stubs(self, delta: torch.Tensor) -> Iterator[None]:
        """Blocks below the first live one return at once; the last of them returns the entering states."""
        if self.entering is None:
            yield
            return
        states = self.entering
        if self.site.what == "block":
            added = states[:, 0] + delta.to(states.dtype).to(states.device)
            states = torch.cat([added[:, None], states[:, 1:]], 1)
        stubbed = [self.view.block(layer) for layer in range(self.first_live)]
        own = [vars(block).get("forward") for block in stubbed]  # dispatch hooks put one on the instance
        try:
            for layer, block in enumerate(stubbed):
                block.forward = _stub(states if layer == self.first_live - 1 else None, self.as_tuple)
            yield
        finally:
            for block, forward in zip(stubbed, own, strict=True):
                if forward is not None:
                    block.forward = forward
                else:
                    vars(block).pop("forward", None)  # the class's own shows again

    @contextlib.contextmanager
    def _hook(self, delta: torch.Tensor) -> Iterator[None]:
        if self.site.what == "block":
            yield
            return

        def add(module, args, output):
            hidden = hidden_of(output)
            added = hidden[:, 0] + delta.to(hidden.dtype).to(hidden.device)
            return with_hidden(output, torch.cat([added[:, None], hidden[:, 1:]], 1))

        handle = module_at(self.view, self.site).register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()


def _stub(result: torch.Tensor | None, as_tuple: bool):
    def forward(hidden_states, *args, **kwargs) -> Any:
        out = hidden_states if result is None else result
        return (out, None) if as_tuple else out

    return forward


def _at_slots(part: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Keys or values [R, heads, T, size] of the positions `slots` [R, P]."""
    index = slots.to(part.device)[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3])
    return part.gather(2, index)


def _keys_values(cache: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [R, heads, T, size] of one layer, from any version's cache."""
    if hasattr(cache, "layers"):
        return cache.layers[layer].keys, cache.layers[layer].values
    if hasattr(cache, "key_cache"):
        return cache.key_cache[layer], cache.value_cache[layer]
    return cache[layer][0], cache[layer][1]
