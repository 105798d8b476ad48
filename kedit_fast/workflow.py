"""Load, edit, measure, save: what the command line does, as functions."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from kedit_fast.editing.batch_run import ANCHOR_REQUESTS, Phase
from kedit_fast.editing.checkpoint import RunCheckpoint, StoredBatch
from kedit_fast.editing.editor import Editor
from kedit_fast.editing.result import EditResult
from kedit_fast.editing.tuning.summary import TuningSummary
from kedit_fast.editing.values.clamp import trial_places
from kedit_fast.editing.values.memit_values import MemitCache
from kedit_fast.editing.values.store import ValueFile
from kedit_fast.errors import CheckpointError, EditError, KeditError, RequestError, SolveError, StatisticsError
from kedit_fast.evaluation.evaluator import Evaluator
from kedit_fast.evaluation.judge import Judge
from kedit_fast.evaluation.metrics import SHARES, Metrics, shares_of
from kedit_fast.evaluation.registry import BESIDE
from kedit_fast.evaluation.results import Evaluation
from kedit_fast.evaluation.routing import RoutingProbe, RoutingShift, routing_probe
from kedit_fast.evaluation.sequences import Retention, RetentionTracker
from kedit_fast.memories.memory import SideMemory
from kedit_fast.methods.declaration import AUTO as AUTO_NUMBER
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.forward import evaluating, last_states, pad, unknown_token
from kedit_fast.models.introspection import find_spec
from kedit_fast.models.routes import prompt_tokens
from kedit_fast.models.saving import save_model
from kedit_fast.models.sharded import whole
from kedit_fast.models.shared_experts import is_shared_path
from kedit_fast.models.view import ModelView
from kedit_fast.models.weight_names import module_path_of
from kedit_fast.requests.irrelevant import irrelevant_texts, unrelated_texts
from kedit_fast.requests.problems import OnError, first_problems, require_no_problems, skipped_records
from kedit_fast.requests.prompts import PreparedRequest, PromptFormat, continuation
from kedit_fast.requests.reading import rows_of
from kedit_fast.requests.request import EditRequest
from kedit_fast.requests.spacing import AUTO
from kedit_fast.solver.harm import Harm, Moments
from kedit_fast.solver.preconditioner import NullSpace
from kedit_fast.statistics.collect import Statistics
from kedit_fast.support.files import is_of_disk, write_text
from kedit_fast.support.matrix_bits import edit_fingerprint, same_bits
from kedit_fast.support.messages import first_line
from kedit_fast.support.timing import timed
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
STATE_FILE = "kedit_fast_state.safetensors"
"""In the folder of an edited model: what the method keeps between batches."""
MEMORY_FILE = "kedit_fast_memory.safetensors"
"""In the folder of an edited model: the edits of a method that keeps them beside the weights (`memories.attach`)."""
HPARAMS_FILE = "kedit_fast_hparams.toml"
"""In the folder of an edited model: the hyper-parameters that trials chose, for --hparams."""
PHASES = ("statistics", *get_args(Phase), "evaluate", "total")
"""What the time of a run is counted to."""


def save_edited(
    model: Any,
    tokenizer: Any,
    path: str | os.PathLike,
    overwrite: bool = False,
    editor: Editor | None = None,
    hparams: str = "",
) -> None:
    """`save_model`, and in the same folder what the editor's method keeps between batches, and hyper-parameters.

    These files are STATE_FILE and HPARAMS_FILE; and MEMORY_FILE, where the edits are beside the weights.

    Args:
        model: the edited model.
        tokenizer: its tokenizer.
        path: the folder.
        overwrite: whether a folder that is there already is replaced.
        editor: the editor of the model; None to save the model alone.
        hparams: the text of HPARAMS_FILE; empty for no such file.
    """

    write_state = editor.state_writer() if editor is not None and editor.keeps_state else None
    memory = editor.memory if editor is not None and editor.recipe.makes_memory else None

    def write_beside(folder: Path) -> None:
        if write_state is not None:
            write_state(folder / STATE_FILE)
        if memory is not None:
            memory.save(folder / MEMORY_FILE)
        if hparams:
            write_text(folder / HPARAMS_FILE, hparams, KeditError)

    save_model(model, tokenizer, path, overwrite, write_beside)


@dataclass(frozen=True)
class Report:
    """What a run of edits did: metrics before and after, and how long each phase took."""

    method: str
    edits: int
    """Number of requests that were written."""
    before: Metrics
    after: Metrics
    seconds: dict[str, float]
    """Phase -> seconds; the phases are PHASES."""
    results: tuple[EditResult, ...]
    """One per batch that was written; without their updates where `memory_window` bounds what is held."""
    skipped: dict[int, str] = field(default_factory=dict)
    """Index of a request, or of a record in its file -> why it was left out."""
    evaluation: Evaluation | None = field(default=None, repr=False)
    """The metrics that were asked for, of the requests that were written, before ("pre") and after ("final")."""
    retention: Retention | None = field(default=None, repr=False)
    """What the final model keeps of each batch, where that was asked for."""
    editor: Editor | None = field(default=None, repr=False)
    """The editor that made the edits."""
    requests: tuple[dict[str, Any], ...] = ()
    """Of each request that was written: index, id, target_separator, target_text, target_tokens."""
    harm: Harm | None = field(default=None, repr=False)
    """Norms of all that was written, and what it is predicted to do to ordinary text; None where the edits are beside
    the weights."""
    warm_up: int = 0
    """Number of requests that a running normalizer has seen before the first batch."""
    routing: tuple[RoutingShift, ...] = ()
    """Of a mixture of experts, after each batch and after the final step where it writes: the choices of experts above
    the lowest edited layer against those of the model before the first batch, in text that names no edited subject."""

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        pairs: dict[str, Any] = {"method": self.method, "edits": self.edits}
        before, after = self.before.as_dict(), self.after.as_dict()
        for name in after:
            pairs[name] = after[name]
            pairs[f"{name}_before"] = before[name]
        if self.evaluation is not None:
            pairs["metrics"] = before_and_after(self.evaluation)
        if self.retention is not None:
            pairs["retention"] = self.retention.as_dict()
        if self.harm is not None:
            pairs["harm"] = self.harm.as_dict()
        if self.routing:
            shares = [one.share for one in self.routing]
            pairs["routing"] = {**self.routing[-1].as_dict(), "share_after_each_batch": shares}
        if self.tuning is not None:
            pairs["tuning"] = self.tuning.as_dict()
        pairs["requests"] = list(self.requests)
        pairs["skipped"] = skipped_records(self.skipped)
        if self.warm_up:
            pairs["warm_up"] = self.warm_up
        pairs["seconds"] = self.seconds
        if self.null_spaces:
            pairs["null_space_dimensions"] = self.null_spaces
        if self.resolved:
            pairs["resolved"] = self.resolved
        return pairs

    @property
    def resolved(self) -> dict[str, Any]:
        """Hyper-parameters that are "auto" -> what the first batch has made of them; see `Editor.resolved`."""
        return {} if self.editor is None else self.editor.resolved

    @property
    def memory(self) -> SideMemory | None:
        """The edits of a method that keeps them beside the weights, attached to the model now; None of others."""
        editor = self.editor
        if editor is None or not editor.recipe.makes_memory or not editor.ledger.count:
            return None
        return editor.memory

    @property
    def tuning(self) -> TuningSummary | None:
        """What the gradient steps of a method without a closed form did; None of others."""
        editor = self.editor
        return None if editor is None or editor.tuning is None else TuningSummary.of(self.results, self.memory)

    @property
    def changed_anything(self) -> bool:
        """Whether a bit of a weight is another one, or something stands beside the weights."""
        memory = self.memory
        return bool(self.changed_weights) if memory is None else not memory.empty

    @property
    def changed_weights(self) -> list[str]:
        """Names of the matrices that now differ in a bit from what they were before the edits."""
        ledger = None if self.editor is None else self.editor.ledger
        names = [] if ledger is None else ledger.names()
        return [name for name in names if ledger is not None and not same_bits(*map(whole, ledger.original(name)))]

    @property
    def null_spaces(self) -> dict[int, int]:
        """Layer -> dimension of its null space, of methods that have one."""
        return {} if self.editor is None else self.editor.solver_state.null_spaces


def run_edits(
    model: Any,
    tokenizer: Any,
    requests: Iterable[EditRequest | Mapping[str, Any]],
    method: str,
    *,
    statistics: Statistics | None,
    null_spaces: Mapping[int, NullSpace] | None = None,
    statistics_seconds: float = 0.0,
    hparams: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    values: str | os.PathLike | None = None,
    state: str | os.PathLike | None = None,
    warm_up: Iterable[EditRequest | Mapping[str, Any]] | None = None,
    prompt_format: PromptFormat | None = None,
    target_separator: str = AUTO,
    on_error: OnError = "raise",
    metrics: str | Iterable[str] = "default",
    judge: Judge | None = None,
    retention: int | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
    progress: bool = False,
    spec: ArchSpec | None = None,
    irrelevant: Sequence[str] | None = None,
) -> Report:
    """Measure, edit in batches, and measure again.

    Args:
        model: the model; edited in place.
        tokenizer: its tokenizer.
        requests: what to edit; see `Editor.edit`.
        method: the method, by name.
        statistics: second moments of the edited layers; None where the method uses none.
        null_spaces: layer -> null space, instead of statistics.
        statistics_seconds: seconds that the statistics took, for the report.
        hparams: name -> value, overrides of the preset.
        batch_size: requests per batch; None for one batch of all.
        seed: seed of the context prefixes.
        values: where optimized values are stored and looked up.
        state: a file that `Editor.save_state` wrote; the run continues from it.
        warm_up: requests that the running normalizer of a gradient method sees before the first batch, without being
            written; see `Editor.warm_up`.
        prompt_format: from a prompt to the text that the model reads; metrics read what edits do, with DINM's suffix.
        target_separator: the text between prompt and target of requests that do not name one.
        on_error: "raise" at requests that cannot be written or measured, or "skip" them.
        metrics: what to measure beside efficacy, paraphrase and neighborhood; see `registry.select`. "default" counts
            routes, too, where edits stand beside the weights.
        judge: a classifier of answers, for metrics of defense.
        retention: so many requests of each batch, at most, are measured right after it, too, for a retention curve.
        checkpoint: a folder in which finished batches are safe, made if absent; the same call goes on there after any
            interruption, SIGKILL included, and ends with the same bits of weights, patch, state and metrics. The model
            must be the unedited one again. A batch that was not finished is begun again.
        checkpoint_every: batches between two writes to that folder; None for as often as takes at most 5 % of the time.
        progress: show progress bars on stderr: edits a second, time left, and of the last batch the largest norm of an
            update relative to its weight's, the share of the residual that is left, and with `retention` its efficacy.
        spec: an ArchSpec for an architecture that is not known.
        irrelevant: texts that have nothing to do with the edits, for methods that need some (see `Editor`) and for the
            routing shift of a mixture of experts; those that name an edited subject do not count for it. None for
            built-in ones.

    A method that keeps its edits beside the weights leaves its memory attached to the model.

    Returns:
        the report. Requests that were skipped are in `skipped`, by their index in `requests` or in the file that
        `load_requests` read, and in no metric.

    After the last batch the method's final step is taken (PRUNE). With `on_error="skip"` a batch that cannot be solved
    or written is left out with all its requests, and the others are written. Otherwise, when a batch fails, or every
    request was skipped, the model is as it was before the first batch; batches before it stay in `checkpoint`.

    Raises:
        CheckpointError: `checkpoint` cannot be written, has too little room or is of another run, which is named; no
            value was optimized. Where its disk is full later, a warning says so, and the run goes on.

    Example:
        >>> from kedit_fast.workflow import run_edits
        >>> report = run_edits(
        ...     model, tokenizer, requests[:2], "memit", statistics=statistics, hparams={"v_num_grad_steps": 2}
        ... )
        >>> report.edits, report.after.efficacy >= report.before.efficacy
        (2, True)
        >>> report.editor.restore()
    """
    begin = time.perf_counter()
    editor = Editor(
        model,
        tokenizer,
        method,
        statistics=statistics,
        null_spaces=null_spaces,
        hparams=hparams,
        seed=seed,
        values=values,
        prompt_format=prompt_format,
        target_separator=target_separator,
        progress=progress,
        spec=spec,
        irrelevant=irrelevant,
    )
    if state is not None:
        editor.load_state(state)
    _log.info("%s on layers %s (%s)", method, ",".join(map(str, editor.hparams.layers)), editor.origin)
    seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    seconds["statistics"] = statistics_seconds
    warmed = _warmed_up(editor, warm_up, on_error, seconds)
    if checkpoint is not None and editor.recipe.makes_memory:
        raise EditError(
            f"a checkpoint records what is written into weights, and {editor.recipe.name} keeps its edits beside them: "
            "run it without a checkpoint"
        )
    if checkpoint is None and checkpoint_every is not None:
        raise EditError("checkpoint_every is about a checkpoint: give its folder, too")
    opened = None if checkpoint is None else RunCheckpoint.opened(checkpoint, editor, checkpoint_every)
    with opened or contextlib.nullcontext() as saved:
        prepared, skipped = _usable_requests(editor, requests, on_error)
        metrics = BESIDE if editor.recipe.makes_memory and metrics == "default" else metrics
        metrics = [*(metrics.split(",") if isinstance(metrics, str) else metrics), *SHARES]
        evaluator = Evaluator(
            model,
            tokenizer,
            [p.request for p in prepared.values()],
            metrics,
            judge=judge,
            prompt_format=editor.prompt_format,
            target_separator=target_separator,
            spec=spec,
            on_error="skip",
            progress=progress,
        )
        places = dict(zip(prepared, range(len(prepared)), strict=True))
        unmeasured = {
            i: f"{prepared[i].name}: {evaluator.skipped[p]}" for i, p in places.items() if p in evaluator.skipped
        }
        if on_error == "raise":
            require_no_problems(unmeasured)
        skipped |= unmeasured
        indices = [i for i in prepared if i not in unmeasured]
        if isinstance(editor.values, MemitCache):
            _require_single_ids({i: prepared[i] for i in indices})
        tracker = None
        if retention is not None:
            settings = {"prompt_format": editor.prompt_format, "target_separator": target_separator, "spec": spec}
            tracker = RetentionTracker(evaluator, retention, **settings)
        size = batch_size or max(1, len(indices))
        if saved is not None:
            saved.claim(
                {i: prepared[i] for i in indices},
                {
                    "batch size": size,
                    "metrics": [metric.id for metric in evaluator.metrics],
                    "retention": retention,
                    "values": None if values is None else str(values),
                    "state of an earlier edit": None if state is None else _hash_of(state),
                    "warm-up": None if warm_up is None else _hash_of_normalizers(editor),
                },
            )
        probe = None
        if not editor.recipe.makes_memory:
            with timed(seconds, "evaluate"):
                probe = _probe_of(editor, [prepared[i].request for i in indices], irrelevant)
        run = _Run(editor, evaluator, tracker, probe, prepared, places, skipped, seconds, on_error, saved)
        batches = [indices[start : start + size] for start in range(0, len(indices), size)]
        with _progress_bar(len(indices), progress and len(batches) > 1) as bar:
            try:
                run.start(batches)
                if state is None and not editor.ledger.count and run.batches < len(batches) and size < len(indices):
                    _measure_anchor(editor, [prepared[i] for i in indices], size, seconds)
                for batch in batches[run.batches :]:
                    run.write(batch)
                    run.show(bar)
                written = [i for i in indices if i not in skipped]
                if not written:
                    raise EditError("\n".join(["every request was skipped:", *first_problems(skipped)]))
                with timed(seconds, "solve"):
                    editor.finish()
                if editor.ledger.count > run.ledger_batches and probe is not None:
                    with timed(seconds, "evaluate"):
                        run.routing.append(probe.shift())
                run.save()
            except BaseException:
                try:
                    with contextlib.suppress(KeditError):  # the error that stopped the run matters more
                        run.save()
                finally:
                    editor.restore()  # also the batches before the one that failed
                raise
        try:
            with timed(seconds, "evaluate"):
                evaluator.measure("final", [places[i] for i in written])
                evaluation = evaluator.result([places[i] for i in written])
                harm = None if editor.recipe.makes_memory else predicted_harm(editor, statistics)
                editor.require_untouched()
        except BaseException:
            editor.overwrite()
            raise
        if saved is None:
            seconds["total"] = time.perf_counter() - begin + statistics_seconds
        else:
            seconds["checkpoint"], seconds["total"] = saved.seconds, saved.elapsed + statistics_seconds
    return Report(
        method,
        len(written),
        shares_of(evaluation, "pre"),
        shares_of(evaluation, "final"),
        {phase: round(spent, 3) for phase, spent in seconds.items()},
        tuple(run.results),
        dict(sorted(skipped.items())),
        evaluation,
        None if tracker is None else tracker.result(evaluation),
        editor,
        tuple(_request_entry(tokenizer, i, prepared[i]) for i in written),
        harm,
        warmed,
        tuple(run.routing),
    )


def _probe_of(editor: Editor, requests: Sequence[EditRequest], irrelevant: Sequence[str] | None) -> RoutingProbe | None:
    """What the routing of a mixture of experts is measured by; None of other models."""
    lowest = min(editor.hparams.layers, default=None) if not editor.hparams.inner_params else None
    view = editor.view
    if is_shared_path(view.spec.edit):  # edited alone: a view of the experts beside them sees what is chosen
        view = ModelView(view.model, find_spec(view.model))
    if all(view.experts(layer) is None for layer in view.editable):
        return None
    texts = unrelated_texts(irrelevant_texts(irrelevant), requests)
    return routing_probe(view, editor.tokenizer, texts, lowest)


def _measure_anchor(editor: Editor, prepared: Sequence[PreparedRequest], size: int, seconds: dict[str, float]) -> None:
    """Measure a norm anchor that is "auto" on requests of the whole run, where its first batch is too small for it."""
    if editor.recipe.optimizes_values and editor.hparams.norm_anchor == AUTO_NUMBER and size < ANCHOR_REQUESTS:
        with timed(seconds, "values"):
            editor.measure_norm_anchor([prepared[i] for i in trial_places(len(prepared), ANCHOR_REQUESTS)], "skip")


def _warmed_up(
    editor: Editor,
    requests: Iterable[EditRequest | Mapping[str, Any]] | None,
    on_error: OnError,
    seconds: dict[str, float],
) -> int:
    """Warm up an editor's normalizer; the number of requests that it has seen."""
    if requests is None:
        return 0
    rows = rows_of(requests)
    with timed(seconds, "values"):
        skipped = editor.warm_up(rows, on_error)
    if skipped:
        _log.warning("%d requests of the warm-up were left out: %s", len(skipped), first_problems(skipped)[0].strip())
    return len(rows) - len(skipped)


def _hash_of_normalizers(editor: Editor) -> str:
    """What a warm-up has made of an editor's normalizers."""
    tensors = [part for known in editor.solver_state.normalizers.values() for part in known.tensors().values()]
    return edit_fingerprint(part.reshape(-1, part.shape[-1]) for part in tensors if part.ndim)[:16]


class _Run:
    """The batches of a run: written, measured, recorded where there is a checkpoint, and shown.

    Args:
        editor, evaluator, tracker, probe, on_error, saved: of the run.
        prepared: index of a request -> the request.
        places: index of a request -> its index in the evaluator.
        skipped: index of a request -> why it is left out; added to.
        seconds: phase -> seconds; added to.
    """

    def __init__(
        self,
        editor: Editor,
        evaluator: Evaluator,
        tracker: RetentionTracker | None,
        probe: RoutingProbe | None,
        prepared: Mapping[int, PreparedRequest],
        places: Mapping[int, int],
        skipped: dict[int, str],
        seconds: dict[str, float],
        on_error: OnError,
        saved: RunCheckpoint | None,
    ):
        self.editor, self.evaluator, self.tracker, self.saved = editor, evaluator, tracker, saved
        self.probe = probe
        self.prepared, self.places = prepared, places
        self.on_error: OnError = on_error
        self.skipped, self.seconds = skipped, seconds
        self.results: list[EditResult] = []
        self.routing: list[RoutingShift] = []
        self.batches = self.requests = self.resumed = 0
        """How many are done, failed ones included; and the requests of earlier processes."""
        self.ledger_batches = 0
        """How many batches the ledger has, without the final step."""
        self._measures_batches = bool(evaluator.compared_states & {"first", "post"})

    def start(self, batches: Sequence[Sequence[int]]) -> None:
        """Measure the model before the edits; or take over what an earlier process has done, batch by batch."""
        steps = self.saved.resume() if self.saved is not None else iter(())
        before = next(steps, None)
        if isinstance(before, dict):
            self.evaluator.recall(before["pre"], "pre")
            self.seconds["evaluate"] += before["seconds"]
        else:
            if self.saved is not None:
                self.saved.reserve(len(batches[0]) if batches else 0)
            with timed(self.seconds, "evaluate"):
                self.evaluator.measure("pre")
            if self.saved is not None:
                self.saved.begin({"pre": self.evaluator.recorded("pre"), "seconds": self.seconds["evaluate"]})
        if isinstance(self.editor.values, ValueFile | MemitCache) and self.saved is not None:
            self.editor.values.hold()
        for stored in steps:
            assert isinstance(stored, StoredBatch)
            if list(stored.requests) != list(batches[self.batches]):
                raise CheckpointError(f"batch {self.batches + 1} of the checkpoint is of other requests")
            self._count(stored.requests, stored.skipped, stored.result)
            for phase, spent in stored.beside["seconds"].items():
                self.seconds[phase] += spent
            measured = self._measured(stored.requests)
            if self.tracker is not None:
                self.tracker.recall(measured, stored.beside["retention"])
            if shift := stored.beside.get("routing"):
                self.routing.append(RoutingShift.from_dict(shift))
            if self._measures_batches:
                self.evaluator.recall(stored.beside["post"], "post", measured)
        self.resumed = self.requests
        if self.batches:
            _log.info("%d batches were there already", self.batches)

    def write(self, batch: Sequence[int]) -> None:
        """Edit and measure one batch.

        Where requests that cannot be written are skipped, a batch that cannot be solved or written is, too: its
        requests are named, and the model is as it was before it.
        """
        result, skipped, spent = None, {}, dict.fromkeys(self.seconds, 0.0)
        try:
            result = self.editor.edit([self.prepared[i] for i in batch], self.on_error)
            skipped = {batch[place]: reason for place, reason in result.skipped.items()}
            spent |= result.seconds
        except (EditError, SolveError, RequestError) as error:
            if self.on_error == "raise" or is_of_disk(error) or not self.editor.in_place():
                raise
            self.editor.require_untouched()  # what else has changed the model would spoil every batch
            reason = f"its batch of {len(batch)} could not be written: {first_line(error)}"
            skipped = {i: f"{self.prepared[i].name}: {reason}" for i in batch}
            _log.warning("batch %d was left out: %s", self.batches + 1, first_line(error))
        self._count(batch, skipped, result)
        with timed(spent, "evaluate"):
            measured = self._measured(batch)
            if self.tracker is not None:
                self.tracker.measure(measured)
            if self._measures_batches:
                self.evaluator.measure("post", measured)
            shift = self.probe.shift() if self.probe is not None and result is not None and result.batch else None
        if shift is not None:
            self.routing.append(shift)
        for phase, seconds in spent.items():
            self.seconds[phase] += seconds
        if self.saved is not None:
            beside = {
                "seconds": spent,
                "retention": None if self.tracker is None else self.tracker.recorded(),
                "post": self.evaluator.recorded("post", measured) if self._measures_batches else None,
                "routing": None if shift is None else shift.as_dict(),
            }
            self.saved.add(batch, skipped, result, beside)

    def save(self) -> None:
        """Make every batch that was written safe, and write the values that were waiting for that."""
        if self.saved is not None:
            self.saved.save()
            if isinstance(self.editor.values, ValueFile | MemitCache):
                self.editor.values.release()

    def show(self, bar: Any) -> None:
        """Move the bar, and say how the last batch went."""
        bar.initial = self.resumed
        bar.update(self.requests - bar.n)
        if not bar.disable and self.results:
            last = self.results[-1]
            health = {"norm": max(last.relative_norms.values(), default=0.0), "residual": last.residual}
            if self.routing:
                health["routing shift"] = self.routing[-1].share
            efficacy = None if self.tracker is None else self.tracker.last
            shown = health if efficacy is None else {**health, "efficacy": efficacy}
            bar.set_postfix_str(", ".join(f"{name} {value:.2g}" for name, value in shown.items()))

    def _count(self, batch: Sequence[int], skipped: Mapping[int, str], result: EditResult | None) -> None:
        self.skipped.update(skipped)
        self.batches += 1
        self.ledger_batches = self.editor.ledger.count
        self.requests += len(batch)
        if result is not None:
            if self.editor.hparams.undo_window:  # memory has a bound, however many batches there are
                result = replace(result, updates={})
            self.results.append(result)

    def _measured(self, batch: Sequence[int]) -> list[int]:
        """The requests of a batch that were written, by their index in the evaluator."""
        return [self.places[i] for i in batch if i not in self.skipped]


def _progress_bar(requests: int, progress: bool) -> Any:
    """A bar over all requests of a run: edits a second, time left, and what `_Run.show` adds."""
    form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {rate_noinv_fmt}, {remaining} left{postfix}"
    return tqdm(total=requests, unit=" edits", desc="edits", bar_format=form, smoothing=0, disable=not progress)


def _hash_of(path: str | os.PathLike) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise EditError(f"cannot read {path}: {error.strerror or error}") from error


def predicted_harm(editor: Editor, statistics: Statistics | None) -> Harm:
    """Of all that an editor has written: |Delta|, and the KL divergence that it is predicted to cause on ordinary text.

    Args:
        editor: after its edits.
        statistics: of the model before them, with output metrics (`collect_statistics(output_metric=True)`); without
            these, norms alone, and `Harm.missing` says what would be needed.

    Cost: see `solver.harm.predicted_kl`.
    """
    layers = {} if statistics is None else {second.module: layer for layer, second in statistics.layers.items()}
    shared = {one.path: layer for layer in layers.values() if (one := editor.view.shared_experts(layer)) is not None}

    def moments(module: str) -> Moments | str:
        layer = layers.get(module, shared.get(module))
        if statistics is None or layer is None:
            return f"no statistics of {module}"
        try:
            second = statistics.moment(layer)
            moment = second.shared if module in shared else second.moment
            if moment is None:
                return f"no statistics of {module}"
            return moment, statistics.output_metric(layer)
        except StatisticsError as error:
            return str(error)

    ledger = editor.ledger
    totals = ((module_path_of(name), ledger.total(name)) for name in ledger.names())  # one in memory at a time
    return Harm.of(totals, moments)


def before_and_after(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """The entry `metrics` of JSON: each metric's id -> its value, records, interval, and value before the edits."""
    entries = {}
    for id, one in evaluation.metrics.items():
        before, after = one.states.get("pre"), one.states.get("final")
        entries[id] = {
            "value": None if after is None else after.value,
            "n": 0 if after is None else after.records,
            "interval": None if after is None or after.interval is None else list(after.interval),
            "before": None if before is None else before.value,
        }
    return entries


def _usable_requests(
    editor: Editor, requests: Iterable[EditRequest | Mapping[str, Any]], on_error: OnError
) -> tuple[dict[int, PreparedRequest], dict[int, str]]:
    """Index -> each request that can be written, and index -> why one cannot."""
    checked, skipped = editor.check(requests, on_error)
    indices = [i for i in range(len(checked) + len(skipped)) if i not in skipped]
    return dict(zip(indices, checked, strict=True)), skipped


def _require_single_ids(prepared: Mapping[int, PreparedRequest]) -> None:
    """Raise RequestError when two requests have one id: memit's files would give both the same value."""
    counts = Counter(p.request.id for p in prepared.values() if p.request.id is not None)
    require_no_problems(
        {
            i: f"{p.name}: memit's value files are named by case id, and {counts[p.request.id]} requests have this one"
            for i, p in prepared.items()
            if p.request.id is not None and counts[p.request.id] > 1
        }
    )


def _request_entry(tokenizer: Any, index: int, prepared: PreparedRequest) -> dict[str, Any]:
    """The entry of a request in `Report.requests`."""
    tokens = list(prepared.target)
    return {
        "index": index,
        **({} if prepared.request.id is None else {"id": prepared.request.id}),
        "target_separator": prepared.separator,
        "target_text": tokenizer.decode(tokens),
        "target_tokens": tokens,
    }


@plain_torch()
def complete(
    model: Any,
    tokenizer: Any,
    prompt: str,
    tokens: int = 6,
    prompt_format: PromptFormat | None = None,
    spec: ArchSpec | None = None,
) -> str:
    """The greedy continuation of a prompt, up to the end of its first sentence.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompt: the text to continue.
        tokens: most tokens to generate.
        prompt_format: from a prompt to the text that the model reads.
        spec: an ArchSpec for an architecture that is not known.

    Raises:
        RequestError: the prompt has no tokens, or one that the model has no embedding for.
    """
    view = ModelView(model, spec)
    ids, _ = continuation(tokenizer, prompt, "", prompt_format)
    if why := unknown_token(tokenizer, ids, view.vocabulary) or ("" if ids else "it has no tokens"):
        raise RequestError(f"the prompt {prompt!r}: {why}")
    begin = len(ids)
    with evaluating(view), torch.no_grad(), prompt_tokens(model, [begin]):
        for _ in range(tokens):
            states = last_states(view, pad([ids], view.device))[:, -1]
            ids.append(int(view.head.logits(states).argmax()))
    text = tokenizer.decode(ids[begin:], skip_special_tokens=True).strip()
    return text.split(".")[0].strip()
