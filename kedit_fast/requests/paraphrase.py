"""Other phrasings of a request's fact, from templates of its relation; no model is needed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from kedit_fast.errors import RequestError
from kedit_fast.requests.lint import folded
from kedit_fast.requests.request import EditRequest
from kedit_fast.support.messages import comma_list


@dataclass(frozen=True)
class Paraphrased:
    """Requests with phrasings added."""

    requests: tuple[EditRequest, ...]
    """All requests, in order; those that got no phrasing as they were."""
    added: int
    """Number of phrasings."""
    lacking: dict[int, str]
    """Index -> why a request got fewer phrasings than were asked for, or none."""


def add_paraphrases(
    requests: Sequence[EditRequest], templates: Mapping[str, Sequence[str]], number: int = 2, seed: int = 0
) -> Paraphrased:
    """Add phrasings to `paraphrase_prompts`, drawn from the templates of each request's relation.

    A request says its relation, or its prompt is one of a relation's templates. A phrasing holds the subject, is not
    the prompt, and is none that the request has already. What a request gets depends on it, the templates and the seed,
    not on the other requests.

    Args:
        requests: what to phrase in other words.
        templates: relation -> texts with one {} for the subject; `relations.load_templates` reads them from files.
        number: phrasings that each request gets, where there are so many.
        seed: of the draws.

    Raises:
        RequestError: a number below 1, or no request has a relation of these.

    Example:
        >>> from kedit_fast import EditRequest
        >>> templates = {"P22": ["The father of {} is", "{} was fathered by", "{}'s dad is"]}
        >>> result = add_paraphrases([EditRequest("The father of {} is", "Ada", "Leo")], templates, number=2)
        >>> sorted(result.requests[0].paraphrase_prompts)
        ["Ada's dad is", 'Ada was fathered by']
    """
    if number < 1:
        raise RequestError(f"number = {number}: at least one phrasing must be asked for")
    relations: dict[str, list[str]] = {}  # casefolded template -> relations that have it
    for relation, texts in templates.items():
        for text in dict.fromkeys(map(folded, texts)):
            relations.setdefault(text, []).append(relation)
    result, added, lacking = [], 0, {}
    for index, request in enumerate(requests):
        relation, why = _relation_of(request, templates, relations)
        phrasings = [] if relation is None else _phrasings(request, templates[relation])
        if why == "" and len(phrasings) < number:
            why = (
                f"the relation {relation!r} has only {len(phrasings)} that it has not"
                if phrasings
                else f"it has all phrasings of the relation {relation!r}"
            )
        if why:
            lacking[index] = why
        drawn = random.Random(f"{seed}\n{request.subject}\n{request.prompt}").sample(
            phrasings, min(number, len(phrasings))
        )
        added += len(drawn)
        result.append(replace(request, paraphrase_prompts=(*request.paraphrase_prompts, *drawn)) if drawn else request)
    if requests and not added:
        raise RequestError(
            f"no request got a phrasing; the first: {lacking[0]}. The relations of the templates are "
            f"{_first(templates)}"
        )
    return Paraphrased(tuple(result), added, lacking)


def _first(names: Iterable[str], count: int = 10) -> str:
    names = list(names)
    return comma_list(map(repr, names[:count])) + (f" and {len(names) - count} more" if len(names) > count else "")


def _relation_of(
    request: EditRequest, templates: Mapping[str, Sequence[str]], relations: Mapping[str, Sequence[str]]
) -> tuple[str | None, str]:
    """A request's relation among those of the templates, or why it has none."""
    if request.subject is None:
        return None, f"{request.text!r} has no subject"
    if request.relation is not None and request.relation in templates:
        return request.relation, ""
    named = relations.get(folded(request.prompt), ())
    if len(named) == 1:
        return named[0], ""
    if named:
        return None, f"{request.prompt!r} is a template of several relations, {_first(named)}"
    if request.relation is not None:
        return None, f"its relation is {request.relation!r}"
    return None, f"it says no relation, and {request.prompt!r} is none of the templates"


def _phrasings(request: EditRequest, templates: Iterable[str]) -> list[str]:
    """What templates say of a request's subject, without its prompt and the phrasings that it has."""
    known = {folded(text) for text in (request.text, *request.paraphrase_prompts)}
    phrasings: dict[str, str] = {}
    for template in templates:
        if template.count("{}") == 1:
            text = template.replace("{}", request.subject or "")
            if folded(text) not in known:
                phrasings.setdefault(folded(text), text)
    return list(phrasings.values())
