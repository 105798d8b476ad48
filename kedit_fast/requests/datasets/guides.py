"""What some data sets need beside their records: names of identifiers, phrasings of relations, reference texts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kedit_fast.errors import RequestError
from kedit_fast.requests.request import describe
from kedit_fast.support.textfiles import parse_json, read_text


def read_labels(source: str | Path | Mapping[str, str] | None) -> dict[str, str]:
    """Identifier -> name, from a mapping or a JSON file of one; empty for None.

    Raises:
        RequestError: the file cannot be read, or a name is no text.
    """
    labels = _mapping(source, "labels")
    for identifier, name in labels.items():
        if not isinstance(name, str) or not name.strip():
            raise RequestError(f"labels: the name of {identifier!r} must be a non-empty text; got {describe(name)}")
    return labels


def read_relation_prompts(source: str | Path | Mapping[str, Sequence[str]] | None) -> dict[str, tuple[str, ...]]:
    """Id of a relation -> prompts with one {}, from a mapping or a JSON file of one; empty for None.

    Raises:
        RequestError: the file cannot be read, or a prompt is no text with one {}.
    """
    prompts: dict[str, tuple[str, ...]] = {}
    for relation, templates in _mapping(source, "relation prompts").items():
        if not isinstance(templates, list | tuple):
            raise RequestError(f"relation prompts of {relation!r} must be a list of texts; got {describe(templates)}")
        for template in templates:
            if not isinstance(template, str) or template.count("{}") != 1:
                raise RequestError(f"relation prompts of {relation!r} must contain {{}} once; got {describe(template)}")
        prompts[relation] = tuple(templates)
    return prompts


def read_snippets(source: str | Path | Sequence[Any] | None) -> dict[tuple[str, str], tuple[tuple[str, str], ...]]:
    """(relation, target), both as identifiers -> (subject, text about it) of each sample; empty for None.

    Args:
        source: `attribute_snippets.json` of CounterFact, or what it holds: a list of objects {relation_id, target_id,
            samples: [{name, text}]}.

    Raises:
        RequestError: the file cannot be read, or holds something else.
    """
    where = "snippets"
    if isinstance(source, str | os.PathLike):
        where = f"snippets of {source}"
        source = parse_json(read_text(source, RequestError), str(source), RequestError)
    if not isinstance(source, list | tuple | type(None)):
        raise RequestError(f"{where} must be a list of objects; got {describe(source)}")
    snippets: dict[tuple[str, str], tuple[tuple[str, str], ...]] = {}
    for number, entry in enumerate(source or (), 1):
        try:
            key = str(entry["relation_id"]), str(entry["target_id"])
            samples = tuple((str(sample["name"]), str(sample["text"])) for sample in entry["samples"])
        except (TypeError, KeyError):
            raise RequestError(
                f"{where}: entry {number} must have relation_id, target_id, and samples with name and text"
            ) from None
        snippets[key] = snippets.get(key, ()) + tuple(sample for sample in samples if sample[1].strip())
    return snippets


def _mapping(source: Any, meaning: str) -> dict[str, Any]:
    where = meaning
    if isinstance(source, str | os.PathLike):
        where = f"{meaning} of {source}"
        source = parse_json(read_text(source, RequestError), str(source), RequestError)
    if source is not None and not isinstance(source, Mapping):
        raise RequestError(f"{where} must be an object; got {describe(source)}")
    return dict(source or {})
