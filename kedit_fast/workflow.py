"""Load, edit, measure, save: what the command line does, as functions."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kedit_fast.editing.editor import Editor, EditResult
from kedit_fast.editing.values.memit_values import MemitCache
from kedit_fast.errors import EditError, RequestError
from kedit_fast.evaluation.metrics import Metrics, evaluate, evaluate_each, summary, unusable
from kedit_fast.models.forward import evaluating, last_hidden, pad, unknown_token
from kedit_fast.models.saving import save_model
from kedit_fast.models.view import ModelView
from kedit_fast.requests.problems import first_problems, require_no_problems, skipped_records
from kedit_fast.requests.prompts import PreparedRequest, PromptFormat, continuation
from kedit_fast.requests.request import EditRequest
from kedit_fast.requests.spacing import AUTO
from kedit_fast.solver.preconditioner import NullSpace
from kedit_fast.statistics.collect import Statistics
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
STATE_FILE = "kedit_fast_state.safetensors"  # in a model's folder: what a method keeps between batches
PHASES = ("statistics", "keys", "values", "solve", "write", "evaluate", "total")


def save_edited(
    model: Any, tokenizer: Any, path: str | os.PathLike, overwrite: bool = False, editor: Editor | None = None
) -> None:
    """`save_model`, and beside the model what its editor's method keeps between batches, as STATE_FILE."""

    def save_state(folder: Path) -> None:
        if editor is not None and editor.keeps_state:
            editor.save_state(folder / STATE_FILE)

    save_model(model, tokenizer, path, overwrite, save_state)


@dataclass(frozen=True)
class Report:
    """What a run of edits did, before and after, and how long each phase took."""

    method: str
    edits: int
    before: Metrics
    after: Metrics
    seconds: dict[str, float]
    results: tuple[EditResult, ...]
    skipped: dict[int, str] = field(default_factory=dict)  # index of a request, or of a file's record -> why
    editor: Editor | None = field(default=None, repr=False)  # that made them
    requests: tuple[dict[str, Any], ...] = ()  # of each that was written: index, id, target_separator, _text, _tokens

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        pairs: dict[str, Any] = {"method": self.method, "edits": self.edits}
        before, after = self.before.as_dict(), self.after.as_dict()
        for name in after:
            pairs[name] = after[name]
            pairs[f"{name}_before"] = before[name]
        pairs["requests"] = list(self.requests)
        pairs["skipped"] = skipped_records(self.skipped)
        pairs["seconds"] = self.seconds
        if self.null_spaces:
            pairs["null_space_dimensions"] = self.null_spaces
        return pairs

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
    on_error: str = "raise",
    progress: bool = False,
) -> Report:
    """Measure, edit in batches of `batch_size` (all at once for None), measure again; see Editor for the rest.

    With `state`, a file that Editor.save_state wrote, the run goes on from there. After the last batch the method's
    final step is taken (PRUNE).

    Requests that were skipped are in `skipped`, by their place in what was passed or in the file that `load_requests`
    read, and in no metric; of the others `requests` says what was put between prompt and target, and the target's
    tokens. When a batch fails, or every request was skipped, the model is what it was before the first.
    """
    begin = time.perf_counter()
    editor = Editor(
        model, tokenizer, method, statistics=statistics, null_spaces=null_spaces, hparams=hparams, seed=seed,
        values=values, prompt_format=prompt_format, target_separator=target_separator, progress=progress,
    )  # fmt: skip
    if state is not None:
        editor.load_state(state)
    _log.info("%s on layers %s (%s)", method, ",".join(map(str, editor.hparams.layers)), editor.origin)
    seconds = dict.fromkeys(PHASES, 0.0)
    seconds["statistics"] = statistics_seconds
    prepared, skipped = editor.check(requests, on_error)
    number = [i for i in range(len(prepared) + len(skipped)) if i not in skipped]
    unmeasured = {
        i: f"{p.name}: {what}" for i, p in zip(number, prepared, strict=True)
        if (what := unusable(editor.view, tokenizer, p.request, prompt_format, target_separator))
    }  # fmt: skip
    if on_error == "raise":
        require_no_problems(unmeasured)
    skipped |= unmeasured
    prepared = [p for i, p in zip(number, prepared, strict=True) if i not in unmeasured]
    number = [i for i in number if i not in unmeasured]
    if isinstance(editor.values, MemitCache):  # a later batch would take an earlier one's value
        ids = Counter(p.request.id for p in prepared if p.request.id is not None)
        require_no_problems({
            i: f"{p.name}: memit's value files are named by case id, and {ids[p.request.id]} requests have this one"
            for i, p in zip(number, prepared, strict=True) if ids[p.request.id] > 1
        })  # fmt: skip
    measuring = time.perf_counter()
    shown: dict[str, Any] = {"prompt_format": prompt_format, "target_separator": target_separator}
    before = evaluate_each(model, tokenizer, [p.request for p in prepared], **shown)
    seconds["evaluate"] += time.perf_counter() - measuring
    size = batch_size or max(1, len(prepared))
    results = []
    try:
        for start in range(0, len(prepared), size):
            results.append(editor.edit(prepared[start : start + size], on_error))
            skipped |= {number[start + i]: reason for i, reason in results[-1].skipped.items()}
            for phase, spent in results[-1].seconds.items():
                seconds[phase] += spent
        kept = [p.request for i, p in zip(number, prepared, strict=True) if i not in skipped]
        if not kept:
            raise EditError("\n".join(["every request was skipped:", *first_problems(skipped)]))
        finishing = time.perf_counter()
        editor.finish()
        seconds["solve"] += time.perf_counter() - finishing
    except BaseException:
        editor.restore()  # a later batch failed: earlier ones go too
        raise
    measuring = time.perf_counter()
    try:
        after = evaluate(model, tokenizer, kept, **shown)
        editor.require_untouched()
    except BaseException:
        editor.overwrite()
        raise
    before = [seen for i, seen in zip(number, before, strict=True) if i not in skipped]
    now = time.perf_counter()
    seconds["evaluate"] += now - measuring
    seconds["total"] = now - begin + statistics_seconds
    seconds = {phase: round(spent, 3) for phase, spent in seconds.items()}
    written = tuple(_written(tokenizer, i, p) for i, p in zip(number, prepared, strict=True) if i not in skipped)
    return Report(method, len(kept), summary(before), after, seconds, tuple(results), skipped, editor, written)


def _written(tokenizer: Any, index: int, prepared: PreparedRequest) -> dict[str, Any]:
    """What `Report.requests` says of a request."""
    own = {} if prepared.request.id is None else {"id": prepared.request.id}
    text, tokens = tokenizer.decode(list(prepared.target)), list(prepared.target)
    separator = prepared.separator
    return {"index": index, **own, "target_separator": separator, "target_text": text, "target_tokens": tokens}


@plain_torch()
def complete(
    model: Any, tokenizer: Any, prompt: str, tokens: int = 6, prompt_format: PromptFormat | None = None
) -> str:
    """The greedy continuation of a prompt, up to the end of its first sentence.

    Raises:
        RequestError: the prompt has no tokens, or one that the model has no embedding for.
    """
    view = ModelView(model)
    ids, _ = continuation(tokenizer, prompt, "", prompt_format)
    if why := unknown_token(tokenizer, ids, view.vocabulary) or ("" if ids else "it has no tokens"):
        raise RequestError(f"the prompt {prompt!r}: {why}")
    begin = len(ids)
    with evaluating(view), torch.no_grad():
        for _ in range(tokens):
            states = last_hidden(view, pad([ids], view.device))[:, -1]
            ids.append(int(view.logits(states).argmax()))
    text = tokenizer.decode(ids[begin:], skip_special_tokens=True).strip()
    return text.split(".")[0].strip()
