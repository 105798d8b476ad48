"""The short search that an edit of a model without a preset begins with, and its result in a file for the next one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kedit_fast._version import __version__
from kedit_fast.errors import KeditError, MethodError
from kedit_fast.methods.hparams_files import parse_values
from kedit_fast.methods.presets import make_hparams
from kedit_fast.methods.registry import find_recipe
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.fingerprint import fingerprint
from kedit_fast.models.view import ModelView
from kedit_fast.reports.suggest import suggest
from kedit_fast.reports.trials import StoredStatistics
from kedit_fast.requests.problems import OnError
from kedit_fast.requests.prompts import PromptFormat
from kedit_fast.requests.reading import rows_of
from kedit_fast.requests.request import EditRequest
from kedit_fast.requests.spacing import AUTO
from kedit_fast.support.files import write_text
from kedit_fast.support.process_group import gather, world
from kedit_fast.support.torch_state import plain_torch

FORMAT_VERSION = "1"
REQUESTS = 48
"""The trials run on so many of the requests, at most."""


@dataclass(frozen=True)
class Choice:
    """Hyper-parameters that trials chose, for one model and method."""

    hparams: dict[str, Any]
    """Name -> value of what was chosen: the layers, the clamp and the residual share; of UltraEdit also its rate and
    token."""
    toml: str
    """The whole configuration as a file for --hparams."""
    edits: int
    """Requests that each trial wrote."""
    trials: tuple[dict[str, Any], ...]
    """The fields of each `Trial`."""
    best: int
    """The index of the one that was chosen."""
    notes: tuple[str, ...] = ()
    """As in `Suggestion`."""
    records: int = 0
    """Records that the trials could choose their requests from, at most REQUESTS."""
    expected: int = 0
    """Edits that the scores of the trials were projected to."""


@plain_torch()
def choose(
    model: torch.nn.Module,
    tokenizer: Any,
    requests: Iterable[EditRequest | Mapping[str, Any]],
    method: str,
    *,
    statistics: StoredStatistics | None,
    hparams: Mapping[str, Any] | None = None,
    folder: str | os.PathLike | None = None,
    seed: int = 0,
    prompt_format: PromptFormat | None = None,
    target_separator: str = AUTO,
    on_error: OnError = "raise",
    progress: bool = False,
    spec: ArchSpec | None = None,
) -> tuple[Choice, str]:
    """`suggest` with effort "short" on at most 48 of the requests, or what it chose before.

    Args:
        folder: where the choice is looked up and written, beside the statistics; None for nowhere. An earlier one is
            used when the model, the method, the hyper-parameters, the statistics, the format of the prompts, the
            ArchSpec and this
            package's version are the same, and it was made from as many requests and for half as many edits or more.
        model, tokenizer, requests, method, statistics, hparams, seed, prompt_format, target_separator, on_error,
            progress, spec: as in `suggest`.

    Returns:
        the choice, and where it is from or what became of its file, as half a sentence.

    Raises:
        MethodError, RequestError: as `suggest`. A file that cannot be read or written is no error.
    """
    rows, given = rows_of(requests), dict(hparams or {})
    view = ModelView(model, spec)
    identity = {
        "kedit_fast": __version__,
        "method": find_recipe(method).name,
        "model": fingerprint(view, tokenizer),
        "architecture": asdict(view.spec),
        "hparams": given,
        "statistics": None if statistics is None else statistics.identity,
        "seed": seed,
        "prompt format": "{} is" if prompt_format is None else prompt_format("{} is"),
        "target separator": target_separator,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    path = None if folder is None else Path(folder) / f"trials_{find_recipe(method).name}_{digest[:16]}.json"
    records = min(REQUESTS, len(rows))
    choice, problem = gather(_read(path, digest, method, view, given))[0]  # of the first process
    if choice is not None and choice.records >= records and 2 * choice.expected >= len(rows):
        return choice, f"chosen earlier, {path}"
    suggestion = suggest(
        model,
        tokenizer,
        rows,
        method,
        statistics=statistics,
        hparams=given,
        seed=seed,
        prompt_format=prompt_format,
        target_separator=target_separator,
        on_error=on_error,
        effort="short",
        most=REQUESTS,
        expected=len(rows),
        progress=progress,
        spec=spec,
    )
    best = suggestion.best
    choice = Choice(
        best.hparams,
        suggestion.toml(),
        suggestion.edits,
        tuple(asdict(trial) for trial in suggestion.trials),
        suggestion.trials.index(best),
        suggestion.notes,
        records,
        len(rows),
    )
    if path is None:
        return choice, "not stored: there is no folder of statistics"
    if world()[0] == 0:
        try:
            content = {"format_version": FORMAT_VERSION, "identity": digest, **asdict(choice)}
            write_text(path, json.dumps(content, indent=1) + "\n", KeditError)
        except KeditError as error:
            return choice, f"not stored: {error}"
    return choice, f"{problem}stored in {path}"


def _read(
    path: Path | None, digest: str, method: str, view: ModelView, given: Mapping[str, Any]
) -> tuple[Choice | None, str]:
    """The choice in a file; or None, and what is to be said of the file."""
    if path is None or world()[0] or not path.exists():
        return None, ""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format_version") != FORMAT_VERSION or content.pop("identity") != digest:
            raise ValueError("it is of another format or configuration")
        content["hparams"] = parse_values(content["hparams"], str(path))
        content |= {name: tuple(content[name]) for name in ("trials", "notes")}
        choice = Choice(**content)
        make_hparams(method, view.config, given, choice.hparams)
        view.check_layers(choice.hparams["layers"])
        if not (isinstance(choice.toml, str) and choice.trials[choice.best]["efficacy"] is not None):
            raise ValueError("it has no trial")
        return choice, ""
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, MethodError) as error:
        return None, f"{path} was damaged ({error}); "
