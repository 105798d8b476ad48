"""Gradients as values: what UltraEdit writes are the gradients of its modules' outputs at the tokens of the answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from kedit_fast.editing.values.result import OnProblem
from kedit_fast.errors import EditError, InvalidArgumentError
from kedit_fast.models.forward import as_rows, evaluating, last_states, pad
from kedit_fast.models.patching import output_hooks
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import PreparedRequest
from kedit_fast.support.sums import add_by_owner_
from kedit_fast.support.torch_state import plain_torch

BATCH_TOKENS = 2048
"""Tokens of one forward and backward pass."""
Tokens = Literal["answer", "all"]
NOT_FINITE = "the gradients of its target are not finite; is the model's output finite there?"


@dataclass(frozen=True)
class ModuleGradients:
    """Inputs and output gradients of one linear module, a row for each token, in the order of requests and tokens."""

    keys: torch.Tensor
    """[n, d] fp32, inputs of the module."""
    gradients: torch.Tensor
    """[n, out] fp32, gradients of each request's mean cross entropy by the module's output."""


@dataclass(frozen=True)
class AnswerGradients:
    """What one backward pass per batch gives for several modules."""

    modules: dict[str, ModuleGradients]
    """Path of a module -> its rows."""
    request: torch.Tensor
    """[n] index of the request of each row."""
    losses: torch.Tensor
    """[u] mean cross entropy of each request's target, in nats."""
    turns: tuple[int, ...] = ()
    """Numbers of rows that the normalizer takes one after another; empty for all rows at once."""

    def without(self, requests: Sequence[int]) -> AnswerGradients:
        """The same without the rows of some requests; the indices of the others do not change."""
        remaining = ~torch.isin(self.request, torch.tensor(list(requests), dtype=self.request.dtype))
        modules = {}
        for name, rows in self.modules.items():
            selected = remaining.to(rows.keys.device)
            modules[name] = ModuleGradients(rows.keys[selected], rows.gradients[selected])
        turns = tuple(int(part.sum()) for part in remaining.split(list(self.turns))) if self.turns else ()
        return AnswerGradients(modules, self.request[remaining], self.losses, turns)

    def not_finite(self) -> list[int]:
        """Requests whose loss or gradients are not finite."""
        bad = ~torch.isfinite(self.losses)
        for rows in self.modules.values():
            wrong = ~(torch.isfinite(rows.keys).all(1) & torch.isfinite(rows.gradients).all(1)).cpu()
            bad[self.request[wrong]] = True
        return torch.nonzero(bad)[:, 0].tolist()


@plain_torch()
def answer_gradients(
    view: ModelView,
    prepared: Sequence[PreparedRequest],
    modules: Sequence[str],
    tokens: Tokens = "answer",
    on_problem: OnProblem = "raise",
) -> AnswerGradients:
    """Keys and output gradients at answer tokens, of several modules from one backward pass per batch.

    With L_i = -(1/T) sum_t log p(target_t) of request i at its bare prompt, a row holds the input of a module at one
    token and dL_i / d(its output there). The published code takes the mean over all answer tokens of its small batches
    instead, so its gradients are scaled by which requests share a batch; UltraEdit's normalizer divides scales out.

    Args:
        view: the model; nothing in it changes.
        prepared: u requests.
        modules: paths of linear modules, for example "model.layers.11.mlp.gate_proj".
        tokens: "answer", those that predict a token of the answer; or "all" of prompt and answer except the last.
        on_problem: "raise" at a request whose loss or gradients are not finite, or "keep" it (`not_finite` names it).

    Raises:
        InvalidArgumentError: an unknown module or choice of tokens.
        EditError: a loss or gradient that is not finite, naming the request.

    Cost: one forward pass, one backward pass down to the lowest of the modules; the head on answer tokens alone. Memory
        is that of a batch of 2,048 tokens, and the rows.

    Source: UltraEdit (arXiv 2505.14679), its released `cache`.
    """
    if tokens not in ("answer", "all"):
        raise InvalidArgumentError(f"tokens must be answer or all; got {tokens!r}")
    linears = {name: view.linear(name)[0] for name in modules}
    if not prepared or not linears:
        raise InvalidArgumentError("no requests" if not prepared else "no modules given")
    rows = [(*request.rewriting[0].ids, *request.target[:-1]) for request in prepared]
    keys: dict[str, list[torch.Tensor]] = {name: [] for name in linears}
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in linears}
    owners: list[torch.Tensor] = []
    losses = torch.zeros(len(prepared), dtype=torch.float32, device="cpu")
    order = sorted(range(len(prepared)), key=lambda i: len(rows[i]), reverse=True)
    with evaluating(view):
        while order:
            count = max(1, BATCH_TOKENS // len(rows[order[0]]))
            chunk, order = sorted(order[:count]), order[count:]
            by_module, loss, owner = _one_pass(
                view, [prepared[i] for i in chunk], [rows[i] for i in chunk], linears, tokens
            )
            losses[chunk] = loss
            owners.append(torch.tensor(chunk)[owner])
            for name, (key, gradient) in by_module.items():
                keys[name].append(key)
                gradients[name].append(gradient)
    request = torch.cat(owners)
    back = torch.argsort(request, stable=True)
    in_order = {
        name: ModuleGradients(*(torch.cat(parts)[back.to(parts[0].device)] for parts in (keys[name], gradients[name])))
        for name in linears
    }
    gathered = AnswerGradients(in_order, request[back], losses)
    if on_problem == "raise" and (bad := gathered.not_finite()):
        raise EditError(f"{prepared[bad[0]].name}: {NOT_FINITE}")
    return gathered


def _one_pass(
    view: ModelView,
    prepared: Sequence[PreparedRequest],
    rows: Sequence[tuple[int, ...]],
    modules: dict[str, torch.nn.Module],
    tokens: Tokens,
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], torch.Tensor, torch.Tensor]:
    """Path of a module -> its keys and gradients; losses [v]; the request of every row [n]."""
    batch = pad(rows, view.device)
    starts = [len(request.rewriting[0].ids) - 1 for request in prepared]
    answers = [(r, starts[r] + t) for r, request in enumerate(prepared) for t in range(len(request.target))]
    wanted = answers if tokens == "answer" else [(r, t) for r, row in enumerate(rows) for t in range(len(row))]
    at_answers, at_wanted = (torch.tensor(places, device=view.device).T for places in (answers, wanted))
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    @contextlib.contextmanager
    def recording() -> Iterator[None]:
        def hook_for(name: str):
            def hook(module, args, output):
                row, token = at_wanted.to(output.device)
                inputs[name] = as_rows(args[0].detach(), batch.input_ids.shape)[row, token].float()
                outputs[name] = output if output.requires_grad else output.detach().requires_grad_(True)
                return outputs[name]

            return hook

        with output_hooks([(module, hook_for(name)) for name, module in modules.items()]):
            yield

    with torch.enable_grad(), recording():
        hidden = last_states(view, batch)
        row, token = at_answers.to(hidden.device)
        states = hidden[row, token].to(view.head.device)
        targets = torch.tensor([t for request in prepared for t in request.target], device=view.head.device)
        log_probs = view.head.target_log_probs(states, targets).log_prob
        weights = torch.tensor(
            [1 / len(request.target) for request in prepared], dtype=torch.float32, device=log_probs.device
        )
        owner = at_answers[0].to(log_probs.device)
        loss = add_by_owner_(torch.zeros_like(weights), owner, -log_probs.float() * weights[owner])
        flowing = [name for name in modules if name in outputs]
        if missing := sorted(set(modules) - set(flowing)):
            raise InvalidArgumentError(f"{missing[0]!r} takes no part in the model's output")
        flowing_gradients = torch.autograd.grad(loss.sum(), [outputs[name] for name in flowing])
    by_module = {}
    for name, gradient in zip(flowing, flowing_gradients, strict=True):
        row, token = at_wanted.to(gradient.device)
        by_module[name] = (inputs[name], as_rows(gradient, batch.input_ids.shape)[row, token].float())
    return by_module, loss.detach().cpu(), at_wanted[0].cpu()
