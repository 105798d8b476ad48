"""One iteration of the value loop in the published form, with any one of the savings, to see what each is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import DynamicCache

from benchmarks.published import deltas_at, padded
from kedit_fast.models.forward import Entering, Site, TokenBatch, capture, stubs
from kedit_fast.models.patching import replaced_forwards
from kedit_fast.models.tail_runner import at_slots, keys_values
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import PreparedRequest

SAVINGS = ("batching", "depth", "cached prefix", "target rows")


def iteration(
    view: ModelView, prepared: Sequence[PreparedRequest], layer: int, with_: Sequence[str]
) -> Callable[[], torch.Tensor]:
    """A call that runs one iteration, forward and backward, of every request at delta = 0 and returns the gradients.

    Args:
        with_: of SAVINGS. "batching": the requests' prompts in one batch; "depth": only the blocks above the edited
            one; "cached prefix": only the tokens from the lookup token on, the others' keys and values kept; "target
            rows": the head on target tokens alone.
    """
    unknown = set(with_) - set(SAVINGS)
    if unknown:
        raise ValueError(f"unknown savings {unknown}")
    groups = [prepared] if "batching" in with_ else [[request] for request in prepared]
    parts = [_Group(view, group, layer, set(with_)) for group in groups]

    def run() -> torch.Tensor:
        return torch.cat([part.gradients() for part in parts])

    return run


class _Group:
    """Requests that share a batch."""

    def __init__(self, view: ModelView, prepared: Sequence[PreparedRequest], layer: int, with_: set[str]):
        self.view, self.layer, self.with_, self.count = view, layer, with_, len(prepared)
        for parameter in view.model.parameters():
            parameter.requires_grad_(False)
        rows, lookups, owner, targets = [], [], [], []
        self.kl = []
        for i, request in enumerate(prepared):
            weight = 1.0 / (len(request.rewriting) * len(request.target))
            for prompt in request.rewriting:
                start = len(prompt.ids) - 1
                targets += [(len(rows), start + t, token, i, weight) for t, token in enumerate(request.target)]
                rows.append([*prompt.ids, *request.target[:-1]])
                lookups.append(prompt.lookup)
                owner.append(i)
            self.kl.append(len(rows))
            rows.append(list(request.kl.ids))
            lookups.append(request.kl.lookup)
            owner.append(i)
        device = view.device
        self.inputs = padded(rows, "right", device)
        self.lookup, self.owner = torch.tensor(lookups, device=device), torch.tensor(owner, device=device)
        self.row, self.token, self.target, self.of, weight = (torch.tensor(c, device=device)
                                                              for c in zip(*targets, strict=True))  # fmt: skip
        self.weight, self.kl = weight, torch.tensor(self.kl, device=device)
        self.states = None
        if "cached prefix" in with_:
            self._cut()
        if "depth" in with_:
            self._enter()
        with torch.no_grad():
            hidden, logits = self._forward(torch.zeros(len(rows), view.head.matrix.shape[1], device=device))
            at = self.lookup[self.kl]
            self.reference = hidden[self.kl, at]
            self.reference_logs = None if logits is None else torch.log_softmax(logits[self.kl, at].float(), -1)

    def _cut(self) -> None:
        """Keep keys and values before the lookup tokens; rows become [gap, prefix, tail]."""
        inputs, lookup = self.inputs, self.lookup
        lengths = inputs["attention_mask"].sum(1)
        prefix, tail = int(lookup.max()), int((lengths - lookup).max())
        slots = torch.arange(prefix, device=lookup.device) - (prefix - lookup)[:, None]
        with torch.no_grad():
            full = self.view.base(**inputs, use_cache=True).past_key_values
        self.prefix = []
        for layer in range(self.view.num_layers):
            self.prefix.append([at_slots(part, slots.clamp(min=0)) for part in keys_values(full, layer)])
        places = lookup[:, None] + torch.arange(tail, device=lookup.device)
        inside = places < lengths[:, None]
        places = places.clamp(max=inputs["input_ids"].shape[1] - 1)
        mask = torch.cat([slots >= 0, inside], 1).long()
        self.inputs = {"input_ids": inputs["input_ids"].gather(1, places), "attention_mask": mask,
                       "position_ids": places}  # fmt: skip
        self.token = self.token - lookup[self.row]
        self.lookup = torch.zeros_like(lookup)

    def _enter(self) -> None:
        """Keep what enters the block above the edited one."""
        if "cached prefix" in self.with_:
            raise ValueError("each saving is measured alone")
        batch = TokenBatch(self.inputs["input_ids"], self.inputs["attention_mask"])
        above = self.layer + 1
        site = Site(above, "key")
        _, self.states = capture(self.view, batch, [site], capture_entering=above)

    def _forward(self, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Last hidden states, and all logits unless target rows are saved, with delta [R, h] at the lookup tokens."""
        inputs = dict(self.inputs)
        if "cached prefix" in self.with_:
            cache = DynamicCache()
            for layer, (keys, values) in enumerate(self.prefix):
                cache.update(keys, values, layer)
            inputs |= {"past_key_values": cache, "use_cache": True}
        else:
            inputs["use_cache"] = False
        rows = torch.arange(len(self.owner), device=delta.device)
        if isinstance(self.states, Entering):
            states = self.states.states.clone()
            states[rows, self.lookup] = states[rows, self.lookup] + delta
            with replaced_forwards(stubs(self.view, Entering(self.layer + 1, states, self.states.as_tuple))):
                hidden = self.view.base(**inputs).last_hidden_state
        else:
            with deltas_at([self.view.block(self.layer)], [delta], self.lookup):
                hidden = self.view.base(**inputs).last_hidden_state
        if "target rows" in self.with_:
            return hidden, None
        head = self.view.model.get_output_embeddings()
        return hidden, head(hidden)

    def gradients(self) -> torch.Tensor:
        """dL/d(delta) of each request [v, h] at delta = 0."""
        view = self.view
        delta = torch.zeros(self.count, view.head.matrix.shape[1], device=view.head.device, requires_grad=True)
        with torch.enable_grad():
            hidden, logits = self._forward(delta[self.owner])
            at = self.lookup[self.kl]
            if logits is None:
                states = hidden[self.row, self.token]
                scores = view.head.target_log_probs(states, self.target).log_prob
                kl = view.head.distribution_kl(hidden[self.kl, at], self.reference)
            else:  # as published: the head once for the divergence and once more for the targets
                again = view.model.get_output_embeddings()(hidden)
                scores = torch.log_softmax(again.float(), -1)[self.row, self.token, self.target]
                current = torch.log_softmax(logits[self.kl, at].float(), -1)
                kl = torch.nn.functional.kl_div(self.reference_logs, current, log_target=True, reduction="none").sum(-1)
            (gradient,) = torch.autograd.grad(-(scores * self.weight).sum() + 0.0625 * kl.sum(), delta)
        return gradient
