"""Values: the output at the subject's last token that makes the model say the target, found by gradient descent.

For each request, minimise over delta in R^h, added to the site's output h0 at the subject's last token,

    mean over contexts of -(1/T) sum_t log p(target_t)
    + kl_factor KL(p_delta || p_0) at the subject's last token of "{subject} is a"
    + v_weight_decay |delta| / |h0|^2

by Adam, and keep |delta| <= clamp_norm_factor |h0|. The order is the published loop's: forward, loss, stop if it is
below v_stop_loss before the step, no step in the last iteration. Requests do not see each other: a batch of them
gives what one at a time gives.

PMET optimises two deltas together, at the outputs of attention and MLP, each with its own decay and clamp; the
likelihood weighs a tenth in the iteration after one in which every target token was the argmax in every context, and a
request for which that holds stops once kl_factor KL is at most 0.01.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from kedit_fast.editing.values.batch_size import fitting_batch
from kedit_fast.editing.values.objective import Objective
from kedit_fast.errors import EditError
from kedit_fast.methods.hparams import Hparams
from kedit_fast.models.forward import Site, evaluating
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import PreparedRequest
from kedit_fast.solver.value_descent import (
    BAD_GRADIENT,
    BAD_LOSS,
    GOING,
    PREDICTED,
    STOPPED,
    USED_UP,
    clamped_step,
)
from kedit_fast.support.sums import add_by_owner_
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
LEAVE_SHARE = 0.9  # with nobody waiting, requests that are done leave when no more than this share still goes
WARM = 2  # iterations before a graph is recorded: libraries choose their kernels in them
ENTER_PARTS = 4  # requests enter in groups of this part of a batch
EASED, EASED_KL = 0.1, 0.01  # PMET: the likelihood's weight after every target was right, and the KL that ends it
SITES = {"block": ("block",), "mlp": ("mlp",), "attention and mlp": ("attention", "mlp")}
PROBLEMS = {
    PREDICTED: "the model says the target already: its value would take no step (on_predicted = allow writes that)",
    BAD_LOSS: "the loss of its value is not finite; is the model's output finite on its prompt?",
    BAD_GRADIENT: "the gradient of its value is not finite; is the model's output finite on its prompt?",
}


@dataclass(frozen=True)
class Values:
    """Optimised values of u requests, at one site or two."""

    sites: tuple[str, ...]  # "block", "mlp", or "attention" and "mlp"
    all_targets: torch.Tensor  # [sites, h, u] h0 + delta, fp64
    all_deltas: torch.Tensor  # [sites, h, u] fp32
    losses: torch.Tensor  # [u] at the last forward pass
    steps: torch.Tensor  # [u] optimiser steps taken
    status: torch.Tensor  # [u] USED_UP (all iterations), STOPPED, or a key of PROBLEMS

    @staticmethod
    def concatenated(parts: Sequence[Values], device: torch.device) -> Values:
        """The values of all parts, one after another, on one device."""
        wide = (torch.cat([getattr(p, name).to(device) for p in parts], 2) for name in ("all_targets", "all_deltas"))
        flat = (torch.cat([getattr(p, name) for p in parts]) for name in ("losses", "steps", "status"))
        return Values(parts[0].sites, *wide, *flat)

    @property
    def targets(self) -> torch.Tensor:
        """[h, u] of the last site: the one whose layer is written."""
        return self.all_targets[-1]

    @property
    def deltas(self) -> torch.Tensor:
        """[h, u] of the last site."""
        return self.all_deltas[-1]

    def select(self, which: Sequence[int]) -> Values:
        """The values of some of the requests."""
        index = torch.tensor(list(which), dtype=torch.int64)
        at = index.to(self.all_targets.device)
        return Values(self.sites, self.all_targets[:, :, at], self.all_deltas[:, :, at],
                      self.losses[index], self.steps[index], self.status[index])  # fmt: skip


@plain_torch()
def find_values(
    view: ModelView,
    prepared: Sequence[PreparedRequest],
    layer: int,
    what: str,
    hparams: Hparams,
    *,
    teams: Sequence[Hashable] | None = None,
    on_problem: str = "raise",
    progress: bool = False,
    finished: Callable[[Sequence[int], Values], None] | None = None,
) -> Values:
    """Optimise the value of each request at layer `layer`.

    Args:
        view: the model; nothing in it changes.
        prepared: u requests.
        layer: where the delta is added.
        what: "block" (MEMIT), "mlp" (ROME, and every method where a norm follows the MLP: Gemma 2 and 3, OLMo 2), or
            "attention and mlp" (PMET): two deltas under PMET's rule.
        hparams: the numbers of the loop; `values_batch` requests are optimised together (0: what memory takes, see
            `fitting_batch`).
        teams: u names; requests with one name share one delta, whose loss is the mean of theirs and whose clamp is the
            first one's (MEMIT-Merge: requests on one subject). None: every request for itself.
        on_problem: "raise" at the first request whose loss or gradient is not finite, or "keep" going with the others:
            `status` tells, and such a request has the delta it had before. A target the model says already is no
            error here, `status` is PREDICTED.
        progress: show a bar on stderr.
        finished: called with the numbers and values of requests as they are done.

    Raises:
        EditError: a loss or gradient that is not finite, naming the request; the site "block" in a model with a norm
            between the MLP and the residual sum.

    Cost: one full pass over the prompts, then for each iteration a forward and a backward pass of the blocks above
        `layer` over the tokens from the subject's last one on, for requests that have not stopped; the last block's
        MLP and the head run on target tokens alone.
    """
    if not prepared:
        raise EditError("no requests")
    if what == "block" and view.spec.post_norm:
        raise EditError(
            f"{view.spec.name} has a norm between the edited layer and the residual sum, so no write can produce a "
            'value at a block\'s output: use the site "mlp", before that norm'
        )
    sites = [Site(layer, name) for name in SITES[what]]
    size = hparams.values_batch
    if size == 0:
        found = fitting_batch(view, prepared, sites)
        size = found.requests
        _log.info("values of %d requests at a time (%d MiB each)", size, found.request_bytes >> 20)
    shape = "{desc}: {percentage:3.0f}%|{bar}| {rate_fmt}, {remaining} left"
    bar = tqdm(
        total=len(prepared), unit=" edits", desc="values", bar_format=shape, disable=not progress, leave=False
    )  # fmt: skip
    device = view.head.device
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with evaluating(view), here, bar:
        return _Descent(view, prepared, sites, hparams, size, teams, on_problem, finished).run(bar)


def by_length(prepared: Sequence[PreparedRequest]) -> list[int]:
    """Requests with tails of one length together, and then prefixes of one length: so little of a batch is padding."""

    def lengths(i: int) -> tuple[int, int]:
        prompts = prepared[i].rewriting
        tail = max(len(prompt.ids) - prompt.lookup for prompt in prompts) + len(prepared[i].target) - 1
        return tail, max(prompt.lookup for prompt in prompts)

    return sorted(range(len(prepared)), key=lengths)


def in_teams(order: Sequence[int], teams: Sequence[Hashable] | None) -> list[list[int]]:
    """Requests in order, those of one team together where its first one stands."""
    if teams is None:
        return [[i] for i in order]
    members: dict[Hashable, list[int]] = {}
    for i in order:
        members.setdefault(teams[i], []).append(i)
    return [sorted(team) for team in members.values()]


def no_graph(view: ModelView) -> str:
    """What a model lacks for a CUDA graph of its iterations, or "": a graph's memory is of one device."""
    devices = sorted({str(parameter.device) for parameter in view.model.parameters()})
    if len(devices) > 1:
        return f"the whole model on one CUDA device; it is on {', '.join(devices)}"
    if hooked := [name for name, module in view.model.named_modules() if hasattr(module, "_hf_hook")]:
        return (
            f"a model that is not dispatched by accelerate, which moves tensors between devices ({hooked[0] or 'it'})"
        )
    if view.head.device.type != "cuda":
        return f"a CUDA device; the model is on {view.head.device}"
    rope = getattr(view.config, "rope_parameters", None) or getattr(view.config, "rope_scaling", None) or {}
    if (rope.get("rope_type") or rope.get("type")) == "dynamic":
        return "a model whose rotary embedding does not look at every pass's length (its rope type is dynamic)"
    return ""


class _Descent:
    """The published loop over all requests, `size` of them at a time.

    Requests enter by length, in groups, as others leave; each counts its own iterations. What is known of those that
    run lies on the device, and is looked at every `check_every` iterations and when a group ends.
    """

    held: torch.Tensor  # [v] the requests that run; what follows is theirs
    limit: torch.Tensor  # [v, sites, 1] of the deltas' norms
    delta: torch.Tensor  # [v, sites, h]
    mean: torch.Tensor  # [v, sites, h] of Adam
    square: torch.Tensor  # [v, sites, h] of Adam
    losses: torch.Tensor  # [v] at the last forward pass of each
    factor: torch.Tensor  # [v] of the likelihood
    steps: torch.Tensor  # [v] taken
    status: torch.Tensor  # [v] GOING, or how it ended
    since: torch.Tensor  # [v] iterations in which every target was the argmax in the prefixed contexts, less one
    lead: torch.Tensor  # [v] the first request of its team
    team: torch.Tensor | None = None  # [v] number among the teams that run; None where every request is its own
    members: torch.Tensor  # [v] of each team, by its number

    RUNNING = ("held", "limit", "delta", "mean", "square", "losses", "factor", "steps", "status", "since", "lead")
    KEPT = ("delta", "losses", "steps", "status")

    def __init__(
        self,
        view: ModelView,
        prepared: Sequence[PreparedRequest],
        sites: Sequence[Site],
        hparams: Hparams,
        size: int,
        teams: Sequence[Hashable] | None,
        on_problem: str,
        finished: Callable[[Sequence[int], Values], None] | None,
    ):
        self.view, self.prepared, self.sites, self.hparams = view, prepared, sites, hparams
        self.on_problem, self.finished = on_problem, finished
        self.eases = len(sites) == 2
        self.asks = self.eases or hparams.most_probable_steps > 0
        self.queue = in_teams(by_length(prepared), teams)
        self.shares = teams is not None
        self.size, self.group = size, max(1, size // ENTER_PARTS)
        self.objective: Objective | None = None
        self.results: dict[str, torch.Tensor] = {}  # of all requests [u, ...], filled as they leave
        device = view.head.device
        self.every = hparams.check_every or (1 if device.type == "cpu" else 4)
        self.captures = hparams.values_graph
        if self.captures and (reason := no_graph(view)):
            raise EditError(f"values_graph needs {reason}")
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = 0  # iterations since the requests changed
        self.iteration = 0
        self.due: set[int] = set()  # iterations in which a group that runs ends, whatever its losses

    def run(self, bar: tqdm) -> Values:
        """Optimise all requests."""
        self.enter()
        while self.objective is not None:
            self.iteration += 1
            look = self.iteration % self.every == 0 or self.iteration in self.due
            going = None
            if self.captures:
                self.replay()
                going = self.look() if look else None
            else:
                with torch.enable_grad():
                    current = self.delta.clone().requires_grad_(True)
                    loss = self.measure(current)
                    going = self.look() if look else None
                    if going is None or going:
                        (gradient,) = torch.autograd.grad(loss.sum(), current)
                        self.move(gradient)
            if going is not None:
                self.leave(going)
                self.enter()
                if not bar.disable:
                    bar.update(self.share_done() * len(self.prepared) - bar.n)
        return self.values(range(len(self.prepared)))

    def share_done(self) -> float:
        """The share of the requests that is behind us, those that run by their steps."""
        running = 0 if self.objective is None else self.held.numel()
        part = float(self.steps.sum()) / self.hparams.v_num_grad_steps if running else 0.0
        return (len(self.prepared) - sum(map(len, self.queue)) - running + part) / len(self.prepared)

    def step(self) -> None:
        """One iteration that leaves all of its state in the tensors it found it in, so that it can be replayed."""
        found = {name: getattr(self, name) for name in self.RUNNING}
        with torch.enable_grad():
            current = self.delta.clone().requires_grad_(True)
            loss = self.measure(current)
            (gradient,) = torch.autograd.grad(loss.sum(), current)
            self.move(gradient)
        for name, tensor in found.items():
            if getattr(self, name) is not tensor:
                tensor.copy_(getattr(self, name))
                setattr(self, name, tensor)

    def replay(self) -> None:
        """One iteration, as a CUDA graph from the third on that the same requests share."""
        if self.graph is not None:
            self.graph.replay()
            return
        if self.warm < WARM:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.step()
            torch.cuda.current_stream().wait_stream(stream)
            self.warm += 1
            return
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):  # records, and does not run
            self.step()
        self.graph.replay()

    def enter(self) -> None:
        """Groups of requests from the queue join as long as there is room for them."""
        while self.queue and (self.objective is None or self.held.numel() + self.group <= self.size):
            units: list[list[int]] = []
            while self.queue and sum(map(len, units)) < self.group:
                units.append(self.queue.pop(0))
            group = [i for unit in units for i in unit]
            firsts = [group.index(unit[0]) for unit in units for _ in unit]
            objective = Objective(self.view, [self.prepared[i] for i in group], self.sites)
            h0, device = objective.h0, objective.device  # [v, sites, h]
            v = len(group)
            new = {
                "held": torch.tensor(group, device=device),
                "lead": torch.tensor([group[i] for i in firsts], device=device),
                "limit": self.hparams.clamp_norm_factor * h0.norm(dim=2, keepdim=True)[firsts],
                **{name: torch.zeros_like(h0) for name in ("delta", "mean", "square")},
                "losses": torch.zeros(v, device=device, dtype=torch.float32),
                "factor": torch.ones(v, device=device, dtype=torch.float32),
                "steps": torch.zeros(v, device=device, dtype=torch.int64),
                "status": torch.full((v,), GOING, device=device),
                "since": torch.full((v,), -1, device=device),
            }
            for name, value in new.items():
                setattr(self, name, value if self.objective is None else torch.cat([getattr(self, name), value]))
            self.objective = objective if self.objective is None else self.objective.joined(objective)
            self.due.add(self.iteration + self.hparams.v_num_grad_steps)
            self.count_teams()
            self.graph, self.warm = None, 0

    def count_teams(self) -> None:
        """Number the teams that run, and count their members."""
        if self.shares:
            self.team = torch.unique(self.lead, return_inverse=True)[1]
            self.members = torch.bincount(self.team, minlength=self.team.numel()).clamp(min=1)

    def shared(self, found: torch.Tensor) -> torch.Tensor:
        """The mean over each team, in the place of every member, of what was found for requests [v, ...]."""
        if self.team is None:
            return found
        sums = add_by_owner_(torch.zeros_like(found), self.team, found)
        return (sums / self.members.view(-1, *[1] * (found.ndim - 1)))[self.team]

    def of_all(self, right: torch.Tensor) -> torch.Tensor:
        """Whether something [v] holds for every member of a request's team."""
        return right if self.team is None else self.shared(right.float()) == 1.0

    def measure(self, current: torch.Tensor) -> torch.Tensor:
        """The losses [v] at the deltas; who is done stops here, before the step. Nothing is read back."""
        hparams, going = self.hparams, self.status == GOING
        nll, kl, decay, right, prefixed = self.objective.terms(current, self.asks)
        loss = self.factor * nll + hparams.kl_factor * kl + hparams.v_weight_decay * decay
        measured = self.shared(loss.detach())
        self.losses = torch.where(going, measured, self.losses)
        stop = measured < hparams.v_stop_loss
        if self.eases:
            right = self.of_all(right)
            self.factor = torch.where(right, EASED, torch.ones_like(self.factor))
            stop = stop | (right & (hparams.kl_factor * self.shared(kl.detach()) <= EASED_KL))
        if hparams.most_probable_steps:
            self.since = self.since + self.of_all(prefixed)
            stop = stop | (self.since >= hparams.most_probable_steps)
        over = torch.where(self.steps >= hparams.v_num_grad_steps - 1, USED_UP, GOING)
        found = torch.where(stop, torch.where(self.steps == 0, PREDICTED, STOPPED), over)
        found = torch.where(torch.isfinite(measured), found, BAD_LOSS)
        self.status = torch.where(going, found, self.status)
        return loss

    def move(self, gradient: torch.Tensor) -> None:
        """One step of Adam and the clamp, for requests that still go [v, sites, h]. Nothing is read back."""
        gradient = self.shared(gradient)
        finite = torch.isfinite(gradient.sum((1, 2)))
        self.status = torch.where((self.status == GOING) & ~finite, BAD_GRADIENT, self.status)
        going = self.status == GOING
        moving = going[:, None, None]
        self.steps = self.steps + going
        count = self.steps.clamp(min=1)[:, None, None]
        self.delta, self.mean, self.square = clamped_step(
            self.delta, gradient, self.mean, self.square, count, moving, self.hparams.v_lr, self.limit
        )

    def look(self) -> list[int]:
        """The held requests that still go, as indices into `held`; raises for one that is not finite."""
        status = self.status.tolist()  # the one wait for the device
        if self.on_problem == "raise":
            for i, code in zip(self.held.tolist(), status, strict=True):
                if code in (BAD_LOSS, BAD_GRADIENT):
                    raise EditError(f"{self.prepared[i].name}: {PROBLEMS[code]}")
        return [i for i, code in enumerate(status) if code == GOING]

    def leave(self, going: list[int]) -> None:
        """Requests that are done leave, once they are enough for it to be worth it."""
        held = self.held.numel()
        if len(going) == held or (going and len(going) > LEAVE_SHARE * held and not self.queue):
            return
        gone = sorted(set(range(held)) - set(going))
        self.keep(torch.tensor(gone, device=self.held.device))
        if not going:
            self.objective = None
            return
        self.graph, self.warm = None, 0
        stay = torch.tensor(going, device=self.held.device)
        self.objective = self.objective.select(stay)
        for name in self.RUNNING:
            setattr(self, name, getattr(self, name)[stay])
        self.count_teams()

    def keep(self, gone: torch.Tensor) -> None:
        """Write down what requests that leave have reached."""
        h0 = self.objective.h0[gone]
        found = {name: getattr(self, name)[gone] for name in self.KEPT}
        found["h0"] = h0
        where = self.held[gone]
        for name, value in found.items():
            if name not in self.results:
                self.results[name] = value.new_zeros(len(self.prepared), *value.shape[1:])
            self.results[name][where] = value
        if self.finished is not None:
            numbers = where.tolist()
            self.finished(numbers, self.values(numbers))

    def values(self, which: Sequence[int]) -> Values:
        """The values of some requests that are done."""
        index = torch.tensor(list(which), device=self.results["delta"].device)
        delta, h0 = self.results["delta"][index], self.results["h0"][index]
        flat = (self.results[name][index].cpu() for name in ("losses", "steps", "status"))
        targets = h0.double() + delta.double()
        return Values(
            tuple(site.kind for site in self.sites),
            targets.permute(1, 2, 0).contiguous(),
            delta.permute(1, 2, 0).contiguous(),
            *flat,
        )
