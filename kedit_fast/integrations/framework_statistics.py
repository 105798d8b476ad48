"""Statistics in a framework's own folder: read from there, or computed from a text and stored there for the next call.

The folder is `{stats_dir}/{model}/{mom2_dataset}_stats`. Its files are npz in the framework's own layout, so the
framework can read what is stored here. `mom2_n_samples` and `mom2_dtype` are part of a file's name, and choose among
several files.

The text is the one that `statistics_text` names; else the data set that `mom2_dataset` names, if the datasets library
has it on this machine. A file that is computed here records which text it was made from.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kedit_fast.errors import MethodError, StatisticsError
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.view import ModelView
from kedit_fast.statistics import memit_npz
from kedit_fast.statistics.collect import Statistics, collect_statistics
from kedit_fast.statistics.sources import DATASETS, open_texts
from kedit_fast.statistics.store import load_statistics, metadata_of, path_of
from kedit_fast.support import process_group
from kedit_fast.support.messages import comma_list

Text = str | os.PathLike | Sequence[str]
ENVIRONMENT = "KEDIT_FAST_STATISTICS_TEXT"
PRECISIONS = ("float16", "float32", "float64")
SEED = 1
"""Of the sample of documents, as in the frameworks."""
_DATA_SETS = {
    "wikipedia": ("wikimedia/wikipedia:20231101.en", "wikipedia:20200501.en"),
    "wikitext": ("Salesforce/wikitext:wikitext-103-raw-v1", "wikitext:wikitext-103-raw-v1"),
    "wikitext2": ("Salesforce/wikitext:wikitext-2-raw-v1", "wikitext:wikitext-2-raw-v1"),
}
"""`mom2_dataset` -> what the frameworks load for it, newest first."""
_SOURCE = "statistics_text"  # in a file's metadata
_log = logging.getLogger("kedit_fast")


def framework_statistics(
    model: torch.nn.Module,
    tokenizer: Any,
    layers: Sequence[int],
    raw: Mapping[str, Any],
    stats_dir: str | os.PathLike | None = None,
    text: Text | None = None,
    whole_name: bool = False,
    spec: ArchSpec | None = None,
) -> Statistics:
    """Statistics of layers from a framework's folder or one of ours; missing ones are computed and stored.

    Args:
        model: with or without edits for stored statistics; new ones are computed on the model as it is.
        tokenizer: its tokenizer.
        layers: zero-based.
        raw: a framework's hyper-parameters: mom2_dataset, mom2_n_samples, mom2_dtype, model_name, stats_dir.
        stats_dir: instead of that of `raw`.
        text: a file or `datasets:` name for `open_texts`, or documents. None: what the environment variable
            KEDIT_FAST_STATISTICS_TEXT names, or the data set of `raw`.
        whole_name: a new folder is named by the whole path of the model with "_" for "/" (memit), not its last part.
        spec: an ArchSpec for an architecture that is not known.

    Raises:
        StatisticsError: there are no statistics, and no text to compute them from; several files match; or a file is of
            another model or text. Nothing is written then.
    """
    view = ModelView(model, spec)
    samples, precision = requested_sample(raw)
    root = Path(stats_dir or raw.get("stats_dir") or "data/stats")
    folders = _folders(root, model, raw, whole_name)
    text = text or os.environ.get(ENVIRONMENT) or None
    modules = {layer: view.module_name(layer) for layer in layers}

    def available(folder: Path, exact: bool) -> list[int]:
        return [layer for layer, module in modules.items() if _has(folder, module, samples, precision, exact)]

    def read(folder: Path) -> Statistics:
        statistics = load_statistics(
            folder, model, tokenizer, layers, trust=True, samples=samples, precision=precision, spec=spec
        )
        _check_source(folder, modules, samples, precision, text)
        return statistics

    for folder in (*folders, root):
        if len(available(folder, exact=True)) == len(modules):
            return read(folder)
    documents, source = _documents(text, raw)
    if documents is None:
        for folder in (*folders, root):
            if available(folder, exact=False):
                statistics = read(folder)
                _log.warning("%s has no statistics of %s: those that are there are used", folder, _describe_sample(raw))
                return statistics
        raise StatisticsError(_nothing_there(layers, (*folders, root), root))
    folder = folders[0]
    missing = {layer: module for layer, module in modules.items() if layer not in available(folder, exact=True)}
    for layer in modules.keys() - missing.keys():
        if _source_of(folder, modules[layer], samples, precision) != source:
            raise StatisticsError(
                f"{folder} has statistics of layer {layer} that were not made from {source}, and none of "
                f"{comma_list(missing)}: all must be of one text; move them away, or collect the others"
            )
    if of_experts := [layer for layer in missing if view.experts(layer) is not None]:
        raise StatisticsError(
            f"layers {comma_list(of_experts)} are mixtures of experts, whose second moments do not fit into the npz "
            f"files of memit: collect them with `kedit-fast stats` into {root}"
        )
    _check_writable(folder)
    _log.warning(
        "statistics of layers %s are computed from %s (once; they are kept in %s)", comma_list(missing), source, folder
    )
    seed = SEED if isinstance(documents, Sequence) else None
    new = collect_statistics(model, tokenizer, documents, tuple(missing), max_samples=samples, seed=seed, spec=spec)
    precision = precision or "float32"
    for second in new.layers.values():
        memit_npz.sum_in(second, precision)  # raises where a sum does not fit, before any file is written
    if process_group.world()[0] == 0:
        for layer, module in missing.items():
            name = memit_npz.path_of("", "", "", module, samples, precision).name
            memit_npz.write(
                folder / name, new.layers[layer], {**metadata_of(new, layer), _SOURCE: source}, samples, precision
            )
    process_group.wait_for_all()
    return read(folder)  # rounded to the file's precision, as the next call will read them


def _check_writable(folder: Path) -> None:
    """Raise StatisticsError, before hours of work, where a folder cannot be made or written."""
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise StatisticsError(f"cannot keep statistics in {folder}: {nearest} is no folder that can be written")


def requested_sample(raw: Mapping[str, Any]) -> tuple[int | None, str | None]:
    """`mom2_n_samples` and `mom2_dtype`; None for what is not given."""
    samples, precision = raw.get("mom2_n_samples"), raw.get("mom2_dtype")
    if samples is not None:
        integral = isinstance(samples, int | float) and not isinstance(samples, bool) and samples == int(samples)
        if not integral or samples < 1:
            raise MethodError(f"mom2_n_samples = {samples!r} is not a number of documents")
        samples = int(samples)
    if precision is not None and precision not in PRECISIONS:
        raise MethodError(f"mom2_dtype = {precision!r}: choose from {', '.join(PRECISIONS)}")
    return samples, precision


def _folders(root: Path, model: torch.nn.Module, raw: Mapping[str, Any], whole_name: bool) -> list[Path]:
    """Where frameworks look for statistics of a model; the folder for new ones first."""
    names = []
    for name in (getattr(model.config, "_name_or_path", ""), raw.get("model_name", "")):
        name = name if isinstance(name, str) else ""  # BaseEditor also accepts (model, tokenizer) as model_name
        both = [name.rstrip("/").rsplit("/")[-1], name.replace("/", "_")]
        names += reversed(both) if whole_name else both
    folder = f"{raw.get('mom2_dataset') or 'wikipedia'}_stats"
    return [root / name / folder for name in dict.fromkeys(names) if name] or [root / folder]


def _has(folder: Path, module: str, samples: int | None, precision: str | None, exact: bool) -> bool:
    """Whether a folder has a file of a module; with `exact`, one of this sample in this precision."""
    if path_of(folder, module).exists():
        return True
    files = [path for path in folder.glob("*.npz") if memit_npz.module_of(path) == module]
    return bool(files) and (not exact or any(memit_npz.is_named(path, samples, precision) for path in files))


def _source_of(folder: Path, module: str, samples: int | None, precision: str | None) -> str | None:
    """The text that a file in the framework's layout was made from; None for files that kedit_fast did not make."""
    path = None if path_of(folder, module).exists() else memit_npz.find(folder, module, samples, precision)
    return None if path is None else memit_npz.metadata_in(path).get(_SOURCE)


def _check_source(
    folder: Path, modules: Mapping[int, str], samples: int | None, precision: str | None, text: Text | None
) -> None:
    """Raise StatisticsError where a text is named and kedit_fast made the files from another one."""
    wanted = None if text is None else _label(text)
    for module in modules.values() if wanted is not None else ():
        source = _source_of(folder, module, samples, precision)
        if source not in (None, wanted):
            raise StatisticsError(
                f"the statistics of {module} in {folder} were computed from {source}, statistics_text is {wanted}: "
                "remove them, or name another stats_dir"
            )


def _documents(text: Text | None, raw: Mapping[str, Any]) -> tuple[Sequence[str] | None, str]:
    """The documents of the configured text and its name; None where no text is configured."""
    if text is not None:
        documents = open_texts(text) if isinstance(text, str | os.PathLike) else text
        return documents, _label(text)
    for name in _DATA_SETS.get(raw.get("mom2_dataset") or "wikipedia", ()):
        try:
            return open_texts(DATASETS + name, local=True), DATASETS + name
        except StatisticsError as error:
            _log.info("%s", error)
    return None, ""


def _label(text: Text) -> str:
    if not isinstance(text, str | os.PathLike):
        return "a list of texts"
    return str(text) if str(text).startswith(DATASETS) else Path(text).name


def _describe_sample(raw: Mapping[str, Any]) -> str:
    requested = {name: raw[name] for name in ("mom2_n_samples", "mom2_dtype") if raw.get(name) is not None}
    return " and ".join(f"{name} = {value}" for name, value in requested.items())


def _nothing_there(layers: Sequence[int], folders: Sequence[Path], root: Path) -> str:
    span = ",".join(map(str, layers))
    return (
        f"no statistics for layers {comma_list(layers)} in {comma_list(folders)}: name a text to "
        f"compute them from (statistics_text, or {ENVIRONMENT}), collect them with `kedit-fast stats MODEL --text FILE "
        f"--layers {span} --out {root}`, or pass statistics="
    )
