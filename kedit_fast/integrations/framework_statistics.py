"""Statistics where a framework keeps them: found there, or computed from a text and kept there for the next call.

The folder is `{stats_dir}/{model}/{mom2_dataset}_stats`, the files are npz in the framework's own layout, which reads
them as its own; `mom2_n_samples` and `mom2_dtype` stand in their names and choose among several. A text is what
`statistics_text` names, else the data set that `mom2_dataset` names, where the datasets library has it on this machine.
What is computed here says in its file which text it is of.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kedit_fast.errors import MethodError, StatisticsError
from kedit_fast.models.view import ModelView
from kedit_fast.statistics import memit_npz
from kedit_fast.statistics.collect import Statistics, collect_statistics
from kedit_fast.statistics.sources import DATASETS, open_texts
from kedit_fast.statistics.store import load_statistics, metadata_of, path_of
from kedit_fast.support import process_group

Text = str | os.PathLike | Sequence[str]
ENVIRONMENT = "KEDIT_FAST_STATISTICS_TEXT"
PRECISIONS = ("float16", "float32", "float64")
SEED = 1  # of the frameworks' sample of documents
# What the frameworks load for their `mom2_dataset`.
_DATA_SETS = {
    "wikipedia": ("wikimedia/wikipedia:20231101.en", "wikipedia:20200501.en"),
    "wikitext": ("Salesforce/wikitext:wikitext-103-raw-v1", "wikitext:wikitext-103-raw-v1"),
    "wikitext2": ("Salesforce/wikitext:wikitext-2-raw-v1", "wikitext:wikitext-2-raw-v1"),
}
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
) -> Statistics:
    """Statistics of layers, found where a framework keeps them or in a folder of ours; else computed and kept there.

    Args:
        model: its edits do not matter for what is found; what is computed is of the model as it is.
        tokenizer: its tokenizer.
        layers: zero-based.
        raw: a framework's hyper-parameters: mom2_dataset, mom2_n_samples, mom2_dtype, model_name, stats_dir.
        stats_dir: instead of that of `raw`.
        text: a file or `datasets:` name for `open_texts`, or documents; None for the environment's, or the data set's.
        whole_name: a new folder is named by the whole path of the model with "_" for "/" (memit), not its last part.

    Raises:
        StatisticsError: there are none and no text is known; several files and none is the one asked for; a file of
            another model or text. Nothing is written then.
    """
    view = ModelView(model)
    samples, precision = asked_of(raw)
    root = Path(stats_dir or raw.get("stats_dir") or "data/stats")
    places = _places(root, model, raw, whole_name)
    text = text or os.environ.get(ENVIRONMENT) or None
    modules = {layer: view.module_name(layer) for layer in layers}

    def there(place: Path, exact: bool) -> list[int]:
        return [layer for layer, module in modules.items() if _has(place, module, samples, precision, exact)]

    def read(place: Path) -> Statistics:
        found = load_statistics(place, model, tokenizer, layers, trust=True, samples=samples, precision=precision)
        _check_source(place, modules, samples, precision, text)
        return found

    for place in (*places, root):
        if len(there(place, exact=True)) == len(modules):
            return read(place)
    documents, source = _documents(text, raw)
    if documents is None:
        for place in (*places, root):
            if there(place, exact=False):
                found = read(place)
                _log.warning("%s has no statistics of %s: those that are there are used", place, _named(raw))
                return found
        raise StatisticsError(_nothing(layers, (*places, root), root))
    place = places[0]
    missing = {layer: module for layer, module in modules.items() if layer not in there(place, exact=True)}
    for layer in modules.keys() - missing.keys():
        if _source_of(place, modules[layer], samples, precision) != source:
            raise StatisticsError(
                f"{place} has statistics of layer {layer} that were not made from {source}, and none of "
                f"{', '.join(map(str, missing))}: all must be of one text; move them away, or collect the others"
            )
    _check_writable(place)
    _log.warning(
        "statistics of layers %s are computed from %s (once; they are kept in %s)",
        ", ".join(map(str, missing)), source, place,
    )  # fmt: skip
    seed = SEED if isinstance(documents, Sequence) else None
    new = collect_statistics(model, tokenizer, documents, tuple(missing), max_samples=samples, seed=seed)
    precision = precision or "float32"
    for second in new.layers.values():
        memit_npz.sum_in(second, precision)  # all of them fit, or none is written
    if process_group.world()[0] == 0:
        for layer, module in missing.items():
            name = memit_npz.path_of("", "", "", module, samples, precision).name
            memit_npz.write(
                place / name, new.layers[layer], {**metadata_of(new, layer), _SOURCE: source}, samples, precision
            )
    process_group.wait_for_all()
    return read(place)  # as the next call will find them


def _check_writable(place: Path) -> None:
    """Raise StatisticsError, before hours of work, where a folder cannot be made or written."""
    nearest = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise StatisticsError(f"cannot keep statistics in {place}: {nearest} is no folder that can be written")


def asked_of(raw: Mapping[str, Any]) -> tuple[int | None, str | None]:
    """`mom2_n_samples` and `mom2_dtype`; None for what is not given."""
    samples, precision = raw.get("mom2_n_samples"), raw.get("mom2_dtype")
    if samples is not None:
        whole = isinstance(samples, int | float) and not isinstance(samples, bool) and samples == int(samples)
        if not whole or samples < 1:
            raise MethodError(f"mom2_n_samples = {samples!r} is not a number of documents")
        samples = int(samples)
    if precision is not None and precision not in PRECISIONS:
        raise MethodError(f"mom2_dtype = {precision!r}: choose from {', '.join(PRECISIONS)}")
    return samples, precision


def _places(root: Path, model: torch.nn.Module, raw: Mapping[str, Any], whole_name: bool) -> list[Path]:
    """Where frameworks keep statistics of a model, the place for new ones first."""
    names = []
    for name in (getattr(model.config, "_name_or_path", ""), raw.get("model_name", "")):
        name = name if isinstance(name, str) else ""  # BaseEditor also takes (model, tokenizer) there
        both = [name.rstrip("/").rsplit("/")[-1], name.replace("/", "_")]
        names += reversed(both) if whole_name else both
    folder = f"{raw.get('mom2_dataset') or 'wikipedia'}_stats"
    return [root / name / folder for name in dict.fromkeys(names) if name] or [root / folder]


def _has(place: Path, module: str, samples: int | None, precision: str | None, exact: bool) -> bool:
    if path_of(place, module).exists():
        return True
    found = [path for path in place.glob("*.npz") if memit_npz.module_of(path) == module]
    return bool(found) and (not exact or any(memit_npz.is_named(path, samples, precision) for path in found))


def _source_of(place: Path, module: str, samples: int | None, precision: str | None) -> str | None:
    """The text that a file in the framework's layout was made from, if it was here."""
    path = None if path_of(place, module).exists() else memit_npz.find(place, module, samples, precision)
    return None if path is None else memit_npz.metadata_in(path).get(_SOURCE)


def _check_source(
    place: Path, modules: Mapping[int, str], samples: int | None, precision: str | None, text: Text | None
) -> None:
    """Raise StatisticsError where a text is named and the files were made here from another one."""
    wanted = None if text is None else _label(text)
    for module in modules.values() if wanted is not None else ():
        source = _source_of(place, module, samples, precision)
        if source not in (None, wanted):
            raise StatisticsError(
                f"the statistics of {module} in {place} were computed from {source}, statistics_text is {wanted}: "
                "remove them, or name another stats_dir"
            )


def _documents(text: Text | None, raw: Mapping[str, Any]) -> tuple[Sequence[str] | None, str]:
    """The documents that are configured, and what they are called; None where there are none."""
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


def _named(raw: Mapping[str, Any]) -> str:
    asked = {name: raw[name] for name in ("mom2_n_samples", "mom2_dtype") if raw.get(name) is not None}
    return " and ".join(f"{name} = {value}" for name, value in asked.items())


def _nothing(layers: Sequence[int], places: Sequence[Path], root: Path) -> str:
    span = ",".join(map(str, layers))
    return (
        f"no statistics for layers {', '.join(map(str, layers))} in {', '.join(map(str, places))}: name a text to "
        f"compute them from (statistics_text, or {ENVIRONMENT}), collect them with `kedit-fast stats MODEL --text FILE "
        f"--layers {span} --out {root}`, or pass statistics="
    )
