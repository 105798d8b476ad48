"""Load, edit, measure, save: what the command line does, as functions."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from kedit_fast.editing.batch_run import Phase
from kedit_fast.editing.editor import Editor
from kedit_fast.editing.result import EditResult
from kedit_fast.editing.values.memit_values import MemitCache
from kedit_fast.errors import EditError, KeditError, RequestError
from kedit_fast.evaluation.evaluator import Evaluator
from kedit_fast.evaluation.metrics import SHARES, Metrics, shares_of
from kedit_fast.evaluation.results import Evaluation
from kedit_fast.evaluation.sequences import Retention, RetentionTracker
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.forward import evaluating, last_states, pad, unknown_token
from kedit_fast.models.saving import save_model
from kedit_fast.models.sharded import whole
from kedit_fast.models.view import ModelView
from kedit_fast.requests.problems import OnError, first_problems, require_no_problems, skipped_records
from kedit_fast.requests.prompts import PreparedRequest, PromptFormat, continuation
from kedit_fast.requests.request import EditRequest
from kedit_fast.requests.spacing import AUTO
from kedit_fast.solver.preconditioner import NullSpace
from kedit_fast.statistics.collect import Statistics
from kedit_fast.support.files import write_text
from kedit_fast.support.matrix_bits import same_bits
from kedit_fast.support.timing import timed
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
STATE_FILE = "kedit_fast_state.safetensors"
"""In the folder of an edited model: what the method keeps between batches."""
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

    These files are STATE_FILE and HPARAMS_FILE.

    Args:
        model: the edited model.
        tokenizer: its tokenizer.
        path: the folder.
        overwrite: whether a folder that is there already is replaced.
        editor: the editor of the model; None to save the model alone.
        hparams: the text of HPARAMS_FILE; empty for no such file.
    """

    write_state = editor.state_writer() if editor is not None and editor.keeps_state else None

    def write_beside(folder: Path) -> None:
        if write_state is not None:
            write_state(folder / STATE_FILE)
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
    """One per batch."""
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
        pairs["requests"] = list(self.requests)
        pairs["skipped"] = skipped_records(self.skipped)
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
    prompt_format: PromptFormat | None = None,
    target_separator: str = AUTO,
    on_error: OnError = "raise",
    metrics: str | Iterable[str] = "default",
    retention: int | None = None,
    progress: bool = False,
    spec: ArchSpec | None = None,
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
        prompt_format: from a prompt to the text that the model reads.
        target_separator: the text between prompt and target of requests that do not name one.
        on_error: "raise" at requests that cannot be written or measured, or "skip" them.
        metrics: what to measure beside efficacy, paraphrase and neighborhood; see `registry.select`.
        retention: so many requests of each batch, at most, are measured right after it, too, for a retention curve.
        progress: show progress bars on stderr.
        spec: an ArchSpec for an architecture that is not known.

    Returns:
        the report. Requests that were skipped are in `skipped`, by their index in `requests` or in the file that
        `load_requests` read, and in no metric.

    After the last batch the method's final step is taken (PRUNE). When a batch fails, or every request was skipped, the
    model is as it was before the first batch.

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
    )
    if state is not None:
        editor.load_state(state)
    _log.info("%s on layers %s (%s)", method, ",".join(map(str, editor.hparams.layers)), editor.origin)
    seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    seconds["statistics"] = statistics_seconds
    prepared, skipped = _usable_requests(editor, requests, on_error)
    metrics = [*(metrics.split(",") if isinstance(metrics, str) else metrics), *SHARES]
    evaluator = Evaluator(
        model,
        tokenizer,
        [p.request for p in prepared.values()],
        metrics,
        prompt_format=prompt_format,
        target_separator=target_separator,
        spec=spec,
        on_error="skip",
        progress=progress,
    )
    places = dict(zip(prepared, range(len(prepared)), strict=True))
    unmeasured = {i: f"{prepared[i].name}: {evaluator.skipped[p]}" for i, p in places.items() if p in evaluator.skipped}
    if on_error == "raise":
        require_no_problems(unmeasured)
    skipped |= unmeasured
    indices = [i for i in prepared if i not in unmeasured]
    if isinstance(editor.values, MemitCache):
        _require_single_ids({i: prepared[i] for i in indices})
    with timed(seconds, "evaluate"):
        evaluator.measure("pre")
    tracker = None
    if retention is not None:
        settings = {"prompt_format": prompt_format, "target_separator": target_separator, "spec": spec}
        tracker = RetentionTracker(evaluator, retention, **settings)
    size = batch_size or max(1, len(indices))
    results = []
    try:
        for start in range(0, len(indices), size):
            batch = indices[start : start + size]
            result = editor.edit([prepared[i] for i in batch], on_error)
            results.append(result)
            skipped |= {batch[place]: reason for place, reason in result.skipped.items()}
            for phase, spent in result.seconds.items():
                seconds[phase] += spent
            with timed(seconds, "evaluate"):
                of_batch = [places[i] for i in batch if i not in skipped]
                if tracker is not None:
                    tracker.measure(of_batch)
                if evaluator.compared_states & {"first", "post"}:
                    evaluator.measure("post", of_batch)
        written = [i for i in indices if i not in skipped]
        if not written:
            raise EditError("\n".join(["every request was skipped:", *first_problems(skipped)]))
        with timed(seconds, "solve"):
            editor.finish()
    except BaseException:
        editor.restore()  # also the batches before the one that failed
        raise
    try:
        with timed(seconds, "evaluate"):
            evaluator.measure("final", [places[i] for i in written])
            evaluation = evaluator.result([places[i] for i in written])
            editor.require_untouched()
    except BaseException:
        editor.overwrite()
        raise
    seconds["total"] = time.perf_counter() - begin + statistics_seconds
    return Report(
        method,
        len(written),
        shares_of(evaluation, "pre"),
        shares_of(evaluation, "final"),
        {phase: round(spent, 3) for phase, spent in seconds.items()},
        tuple(results),
        skipped,
        evaluation,
        None if tracker is None else tracker.result(evaluation),
        editor,
        tuple(_request_entry(tokenizer, i, prepared[i]) for i in written),
    )


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
    with evaluating(view), torch.no_grad():
        for _ in range(tokens):
            states = last_states(view, pad([ids], view.device))[:, -1]
            ids.append(int(view.head.logits(states).argmax()))
    text = tokenizer.decode(ids[begin:], skip_special_tokens=True).strip()
    return text.split(".")[0].strip()
