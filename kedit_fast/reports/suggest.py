"""Hyper-parameters for a model without a preset: try windows of layers and more on a few requests, choose the best."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from kedit_fast.errors import KeditError, MethodError
from kedit_fast.evaluation.metrics import unusable
from kedit_fast.methods.declaration import AUTO as FROM_MODEL
from kedit_fast.methods.hparams import Hparams, reads, unused, worth_a_warning
from kedit_fast.methods.presets import guessed_numbers, make_hparams
from kedit_fast.methods.recipe import Recipe
from kedit_fast.methods.registry import find_recipe
from kedit_fast.methods.windows import windows
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.view import ModelView
from kedit_fast.reports.locating import TracedLayers, traced_layers
from kedit_fast.reports.search import SEARCHES, Effort, Search, kind_of, span
from kedit_fast.reports.trials import StoredStatistics, Trial, Trials, in_memory
from kedit_fast.requests.problems import OnError, require_no_problems, skipped_records
from kedit_fast.requests.prompts import PreparedRequest, PromptFormat
from kedit_fast.requests.request import EditRequest
from kedit_fast.requests.spacing import AUTO
from kedit_fast.statistics.collect import Statistics, collect_statistics
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
DRIFT_TEXTS = 64
"""Documents on which the drift is measured, at most."""
FEW, TO_HOLD_OUT = 32, 6
"""A full search on fewer requests than the first says so; with fewer than the second none is held out."""
EVERY = 3
"""One of so many requests is held out."""
FINALISTS = 3
"""The best configurations, which are tried again with the requests that were held out."""


@dataclass(frozen=True)
class Suggestion:
    """All trials, and the best one as a configuration."""

    method: str
    """The method's name."""
    edits: int
    """Requests that were written in each trial."""
    swept: str
    """The hyper-parameters that were varied, separated by commas."""
    trials: tuple[Trial, ...]
    """All trials, in the order they ran."""
    best: Trial
    """The trial that is suggested: the best one on the requests that were held out, else that of the highest score."""
    hparams: dict[str, Any]
    """Hyper-parameters of the best trial that differ from the defaults."""
    skipped: dict[int, str] = field(default_factory=dict)
    """Index of a request, or of a file's record -> why it could not be used."""
    held_out: tuple[Trial, ...] = ()
    """The best configurations again, with all requests written and those scored that no trial before had seen."""
    held_out_edits: int = 0
    """Requests that were held out."""
    score: float = 0.0
    """Of the suggested configuration: on the requests that were held out, else that of its trial."""
    notes: tuple[str, ...] = ()
    """What is worth knowing of the search: best values at an edge, and what could not be measured."""

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints, in which `numbers` are the hyper-parameters."""
        names = {"hparams": "numbers"}
        fields_ = {names.get(name, name): value for name, value in asdict(self).items()}
        return {**fields_, "skipped": skipped_records(self.skipped)}

    def toml(self) -> str:
        """The best configuration as a file for --hparams."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in self.hparams.items()}
        lines = [f"{name} = {json.dumps(value)}" for name, value in plain.items()]  # JSON of such values is also TOML
        title = f"# {self.method}: the best of {len(self.trials)} on {self.edits} requests, score {self.score:.3f}"
        title += f" on {self.held_out_edits} others" if self.held_out else ""
        return "\n".join([title, *lines]) + "\n"


@plain_torch()
def suggest(
    model: torch.nn.Module,
    tokenizer: Any,
    requests: Iterable[EditRequest | Mapping[str, Any]],
    method: str = "memit",
    *,
    statistics: Statistics | StoredStatistics | None = None,
    texts: Sequence[str] = (),
    max_tokens: int = 100_000,
    last_layers: Sequence[int] | None = None,
    trace: bool = False,
    hparams: Mapping[str, Any] | None = None,
    seed: int = 0,
    prompt_format: PromptFormat | None = None,
    target_separator: str = AUTO,
    on_error: OnError = "raise",
    effort: Effort = "full",
    most: int | None = None,
    expected: int = 0,
    progress: bool = False,
    spec: ArchSpec | None = None,
) -> Suggestion:
    """Edit with one configuration after another, measure, undo, and choose the best.

    The search goes from coarse to fine, one hyper-parameter after another, around the best configuration so far:
    windows of layers, then the residual share, the clamp and the learning rate (AlphaEdit: also the threshold of its
    null space; UltraEdit: its rate and token; methods that tune a matrix: the rate, the layer, and what their router or
    steps depend on). Where the best value is the smallest or largest one, it goes on past it.

    Args:
        model: its weights are the same afterwards, bit for bit.
        tokenizer: its tokenizer.
        requests: 48 or more make a good choice; so do paraphrase and neighborhood prompts.
        method: a method's name.
        statistics: second moments of the layers to try; a window without them is not tried.
        texts: documents to collect statistics from where none are given; the last ones also measure the drift.
        max_tokens: tokens to collect statistics from.
        last_layers: try windows that end at these layers alone; by default those of `methods.windows`, and their
            neighbors.
        trace: trace some of the requests first (see `locating.tracing`), and begin with windows that end at the layers
            that the trace speaks for, in place of windows over the whole depth. Their neighbors are tried as without.
            It takes fewer trials; that facts are best edited where they are traced to is no law, so it is not the
            default.
        hparams: values that override the preset's or the guess's. What is given is not varied.
        seed: seed of the context prefixes.
        prompt_format, target_separator: as in `Editor`.
        on_error: "raise" at requests that cannot be written or measured, or "skip" them and name them in the result.
        effort: "full"; or "short", which varies layers, residual share and clamp (UltraEdit: layers, rate and
            token), holds no requests out, and where no target comes through still names the likeliest window.
        most: use so many of the requests, the first usable ones; None for all.
        expected: edits that the configuration is for, where they are more than a trial writes: the loss of neighborhood
            and the drift are projected to as many.
        progress: show the number of trials on stderr.
        spec: an ArchSpec for an architecture that is not known.

    Returns:
        the suggestion. A full search of six requests or more holds a third of them out: the three best configurations
        are tried again with all requests written, and the best one by the held-out third is suggested. A trial that
        fails is one of the trials, with its reason.

    Raises:
        MethodError: no statistics and no text for a method that needs them, no statistics of any window, every trial
            failed, or (with effort "full") no target came through in any; `trace` together with layers that are given.
        RequestError: requests that cannot be written.

    Cost: the values of all requests once per last layer, clamp and rate; a solve, a write and an evaluation per trial.
        In a process group all processes make the same calls and get the same result.
    """
    view, recipe = ModelView(model, spec), find_recipe(method)
    given = dict(hparams or {})
    if idle := worth_a_warning(recipe, given):
        _log.warning("%s does not use %s", recipe.name, ", ".join(idle))
    given = {name: value for name, value in given.items() if reads(recipe, name)}
    preset, origin = make_hparams(method, view.config, given)
    base = given if effort == "short" else _freed(recipe, view.config, given)
    chosen, _ = make_hparams(method, view.config, base)
    candidates, can_move = _windows(recipe, view, chosen, given, last_layers)
    if trace and not can_move:
        raise MethodError(
            "trace chooses the windows of layers that are tried first, and layers are given: leave one of them out"
            if recipe.tuning is None or not recipe.tuning.locates_layers
            else f"trace chooses windows of layers, and {recipe.name} chooses its layers itself: leave it out"
        )
    drift_texts = list(texts[-DRIFT_TEXTS:]) if texts else []
    stored, available = None, frozenset(view.editable)
    if chosen.uses_statistics:
        if statistics is None:
            layers = sorted({layer for window in candidates for layer in window})
            if not texts:
                raise MethodError(
                    f"{recipe.name} needs statistics: give --stats of layers {span(layers)}, or --text to collect them"
                )
            documents = texts[: -len(drift_texts)] or texts
            statistics = collect_statistics(
                model,
                tokenizer,
                documents,
                layers,
                max_tokens=max_tokens,
                output_metric=chosen.weighs_outputs or chosen.constrains_curvature,
                progress=progress,
                spec=spec,
            )
        stored = statistics if isinstance(statistics, StoredStatistics) else in_memory(statistics)
        available &= frozenset(stored.layers)
        candidates = _inside(candidates, available, recipe)
    options = {"seed": seed, "prompt_format": prompt_format, "target_separator": target_separator, "spec": spec}
    trials = Trials(model, tokenizer, recipe.name, base, stored, drift_texts, options, expected, progress)
    with trials.bar:
        usable, skipped = _usable(trials, candidates, requests, on_error)
        usable = usable[:most]
        tried, held = _split(usable) if effort == "full" else (usable, [])
        origins: tuple[str, ...] = ()
        if trace:
            speaks = traced_layers(view, tokenizer, [p.request for p in tried], prompt_format=prompt_format)
            candidates, note = _traced_windows(candidates, speaks, available)
            origins = (note,)
        start = chosen.layers if chosen.layers in candidates else candidates[0]
        search = Search(trials, tried, recipe, chosen, frozenset(given), candidates, start, available, can_move)
        if effort == "full" and origin.startswith("preset") and preset.layers and available >= set(preset.layers):
            trials.run("preset", None, _differing(preset, chosen), tried)
        search.run(SEARCHES[effort, kind_of(recipe)])
        sweep = tuple(trials.done)
        best = _require_best(sweep, effort)
        if effort == "short" and search.best is not None:
            best = search.best  # a stage may want more than the higher score
        finals = ()
        if held:
            by_rank = sorted((t for t in sweep if t.score), key=lambda trial: trial.rank, reverse=True)
            finals = tuple(
                trials.run(trial.stage, trial.value, _settled(trial), usable, held) for trial in by_rank[:FINALISTS]
            )
            index = max(range(len(finals)), key=lambda i: finals[i].rank)  # the first of equals
            best = by_rank[index]
            if finals[index].failure:
                failures = [(trial.layers, trial.failure) for trial in finals]
                raise MethodError(_distinct(f"the best configurations fail with all {len(usable)} requests", failures))
    changes = best.hparams if effort == "short" else _settled(best)
    return Suggestion(
        recipe.name,
        len(tried),
        ", ".join(dict.fromkeys(trial.stage for trial in sweep)),
        sweep,
        best,
        _described(make_hparams(method, view.config, base, changes)[0], recipe),
        skipped,
        finals,
        len(held),
        max((t for t in finals), key=lambda trial: trial.rank).score if finals else best.score,
        (*origins, *search.edges.values(), *_notes(best, len(usable), effort, held)),
    )


def _freed(recipe: Recipe, config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, with the numbers of a model without a preset in place of a preset's, as a full search varies these."""
    freed = {name: value for name, value in guessed_numbers(recipe, config).items() if reads(recipe, name)}
    if {"nullspace_rule", "nullspace_threshold"} & set(given):  # a threshold is of a rule
        freed = {name: value for name, value in freed.items() if not name.startswith("nullspace_")}
    if given.get("update_norm_lambda", 0) not in (0, FROM_MODEL):
        freed.pop("mom2_update_weight", None)
    return {**freed, **given}


def _differing(preset: Hparams, chosen: Hparams) -> dict[str, Any]:
    """The hyper-parameters of a preset that differ from those of a search, and the layers."""
    names = [f.name for f in fields(Hparams) if f.name != "method"]
    differing = {name: getattr(preset, name) for name in names if getattr(preset, name) != getattr(chosen, name)}
    return {"layers": preset.layers, **differing}


def _windows(
    recipe: Recipe,
    view: ModelView,
    chosen: Hparams,
    given: Mapping[str, Any],
    last_layers: Sequence[int] | None,
) -> tuple[list[tuple[int, ...]], bool]:
    """The windows to try, and whether others may be tried beside them."""
    if recipe.tuning is not None and recipe.tuning.locates_layers:  # each request points to one of all these
        return [chosen.layers], False
    coarse = [tuple(view.editable[place] for place in window) for window in windows(recipe, len(view.editable))]
    if last_layers is not None:
        size = max(map(len, coarse))
        return [tuple(range(max(0, last - size + 1), last + 1)) for last in last_layers], False
    if given.get("layers"):
        return [tuple(given["layers"])], False
    start = view.nearest_editable(chosen.layers)
    if start and start not in coarse:
        coarse = sorted([*coarse, start], key=lambda window: (window[-1], -len(window)))
    return coarse, True


def _traced_windows(
    candidates: Sequence[tuple[int, ...]], speaks: TracedLayers, available: frozenset[int]
) -> tuple[list[tuple[int, ...]], str]:
    """The windows that a search begins with where a trace was made, and a sentence about them.

    They end at the last layer that the trace speaks for and at the one of the largest effect, with as many layers as
    the other windows. All candidates remain where the trace speaks for no layer, or none of these can be edited.
    """
    if not speaks.layers:
        return list(candidates), f"{speaks.sentence}: windows over the whole depth are tried"
    size = max(map(len, candidates))
    ends = sorted({speaks.peak, speaks.layers[-1]})
    traced = [tuple(range(max(0, end - size + 1), end + 1)) for end in ends]
    traced = [window for window in traced if available >= set(window)]
    if not traced:
        return list(candidates), f"{speaks.sentence}; these have no statistics or no such weight: others are tried"
    return traced, f"{speaks.sentence}: the first windows are {' and '.join(span(window) for window in traced)}"


def _inside(candidates: Sequence[tuple[int, ...]], available: frozenset[int], recipe: Recipe) -> list[tuple[int, ...]]:
    """The windows whose layers all have statistics."""
    inside = [window for window in candidates if available >= set(window)]
    if not inside:
        raise MethodError(
            f"the statistics are of layers {span(sorted(available))}: {recipe.name} would try windows such as "
            f"{span(candidates[0])} or {span(candidates[-1])}; `kedit-fast stats MODEL --text FILE --layers auto --out "
            "DIR` collects them for all"
        )
    return inside


def _usable(
    trials: Trials,
    candidates: Sequence[tuple[int, ...]],
    requests: Iterable[EditRequest | Mapping[str, Any]],
    on_error: OnError,
) -> tuple[list[PreparedRequest], dict[int, str]]:
    """The requests that can be written and measured, and the others by index."""
    editor, problems = None, []
    for window in candidates:
        try:
            editor = trials.editor({"layers": window})
            break
        except KeditError as error:
            problems.append((window, str(error)))
    if editor is None:
        raise MethodError(_distinct("no window can be edited", problems))
    prepared, skipped = editor.check(requests, on_error)
    places = [place for place in range(len(prepared) + len(skipped)) if place not in skipped]
    by_place = dict(zip(places, prepared, strict=True))
    bad = {
        place: f"{p.name}: {problem}"
        for place, p in by_place.items()
        if (
            problem := unusable(editor.view, editor.tokenizer, p.request, editor.prompt_format, editor.target_separator)
        )
    }
    if on_error == "raise" or len(bad) == len(by_place):
        require_no_problems(skipped | bad if len(bad) == len(by_place) else bad)
    return [p for place, p in by_place.items() if place not in bad], skipped | bad


def _split(usable: list[PreparedRequest]) -> tuple[list[PreparedRequest], list[PreparedRequest]]:
    """The requests of the trials, and those that are held out: every third one."""
    if len(usable) < TO_HOLD_OUT:
        return usable, []
    held = usable[EVERY - 1 :: EVERY]
    return [request for index, request in enumerate(usable) if index % EVERY != EVERY - 1], held


def _require_best(sweep: Sequence[Trial], effort: Effort) -> Trial:
    """The best trial; raises MethodError when all failed, or when a full search taught the model nothing."""
    best = max(sweep, key=lambda trial: trial.rank)  # the first of equals
    if not best.failure and (best.score or effort == "short"):
        return best
    headline = f"none of {len(sweep)} configurations works on these requests"
    failures = [(trial.layers, trial.failure) for trial in sweep if trial.failure]
    if len(failures) < len(sweep):
        failures.append(((), "no target or paraphrase came through, or no neighborhood prompt was left as it was"))
    raise MethodError(_distinct(headline, failures))


def _distinct(headline: str, failures: Sequence[tuple[tuple[int, ...], str]]) -> str:
    """A headline, and each reason once, with the windows it was given for."""
    layers: dict[str, list[str]] = {}
    for window, reason in failures:
        layers.setdefault(reason, []).append(span(window))
    lines = []
    for reason, spans in layers.items():
        names = list(dict.fromkeys(filter(None, spans)))
        lines.append(f"  layers {', '.join(names)}: {reason}" if names else f"  {reason}")
    return "\n".join([f"{headline}:", *lines])


def _settled(trial: Trial) -> dict[str, Any]:
    """What a trial changes, with the clamp as a number: other requests could resolve another one."""
    clamp = trial.resolved.get("clamp_norm_factor")
    return {**trial.hparams, **({} if clamp is None else {"clamp_norm_factor": clamp})}


def _described(chosen: Hparams, recipe: Recipe) -> dict[str, Any]:
    """The hyper-parameters that the method reads, have an effect and differ from the defaults; always the layers."""
    names = [f.name for f in fields(Hparams) if f.name not in ("method", "v_loss_layer")]
    defaults = {f.name: f.default for f in fields(Hparams)}
    idle = set(unused(recipe, names))
    differing = {
        name: getattr(chosen, name)
        for name in names
        if name not in idle and chosen.has_effect(name) and getattr(chosen, name) != defaults[name]
    }
    return {"layers": chosen.layers, **differing, **({"inner_params": ()} if recipe.gathers_gradients else {})}


def _notes(best: Trial, usable: int, effort: Effort, held: Sequence[PreparedRequest]) -> list[str]:
    """What the score lacks."""
    notes = []
    if effort == "full" and not held:
        notes.append(f"{usable} requests are fewer than {TO_HOLD_OUT}: none is held out, and the score flatters")
    elif effort == "full" and usable < FEW:
        notes.append(f"{usable} requests: {FEW} or more choose better")
    lacking = {
        "paraphrase": ("no paraphrase prompts", best.paraphrase),
        "neighborhood": ("no neighborhood prompts with a target_true", best.neighborhood),
        "drift": ("no text", best.drift),
    }
    notes += [f"{why}: {name} is not in the score" for name, (why, value) in lacking.items() if value is None]
    return notes
