"""Knowledge conflicts: a passage in the prompt says something else than the model has learned; which of the two wins?

Passages are a statement of the fact with another answer, in front of its prompt. The other answers (substitutes, as in
arXiv 2109.05052) come from the request file: the old answer, an alias, another answer of the same relation, an answer
of another relation. Probes of kind "conflict" bring passages of their own: the prompt with its passage, and what that
says.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AnySet
from typing import Any, TypeVar

from kedit_fast.evaluation.asks import Ask, Generated, GeneratedAnswer
from kedit_fast.evaluation.catalog.counterfact import Answers, forced, forced_answers, probes_of
from kedit_fast.evaluation.metric import Better, Case, Metric, Prompts, Scoring, request_of
from kedit_fast.evaluation.words import contains
from kedit_fast.requests.request import EditRequest
from kedit_fast.requests.spacing import separator

T = TypeVar("T")
ANSWER_TOKENS = 16
"""New tokens in which a model has to say the one or the other."""
STOPS = ("\n",)


def passage(request: EditRequest, answer: str) -> str:
    """The request's prompt behind a statement that `answer` continues it."""
    text = request.text
    said = text + separator(text, answer, request.target_separator) + answer
    mark = "" if said.rstrip()[-1:] in ".!?。" else "."
    return f"{said.rstrip()}{mark}\n{text}"


def names(request: EditRequest, old: bool = False) -> tuple[str, ...]:
    """The target and its aliases; of `old`, those of the answer before."""
    target, aliases = (
        (request.target_true, request.true_aliases) if old else (request.target_new, request.target_aliases)
    )
    return () if target is None else (target, *aliases)


def _apart(one: str, other: str) -> bool:
    """Whether neither answer contains the other, so that a text can be told to hold one of them."""
    return not contains(one, (other,)) and not contains(other, (one,))


def _relation(request: EditRequest) -> str:
    return request.prompt if request.relation is None else request.relation


def _old_answer(requests: Sequence[EditRequest]) -> list[str | None]:
    return [request.target_true for request in requests]


def _alias(requests: Sequence[EditRequest]) -> list[str | None]:
    return [
        next((one for one in request.target_aliases if _apart(one, request.target_new)), None) for request in requests
    ]


def _pools(requests: Sequence[EditRequest]) -> Mapping[str, list[str]]:
    """The answers of each relation, in the order of the file."""
    pools: dict[str, dict[str, None]] = defaultdict(dict)
    for request in requests:
        pools[_relation(request)].update(dict.fromkeys((*names(request)[:1], *names(request, old=True)[:1])))
    return {relation: list(answers) for relation, answers in pools.items()}


def _drawn(request: EditRequest, pool: Sequence[str], without: AnySet[str] = frozenset()) -> str | None:
    """An answer of a pool that is none of the request's, drawn by the request's text; None if there is none."""
    taken = (*names(request), *names(request, old=True))
    for answer in _from_a_place(pool, request.text):
        if answer not in without and all(_apart(answer, one) for one in taken):
            return answer
    return None


def _from_a_place(items: Sequence[T], seed: str) -> Iterator[T]:
    """All items in their order, from one on that a seed draws."""
    start = random.Random(seed).randrange(len(items)) if items else 0
    yield from (items[(start + step) % len(items)] for step in range(len(items)))


def _same_type(requests: Sequence[EditRequest]) -> list[str | None]:
    pools = _pools(requests)
    return [_drawn(request, pools[_relation(request)]) for request in requests]


def _other_type(requests: Sequence[EditRequest]) -> list[str | None]:
    pools = _pools(requests)
    sets = {relation: frozenset(pool) for relation, pool in pools.items()}
    relations = list(pools)

    def drawn(request: EditRequest) -> Iterator[str | None]:
        relation = _relation(request)
        for other in _from_a_place(relations, request.text):
            if other != relation:
                yield _drawn(request, pools[other], without=sets[relation])

    return [next((answer for answer in drawn(request) if answer is not None), None) for request in requests]


def _against_edit(substitutes: Callable[[Sequence[EditRequest]], list[str | None]]) -> Prompts:
    """Passages that contradict the edit: `new` is what it wrote, `true` what the passage says."""

    def cases(requests: Sequence[EditRequest]) -> list[tuple[Case, ...]]:
        return [
            ()
            if answer is None or not _apart(answer, request.target_new)
            else (Case(passage(request, answer), request.target_new, answer, record=request),)
            for request, answer in zip(requests, substitutes(requests), strict=True)
        ]

    return Prompts("requests", cases, beside=True)


def probed(request: EditRequest) -> tuple[Case, ...]:
    """The passages that the request's conflict probes have."""
    return tuple(
        Case(question.prompt, request.target_new, question.answers[0][0], name=probe.name, record=request)
        for probe in probes_of(request, "conflict")
        for question in probe.questions
        if question.answers and _apart(question.answers[0][0], request.target_new)
    )


def for_edit(request: EditRequest) -> tuple[Case, ...]:
    """The other way round, a passage that says what the edit wrote: `new` is the old answer, `true` the edit's."""
    old, new = request.target_true, request.target_new
    return () if old is None or not _apart(old, new) else (Case(passage(request, new), old, new, record=request),)


PROMPTS = {
    "passage, old answer": _against_edit(_old_answer),
    "passage, alias": _against_edit(_alias),
    "passage, same type": _against_edit(_same_type),
    "passage, other type": _against_edit(_other_type),
    "passage, probe": Prompts("requests", probed),
    "passage, reverse": Prompts("requests", for_edit),
}


def _both(case: Case) -> tuple[str, str]:
    """What the model should have learned, and what the passage says."""
    assert case.new is not None and case.true is not None
    return case.new, case.true


def _said(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    text = request_of(case).text
    return Generated(case.prompt, ANSWER_TOKENS, stops=STOPS), Generated(text, ANSWER_TOKENS, stops=STOPS)


def _texts(answers: Answers) -> tuple[str, str]:
    behind, plain = answers["now"]
    assert isinstance(behind, GeneratedAnswer) and isinstance(plain, GeneratedAnswer)
    return behind.text, plain.text


def _learned_is_said(case: Case, answers: Answers) -> float | None:
    behind, plain = _texts(answers)
    learned, passed = (contains(behind, (answer,)) for answer in _both(case))
    if not contains(plain, _both(case)[:1]) or not (learned or passed):
        return None
    return 0.5 if learned and passed else float(learned)


def _times_counted(case: Case, answers: Answers) -> float:
    """A text that says both counts as one of each."""
    behind, _ = _texts(answers)
    return float(sum(contains(behind, (answer,)) for answer in _both(case)))


def _compared(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    text = request_of(case).text
    return tuple(forced(case, answer, prompt) for prompt in (case.prompt, text) for answer in _both(case))


def _learned_is_preferred(case: Case, answers: Answers) -> float | None:
    behind_learned, behind_passed, plain_learned, plain_passed = forced_answers(answers)
    if not plain_learned.nll < plain_passed.nll:
        return None
    return float(behind_learned.nll < behind_passed.nll)


SCORINGS = {
    "kc.M_R": Scoring(_said, _learned_is_said, weight=_times_counted),
    "kc.M_R.choice": Scoring(_compared, _learned_is_preferred),
}

_SOURCE = "arXiv 2109.05052 (M_R); its code (ml-knowledge-conflicts src/substitution_fns.py) draws substitutes alone"


_AGAINST_EDIT = (
    "the new target against a passage with the old answer (old_answer), an alias (alias), another answer of the same "
    "relation (same_type) or of another one (other_type), or with what a conflict probe says (probe)"
)


def _metrics(name: str, better: Better = "higher", sides: str = _AGAINST_EDIT) -> tuple[Metric, ...]:
    prompts = f"passage, {name.replace('_', ' ')}"
    return (
        Metric(
            id=f"kc.M_R/{name}",
            prompts=prompts,
            scoring="kc.M_R",
            definition="p_o / (p_o + p_s), the shares of answers that contain what was learned and what a passage says "
            f"({ANSWER_TOKENS} tokens, greedy), among prompts that bring the former without a passage; {sides}.",
            source=_SOURCE,
            unit="prompt",
            scale=100.0,
            better=better,
        ),
        Metric(
            id=f"kc.M_R.choice/{name}",
            prompts=prompts,
            scoring="kc.M_R.choice",
            definition="Share of prompts at which what was learned has a lower NLL than what a passage says, among "
            f"those at which it has without the passage; {sides}.",
            source="defined here, after arXiv 2109.05052",
            unit="prompt",
            scale=100.0,
            better=better,
        ),
    )


METRICS = (
    *_metrics("old_answer"),
    *_metrics("alias", better=""),
    *_metrics("same_type"),
    *_metrics("other_type"),
    *_metrics("probe"),
    *_metrics("reverse", better="", sides="the old answer against a passage with the new target"),
)
