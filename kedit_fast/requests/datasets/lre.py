"""Relations of LRE (linear relational embeddings): true facts, of which counterfactual requests are drawn."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kedit_fast.errors import RequestError
from kedit_fast.requests.datasets.dataset import DataSet, Fault, list_of, object_of, stray_spaces, text_of
from kedit_fast.requests.records import SPACES, Options, read_flat
from kedit_fast.requests.request import EditRequest, shorten

NEIGHBORS = 10
"""At most so many neighborhood prompts are drawn for a request, as CounterFact has."""
_ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})")
_SAMPLE, _RELATION = "sample", "relation"  # the names of a part of a file


@dataclass(frozen=True)
class _Relation:
    """What the samples of a relation share."""

    name: str
    templates: tuple[str, ...]
    """Prompts with {}, the first of which is edited."""
    objects: Mapping[str, tuple[str, ...]]
    """Subject -> its objects, in the order of the file."""
    subjects: Mapping[str, tuple[str, ...]]
    """Object -> the subjects that have it."""
    first: Mapping[str, int]
    """Subject -> the index of its first sample."""


def _split(record: Mapping[str, Any], where: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The samples of a relation; each with its index and what they share."""
    name = text_of(record, "name", where) if "name" in record else ""
    templates = _templates(record, where)
    samples = list_of(record["samples"], "samples", where)
    if not samples:
        raise RequestError(f"{where}: samples is empty")
    objects: dict[str, tuple[str, ...]] = {}
    subjects: dict[str, tuple[str, ...]] = {}
    first: dict[str, int] = {}
    for index, sample in enumerate(samples):
        if not isinstance(sample, Mapping):
            continue  # named when it is read
        subject, target = _decoded(sample.get("subject")), _decoded(sample.get("object"))
        if subject and target and target not in objects.get(subject, ()):
            objects[subject] = (*objects.get(subject, ()), target)
            subjects[target] = (*subjects.get(target, ()), subject)
            first.setdefault(subject, index)
    relation = _Relation(name, templates, objects, subjects, first)
    return [
        (f"{where}, sample {number}", {_SAMPLE: sample, "index": number - 1, _RELATION: relation})
        for number, sample in enumerate(samples, 1)
    ]


def _templates(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """All templates of a relation, each once; those for few shots first."""
    templates: dict[str, None] = {}
    for name in ("prompt_templates", "prompt_templates_zs"):
        for template in list_of(record.get(name), name, where):
            if not isinstance(template, str) or template.count("{}") != 1:
                raise RequestError(f"{where}: {name} must hold texts with one {{}} each; got {shorten(template)}")
            templates[template] = None
    if not templates:
        raise RequestError(f"{where}: prompt_templates is empty")
    return tuple(templates)


def _decoded(value: Any) -> str:
    """A text without spaces around it, and with its \\uXXXX as characters; "" for anything else."""
    return _ESCAPED.sub(lambda match: chr(int(match[1], 16)), value).strip(SPACES) if isinstance(value, str) else ""


def _read(record: Mapping[str, Any], where: str, options: Options) -> list[EditRequest]:
    sample = object_of(record[_SAMPLE], "the sample", where)
    subject, true = (_decoded(text_of(sample, name, where)) for name in ("subject", "object"))
    relation: _Relation = record[_RELATION]
    if relation.first[subject] != record["index"]:  # its objects belong to the subject's first sample
        return []
    own_objects = relation.objects[subject]
    true_objects = {text.casefold() for text in own_objects}
    others = [text for text in relation.subjects if text.casefold() not in true_objects]
    if not others:
        raise RequestError(f"{where}: the relation has no object beside those of {subject!r}: none can be drawn")
    generator = random.Random(f"{options.seed}/{relation.name}/{subject}")
    target = generator.choice(sorted(others))
    near = [one for one in relation.subjects[true] if one != subject and target not in relation.objects[one]]
    near = generator.sample(near, min(NEIGHBORS, len(near)))
    prompt, *paraphrases = relation.templates
    flat = {"prompt": prompt, "subject": subject, "target_new": target, "target_true": true}
    request = read_flat(
        [flat],
        where,
        options,
        true_aliases=own_objects[1:],
        relation=relation.name or None,
        paraphrase_prompts=[template.replace("{}", subject) for template in paraphrases],
        neighborhood_prompts=[prompt.replace("{}", one) for one in near],
    )
    return [request]


def _repeats(record: Mapping[str, Any], requests: Sequence[EditRequest]) -> bool:
    return not requests


def _is_escaped(record: Mapping[str, Any], requests: Sequence[EditRequest]) -> bool:
    return any(isinstance(text, str) and _ESCAPED.search(text) for text in record[_SAMPLE].values())


DATA_SETS = (
    DataSet(
        name="lre",
        title="LRE's relations: prompt_templates and samples; new answers are other objects of the relation, drawn",
        fields=frozenset({"prompt_templates", "samples"}),
        read=_read,
        optional=frozenset({"name", "prompt_templates_zs"}),
        unused=frozenset({"properties"}),
        faults=(
            Fault("a subject that an earlier sample has: its object is one of the true answers of that one", _repeats),
            Fault(r"characters that are written as \uXXXX, which are decoded", _is_escaped),
            Fault(
                "spaces around a text, which are taken away",
                lambda record, _: stray_spaces(record[_SAMPLE], ("subject", "object")),
            ),
        ),
        split=_split,
    ),
)
