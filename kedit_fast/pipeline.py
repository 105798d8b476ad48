"""Load, edit, measure, save: what the command line does, as functions."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from kedit_fast.editing.prompts import PromptFormat, continuation
from kedit_fast.editing.requests import EditRequest, require_none, shortened, skipped_records
from kedit_fast.editing.value_store import MemitCache
from kedit_fast.editor import Editor, EditResult
from kedit_fast.errors import EditError, KeditError, UnsupportedModelError
from kedit_fast.evaluation.metrics import Metrics, evaluate, evaluate_each, summary, unusable
from kedit_fast.files import new_folder
from kedit_fast.models.architectures import ModelView, find_architecture
from kedit_fast.models.forward import evaluating, last_hidden, pad
from kedit_fast.solver.preconditioner import NullSpace
from kedit_fast.statistics.collect import Statistics
from kedit_fast.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
STATE_FILE = "kedit_fast_state.safetensors"  # in a model's folder: what a method keeps between batches
PHASES = ("statistics", "keys", "values", "solve", "write", "evaluate", "total")


def load_config(path: str | os.PathLike) -> Any:
    """A model's configuration, refused by name when its architecture is not supported."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"cannot load a model from {path}: {_first_line(error)}") from error
    find_architecture(config)
    return config


@plain_torch()
def load_model(
    path: str | os.PathLike, dtype: Any = "auto", device: str = "cpu", device_map: Any = None
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer from a folder or a hub name.

    `device_map` spreads a model over several devices, as from_pretrained does ("auto", or modules by device); it needs
    the accelerate package, and `device` is not looked at.

    Raises:
        UnsupportedModelError: no model there, one that cannot be read, or an architecture that is not supported.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    load_config(path)
    name = "dtype" if _version(transformers.__version__) >= (4, 56) else "torch_dtype"
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            str(path), trust_remote_code=False, output_loading_info=True, device_map=device_map, **{name: dtype}
        )
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # whatever a damaged file makes the loaders raise
        raise UnsupportedModelError(f"cannot load a model from {path}: {_first_line(error)}") from error
    if missing := sorted(loading["missing_keys"]):
        raise UnsupportedModelError(f"{path} has no weights for {missing[0]} ({len(missing)} tensors are missing)")
    return (model if device_map is not None else model.to(device)).eval(), tokenizer


@plain_torch()
def empty_model(config: Any, dtype: Any = "auto") -> torch.nn.Module:
    """A model without memory, on torch's "meta" device: for what can be told from shapes alone."""
    from transformers import AutoModelForCausalLM

    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).to(dtype)


@plain_torch()
def save_model(
    model: Any, tokenizer: Any, path: str | os.PathLike, overwrite: bool = False, editor: Editor | None = None
) -> None:
    """Write a model and its tokenizer so that from_pretrained loads them; all or nothing.

    With an editor whose method keeps something between batches, its state goes beside them, as STATE_FILE.
    """
    with new_folder(path, overwrite, KeditError) as work:
        try:
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
            if editor is not None and editor.keeps_state:
                editor.save_state(work / STATE_FILE)
        except (OSError, KeditError):
            raise
        except Exception as error:  # safetensors reports a full disk with an error of its own
            raise KeditError(f"cannot write {path}: {_first_line(error)}") from error


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

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        pairs: dict[str, Any] = {"method": self.method, "edits": self.edits}
        before, after = self.before.as_dict(), self.after.as_dict()
        for name in after:
            pairs[name] = after[name]
            pairs[f"{name}_before"] = before[name]
        pairs["skipped"] = skipped_records(self.skipped)
        pairs["seconds"] = self.seconds
        if self.null_spaces:
            pairs["null_space_dimensions"] = self.null_spaces
        return pairs

    @property
    def null_spaces(self) -> dict[int, int]:
        """Layer -> dimension of its null space, of methods that have one."""
        return {} if self.editor is None else self.editor.engine.null_spaces


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
    on_error: str = "raise",
    progress: bool = False,
) -> Report:
    """Measure, edit in batches of `batch_size` (all at once for None), measure again; see Editor for the rest.

    With `state`, a file that Editor.save_state wrote, the run goes on from there. After the last batch the method's
    final step is taken (PRUNE).

    Requests that were skipped are in `skipped`, by their place in what was passed or in the file that `load_requests`
    read, and in no metric. When a batch fails, or every request was skipped, the model is what it was before the first.
    """
    begin = time.perf_counter()
    editor = Editor(
        model, tokenizer, method, statistics=statistics, null_spaces=null_spaces, hparams=hparams, seed=seed,
        values=values, prompt_format=prompt_format, progress=progress,
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
        if (what := unusable(editor.view, tokenizer, p.request, prompt_format))
    }  # fmt: skip
    if on_error == "raise":
        require_none(unmeasured)
    skipped |= unmeasured
    prepared = [p for i, p in zip(number, prepared, strict=True) if i not in unmeasured]
    number = [i for i in number if i not in unmeasured]
    if isinstance(editor.values, MemitCache):  # a later batch would take an earlier one's value
        ids = Counter(p.request.id for p in prepared)
        require_none({
            i: f"{p.name}: memit's value files are named by case id, and {ids[p.request.id]} requests have this one"
            for i, p in zip(number, prepared, strict=True) if ids[p.request.id] > 1
        })  # fmt: skip
    measuring = time.perf_counter()
    before = evaluate_each(model, tokenizer, [p.request for p in prepared], prompt_format=prompt_format)
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
            raise EditError("\n".join(["every request was skipped:", *shortened(skipped)]))
        finishing = time.perf_counter()
        editor.finish()
        seconds["solve"] += time.perf_counter() - finishing
    except BaseException:
        editor.restore()  # a later batch failed: earlier ones go too
        raise
    measuring = time.perf_counter()
    after = evaluate(model, tokenizer, kept, prompt_format=prompt_format)
    before = [seen for i, seen in zip(number, before, strict=True) if i not in skipped]
    now = time.perf_counter()
    seconds["evaluate"] += now - measuring
    seconds["total"] = now - begin + statistics_seconds
    seconds = {phase: round(spent, 3) for phase, spent in seconds.items()}
    return Report(method, len(kept), summary(before), after, seconds, tuple(results), skipped, editor)


@plain_torch()
def complete(
    model: Any, tokenizer: Any, prompt: str, tokens: int = 6, prompt_format: PromptFormat | None = None
) -> str:
    """The greedy continuation of a prompt, up to the end of its first sentence."""
    view = ModelView(model)
    ids, _ = continuation(tokenizer, prompt, "", prompt_format)
    begin = len(ids)
    with evaluating(view), torch.no_grad():
        for _ in range(tokens):
            states = last_hidden(view, pad([ids], view.device))[:, -1]
            ids.append(int(view.logits(states).argmax()))
    text = tokenizer.decode(ids[begin:], skip_special_tokens=True).strip()
    return text.split(".")[0].strip()


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
