"""Hyper-parameters for a model without a preset: try layers and lambda on a few requests, and choose the best."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from tqdm import tqdm

from kedit_fast.editing.editor import Editor
from kedit_fast.editing.values.store import ValueFile
from kedit_fast.errors import KeditError, MethodError
from kedit_fast.evaluation.metrics import evaluate, mean_nll, unusable
from kedit_fast.methods.hparams import Hparams, unused
from kedit_fast.methods.presets import make_hparams
from kedit_fast.methods.recipe import Recipe
from kedit_fast.methods.registry import find_recipe
from kedit_fast.models.view import ModelView
from kedit_fast.requests.problems import OnError, require_no_problems, skipped_records
from kedit_fast.requests.prompts import PromptFormat
from kedit_fast.requests.request import EditRequest
from kedit_fast.requests.spacing import AUTO
from kedit_fast.statistics.collect import Statistics, collect_statistics
from kedit_fast.support.messages import first_line
from kedit_fast.support.torch_state import plain_torch

DEEPEST, PLACES = 0.6, 8
"""The last edited layer is tried at so many places, up to this share of the depth."""
SPREAD_SHARE, MOST_LAYERS = 0.16, 5
"""Edited layers: this share of the depth, at least 2 and at most 5, as for the published models."""
LAMBDAS = (10.0, 100.0, 1000.0, 15000.0)
RIDGES = (1.0, 10.0, 100.0)
"""Values of AlphaEdit's L2."""
RATES = (1e-6, 1e-4, 1e-3, 3e-3, 1e-2)
"""Values of UltraEdit's lr."""
DRIFT_TEXTS = 64
"""Documents on which the drift is measured, at most."""


@dataclass(frozen=True)
class Trial:
    """One configuration and the effect of its edits. Shares are those of `evaluate`; None where the trial failed."""

    layers: tuple[int, ...]
    """Edited layers, zero-based."""
    value: float | None
    """Value of the hyper-parameter that is swept beside the layers; None where none is."""
    efficacy: float | None
    """Share of requests whose target is now the most probable continuation."""
    paraphrase: float | None
    """The same of paraphrases; None without any."""
    neighborhood: float | None
    """Share of neighborhood prompts that still give the true object; None without any."""
    drift: float | None
    """Increase of the loss on unrelated text, in nats per token; None without texts."""
    norm: float | None
    """The largest |Delta| / |W| of the edited matrices."""
    score: float
    """Harmonic mean of the shares there are and of exp(-drift); 0 where the trial failed."""
    failure: str = ""
    """The message of the error that ended the trial."""


@dataclass(frozen=True)
class Suggestion:
    """All trials, and the best one as a configuration."""

    method: str
    """The method's name."""
    edits: int
    """Requests that were written in each trial."""
    swept: str
    """The hyper-parameter that is swept beside the layers; "lambda" where none is and the trials have no value."""
    trials: tuple[Trial, ...]
    """All trials, in the order they ran."""
    best: Trial
    """The trial with the highest score."""
    hparams: dict[str, Any]
    """Hyper-parameters of the best trial that differ from the defaults."""
    skipped: dict[int, str] = field(default_factory=dict)
    """Index of a request, or of a file's record -> why it could not be used."""

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints, in which `numbers` are the hyper-parameters."""
        names = {"hparams": "numbers"}
        fields_ = {names.get(name, name): value for name, value in asdict(self).items()}
        return {**fields_, "skipped": skipped_records(self.skipped)}

    def toml(self) -> str:
        """The best configuration as a file for --hparams."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in self.hparams.items()}
        lines = [f"{name} = {json.dumps(value)}" for name, value in plain.items()]  # JSON of such values is also TOML
        title = f"# {self.method}: the best of {len(self.trials)} on {self.edits} requests, score {self.best.score:.3f}"
        return "\n".join([title, *lines]) + "\n"


@plain_torch()
def suggest(
    model: torch.nn.Module,
    tokenizer: Any,
    requests: Iterable[EditRequest | Mapping[str, Any]],
    method: str = "memit",
    *,
    statistics: Statistics | None = None,
    texts: Sequence[str] = (),
    max_tokens: int = 100_000,
    last_layers: Sequence[int] | None = None,
    hparams: Mapping[str, Any] | None = None,
    seed: int = 0,
    prompt_format: PromptFormat | None = None,
    target_separator: str = AUTO,
    on_error: OnError = "raise",
    progress: bool = False,
) -> Suggestion:
    """Edit with every combination of layers and lambda (AlphaEdit: L2, UltraEdit: lr), measure, and undo.

    Args:
        model: its weights are the same afterwards, bit for bit.
        tokenizer: its tokenizer.
        requests: a few; paraphrase and neighborhood prompts make the choice better informed.
        method: a method's name.
        statistics: second moments of every layer that is tried.
        texts: documents to collect statistics from where none are given; the last ones also measure the drift.
        max_tokens: tokens to collect statistics from.
        last_layers: the last edited layers to try; by default eight up to 60 % of the depth.
        hparams: values that override the preset's or the guess's.
        seed: seed of the context prefixes.
        prompt_format, target_separator: as in `Editor`.
        on_error: "raise" at requests that cannot be written or measured, or "skip" them and name them in the result.
        progress: show a bar on stderr.

    Raises:
        MethodError: no statistics and no text for a method that needs them, or every trial failed.
        RequestError: requests that cannot be written.

    Cost: the values of all requests once per last layer; one edit and one evaluation per combination.
    """
    view, recipe = ModelView(model), find_recipe(method)
    chosen, _ = make_hparams(method, model.config, hparams or {})
    windows = [_window(last, recipe, view.num_layers) for last in last_layers or _places(view.num_layers)]
    every = sorted({layer for window in windows for layer in window})
    drift_texts = list(texts[-DRIFT_TEXTS:]) if texts else []
    if chosen.uses_statistics and statistics is None:
        if not texts:
            raise MethodError(
                f"{recipe.name} needs statistics: give --stats of layers {every}, or --text to collect them"
            )
        statistics = collect_statistics(
            model, tokenizer, texts[: -len(drift_texts)] or texts, every, max_tokens=max_tokens, progress=progress
        )
    before = mean_nll(model, tokenizer, drift_texts) if drift_texts else None
    name, values = _swept(recipe)
    if name in (hparams or {}):
        values = (getattr(chosen, name),)  # the caller's value is not swept
    prefixes: tuple[str, ...] | None = None
    usable: list[EditRequest] = []
    skipped: dict[int, str] = {}
    trials: list[Trial] = []
    with tqdm(total=len(windows) * len(values), desc="trials", disable=not progress, leave=False) as bar:
        for window in windows:
            store = ValueFile(None)  # values do not depend on lambda
            for value in values:
                overrides = {**(hparams or {}), "layers": window}
                overrides |= {} if value is None else {name: value}
                editor = Editor(
                    model,
                    tokenizer,
                    method,
                    statistics=statistics,
                    hparams=overrides,
                    seed=seed,
                    prefixes=prefixes,
                    values=store,
                    prompt_format=prompt_format,
                    target_separator=target_separator,
                )
                prefixes = editor.prefixes
                if not trials:
                    usable, skipped = _usable(editor, requests, on_error)
                trials.append(_run_trial(editor, usable, window, value, drift_texts, before))
                bar.update()
    best = max(trials, key=lambda trial: trial.score)
    if not best.score:
        failures = [trial.failure for trial in trials if trial.failure]
        why = f"; the last failure: {failures[-1]}" if failures else ": no target or paraphrase came through"
        raise MethodError(f"none of {len(trials)} configurations works on these requests{why}")
    best_hparams = {
        **_changed_hparams(chosen, recipe),
        "layers": best.layers,
        **({} if recipe.optimizes_values else {"inner_params": ()}),
    }
    if best.value is not None:
        best_hparams[name] = best.value
    return Suggestion(recipe.name, len(usable), name, tuple(trials), best, best_hparams, skipped)


def _usable(
    editor: Editor, requests: Iterable[EditRequest | Mapping[str, Any]], on_error: OnError
) -> tuple[list[EditRequest], dict[int, str]]:
    """The requests that can be written and measured, and the others by index."""
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
    return [p.request for place, p in by_place.items() if place not in bad], skipped | bad


def _run_trial(
    editor: Editor,
    requests: Sequence[EditRequest],
    layers: tuple[int, ...],
    value: float | None,
    texts: Sequence[str],
    before: float | None,
) -> Trial:
    model, tokenizer = editor.view.model, editor.tokenizer
    try:
        result = editor.edit(requests, "skip")
        if not result.batch:
            raise MethodError(next(iter(result.skipped.values())))
        editor.finish()
        metrics = evaluate(
            model, tokenizer, requests, prompt_format=editor.prompt_format, target_separator=editor.target_separator
        )
        drift = None if before is None else mean_nll(model, tokenizer, texts) - before
    except KeditError as error:
        return Trial(layers, value, None, None, None, None, None, 0.0, first_line(error))
    finally:
        editor.restore()
    norm = max(result.relative_norms.values())
    shares = (metrics.efficacy, metrics.paraphrase, metrics.neighborhood)
    unharmed = None if drift is None else math.exp(-max(0.0, drift))
    score = _harmonic([share for share in (*shares, unharmed) if share is not None])
    return Trial(layers, value, *shares, drift=drift, norm=norm, score=score)


def _harmonic(shares: Sequence[float]) -> float:
    return 0.0 if min(shares) <= 0 else len(shares) / sum(1 / share for share in shares)


def _places(count: int) -> list[int]:
    """Last edited layers to try: evenly spread over the lower part of the model."""
    deepest = max(1, round(DEEPEST * (count - 1)))
    step = max(1.0, deepest / PLACES)
    return sorted({round(deepest - i * step) for i in range(PLACES) if deepest - i * step >= 0})


def _window(last: int, recipe: Recipe, count: int) -> tuple[int, ...]:
    """The edited layers that end at `last`."""
    size = 1 if recipe.edits_one_layer else min(MOST_LAYERS, max(2, round(SPREAD_SHARE * count)))
    return tuple(range(max(0, last - size + 1), last + 1))


def _swept(recipe: Recipe) -> tuple[str, tuple[float | None, ...]]:
    """The hyper-parameter that is swept beside the layers, and its values."""
    if not recipe.optimizes_values:
        return "lr", RATES
    if not recipe.is_batched:
        return "lambda", (None,)
    if recipe.uses_null_space:
        return "L2", RIDGES
    return "mom2_update_weight", LAMBDAS


def _changed_hparams(chosen: Hparams, recipe: Recipe) -> dict[str, Any]:
    """The hyper-parameters that the method reads and that differ from the defaults."""
    names = [field.name for field in fields(Hparams) if field.name not in ("method", "v_loss_layer")]
    defaults = {field.name: field.default for field in fields(Hparams)}
    idle = set(unused(recipe, names))
    return {n: getattr(chosen, n) for n in names if n not in idle and getattr(chosen, n) != defaults[n]}
