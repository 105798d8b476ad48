"""Values: the output at the subject's last token that makes the model say the target, found by gradient descent.

For each request, minimize over delta in R^h, added to the site's output h0 at the subject's last token,

    mean over contexts of -(1/T) sum_t log p(target_t)
    + kl_factor KL(p_delta || p_0) at the subject's last token of "{subject} is a" (kl_temperature, kl_direction:
      see `objective.Drift`)
    + v_weight_decay |delta| / |h0|^2 ("auto": 0.005 |delta| / |h0|)

by Adam with the step size v_lr ("auto": v_lr_scale times the root mean square of h0), and keep |delta| <=
clamp_norm_factor |h0|. The order is the published loop's: forward pass, loss, stop if the loss is below v_stop_loss,
else take a step; the last iteration takes no step. Requests do not depend on each other: a batch of them gives the same
values as one request at a time.

PMET optimizes two deltas together, at the outputs of attention and MLP, each with its own decay and clamp, under a
stopping rule of its own (see `stop_rules`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Hashable, Sequence

import torch
from tqdm import tqdm

from kedit_fast.editing.values.active_set import ActiveSet
from kedit_fast.editing.values.batch_size import fitting_batch
from kedit_fast.editing.values.cuda_graph import GraphedStep, graph_obstacle
from kedit_fast.editing.values.objective import Drift, EarlierChunks, Objective, Terms
from kedit_fast.editing.values.order import by_length, in_groups
from kedit_fast.editing.values.result import PROBLEMS, OnProblem, Values
from kedit_fast.editing.values.slot_shape import SlotShape
from kedit_fast.editing.values.slots import MOST_SLOTS, RecordedIteration, Slots
from kedit_fast.editing.values.stop_rules import MOST_PROBABLE, STOP_RULES, Stopping
from kedit_fast.editing.values.values_dtype import multiplying, value_matrices
from kedit_fast.errors import EditError
from kedit_fast.methods.declaration import AUTO
from kedit_fast.methods.hparams import Hparams
from kedit_fast.methods.recipe import StopRule, ValueSites
from kedit_fast.models.forward import Site, SiteKind, evaluating
from kedit_fast.models.half_matrices import HalfMatrices
from kedit_fast.models.prompt_runner import pass_kind
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import PreparedRequest
from kedit_fast.solver.value_descent import Status, clamped_step
from kedit_fast.support.process_group import gather
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
RETIRE_SHARE = 0.9
"""With an empty queue, finished requests stay until at most this share of the batch still runs."""
DECAY_SHARE = 0.005
"""v_weight_decay = "auto": nats per |delta| / |h0|. It is the published 0.5 for states of norm 100."""
ADMISSIONS = 4
"""Parts of a batch in which requests are admitted."""
SITES: dict[ValueSites, tuple[SiteKind, ...]] = {
    "block": ("block",),
    "mlp": ("mlp",),
    "attention and mlp": ("attention", "mlp"),
    "gradients": (),
    "none": (),
}
"""Sites of the deltas; the layer of the last one is written."""


@plain_torch()
def find_values(
    view: ModelView,
    prepared: Sequence[PreparedRequest],
    layer: int,
    site_kind: ValueSites,
    hparams: Hparams,
    *,
    stop_rule: StopRule = "below_loss",
    groups: Sequence[Hashable] | None = None,
    earlier: Sequence[EarlierChunks] | None = None,
    starting: Sequence[torch.Tensor | None] | None = None,
    on_problem: OnProblem = "raise",
    most: int | None = None,
    progress: bool = False,
    finished: Callable[[Sequence[int], Values], None] | None = None,
    recorded: RecordedIteration | None = None,
) -> Values:
    """Optimize the value of each request at layer `layer`.

    Args:
        view: the model; nothing in it changes.
        prepared: u requests.
        layer: where the delta is added.
        site_kind: "block" (MEMIT), "mlp" (ROME, and every method where a norm follows the MLP: Gemma 2 and 3, OLMo 2),
            or "attention and mlp" (PMET): two deltas.
        hparams: hyper-parameters of the loop; `values_batch` requests are optimized together (0: as many as fit in
            memory, see `fitting_batch`).
        stop_rule: the recipe's; see `STOP_RULES`. `hparams.most_probable_steps` adds a rule to any of them.
        groups: u names; requests with the same name share one delta. Its loss is the mean of their losses and its
            clamp is the first one's (MEMIT-Merge: requests on one subject). None: each request has its own delta.
        earlier: of requests that are chunks of longer targets, the deltas of the chunks before them, as many of each;
            they are added in every pass. None where there are none.
        starting: u values [h] at the last site that descents start from; None for the site's output there, without a
            delta.
        on_problem: "raise" at the first request whose loss or gradient is not finite, or "keep" going with the others:
            such a request keeps the delta that it had before, and `Values.status` says what happened. A target that
            the model says already is never an error here; its status is PREDICTED.
        most: where `values_batch` is 0, optimize so many requests together at most, whatever memory is free now; None
            for as many as fit.
        progress: show a bar on stderr.
        finished: called with the indices and values of requests when they are done.
        recorded: with `values_graph`, an iteration that calls like this one share, so that it is recorded once; None to
            record one for this call.

    Raises:
        EditError: a loss or gradient that is not finite, naming the request; the site "block" in a model with a norm
            between the MLP and the residual sum; a `values_dtype` that is not allowed here.

    Cost: one full pass over the prompts. After that each iteration runs a forward and a backward pass of the blocks
        above `layer`, over the tokens from the subject's last one on, for requests that have not stopped; the last
        block's MLP and the head run on target tokens alone.
    """
    if not prepared:
        raise EditError("no requests")
    if _is_behind_norm(view, site_kind):
        raise EditError(
            f"{view.spec.name} has a norm between the edited layer and the residual sum, so no write can produce a "
            'value at a block\'s output: use the site "mlp", before that norm'
        )
    sites = [Site(layer, kind) for kind in SITES[site_kind]]
    matrices = value_matrices(view, sites, hparams)
    size = hparams.values_batch or min(most or 0, len(prepared))
    if size == 0:
        batch = fitting_batch(view, prepared, sites)
        size = batch.requests
        _log.info("values of %d requests at a time (%d MiB each)", size, batch.request_bytes >> 20)
    bar = tqdm(
        total=len(prepared),
        unit=" edits",
        desc="values",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {rate_fmt}, {remaining} left",
        disable=not progress,
        leave=False,
    )
    device = view.head.device
    current_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with evaluating(view), current_device, bar:
        optimizer = ValueOptimizer(
            view,
            prepared,
            sites,
            hparams,
            size=size,
            stopping=STOP_RULES[stop_rule],
            groups=groups,
            earlier=earlier,
            starting=starting,
            on_problem=on_problem,
            finished=finished,
            matrices=matrices,
            recorded=recorded,
        )
        return optimizer.run(bar)


def _is_behind_norm(view: ModelView, site_kind: ValueSites) -> bool:
    """Whether a norm stands between the matrix that is written and the site of its value."""
    return view.spec.post_norm and "block" in SITES[site_kind]


class ValueOptimizer:
    """The published loop over all requests, at most `size` of them at a time.

    Requests are admitted in order of length, as others retire; each counts its own steps. The state of the active ones
    is on the device. The host polls it every `poll_every` iterations, and when the last iteration of some is due, so
    that no pass runs for requests that have all ended.
    """

    def __init__(
        self,
        view: ModelView,
        prepared: Sequence[PreparedRequest],
        sites: Sequence[Site],
        hparams: Hparams,
        *,
        size: int,
        stopping: Stopping,
        groups: Sequence[Hashable] | None = None,
        earlier: Sequence[EarlierChunks] | None = None,
        starting: Sequence[torch.Tensor | None] | None = None,
        on_problem: OnProblem = "raise",
        finished: Callable[[Sequence[int], Values], None] | None = None,
        matrices: HalfMatrices | None = None,
        recorded: RecordedIteration | None = None,
    ):
        self.matrices = matrices
        self.view, self.prepared, self.sites, self.hparams = view, prepared, sites, hparams
        self.on_problem, self.finished, self.earlier, self.starting = on_problem, finished, earlier, starting
        if hparams.clamp_norm_factor == AUTO:
            raise EditError(f'clamp_norm_factor is "{AUTO}": choose one with `choose_clamp`')
        self.clamp = float(hparams.clamp_norm_factor)
        self.rate, self.rate_scale = (0.0, hparams.v_lr_scale) if hparams.v_lr == AUTO else (float(hparams.v_lr), None)
        scaled = hparams.v_weight_decay == AUTO
        self.decay, self.decay_power = (DECAY_SHARE, 1) if scaled else (float(hparams.v_weight_decay), 2)
        self.drift = Drift(hparams.kl_temperature, hparams.kl_direction == "original")
        self.stop_rules = [stopping, MOST_PROBABLE] if hparams.most_probable_steps else [stopping]
        self.needs_top1 = any(rule.needs_top1 for rule in self.stop_rules)
        self.queue = in_groups(by_length(prepared), groups)  # groups of requests that wait
        self.has_groups = groups is not None
        self.size, self.admission = size, max(1, size // ADMISSIONS)
        self.retired: list[tuple[list[int], Values]] = []
        self.poll_every = hparams.check_every or (1 if view.head.device.type == "cpu" else 4)
        self.uses_graph = hparams.values_graph
        if self.uses_graph and (obstacle := graph_obstacle(view)):
            raise EditError(f"values_graph needs {obstacle}")
        if self.uses_graph and pass_kind(view, tuple(sites)) == "whole prompts":
            raise EditError("values_graph needs a model in which the tails of prompts can run alone")
        self.graphed_step: GraphedStep | None = None  # of the requests that are active now
        self.slots: Slots | None = None  # of the active requests, where these have a recorded iteration for good
        self.recorded = recorded
        self.iteration = 0
        self.last_iterations: set[int] = set()  # of requests that were admitted together and do not stop before

    def run(self, bar: tqdm) -> Values:
        """Optimize all requests."""
        active = self._admit(None)
        while active is not None:
            self.iteration += 1
            running = self._iterate(active)
            if running is not None:
                active = self._admit(self._retire_finished(active, running))
                if not bar.disable:
                    bar.update(self._progress(active) - bar.n)
        if self.recorded is not None and self.slots is not None:
            self.recorded.step, self.recorded.slots = self.graphed_step, self.slots
        return Values.in_order(self.retired, self.view.head.device)

    def _admit(self, active: ActiveSet | None) -> ActiveSet | None:
        """Requests from the queue join the active ones as long as there is room for them."""
        if (shape := self._slot_shape) is not None:
            return self._fill_slots(shape)
        while self.queue and (active is None or len(active) + self.admission <= self.size):
            admitted: list[list[int]] = []
            while self.queue and sum(map(len, admitted)) < self.admission:
                admitted.append(self.queue.pop(0))
            requests = [i for group in admitted for i in group]
            leaders = [requests.index(group[0]) for group in admitted for _ in group] if self.has_groups else None
            entering = self._started(requests, leaders)
            active = entering if active is None else active.append(entering)
            self.last_iterations.add(self.iteration + self.hparams.v_num_grad_steps)
            self.graphed_step = None
        return active

    def _started(
        self, requests: Sequence[int], leaders: Sequence[int] | None = None, shape: SlotShape | None = None
    ) -> ActiveSet:
        """Requests before their first iteration, after the full pass over their prompts."""
        earlier = None if self.earlier is None else [self.earlier[i] for i in requests]
        starting = None if self.starting is None else [self.starting[i] for i in requests]
        prepared = [self.prepared[i] for i in requests]
        objective = Objective.build(self.view, prepared, self.sites, self.decay_power, self.drift, earlier, shape)
        return ActiveSet.start(objective, requests, leaders, self.clamp, self.rate_scale, starting)

    @functools.cached_property
    def _slot_shape(self) -> SlotShape | None:
        """What a slot takes, where iterations are recorded and requests are few enough for slots; else None."""
        if not self.uses_graph or self.has_groups or self.size > MOST_SLOTS:
            return None
        if self.recorded is not None:
            return self.recorded.shape
        return SlotShape.of(self.prepared, self.view.max_length)

    def _fill_slots(self, shape: SlotShape) -> ActiveSet | None:
        """Requests from the queue enter free slots; the first ones make them. None when all requests are done."""
        if self.slots is None and self.recorded is not None:
            self.slots, self.graphed_step = self.recorded.slots, self.recorded.step
        room = min(self.size, len(self.queue))
        if self.slots is not None:
            free, wanted = len(self.slots.free), min(self.admission, len(self.queue))
            room = min(free, len(self.queue)) if free >= wanted else 0
        requests = [i for _ in range(room) for i in self.queue.pop(0)]
        if requests:
            is_last = self.slots is None and self.recorded is None and not self.queue  # none comes after these
            entering = self._started(requests, shape=None if is_last else shape)
            if self.slots is None:
                self.slots = Slots(entering, requests)
            else:
                self.slots.enter(entering, requests)
            self.last_iterations.add(self.iteration + self.hparams.v_num_grad_steps)
        return self.slots.active if self.slots is not None and self.slots.taken else None

    def _iterate(self, active: ActiveSet) -> list[int] | None:
        """One iteration; returns what `_poll` does, None in an iteration without a poll."""
        polls = self.iteration % self.poll_every == 0 or self.iteration in self.last_iterations
        if self.uses_graph:
            if self.graphed_step is None:
                self.graphed_step = GraphedStep(functools.partial(self._step_in_place, active))
            self.graphed_step.run()
            return self._poll(active) if polls else None
        with torch.enable_grad():
            delta = active.delta.clone().requires_grad_(True)
            loss = self._losses(active, delta)
            running = self._poll(active) if polls else None
            if running is None or running:
                (gradient,) = torch.autograd.grad(loss.sum(), delta)
                self._adam_step(active, gradient)
        return running

    def _step_in_place(self, active: ActiveSet) -> None:
        """An iteration that writes its state into the tensors that it read it from, so that it can be replayed."""
        updated = copy.copy(active)
        with torch.enable_grad():
            delta = updated.delta.clone().requires_grad_(True)
            loss = self._losses(updated, delta)
            (gradient,) = torch.autograd.grad(loss.sum(), delta)
            self._adam_step(updated, gradient)
        active.copy_(updated)

    def _losses(self, active: ActiveSet, delta: torch.Tensor) -> torch.Tensor:
        """The losses [v] at `delta`; requests that are done are marked before the step. Nothing is read back."""
        with multiplying(self.matrices):
            terms = active.objective.terms(delta, self.needs_top1)
        likelihood = active.likelihood_weight * terms.nll
        loss = likelihood + self.hparams.kl_factor * terms.kl + self.decay * terms.decay
        self._mark_stopped(active, active.group_mean(loss.detach()), terms)
        return loss

    def _mark_stopped(self, active: ActiveSet, loss: torch.Tensor, terms: Terms) -> None:
        """Note the losses [v] of requests that run, and the status of those that end. Nothing is read back."""
        hparams, running = self.hparams, active.status == Status.RUNNING
        active.loss = torch.where(running, loss, active.loss)
        stop = loss < hparams.v_stop_loss
        for rule in self.stop_rules:
            by_rule = rule.apply(active, terms, hparams)
            if by_rule is not None:
                stop = stop | by_rule
        last = active.steps_taken >= hparams.v_num_grad_steps - 1
        status = torch.where(last, Status.COMPLETED, Status.RUNNING)
        status = torch.where(stop, torch.where(active.steps_taken == 0, Status.PREDICTED, Status.STOPPED), status)
        status = torch.where(torch.isfinite(loss), status, Status.BAD_LOSS)
        active.status = torch.where(running, status, active.status)

    def _adam_step(self, active: ActiveSet, gradient: torch.Tensor) -> None:
        """One step of Adam and the clamp, for requests that run, by gradients [v, sites, h]. Nothing is read back."""
        gradient = active.group_mean(gradient)
        is_finite = torch.isfinite(gradient.sum((1, 2)))
        active.status = torch.where((active.status == Status.RUNNING) & ~is_finite, Status.BAD_GRADIENT, active.status)
        running = active.status == Status.RUNNING
        active.steps_taken = active.steps_taken + running
        active.delta, active.adam_mean, active.adam_square = clamped_step(
            active.delta,
            gradient,
            active.adam_mean,
            active.adam_square,
            active.steps_taken.clamp(min=1)[:, None, None],
            running[:, None, None],
            self.rate if active.rate is None else active.rate,
            active.max_norm,
        )

    def _poll(self, active: ActiveSet) -> list[int]:
        """The rows of active requests that still run. This waits for the device.

        Raises:
            EditError: with `on_problem` "raise", a request whose loss or gradient is not finite.
        """
        status = active.status.tolist()
        if self.view.is_sharded:
            status = gather(status)[0]  # processes that hold the model together stop together
        if self.on_problem == "raise":
            for i, code in zip(active.request.tolist(), status, strict=True):
                if code in (Status.BAD_LOSS, Status.BAD_GRADIENT):
                    raise EditError(f"{self.prepared[i].name}: {PROBLEMS[Status(code)]}")
        return [row for row, code in enumerate(status) if code == Status.RUNNING]

    def _retire_finished(self, active: ActiveSet, running: list[int]) -> ActiveSet | None:
        """The active requests without those that are done, once these are enough to be worth it; None if all are."""
        if self.slots is not None:
            still = set(running)
            if done := [slot for slot in self.slots.taken if slot not in still]:
                self._collect(active, done)
                self.slots.release(done)
            return active
        if len(running) == len(active):
            return active
        if running and len(running) > RETIRE_SHARE * len(active) and not self.queue:
            return active
        self._collect(active, sorted(set(range(len(active))) - set(running)))
        self.graphed_step = None
        return active.select(torch.tensor(running, device=active.request.device)) if running else None

    def _collect(self, active: ActiveSet, rows: list[int]) -> None:
        """Take the values of requests that are done, and pass them to `finished`."""
        done = torch.tensor(rows, device=active.request.device)
        delta = active.delta[done]
        targets = active.objective.h0[done].double() + delta.double()
        values = Values(
            tuple(site.kind for site in self.sites),
            targets.permute(1, 2, 0).contiguous(),
            delta.permute(1, 2, 0).contiguous(),
            active.loss[done].cpu(),
            active.steps_taken[done].cpu(),
            active.status[done].cpu(),
        )
        requests = active.request[done].tolist()
        self.retired.append((requests, values))
        if self.finished is not None:
            self.finished(requests, values)

    def _progress(self, active: ActiveSet | None) -> float:
        """How many requests are done, those that are active counted by the share of their steps."""
        done = float(sum(len(requests) for requests, _ in self.retired))
        if active is None:
            return done
        steps = active.steps_taken if self.slots is None else active.steps_taken[self.slots.taken]
        return done + float(steps.sum()) / self.hparams.v_num_grad_steps
