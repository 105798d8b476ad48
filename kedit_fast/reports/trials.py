"""One trial: edit with a configuration, measure, and undo."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kedit_fast.editing.editor import Editor
from kedit_fast.editing.solver_state import SolverState
from kedit_fast.editing.values.store import ValueFile
from kedit_fast.errors import KeditError, MethodError, StatisticsError
from kedit_fast.evaluation.metrics import Continuation, RequestScores, evaluate_each, mean_nll, summary
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import PreparedRequest
from kedit_fast.statistics.collect import Statistics
from kedit_fast.statistics.store import load_statistics, metadata_in, modules_in, path_of
from kedit_fast.support.messages import first_line
from kedit_fast.support.process_group import gather


@dataclass(frozen=True)
class Trial:
    """One configuration and the effect of its edits. Shares are those of `evaluate`; None where the trial failed."""

    layers: tuple[int, ...]
    """Edited layers, zero-based."""
    stage: str
    """The hyper-parameter that the search varied when it made this trial; "preset" for a preset as it is."""
    value: Any
    """Its value here; None for layers and for a preset."""
    hparams: dict[str, Any]
    """Every hyper-parameter that differs from those that the search began with, the layers included."""
    edits: int
    """Requests that were written."""
    efficacy: float | None = None
    """Share of requests whose target is now the most probable continuation."""
    paraphrase: float | None = None
    """The same of paraphrases; None without any."""
    neighborhood: float | None = None
    """Share of neighborhood prompts that still give the true object; None without any."""
    drift: float | None = None
    """Increase of the loss on unrelated text, in nats per token; None without texts."""
    norm: float | None = None
    """The largest |Delta| / |W| of the edited matrices; 0 where edits stay beside the weights."""
    score: float = 0.0
    """Harmonic mean of the shares there are and of exp(-drift); 0 where the trial failed. For more edits than the trial
    wrote, neighborhood and drift are projected: their loss is taken to grow with the number of edits."""
    margin: float = 0.0
    """The same with mean probabilities in place of shares: it decides between equal scores."""
    resolved: dict[str, Any] = field(default_factory=dict)
    """What became of hyper-parameters that were "auto" -> number, or layer -> number."""
    failure: str = ""
    """The message of the error that ended the trial."""
    no_null_space: tuple[int, ...] = ()
    """Layers for which it failed, because the method needs a null space and they have none."""

    @property
    def rank(self) -> tuple[bool, float, float]:
        """What trials are compared by; the larger, the better."""
        return not self.failure, self.score, self.margin


class StoredStatistics:
    """Statistics that are read when a trial needs them, so that those of all layers need not be in memory at once.

    Args:
        layers: the layers that there are statistics of.
        load: reads those of some layers. The last ones that were read stay in memory.
        identity: what tells these statistics from others, as JSON can hold it.
    """

    def __init__(self, layers: Iterable[int], load: Callable[[tuple[int, ...]], Statistics], identity: Any = None):
        self.layers = tuple(sorted(layers))
        self.identity = identity
        self._load = load
        self._last: tuple[tuple[int, ...], Statistics] | None = None

    def of(self, layers: tuple[int, ...]) -> Statistics:
        """The statistics of these layers."""
        if self._last is None or self._last[0] != layers:
            self._last = None  # before the next ones need the memory
            self._last = layers, self._load(layers)
        return self._last[1]


def in_memory(statistics: Statistics) -> StoredStatistics:
    """Statistics that are read already."""
    return StoredStatistics(statistics.layers, lambda layers: statistics)


def stored_statistics(
    folder: str | os.PathLike, model: torch.nn.Module, tokenizer: Any, **options: Any
) -> StoredStatistics:
    """The statistics in a folder, of every layer of the model that it has.

    Args:
        folder, model, tokenizer: as in `load_statistics`.
        options: of `load_statistics`: trust, samples, precision, spec.

    Raises:
        StatisticsError: there is no such folder, or it has no statistics. What is wrong with a file is raised when it
            is read.
    """
    view, modules = ModelView(model, options.get("spec")), set(modules_in(folder))
    layers = [layer for layer in view.editable if view.module_name(layer) in modules]
    if not layers:
        raise StatisticsError(f"{folder} holds no statistics of a {view.spec.name} model")
    identity = {}
    for layer in layers:
        metadata = {}
        with contextlib.suppress(
            StatisticsError
        ):  # npz files of other programs have none; what is damaged is read later
            metadata = metadata_in(path_of(Path(folder), view.module_name(layer)))
        identity[layer] = [metadata.get(name) for name in ("corpus", "count")]
    return StoredStatistics(layers, lambda some: load_statistics(folder, model, tokenizer, some, **options), identity)


class Trials:
    """What all trials of a search share. Values are reused by later trials that do not change them.

    Args:
        model: every trial leaves its weights as they were, bit for bit.
        tokenizer: its tokenizer.
        method: a method's name.
        hparams: the overrides that all trials have.
        statistics: second moments of the layers that are tried; None where the method uses none.
        texts: documents on which the drift is measured.
        options: further arguments of every `Editor`: seed, prompt_format, target_separator, spec.
        expected: edits that the configuration is for; 0 for as many as a trial writes.
        progress: show a bar on stderr.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        method: str,
        hparams: Mapping[str, Any],
        statistics: StoredStatistics | None,
        texts: Sequence[str],
        options: Mapping[str, Any],
        expected: int = 0,
        progress: bool = False,
    ):
        self.model, self.tokenizer, self.method = model, tokenizer, method
        self.view = ModelView(model, options.get("spec"))
        self.hparams, self.statistics, self.texts, self.options = dict(hparams), statistics, texts, dict(options)
        self.expected = expected
        self.values = ValueFile(None)
        self._last: SolverState | None = None  # of the last trial, whose factors the next one may use
        self._unedited: dict[tuple[PreparedRequest, ...], float | None] = {}  # neighborhood before any edit
        self.loss = self._mean_nll() if texts else None
        self.done: list[Trial] = []
        self.bar = tqdm(
            desc="trials", unit="", disable=not progress, leave=False, bar_format="{desc}: {n_fmt}{postfix}"
        )

    def editor(self, changes: Mapping[str, Any]) -> Editor:
        """An editor with the hyper-parameters of a trial."""
        hparams = {**self.hparams, **changes}
        editor = Editor(
            self.model,
            self.tokenizer,
            self.method,
            statistics=None if self.statistics is None else self.statistics.of(tuple(hparams["layers"])),
            hparams=hparams,
            values=self.values,
            **self.options,
        )
        self.options["prefixes"] = editor.prefixes  # generated once
        if self._last is not None:
            editor.solver_state.adopt(self._last)
        self._last = editor.solver_state
        return editor

    def run(
        self,
        stage: str,
        value: Any,
        changes: Mapping[str, Any],
        requests: Sequence[PreparedRequest],
        scored: Sequence[PreparedRequest] | None = None,
    ) -> Trial:
        """Write requests with `changes` of the hyper-parameters, measure, and undo.

        Args:
            stage, value: see `Trial`.
            changes: name -> value, the layers among them.
            requests: what is written.
            scored: those of them that are measured; None for all.

        Returns:
            the trial, the same in every process of a process group. An error of this package is in `Trial.failure`.
        """
        self.bar.set_postfix_str(f", {stage} {_short(value if value is not None else changes['layers'])}")
        identity = (tuple(changes["layers"]), stage, value, dict(changes), len(requests))
        try:
            trial = Trial(*identity, **self._measured(changes, requests, scored or requests))
        except KeditError as error:
            trial = Trial(*identity, failure=first_line(error))
        trial = gather(trial)[0]  # processes could differ in a rounding, and then in what they try next
        self.done.append(trial)
        self.bar.update()
        return trial

    def _measured(
        self, changes: Mapping[str, Any], requests: Sequence[PreparedRequest], scored: Sequence[PreparedRequest]
    ) -> dict[str, Any]:
        """The fields of a trial that are measured."""
        times = max(1.0, self.expected / len(requests))
        unedited = self._neighborhood_before(scored) if times > 1 else None
        editor = self.editor(changes)
        if reasons := editor.solver_state.without_null_space(editor.hparams.layers):
            return {"failure": next(iter(reasons.values())), "no_null_space": tuple(reasons)}
        try:
            with without_warnings():  # of a clamp, for one: the trial's shares say what came of it
                result = editor.edit(requests, "skip")
            if not result.batch:
                raise MethodError(next(iter(result.skipped.values())))
            editor.finish()
            scores = self._evaluated(scored)
            drift = None if self.loss is None else self._mean_nll() - self.loss
            resolved = editor.resolved
        finally:
            editor.restore()
        metrics, norm = summary(scores), max(result.relative_norms.values(), default=0.0)
        shares = [metrics.efficacy, metrics.paraphrase, metrics.neighborhood]
        prompts = (
            [s.new for s in scores],
            [c for s in scores for c in s.paraphrases],
            [c for s in scores for c in s.neighborhood],
        )
        probabilities = [_mean_probability(continuations) for continuations in prompts]
        if not all(math.isfinite(number) for number in (norm, drift or 0.0, *(p or 0.0 for p in probabilities))):
            raise MethodError("the edited model computes numbers that are not finite")
        unharmed = None if drift is None else math.exp(-max(0.0, times * drift))
        projected = [*shares[:2], projected_share(shares[2], unedited, times)]
        return {
            **dict(zip(("efficacy", "paraphrase", "neighborhood"), shares, strict=True)),
            "drift": drift,
            "norm": norm,
            "score": harmonic_mean([*projected, unharmed]),
            "margin": harmonic_mean([*probabilities, unharmed]),
            "resolved": resolved,
        }

    def _mean_nll(self) -> float:
        """The loss of the model as it is on the texts."""
        return mean_nll(self.model, self.tokenizer, self.texts, spec=self.view.spec)

    def _neighborhood_before(self, requests: Sequence[PreparedRequest]) -> float | None:
        """The neighborhood share of requests in the unedited model."""
        known = tuple(requests)
        if known not in self._unedited:
            self._unedited[known] = summary(self._evaluated(requests)).neighborhood
        return self._unedited[known]

    def _evaluated(self, requests: Sequence[PreparedRequest]) -> list[RequestScores]:
        """What the model as it is says to the prompts of requests."""
        formats = {name: self.options[name] for name in ("prompt_format", "target_separator")}
        return evaluate_each(self.model, self.tokenizer, [p.request for p in requests], self.view.spec, **formats)


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """The package's logger says nothing below ERROR."""

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or record.levelno < logging.WARNING

    log = logging.getLogger("kedit_fast")
    log.addFilter(is_error)
    try:
        yield
    finally:
        log.removeFilter(is_error)


def harmonic_mean(shares: Sequence[float | None]) -> float:
    """n / (1/a + 1/b + ...) of the shares that are not None; 0 where one of them is."""
    known = [share for share in shares if share is not None]
    return 0.0 if min(known) <= 0 else len(known) / sum(1 / share for share in known)


def projected_share(share: float | None, before: float | None, times: float) -> float | None:
    """The neighborhood share after `times` as many edits, when each loses as much of it; `before` is without edits."""
    if share is None or before is None or share >= before:
        return share
    return max(0.0, before - times * (before - share))


def _mean_probability(continuations: Sequence[Continuation]) -> float | None:
    if not continuations:
        return None
    return sum(math.exp(c.log_prob) for c in continuations) / len(continuations)


def _short(value: Any) -> str:
    return (
        f"{value[0]}-{value[-1]}" if isinstance(value, tuple) else f"{value:.3g}" if isinstance(value, float) else value
    )
