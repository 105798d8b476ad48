"""The baseline in context: would a prompt have done? The new fact in front of each prompt, and no edit.

The state "context" of an evaluation is the unedited model asked with every request's new fact before its prompts: as
a sentence, as in-context editing (IKE, arXiv:2305.12740) and RippleEdits' baseline do, or as a triple of subject,
relation and object, as structural prompts do. No demonstrations go with it. Questions over several facts (multi-hop
probes) get the facts of their whole group.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from kedit_fast.errors import InvalidArgumentError
from kedit_fast.evaluation.asks import Ask, Distributions, Forced, Generated
from kedit_fast.requests.request import EditRequest
from kedit_fast.requests.spacing import is_unspaced, separator

Context = Callable[[EditRequest, str], str]
"""From a request and a prompt to the prompt with the new fact in front."""
_IDENTIFIER = re.compile(r"[A-Z]\d+\b")


def sentence(request: EditRequest, prompt: str) -> str:
    """A prompt behind the new fact as the edited prompt states it: "The capital of Australia is Melbourne. ..."."""
    between = separator(request.text, request.target_new, request.target_separator)
    fact = (request.text + between + request.target_new).strip()
    last = fact[-1]
    if is_unspaced(last):
        return f"{fact}。{prompt}"
    return f"{fact} {prompt}" if last in ".!?。！？" else f"{fact}. {prompt}"  # noqa: RUF001 - wide marks end sentences


def triple(request: EditRequest, prompt: str) -> str:
    """A prompt behind a line with the new fact as (subject, relation, object).

    The relation is the request's own, or, where it has none or an identifier ("P36"), the words of its prompt.
    """
    relation = request.relation
    if relation is None or _IDENTIFIER.match(relation):
        relation = " ".join(request.prompt.replace("{}", " ").split())
    parts = (request.subject, relation, request.target_new)
    return f"({', '.join(part.strip() for part in parts if part)})\n{prompt}"


CONTEXTS: Mapping[str, Context] = MappingProxyType({"sentence": sentence, "triple": triple})
"""The forms of a fact by name."""


def context_of(form: Context | str | None) -> Context | None:
    """The form itself, or the one of a name; raises InvalidArgumentError for another name."""
    if not isinstance(form, str):
        return form
    if form not in CONTEXTS:
        raise InvalidArgumentError(f"context {form!r}: choose {', '.join(CONTEXTS)}, or give a function")
    return CONTEXTS[form]


def asked_in_context(ask: Ask, facts: Sequence[EditRequest], context: Context, tokenizer: Any) -> Ask | None:
    """An ask with facts in front, the first one foremost; None where it has no prompt that could stay the same.

    Of texts that count their prompts' tokens, the facts do not take any. What a text's likelihood, or distributions at
    all of its positions, would be with other tokens in front is another question.
    """
    if not isinstance(ask, Forced | Generated) and not (isinstance(ask, Distributions) and (ask.last or ask.answer)):
        return None
    plain = ask.text if isinstance(ask, Distributions) else ask.prompt
    prompt = plain
    for request in reversed(facts):
        prompt = context(request, prompt)
    if isinstance(ask, Distributions):
        return replace(ask, text=prompt)
    if isinstance(ask, Generated) and ask.total:
        counts = [len(tokenizer(text)["input_ids"]) for text in (prompt, plain)]
        return replace(ask, prompt=prompt, tokens=ask.tokens + counts[0] - counts[1])
    return replace(ask, prompt=prompt)
