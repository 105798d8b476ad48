"""Load, edit, measure, save: what the command line does, as functions."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import logging
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from kedit_fast.editing.editor import Editor, EditResult
from kedit_fast.editing.values.store import MemitCache
from kedit_fast.errors import EditError, KeditError, RequestError, UnsupportedModelError
from kedit_fast.evaluation.metrics import Metrics, evaluate, evaluate_each, summary, unusable
from kedit_fast.models.architectures import find_architecture
from kedit_fast.models.editable import plain_model
from kedit_fast.models.forward import evaluating, last_hidden, pad, unknown_token
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import PreparedRequest, PromptFormat, continuation
from kedit_fast.requests.request import EditRequest, require_none, shortened, skipped_records
from kedit_fast.requests.spacing import AUTO
from kedit_fast.solver.preconditioner import NullSpace
from kedit_fast.statistics.collect import Statistics
from kedit_fast.support.files import new_folder, same_bits, tensor_files
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
STATE_FILE = "kedit_fast_state.safetensors"  # in a model's folder: what a method keeps between batches
ADAPTER = "adapter_config.json"  # in a folder: of a peft adapter
PHASES = ("statistics", "keys", "values", "solve", "write", "evaluate", "total")


def load_config(path: str | os.PathLike, merge_adapter: bool = False) -> Any:
    """A model's configuration, refused by name when its architecture is not supported.

    With `merge_adapter`, of an adapter's folder that of the model which it is for.
    """
    from transformers import AutoConfig

    if merge_adapter and (Path(path) / ADAPTER).exists():
        with _base_of(Path(path)) as base:
            return load_config(base)
    _require_no_adapter(path)
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"cannot load a model from {path}: {_first_line(error)}") from error
    find_architecture(config)
    return config


@plain_torch()
def load_model(
    path: str | os.PathLike,
    dtype: Any = "auto",
    device: str = "cpu",
    device_map: Any = None,
    merge_adapter: bool = False,
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer from a folder or a hub name.

    `device_map` spreads a model over several devices, as from_pretrained does ("auto", or modules by device); it needs
    the accelerate package, and `device` is not looked at.

    With `merge_adapter`, the path may be a local folder of a peft adapter: its update is added to the weights of the
    model that its configuration names (or that lies in the same folder), rounded to their dtype; it needs peft.

    Raises:
        UnsupportedModelError: no model there, one that cannot be read, or an architecture that is not supported; or an
            adapter that is not to be merged, or cannot be.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    if merge_adapter and (Path(path) / ADAPTER).exists():
        return _merged(Path(path), dtype, device, device_map)
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
    if getattr(model, "_hf_peft_config_loaded", False):  # from the hub
        raise _is_an_adapter(path)
    return (model if device_map is not None else model.to(device)).eval(), tokenizer


def _merged(path: Path, dtype: Any, device: str, device_map: Any) -> tuple[Any, Any]:
    """The model of an adapter's folder with the adapter in its weights, and the folder's tokenizer or the model's."""
    from transformers import AutoTokenizer

    try:
        from peft import PeftModel
    except ImportError as error:
        raise UnsupportedModelError(
            f"merging {path} needs the peft package (pip install 'kedit-fast[peft]'): {error}"
        ) from error
    with _base_of(path) as base:
        model, tokenizer = load_model(base, dtype, device, device_map)
        try:
            model = PeftModel.from_pretrained(model, str(path)).merge_and_unload(safe_merge=True)
        except Exception as error:  # whatever a damaged adapter, or one of another model, makes peft raise
            raise UnsupportedModelError(f"cannot merge the adapter {path}: {_first_line(error)}") from error
        if (path / "tokenizer_config.json").exists():
            try:
                tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
            except Exception as error:
                raise UnsupportedModelError(f"cannot load a tokenizer from {path}: {_first_line(error)}") from error
    if len(tokenizer) > len(model.get_input_embeddings().weight):
        raise UnsupportedModelError(
            f"the tokenizer of {path} has {len(tokenizer)} tokens, the merged model embeddings of "
            f"{len(model.get_input_embeddings().weight)}"
        )
    model.config._name_or_path = str(path)
    return model.eval(), tokenizer


@contextlib.contextmanager
def _base_of(path: Path) -> Iterator[str]:
    """Where the model of an adapter's folder is: what its configuration names, or the folder's own without adapter."""
    if (path / "config.json").exists():
        with tempfile.TemporaryDirectory() as plain:
            for file in path.iterdir():
                if not file.name.startswith("adapter_"):
                    os.symlink(file.absolute(), Path(plain) / file.name)
            yield plain
        return
    try:
        base = json.loads((path / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnsupportedModelError(f"cannot read {path / ADAPTER}: {_first_line(error)}") from error
    if not base:
        raise UnsupportedModelError(
            f"{path / ADAPTER} does not name the model that the adapter is for: set base_model_name_or_path in it"
        )
    yield base


def _require_no_adapter(path: str | os.PathLike) -> None:
    if (Path(path) / ADAPTER).exists():
        raise _is_an_adapter(path)


def _is_an_adapter(path: str | os.PathLike) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{path} holds an adapter ({ADAPTER}): saved, it would be the adapter alone, without the edits. Merge it into "
        "its model first: --merge-adapter, load_model(..., merge_adapter=True), or peft's merge_and_unload()"
    )


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

    Every tensor is read back and compared with the model's, bit for bit, before the folder appears. With an editor
    whose method keeps something between batches, its state goes beside them, as STATE_FILE.

    Raises:
        KeditError: the folder exists, or cannot be written; or it would not load as this model (adapters, modules that
            are not of the model's class, weights that save_pretrained drops or changes), by the tensor's name.
    """
    model = plain_model(model)
    _require_loadable(model)
    with new_folder(path, overwrite, KeditError) as work:
        try:
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
            _read_back(model, work)
            if editor is not None and editor.keeps_state:
                editor.save_state(work / STATE_FILE)
        except (OSError, KeditError):
            raise
        except Exception as error:  # safetensors reports a full disk with an error of its own
            raise KeditError(f"cannot write {path}: {_first_line(error)}") from error


def _require_loadable(model: Any) -> None:
    """Raise KeditError when from_pretrained would make a model that lacks tensors of this one's class."""
    kind = type(model).__name__
    if getattr(model, "_hf_peft_config_loaded", False):
        raise KeditError(f"what is saved would be an adapter, not this {kind}: merge it first (merge_and_unload())")
    if getattr(model, "hf_quantizer", None) is not None:
        return  # its modules are made from the files
    try:
        with torch.device("meta"):
            fresh = set(type(model)(copy.deepcopy(model.config)).state_dict())
    except Exception:  # a class that cannot be made without memory: what was written is compared all the same
        return
    own = set(_stored(model))
    if lost := fresh - own:
        raise KeditError(
            f"what is saved would not load as this {kind}: it has no {min(lost)}. Merge adapters, make pruned or "
            "parametrized weights plain, take wrappers out, and save that"
        )
    if extra := own - fresh:
        _log.warning("%s is saved, but from_pretrained will leave it out: a new %s has none", min(extra), kind)


def _stored(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, as they are in memory: hooks of state_dict do not reach them."""
    persistent = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._buffers.keys() - module._non_persistent_buffers_set
    }
    buffers = {name: t for name, t in model.named_buffers(remove_duplicate=False) if name in persistent}
    return {**dict(model.named_parameters(remove_duplicate=False)), **buffers}


def _read_back(model: Any, folder: Path) -> None:
    """Raise KeditError unless the files of a folder hold what the model has, tensor by tensor.

    Cost: one pass over the model and one over the files, a tensor at a time.
    """
    places = tensor_files(folder, KeditError)
    stored = {name: tensor.detach() for name, tensor in _stored(model).items() if tensor.device.type != "meta"}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    renamed = places.keys() - _stored(model).keys()  # by transformers, for some architectures

    def holds(place: str, tensor: torch.Tensor) -> bool:
        with safe_open(places[place], framework="pt") as file:
            return same_bits(file.get_tensor(place), tensor)

    def fail(name: str, what: str) -> KeditError:
        return KeditError(
            f"{name} {what} in the files that {type(model).__name__}.save_pretrained wrote: the folder would load as "
            "another model, so it was not kept"
        )

    tied: set[tuple[int, int]] = set()  # addresses of what is written: of weights that are one, one is
    for name in stored.keys() & places.keys():
        if not holds(name, stored[name]):
            raise fail(name, "is not what the model has")
        tied.add((stored[name].data_ptr(), stored[name].numel()))
    found = False
    for name in sorted(stored.keys() - places.keys()):
        tensor = stored[name]
        if (tensor.data_ptr(), tensor.numel()) in tied:
            continue
        if name in buffers and any(re.search(pattern, name) for pattern in ignored):
            continue  # the model's class makes it anew
        if not any(holds(place, tensor) for place in renamed):
            raise fail(name, "is missing")
        found = True
    if found:  # transformers knows its own names
        nowhere = {"": "meta"} if importlib.util.find_spec("accelerate") else None
        _, loading = type(model).from_pretrained(folder, device_map=nowhere, output_loading_info=True)
        if missing := sorted(loading["missing_keys"]):
            raise fail(missing[0], "is missing")


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
        require_none(unmeasured)
    skipped |= unmeasured
    prepared = [p for i, p in zip(number, prepared, strict=True) if i not in unmeasured]
    number = [i for i in number if i not in unmeasured]
    if isinstance(editor.values, MemitCache):  # a later batch would take an earlier one's value
        ids = Counter(p.request.id for p in prepared if p.request.id is not None)
        require_none({
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
            raise EditError("\n".join(["every request was skipped:", *shortened(skipped)]))
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


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
