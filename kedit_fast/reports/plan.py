"""What a run of edits would need: bytes, how many values are optimized together, and time from a short trial."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from kedit_fast.editing.keys import KeyPass
from kedit_fast.editing.stackable import require_stackable
from kedit_fast.editing.values.batch_size import BatchSize, fitting_batch, request_bytes
from kedit_fast.editing.values.chunks import Columns, find_chunk_values, spans_of
from kedit_fast.editing.values.loop import SITES, find_values
from kedit_fast.editing.values.objective import EarlierChunks
from kedit_fast.editing.values.result import Values
from kedit_fast.editing.values.values_dtype import copied_bytes
from kedit_fast.errors import MethodError
from kedit_fast.methods.declaration import AUTO as FROM_BATCH
from kedit_fast.methods.hparams import Hparams
from kedit_fast.methods.presets import is_guess, make_hparams
from kedit_fast.methods.recipe import Recipe, ValueSites
from kedit_fast.methods.registry import find_recipe
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.forward import Site, evaluating
from kedit_fast.models.view import ModelView
from kedit_fast.models.widened import computing_dtype, copy_bytes
from kedit_fast.ops import rank_k_update_
from kedit_fast.reports.tuning_plan import RoutingCost, routing_cost, tuning_bytes, tuning_seconds
from kedit_fast.requests.problems import OnError, require_no_problems, skipped_records
from kedit_fast.requests.prompts import PreparedRequest, Prompt, PromptFormat, prepare_each
from kedit_fast.requests.reading import as_requests, rows_of
from kedit_fast.requests.request import EditRequest
from kedit_fast.requests.spacing import AUTO
from kedit_fast.solver.key_memory import FOLD_ABOVE, window_columns
from kedit_fast.solver.least_squares import system_flops
from kedit_fast.statistics.memory_plan import chosen_experts, sum_bytes
from kedit_fast.support.dtypes import dtype_name
from kedit_fast.support.free_memory import free_bytes
from kedit_fast.support.timing import synchronized_clock
from kedit_fast.support.torch_state import plain_torch

PREFIX = "The old man went to the market in the morning. "
"""A context prefix about as long as the published ones."""
TRIAL = 16
"""Requests of the trial, at most."""
ITERATIONS = (1, 4)
"""Iterations of the two trial runs; their difference is the time of an iteration."""
CLAMP = 1.0
"""The clamp of the trial where the first batch would choose it; an iteration takes as long with any."""
ASSUMED_TOKENS = 24
"""Tokens of a prompt with its prefix, where there is no tokenizer."""


@dataclass(frozen=True)
class Plan:
    """An estimate of memory and time."""

    method: str
    """The method's name."""
    edits: int
    """Requests of the one batch."""
    layers: tuple[int, ...]
    """Edited layers, zero-based."""
    architecture: ArchSpec
    """Where the model's modules are."""
    hparams_from: str
    """Where the hyper-parameters are from: the name of a preset, or how they were guessed."""
    device: str
    """The device of the model; "meta" without a trial."""
    dtype: str
    """The dtype of the edited matrices."""
    bytes: dict[str, int]
    """What is held in memory -> bytes."""
    free_bytes: int | None
    """Free bytes of the device with the model loaded; None when it was not loaded."""
    values_batch: int | None
    """Requests whose values are optimized together; None without a trial."""
    request_bytes: int | None
    """Bytes that the optimization needs per request; None without a trial."""
    seconds: dict[str, float] | None
    """Seconds of values, keys, solve, write, and total, if no request stopped early; None without a trial."""
    skipped: dict[int, str] = field(default_factory=dict)
    """Index of a request, or of a file's record -> why it could not be used."""
    routing: RoutingCost | None = None
    """What the memory costs where it answers, of methods whose edits stay beside the weights; else None."""

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        skipped = skipped_records(self.skipped)
        return {**asdict(self), "total_bytes": sum(self.bytes.values()), "skipped": skipped}


@plain_torch()
def plan(
    model: torch.nn.Module,
    tokenizer: Any | None,
    edits: int,
    method: str = "memit",
    *,
    requests: Iterable[EditRequest | Mapping[str, Any]] = (),
    hparams: Mapping[str, Any] | None = None,
    prompt_format: PromptFormat | None = None,
    target_separator: str = AUTO,
    on_error: OnError = "raise",
    spec: ArchSpec | None = None,
) -> Plan:
    """Estimate the memory and the time of `edits` edits in one batch.

    Args:
        model: loaded, or on the "meta" device for bytes alone.
        tokenizer: its tokenizer; None with a model on "meta".
        edits: how many.
        method: a method's name.
        requests: the trial runs on the first 16 of them; needed unless the model is on "meta".
        hparams: values that override the preset's.
        prompt_format, target_separator: as in `Editor`.
        on_error: "raise" at requests of the trial that cannot be written, or "skip" them and name them in the result.
        spec: an ArchSpec for an architecture that is not known.

    Raises:
        MethodError: no edits, a method that takes no steps (UltraEdit), one that does not go with the experts of the
            model's layers, or a loaded model without requests.
        RequestError: requests that cannot be written, without "skip" or where nothing is left.

    Cost: the value loop of at most 16 requests for 5 iterations, one pass for their keys, and one write to a copy of an
        edited matrix; of methods that tune a matrix, three runs of at most 16 requests with up to 4 steps, which are
        undone bit for bit. Nothing in the model changes.
    """
    if edits < 1:
        raise MethodError(f"cannot plan {edits} edits")
    view, recipe = ModelView(model, spec), find_recipe(method)
    chosen, origin = make_hparams(method, view.config, hparams or {})
    if recipe.gathers_gradients:
        raise MethodError(
            f"plan knows methods that take steps; {recipe.name} takes one backward pass per batch instead"
        )
    if is_guess(origin) and "layers" not in (hparams or {}):
        chosen = replace(chosen, layers=view.nearest_editable(chosen.layers))
    layers = view.check_layers(chosen.layers)
    require_stackable(view, recipe, chosen)
    contexts = 1 + sum(count for _, count in chosen.context_template_length_params)
    empty = view.device.type == "meta"
    prepared: list[PreparedRequest] = []
    skipped: dict[int, str] = dict(getattr(requests, "skipped", {}))
    if not empty:
        rows = rows_of(requests)
        if not rows or tokenizer is None:
            raise MethodError("a trial needs requests and a tokenizer")
        usable = as_requests(rows, on_error, recipe.needs_subject)
        trial = usable.first(min(edits, TRIAL))
        prefixes = (PREFIX,) * (contexts - 1)
        by_index = dict(zip(trial.places, trial, strict=True))
        prepared, unusable = prepare_each(
            tokenizer,
            by_index,
            prefixes,
            view.max_length,
            prompt_format,
            vocabulary=view.vocabulary,
            target_separator=target_separator,
        )
        skipped = usable.skipped | unusable
        if on_error == "raise" or not prepared:
            require_no_problems(unusable if prepared else skipped)
    weight = view.weight(layers[0])
    planned = functools.partial(
        Plan,
        method=recipe.name,
        edits=edits,
        layers=layers,
        architecture=view.spec,
        hparams_from=origin,
        device=str(view.device),
        dtype=dtype_name(weight.dtype),
        free_bytes=None if empty else free_bytes(view.device),
        skipped=skipped,
    )
    tokens = ASSUMED_TOKENS * contexts
    if recipe.tuning is not None:
        if prepared:
            tokens = max(sum(len(p.ids) + len(r.target) for p in r.rewriting) for r in prepared)
        seconds = None
        if prepared:
            overrides = {**(hparams or {}), "layers": layers}
            options = {"prompt_format": prompt_format, "target_separator": target_separator, "spec": spec}
            seconds = tuning_seconds(model, tokenizer, recipe, overrides, chosen.num_steps, prepared, edits, options)
        return planned(
            bytes=tuning_bytes(view, recipe, chosen, edits, tokens),
            values_batch=None,
            request_bytes=None,
            seconds=seconds,
            routing=routing_cost(view, recipe, chosen, edits),
        )
    value_sites = recipe.values_on(view.spec.post_norm)
    sites = [Site(layers[-1], name) for name in SITES[value_sites]]
    if prepared:
        tokens = max(_read(p, r, chosen) for r in prepared for p in r.rewriting) * contexts
    columns, others = _columns(prepared, chosen, edits)
    sizes = _bytes(view, recipe, chosen, edits, tokens, columns, others)
    if copies := copied_bytes(view, sites, chosen):
        sizes["matrices in bfloat16, while values are optimized"] = copies
    batch = seconds = None
    if prepared:
        batch = _batch(view, recipe, chosen, sites, prepared, edits)
        # The key is part of what --json prints, so its spelling stays.
        sizes["values, while optimised"] = batch.requests * batch.request_bytes
        seconds = _seconds(view, recipe, chosen, value_sites, prepared, edits)
    return planned(
        bytes=sizes,
        values_batch=None if batch is None else batch.requests,
        request_bytes=None if batch is None else batch.request_bytes,
        seconds=seconds,
    )


def _batch(
    view: ModelView, recipe: Recipe, hparams: Hparams, sites: list[Site], prepared: list[PreparedRequest], edits: int
) -> BatchSize:
    """How many requests will be optimized together, and the bytes of each."""
    each = request_bytes(view, prepared, sites)
    if not recipe.is_batched:  # one after another
        return BatchSize(1, each)
    if hparams.values_batch:
        return BatchSize(min(edits, hparams.values_batch), each)
    reserved = copied_bytes(view, sites, hparams)
    fitting = fitting_batch(view, prepared * -(-edits // len(prepared)), sites, reserved=reserved)
    return BatchSize(min(fitting.requests, edits), each)


def _read(prompt: Prompt, request: PreparedRequest, hparams: Hparams) -> int:
    """Tokens of a prompt, and of its target, whose states are carried between layers."""
    if hparams.chunk_tokens or hparams.keep_other_tokens:
        return len(prompt.ids) + len(request.target)
    return len(prompt.cut().ids)


def _columns(prepared: Sequence[PreparedRequest], hparams: Hparams, edits: int) -> tuple[int, int]:
    """The columns of `edits` requests like these, and those without a residual; one each where there are none."""
    if not prepared:
        return edits, edits * ASSUMED_TOKENS if hparams.keep_other_tokens else 0
    count = len(Columns.of(prepared, spans_of(prepared, hparams)).owner)
    texts = sum(len(one.rewriting[0].ids) + len(one.target) for one in prepared)
    others = texts - count if hparams.keep_other_tokens else 0
    return -(-edits * count // len(prepared)), -(-edits * others // len(prepared))


def _bytes(
    view: ModelView, recipe: Recipe, hparams: Hparams, edits: int, tokens: int, columns: int, others: int
) -> dict[str, int]:
    """Bytes by value_sites they hold; `tokens` of one request's prompts, cut after the subject; `columns` of the
    system, one a request or one a chunk of its target, and `others` without a residual."""
    layer = hparams.layers[0]
    out, d = view.edited_shape(layer)
    size = view.weight(layer).element_size()
    count = len(hparams.layers)
    chosen = _factor_inputs(view, hparams)
    rows, at_once = (edits, columns) if recipe.is_batched else (1, 1)
    window = hparams.undo_window
    unfolded = min(columns, window_columns(d) if window else int(FOLD_ABOVE * d))  # keys before they are folded
    if view.experts(layer):
        unfolded = columns  # never folded
    memory = 8 * (d * columns + unfolded * unfolded) + (8 * d * (d + 1) if columns > unfolded else 0)
    unmoved = {"keys of other tokens": 3 * 8 * d * others} if others else {}  # as read, whitened, beside the edits'
    return {
        "weights": sum(parameter.nbytes for parameter in view.model.parameters()),
        **({"their copies in float32, during a pass": copies} if (copies := copy_bytes(view.base)) else {}),
        "originals and masters": count * out * d * (size + (4 if size == 2 else 0) + (max(4, size) if window else 0)),
        "statistics and factors": count * 2 * sum_bytes(view, layer) if hparams.uses_moments else 0,
        **({"statistics of outputs, decomposed": count * 2 * out * out * 8} if hparams.weighs_outputs else {}),
        "factors of the updates": count * columns * (out + chosen) * 4,
        "key memory": count * memory if recipe.memory else 0,
        "keys": 4 * d * at_once * 8,  # the mixed and the bare prompt's, each also transposed
        **unmoved,
        "values": out * columns * (8 + 4),
        "states between layers": rows * tokens * out * computing_dtype(view.base, meta_is_cpu=True).itemsize
        if count > 1
        else 0,
    }


def _factor_inputs(view: ModelView, hparams: Hparams) -> int:
    """Rows of an update's right factor for one column: the inputs; of experts, those chosen in any context at most."""
    stack = view.experts(layer := hparams.layers[0])
    if stack is None:
        return view.edited_shape(layer)[1]
    contexts = 1 + sum(count for _, count in hparams.context_template_length_params)
    shared = stack.shared_inputs
    return stack.inputs * min(stack.count, contexts * chosen_experts(view, stack)) + shared


def _seconds(
    view: ModelView,
    recipe: Recipe,
    hparams: Hparams,
    value_sites: ValueSites,
    prepared: Sequence[PreparedRequest],
    edits: int,
) -> dict[str, float]:
    """Seconds by phase, from a trial on `prepared`."""
    trial = len(prepared)
    together = trial if recipe.is_batched else 1
    last = hparams.layers[-1]
    # No request stops early, and the loop checks after every iteration: it ends at a check.
    full_length: dict[str, Any] = dict(
        clamp_norm_factor=CLAMP if hparams.clamp_norm_factor == FROM_BATCH else hparams.clamp_norm_factor,
        v_stop_loss=-1.0,
        most_probable_steps=0,
        values_batch=together,
        check_every=1,
        values_graph=False,
    )
    short, long = (replace(hparams, v_num_grad_steps=count, **full_length) for count in ITERATIONS)
    options: dict[str, Any] = dict(stop_rule=recipe.stop_rule, on_problem="keep")
    spans = spans_of(prepared, hparams)

    def optimize(settings: Hparams) -> None:
        def find(requests: Sequence[PreparedRequest], earlier: Sequence[EarlierChunks] | None = None) -> Values:
            return find_values(view, requests, last, value_sites, settings, earlier=earlier, **options)

        if spans is None:
            find(prepared)
        else:
            find_chunk_values(find, prepared, spans)

    find_values(view, prepared[:1], last, value_sites, short, **options)  # warm-up
    begin, end = (_timed(view, lambda n=n: optimize(n)) for n in (short, long))
    each = max(0.0, end - begin) / (ITERATIONS[1] - ITERATIONS[0])
    values = (max(0.0, begin - each) + each * hparams.v_num_grad_steps) * edits / trial

    def keys() -> None:
        site = Site(last, SITES[value_sites][-1])
        others = hparams.keep_other_tokens
        passes = KeyPass(view, prepared, site, recipe.key_weights, spans=spans, other_tokens=others)
        for layer in hparams.layers:
            passes.at(layer)

    out, d = view.edited_shape(hparams.layers[0])
    stack = view.experts(hparams.layers[0])
    blocks, size = (1, d) if stack is None else (stack.count, stack.inputs)  # of S
    rate = _fp64_rate(view.device)
    columns, others = _columns(prepared, hparams, edits)
    u = columns if recipe.is_batched else 1
    count = len(hparams.layers)
    # The factor is computed once per layer, whatever the number of solves.
    factor = 0.0 if not hparams.uses_moments else blocks * (9.0 if recipe.uses_null_space else 1 / 3) * size**3
    once = system_flops(d, u, others, "auto" if stack is None else "dual")
    short_side, long_side = sorted((out, d))
    attenuation = 2.0 * short_side**2 * long_side + 9.0 * short_side**3 if hparams.sphere_strength else 0.0
    if hparams.weighs_outputs:
        factor += 9.0 * out**3
        once += 9.0 * u**3 + 2 * u * u * d + 4 * out * (out + u) * u
    flops = factor + (2 * blocks * size * size * (u + others) + once + attenuation) * columns / u
    solve = count * 2 * flops / rate
    weight = view.weight(hparams.layers[0])
    weight = (weight if stack is None else weight[0]).clone()
    rank = min(u, 256)
    left, right = (torch.zeros(rows, rank, dtype=torch.float32, device=weight.device) for rows in weight.shape)
    parts = _factor_inputs(view, hparams) / size  # experts that an edit writes to
    write = _timed(view, lambda: rank_k_update_(weight, left, right)) * count * parts * columns / rank
    phases = {"values": values, "keys": _timed(view, keys) * edits / trial, "solve": solve, "write": write}
    return {name: round(spent, 3) for name, spent in {**phases, "total": sum(phases.values())}.items()}


def _timed(view: ModelView, call: Callable[[], object]) -> float:
    with evaluating(view):
        begin = synchronized_clock(view.device)
        call()
        return synchronized_clock(view.device) - begin


def _fp64_rate(device: torch.device, side: int = 1024) -> float:
    """fp64 operations per second of a matrix product, the best of three."""
    a = torch.ones(side, side, dtype=torch.float64, device=device)
    best = float("inf")
    for _ in range(3):
        begin = synchronized_clock(device)
        torch.mm(a, a)
        best = min(best, synchronized_clock(device) - begin)
    return 2 * side**3 / best
